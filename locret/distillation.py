"""Train retaining heads in one forward of the frozen backbone (paper section 3.2).

The backbone reads prompt + answer once. In every layer the answer's queries and the prompt's keys
give the labels, [Q, K, V] of the prompt gives the predictions, and the layer's loss and its
gradients are taken on the spot: nothing of a layer is kept after its loss.

B batch (1), H KV heads, P prompt tokens.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locret import losses
from locret.attention import LayerCall, attend
from locret.backbone import Backbone
from locret.heads import RetainingHead, RetainingHeads
from locret.policies.base import flatten_qkv
from locret.targets import LABELS

PromptKeys = Literal["rotated", "unrotated"]


@dataclass
class Distilled:
    """What one sample gave.

    Attributes:
        loss: scalar; its backward gives the heads their gradients.
        regression: scalar, mean over layers, heads and tokens.
        smoothness: scalar, summed over layers, before weighting.
        predictions, targets: a [B, H, P] tensor for each layer, detached, if asked for.
    """

    loss: Tensor
    regression: Tensor
    smoothness: Tensor
    predictions: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)


class Distillation:
    """Loss of retaining heads on prompt + answer sequences.

    Args:
        backbone: frozen; its parameters get no gradients and keep their mode.
        heads: what is trained.
        label: a name of `locret.targets.LABELS`.
        alpha: weight of the smoothness loss (paper: 0.0025).
        keep_scores: also return predictions and targets of every layer.
        prompt_keys: "rotated" as they should be; "unrotated" is how the released Phi-3 recipe lets
            the answer meet the prompt's keys when it takes its labels. It reproduces those labels,
            and is of no other use.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        label: str = "max_logit",
        alpha: float = 0.0025,
        keep_scores: bool = False,
        prompt_keys: PromptKeys = "rotated",
    ) -> None:
        if prompt_keys not in get_args(PromptKeys):
            raise ValueError(f"prompt_keys is {prompt_keys!r}; expected 'rotated' or 'unrotated'")
        if label not in LABELS:
            raise ValueError(f"label {label!r} is unknown; expected one of {sorted(LABELS)}")
        differences = heads.config.differences(backbone.geometry)
        if differences:
            raise ValueError(f"heads do not fit the backbone: {'; '.join(differences)}")
        self.backbone = backbone
        self.heads = heads
        self.label = LABELS[label]
        self.alpha = alpha
        self.keep_scores = keep_scores
        self.prompt_keys = prompt_keys

    def __call__(self, input_ids: Tensor, prompt_length: int) -> Distilled:
        """One sample.

        Args:
            input_ids: [B, n] long, prompt then answer.
            prompt_length: P; 0 < P < n.

        Raises:
            ValueError: no prompt or no answer.
        """
        length = input_ids.shape[1]
        if not 0 < prompt_length < length:
            raise ValueError(
                f"prompt_length is {prompt_length} of {length} tokens; both a prompt and an answer "
                "are needed"
            )
        sample = _SampleLoss(self, prompt_length, length)
        with torch.no_grad(), self.backbone.attached(sample.layer):
            self.backbone.decoder(input_ids=input_ids, use_cache=False)
        return sample.result()


class _SampleLoss:
    """Collects the losses and gradients of one sample, layer by layer."""

    def __init__(self, distillation: Distillation, prompt_length: int, length: int) -> None:
        self.of = distillation
        self.prompt_length = prompt_length
        self.length = length
        self.backend = distillation.backbone.backend  # asked before attaching, which hides it
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.regression: list[Tensor] = []
        self.smoothness: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.targets: list[Tensor] = []

    def layer(self, call: LayerCall) -> Tensor:
        """The layer function: a layer's loss on the way, and its plain causal attention."""
        prompt, backend = self.prompt_length, self.backend
        query = call.rotate(call.query, 0, self.length)
        key = call.rotate(call.key, 0, self.length)
        seen_by_answer = key
        if self.of.prompt_keys == "unrotated":
            seen_by_answer = torch.cat([call.key[:, :, :prompt], key[:, :, prompt:]], dim=2)
        answer = query[:, :, prompt:]
        targets = self.of.label(answer, seen_by_answer[:, :, :prompt], call.scaling)
        features = flatten_qkv(*(x[:, :, :prompt] for x in (call.query, call.key, call.value)))
        self._learn(self.of.heads[call.layer_idx], features, targets)
        if seen_by_answer is key:
            return attend(query, key, call.value, call.scaling, backend)
        read_query, read_key, read_value = (x[:, :, :prompt] for x in (query, key, call.value))
        read = attend(read_query, read_key, read_value, call.scaling, backend)
        said = attend(answer, seen_by_answer, call.value, call.scaling, backend)
        return torch.cat([read, said], dim=1)

    def _learn(self, head: RetainingHead, features: Tensor, targets: Tensor) -> None:
        layers = len(self.of.heads.layers)
        with torch.set_grad_enabled(self.of.heads.training):
            predictions = head(features).float()
            regression = losses.regression(predictions, targets)
            smoothness = losses.smoothness(predictions)
            loss = regression / layers + self.of.alpha * smoothness
        parameters = [p for p in head.parameters() if p.requires_grad]
        if loss.requires_grad:
            taken = torch.autograd.grad(loss, parameters)
            self.gradients.update(zip(parameters, taken, strict=True))
        self.regression.append(regression.detach())
        self.smoothness.append(smoothness.detach())
        if self.of.keep_scores:
            self.predictions.append(predictions.detach())
            self.targets.append(targets)

    def result(self) -> Distilled:
        regression = _stacked(self.regression).mean()
        smoothness = _stacked(self.smoothness).sum()
        loss = regression + self.of.alpha * smoothness
        if self.gradients:
            parameters = list(self.gradients)
            loss = _WithGradients.apply(loss, *parameters, *self.gradients.values())
        return Distilled(loss, regression, smoothness, self.predictions, self.targets)


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values])


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already.

    Each layer's gradients are taken while its tensors live. Handing them over in backward leaves
    the outer loop as everyone knows it: one loss, scaled, accumulated and clipped by the trainer.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters_and_gradients: Tensor) -> Tensor:
        half = len(parameters_and_gradients) // 2
        ctx.gradients = parameters_and_gradients[half:]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        scaled = [scale.to(gradient.device) * gradient for gradient in ctx.gradients]
        return None, *scaled, *([None] * len(scaled))
