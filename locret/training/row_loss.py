"""What one row of samples gives: labels, losses and gradients, layer by layer.

In every layer the answer's queries and the prompt's keys give the labels, the prompt's features
give the predictions, and the layer's loss and its gradients are taken on the spot: nothing of a
layer is kept after its loss. `PackedAttention` is the same row without heads or labels.

B batch (1), H KV heads, G query heads a KV head, T tokens, D head size, P prompt tokens, A answer
tokens.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from locret.heads.heads import RetainingHeads
from locret.heads.kinds import LayerTensors, RetainingHead
from locret.heads.targets import Label, Loss, smoothness
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall
from locret.model.varlen import Text, attend_texts
from locret.training.segments import Segment

PromptKeys = Literal["rotated", "unrotated"]
Share = Callable[[Sequence[Tensor]], Callable[[], None]]
"""Begins to change gradients in place, such as to average them over processes, while the backbone
reads on; they are used after what it returns was called."""

Features = list[list[Tensor]]
"""What heads read of each segment's labelled tokens, [B, P, input width], by layer and segment."""


@dataclass(frozen=True)
class Recipe:
    """How heads learn.

    Attributes:
        heads: what is trained.
        features: what a head reads of a layer's tokens.
        label: label definition.
        loss: main loss, of predictions and labels.
        alpha: weight of the smoothness loss.
        backend: attention of the backbone.
        keep_scores: keep predictions and labels of every layer.
        prompt_keys: how the answer meets the prompt's keys.
    """

    heads: RetainingHeads
    features: Callable[[LayerTensors], Tensor]
    label: Label
    loss: Loss
    alpha: float
    backend: Backend
    keep_scores: bool
    prompt_keys: PromptKeys


@dataclass
class Distilled:
    """What one row of samples gave.

    Attributes:
        loss: scalar, mean over samples; its backward gives the heads their gradients, once.
        regression: scalar, the main loss, mean over layers.
        smoothness: scalar, summed over layers, before weighting.
        predictions, targets: a [B, H, P] tensor for each layer and answer, detached, if asked for;
            those of a layer stand together. A segment with branches has one for all its answers.
    """

    loss: Tensor
    regression: Tensor
    smoothness: Tensor
    predictions: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class RowLoss:
    """Collects the losses and gradients of one row that is read at once.

    Args:
        recipe: how heads learn.
        segments: the samples in the row.
        share: what becomes of each layer's gradients; None leaves them as they are.
        features: what heads read, instead of the row's own features. A layer's are given up once
            its loss is taken.
    """

    recipe: Recipe
    segments: Sequence[Segment]
    share: Share | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        self.ranges = slots_of(self.segments)
        self.shared: list[Callable[[], None]] = []
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.regression: list[Tensor] = []
        self.smoothness: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.targets: list[Tensor] = []

    def reading(self, decoder: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Entered while `decoder` reads the row."""
        return contextlib.nullcontext()

    def layer(self, call: LayerCall) -> Tensor:
        """The layer function: a layer's loss on the way, and its plain causal attention."""
        query, key = (call.rotate_ranges(x, self.ranges) for x in (call.query, call.key))
        if call.retained_idx is not None and self.recipe.prompt_keys == "unrotated":
            return self._layer_as_released(call, query, key)
        if call.retained_idx is not None:
            targets = [self._labels(call, query, key, segment) for segment in self.segments]
            self.learn(call.retained_idx, self.recipe.features(call), targets)
        return _attend_row(call, query, key, self.segments, self.recipe.backend)

    def learn(
        self, retained_idx: int, features: Tensor, targets: Sequence[Sequence[Tensor]]
    ) -> None:
        """Take a layer's loss and its gradients.

        Args:
            retained_idx: the layer, of those that have heads.
            features: [B, T, input width] of the whole row.
            targets: for each segment and each of its answers, labels [B, H, P].
        """
        head, layers = self.recipe.heads[retained_idx], len(self.recipe.heads.layers)
        main, smooth, samples = [], [], len(self.segments)
        device = next(head.parameters()).device  # not always that of the layer
        each = self._read_by_heads(retained_idx, features)
        with torch.set_grad_enabled(self.recipe.heads.training):
            for segment, read, labels in zip(self.segments, each, targets, strict=True):
                predictions = self.predict(head, read.to(device)).float()
                wanted = [label.to(device) for label in _of_trunk(segment, labels)]
                for label in wanted:
                    predicted = predictions[..., : label.shape[-1]]
                    main.append(self.recipe.loss(predicted, label) / (samples * len(wanted)))
                    if self.recipe.keep_scores:
                        self.predictions.append(predicted.detach())
                        self.targets.append(label)
                smooth.append(smoothness(predictions) / samples)
            regression, differences = torch.stack(main).sum(), torch.stack(smooth).sum()
            loss = regression / layers + self.recipe.alpha * differences
        if loss.requires_grad:
            parameters = [p for p in head.parameters() if p.requires_grad]
            taken = [g.contiguous() for g in torch.autograd.grad(loss, parameters)]
            self.gradients.update(zip(parameters, taken, strict=True))
            if self.share is not None:
                self.shared.append(self.share(taken))
        self.regression.append(regression.detach())
        self.smoothness.append(differences.detach())

    def _read_by_heads(self, retained_idx: int, features: Tensor) -> list[Tensor]:
        """What the layer's head reads of each segment, of the row's `features` if it has no
        others."""
        if self.features is None:
            return [features[:, s.start : s.last_prompt_end] for s in self.segments]
        others, self.features[retained_idx] = self.features[retained_idx], []
        return others

    def predict(self, head: RetainingHead, features: Tensor) -> Tensor:
        """Scores [B, H, T] of features [B, T, input width]."""
        return head(features)

    def result(self) -> Distilled:
        """Of the whole row, once every layer has been read."""
        regression = _stacked(self.regression).mean()
        smoothness = _stacked(self.smoothness).sum()
        loss = regression + self.recipe.alpha * smoothness
        for finish in self.shared:
            finish()
        if self.gradients:
            parameters = list(self.gradients)
            loss = WithGradients.apply(loss, *parameters, *self.gradients.values())
            self.gradients = {}
        return Distilled(loss, regression, smoothness, self.predictions, self.targets)

    def label(
        self, call: LayerCall, query: Tensor, norms: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """An answer's labels [B, H, P].

        Args:
            call: of the layer.
            query: [B, H*G, A, D], the answer's, rotated.
            norms: [B, A], see `AnswerView`.
            key, value: [B, H, P + A, D], of prompt and answer, keys rotated.
        """
        return self.recipe.label(call.seen_by(query, key, value, norms))

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [B, T, H*G, D] as the layer weighs it."""
        backend = self.recipe.backend
        return attend(query, key, value, call.scaling, backend, weighting=call.weighting)

    def _labels(
        self, call: LayerCall, query: Tensor, key: Tensor, segment: Segment
    ) -> list[Tensor]:
        """Labels of one segment's answers; query and key are rotated already."""
        labels = []
        for stretch in segment.stretches:
            if not stretch.answers:
                continue
            keys, values = (stretch.seen(x, stretch.end) for x in (key, call.value))
            for start, end in stretch.answers:
                seen = slice(keys.shape[2] - (stretch.end - end))
                asked = query[:, :, start:end], norms_of(call.hidden[:, start:end])
                labels.append(self.label(call, *asked, keys[:, :, seen], values[:, :, seen]))
        return labels

    def _layer_as_released(self, call: LayerCall, query: Tensor, key: Tensor) -> Tensor:
        """The released Phi-3 label pass: the answer meets the prompt's keys before RoPE."""
        outputs, targets = [], []
        for segment in self.segments:
            start, asked, end = segment.start, segment.answers[0][0], segment.end
            value = call.value[:, :, start:end]
            mixed = torch.cat([call.key[:, :, start:asked], key[:, :, asked:end]], dim=2)
            answer = query[:, :, asked:end]
            norms = norms_of(call.hidden[:, asked:end])
            targets.append([self.label(call, answer, norms, mixed, value)])
            read = (x[:, :, start:asked] for x in (query, key, call.value))
            outputs += [self.attend(call, *read), self.attend(call, answer, mixed, value)]
        assert call.retained_idx is not None
        self.learn(call.retained_idx, self.recipe.features(call), targets)
        return torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class PackedAttention:
    """A layer function: every segment attends to itself, from slot 0 on, and each of its branches
    to the trunk and itself; gradients flow.

    Args:
        segments: what stands in the row, in order, without gaps.
        backend: `eager` or `sdpa`.
    """

    segments: Sequence[Segment]
    backend: Backend

    def __call__(self, call: LayerCall) -> Tensor:
        ranges = slots_of(self.segments)
        query, key = (call.rotate_ranges(x, ranges) for x in (call.query, call.key))
        return _attend_row(call, query, key, self.segments, self.backend)


def _attend_row(
    call: LayerCall, query: Tensor, key: Tensor, segments: Sequence[Segment], backend: Backend
) -> Tensor:
    """Attention output [B, T, H*G, D] of a whole row; query and key are rotated already."""
    texts = [
        Text(
            stretch.end - stretch.start,
            *(stretch.pieces(x, stretch.end) for x in (key, call.value)),
        )
        for segment in segments
        for stretch in segment.stretches
    ]
    return attend_texts(query, texts, call.scaling, backend, call.weighting)


def norms_of(hidden: Tensor) -> Tensor:
    """Euclidean norms, float32 [B, T], of hidden states [B, T, hidden size]."""
    return hidden.norm(dim=-1, dtype=torch.float32)


def slots_of(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Slots of a row's tokens, as `Rotary.rotate_ranges` takes them."""
    stretches = [stretch for segment in segments for stretch in segment.stretches]
    return [stretch.slots(stretch.start, stretch.end) for stretch in stretches]


def _of_trunk(segment: Segment, labels: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a segment's predictions are compared with: the labels of each answer or, with branches,
    the largest label that each unit of the trunk gets."""
    if not segment.branches:
        return labels
    trunk = segment.last_prompt_end - segment.start
    return [reduce(torch.maximum, (label[..., :trunk] for label in labels))]


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack([value.to(values[0].device) for value in values])


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already.

    Each layer's gradients are taken while its tensors live. Handing them over in backward leaves
    the outer loop as everyone knows it: one loss, scaled, accumulated and clipped by the trainer.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters_and_gradients: Tensor) -> Tensor:
        half = len(parameters_and_gradients) // 2
        ctx.gradients = list(parameters_and_gradients[half:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (scale,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward of this loss a second time; its gradients are handed over")
        # One at a time, each freed once scaled: all of them twice would be the step's peak.
        scaled = [scale.to(gradients[0].device) * gradients.pop(0) for _ in range(len(gradients))]
        return None, *scaled, *([None] * len(scaled))
