"""Train retaining heads in one forward of the frozen backbone (paper section 3.2).

The backbone reads prompt + answer once. In every layer the answer's queries and the prompt's keys
give the labels, the prompt's features give the predictions, and the layer's loss and its gradients
are taken on the spot: nothing of a layer is kept after its loss.

Several conversations may stand in one row (`locret.segments`): projections and MLPs run over the
whole row, attention and labels segment by segment, so that no mask is needed and no token sees a
stranger.

B batch (1), H KV heads, P prompt tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locret import losses
from locret.attention import LayerCall
from locret.backbone import Backbone
from locret.backends import attend
from locret.features import FEATURES
from locret.heads import RetainingHead, RetainingHeads
from locret.segments import Segment
from locret.targets import LABELS, AnswerView

PromptKeys = Literal["rotated", "unrotated"]


@dataclass
class Distilled:
    """What one row of samples gave.

    Attributes:
        loss: scalar, mean over samples; its backward gives the heads their gradients.
        regression: scalar, the main loss, mean over layers.
        smoothness: scalar, summed over layers, before weighting.
        predictions, targets: a [B, H, P] tensor for each layer and answer, detached, if asked for;
            those of a layer stand together.
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
        heads: what is trained; their config says what they read and which label they learn.
        alpha: weight of the smoothness loss (paper: 0.0025).
        loss: a name of `locret.losses.LOSSES`.
        keep_scores: also return predictions and targets of every layer.
        prompt_keys: "rotated" as they should be; "unrotated" is how the released Phi-3 recipe lets
            the answer meet the prompt's keys when it takes its labels. It reproduces those labels,
            and is of no other use.

    Raises:
        ValueError: heads that do not fit the backbone, or an unknown label or loss.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        *,
        alpha: float = 0.0025,
        loss: str = "smooth_l1",
        keep_scores: bool = False,
        prompt_keys: PromptKeys = "rotated",
    ) -> None:
        if prompt_keys not in get_args(PromptKeys):
            raise ValueError(f"prompt_keys is {prompt_keys!r}; expected 'rotated' or 'unrotated'")
        differences = heads.config.differences(backbone.geometry)
        if differences:
            raise ValueError(f"heads do not fit the backbone: {'; '.join(differences)}")
        self.backbone = backbone
        self.heads = heads
        self.features = FEATURES[heads.config.tap]
        self.label = _by_name(LABELS, heads.config.label, "label")
        self.loss = _by_name(losses.LOSSES, loss, "loss")
        self.alpha = alpha
        self.keep_scores = keep_scores
        self.prompt_keys = prompt_keys

    def __call__(self, input_ids: Tensor, segments: Sequence[Segment]) -> Distilled:
        """One row of samples.

        Args:
            input_ids: [1, N] long; for one segment also [B, N].
            segments: the samples in the row, in order, without gaps.

        Raises:
            ValueError: segments that do not fill the row.
        """
        ends = [0, *(segment.end for segment in segments)]
        if ends[:-1] != [segment.start for segment in segments] or ends[-1] != input_ids.shape[1]:
            raise ValueError(
                f"segments {list(segments)} do not fill the row of {input_ids.shape[1]} tokens"
            )
        row = _RowLoss(self, segments)
        with torch.no_grad(), self.backbone.attached(row.layer):
            self.backbone.decoder(
                input_ids=input_ids,
                position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
                use_cache=False,
            )
        return row.result()


class _RowLoss:
    """Collects the losses and gradients of one row, layer by layer."""

    def __init__(self, distillation: Distillation, segments: Sequence[Segment]) -> None:
        self.of = distillation
        self.segments = segments
        self.backend = distillation.backbone.backend  # while attached, the model would not tell
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.regression: list[Tensor] = []
        self.smoothness: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.targets: list[Tensor] = []

    def layer(self, call: LayerCall) -> Tensor:
        """The layer function: a layer's loss on the way, and its plain causal attention."""
        outputs, targets = [], []
        lengths = [segment.end - segment.start for segment in self.segments]
        query = call.rotate_packed(call.query, lengths).split(lengths, dim=2)
        key = call.rotate_packed(call.key, lengths).split(lengths, dim=2)
        for i, segment in enumerate(self.segments):
            part = call.part(segment.start, segment.end)
            output, labels = self._read(part, query[i], key[i], segment)
            outputs.append(output)
            targets.append(labels)
        if call.retained_idx is not None:
            self._learn(self.of.heads[call.retained_idx], self.of.features(call), targets)
        return torch.cat(outputs, dim=1)

    def _read(
        self, call: LayerCall, query: Tensor, key: Tensor, segment: Segment
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention output of one segment, rotated already, and the labels of each answer."""
        spans = [(start - segment.start, end - segment.start) for start, end in segment.answers]
        if call.retained_idx is None:
            return self._attend(call, query, key, call.value), []
        if self.of.prompt_keys == "unrotated":
            return self._read_as_released(call, query, key, spans[0][0])
        labels = [
            self.of.label(
                AnswerView(
                    query[:, :, start:end],
                    key[:, :, :end],
                    call.value[:, :, :end],
                    call.scaling,
                    call.output_weight,
                    call.weighting.softcap,
                    call.weighting.sinks,
                )
            )
            for start, end in spans
        ]
        return self._attend(call, query, key, call.value), labels

    def _attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, call.scaling, self.backend, weighting=call.weighting)

    def _read_as_released(
        self, call: LayerCall, query: Tensor, key: Tensor, prompt: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The released Phi-3 label pass: the answer meets the prompt's keys before RoPE."""
        value = call.value
        mixed = torch.cat([call.key[:, :, :prompt], key[:, :, prompt:]], dim=2)
        answer = query[:, :, prompt:]
        labels = self.of.label(AnswerView(answer, mixed, value, call.scaling, call.output_weight))
        read = self._attend(call, *(x[:, :, :prompt] for x in (query, key, value)))
        said = self._attend(call, answer, mixed, value)
        return torch.cat([read, said], dim=1), [labels]

    def _learn(
        self, head: RetainingHead, features: Tensor, targets: Sequence[Sequence[Tensor]]
    ) -> None:
        layers, samples = len(self.of.heads.layers), len(self.segments)
        main, smooth, device = [], [], head.fc1.weight.device  # not always that of the layer
        with torch.set_grad_enabled(self.of.heads.training):
            for segment, labels in zip(self.segments, targets, strict=True):
                read = features[:, segment.start : segment.last_prompt_end].to(device)
                predictions = head(read).float()
                for label in (each.to(device) for each in labels):
                    predicted = predictions[..., : label.shape[-1]]
                    main.append(self.of.loss(predicted, label) / (samples * len(labels)))
                    self._keep(predicted, label)
                smooth.append(losses.smoothness(predictions) / samples)
            regression, smoothness = torch.stack(main).sum(), torch.stack(smooth).sum()
            loss = regression / layers + self.of.alpha * smoothness
        if loss.requires_grad:
            parameters = [p for p in head.parameters() if p.requires_grad]
            taken = torch.autograd.grad(loss, parameters)
            self.gradients.update(zip(parameters, taken, strict=True))
        self.regression.append(regression.detach())
        self.smoothness.append(smoothness.detach())

    def _keep(self, predictions: Tensor, targets: Tensor) -> None:
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


def _by_name(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; expected one of {sorted(table)}")
    return table[name]


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
