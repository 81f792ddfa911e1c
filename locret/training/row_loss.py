"""What one row of samples gives: labels, losses and gradients, layer by layer.

In every layer the answer's queries and the prompt's keys give the labels, the prompt's features
give the predictions, and the layer's loss and its gradients are taken on the spot: nothing of a
layer is kept after its loss. `PackedAttention` is the same row without heads or labels.

A row longer than memory is read in chunks of tokens. They go through one layer before the next
layer begins, so what is kept is the row's hidden states, and of a single layer its keys, values and
features: about 24 KB a token of Llama-3.1-8B in bfloat16, where reading the row at once takes about
120 KB. The other order, every chunk through all layers against a KV cache of the backbone, holds
the keys and values of all layers instead (131 KB a token there, 393 KB in a model without GQA) and,
since labels need the answer, which comes last, either the features of all layers or a second
forward. Heads predict chunk by chunk too, and once more when gradients are taken.

B batch (1), H KV heads, G query heads a KV head, T tokens, D head size, P prompt tokens, A answer
tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locret.heads.heads import RetainingHeads
from locret.heads.kinds import LayerTensors, RetainingHead
from locret.heads.targets import Label, Loss, smoothness
from locret.model.backends import Backend, attend
from locret.model.hooks import LayerCall
from locret.model.varlen import Text, attend_texts
from locret.training.segments import Segment, Stretch, slots_of

PromptKeys = Literal["rotated", "unrotated"]
Share = Callable[[Sequence[Tensor]], Callable[[], None]]
"""Begins to change gradients in place, such as to average them over processes, while the backbone
reads on; they are used after what it returns was called."""

Features = list[list[Tensor]]
"""What heads read of each segment's labelled tokens, [B, P, input width], by layer and segment."""


@dataclass(frozen=True)
class Recipe:
    """How heads learn: by `loss` on labels, and by smoothness, which weighs `alpha`. `features` is
    what a head reads of a layer's tokens; `keep_scores` keeps predictions and labels of every
    layer; `prompt_keys` is how the answer meets the prompt's keys."""

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
        self.plain = PackedAttention(self.segments, self.recipe.backend)
        self.shared: list[Callable[[], None]] = []
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.regression: list[Tensor] = []
        self.smoothness: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.targets: list[Tensor] = []

    def layer(self, call: LayerCall) -> Tensor:
        """The layer function: a layer's loss on the way, and its plain causal attention."""
        query, key = self.plain.rotated(call)
        if call.retained_idx is not None and self.recipe.prompt_keys == "unrotated":
            return self._layer_as_released(call, query, key)
        output, sums = self.plain.attend(call, query, key)
        if call.retained_idx is not None:
            targets = [self._labels(call, query, key, sums, segment) for segment in self.segments]
            self.learn(call.retained_idx, self.recipe.features(call), targets)
        return output

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
        if self.features is None:
            each = [features[:, s.start : s.last_prompt_end] for s in self.segments]
        else:
            each, self.features[retained_idx] = self.features[retained_idx], []
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
        self,
        call: LayerCall,
        query: Tensor,
        norms: Tensor,
        key: Tensor,
        value: Tensor,
        log_sums: Tensor | None = None,
    ) -> Tensor:
        """An answer's labels [B, H, P]: of its queries [B, H*G, A, D], norms [B, A] and, if known,
        log-sum-exps [B, H*G, A], and of keys and values [B, H, P + A, D] of prompt and answer;
        queries and keys are rotated."""
        return self.recipe.label(call.seen_by(query, key, value, norms, log_sums))

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [B, T, H*G, D] as the layer weighs it."""
        backend = self.recipe.backend
        return attend(query, key, value, call.scaling, backend, weighting=call.weighting)

    def _labels(
        self,
        call: LayerCall,
        query: Tensor,
        key: Tensor,
        sums: Tensor | None,
        segment: Segment,
    ) -> list[Tensor]:
        """Labels of one segment's answers; query and key are rotated already, `sums` are the row's
        log-sum-exps."""
        labels = []
        for stretch in segment.stretches:
            if not stretch.answers:
                continue
            keys, values = (stretch.seen(x, stretch.end) for x in (key, call.value))
            for start, end in stretch.answers:
                seen = slice(keys.shape[2] - (stretch.end - end))
                asked = query[:, :, start:end], norms_of(call.hidden[:, start:end])
                its = None if sums is None else sums[:, :, start:end]
                labels.append(self.label(call, *asked, keys[:, :, seen], values[:, :, seen], its))
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


@dataclass(eq=False)
class ChunkedRowLoss(RowLoss):
    """`RowLoss` of a row of which a layer reads `chunk_size` tokens at a time."""

    chunk_size: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.length = self.segments[-1].end
        self._read_so_far: _LayerOfRow | None = None

    def layer(self, call: LayerCall) -> Tensor:
        """The layer function, for one chunk after the other; a layer's loss with its last."""
        features = self.recipe.features(call)
        read = self._read_so_far or _LayerOfRow(call, features, self.length, len(self.segments))
        start, end = read.seen, read.seen + call.query.shape[2]
        pieces = [
            _Piece(i, stretch, max(start, stretch.start), min(end, stretch.end))
            for i, segment in enumerate(self.segments)
            for stretch in segment.stretches
            if stretch.start < end and start < stretch.end
        ]
        ranges = [piece.stretch.slots(piece.start, piece.end) for piece in pieces]
        query, key = (call.rotate_ranges(x, ranges) for x in (call.query, call.key))
        read.key[:, :, start:end] = key
        read.value[:, :, start:end] = call.value
        read.features[:, start:end] = features
        outputs = [self._read_piece(read, call, query, piece) for piece in pieces]
        read.seen = end
        self._read_so_far = read
        if end == self.length:
            self._read_so_far = None
            if call.retained_idx is not None:
                self.learn(call.retained_idx, read.features, read.targets)
        return torch.cat(outputs, dim=1)

    def predict(self, head: RetainingHead, features: Tensor) -> Tensor:
        read = partial(checkpoint, head, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([*map(read, features.split(self.chunk_size, dim=1))], dim=-1)

    def _read_piece(
        self, read: "_LayerOfRow", call: LayerCall, query: Tensor, piece: "_Piece"
    ) -> Tensor:
        """Attention output of a piece's tokens, whose chunk has the rotated queries `query`.

        Takes the labels of the answers that end here.
        """
        which, stretch, start, end = piece
        keys, values = (stretch.seen(x, end) for x in (read.key, read.value))
        for first, last in stretch.answers:
            here = slice(max(first, start) - read.seen, min(last, end) - read.seen)
            if here.start >= here.stop or call.retained_idx is None:
                continue
            read.asking.append((query[:, :, here], norms_of(call.hidden[:, here])))
            if last <= end:
                queries, norms = zip(*read.asking, strict=True)
                asked = torch.cat(queries, dim=2), torch.cat(norms, dim=1)
                read.asking = []
                seen = slice(keys.shape[2] - (end - last))
                labels = self.label(call, *asked, keys[:, :, seen], values[:, :, seen])
                read.targets[which].append(labels)
        return self.attend(call, query[:, :, start - read.seen : end - read.seen], keys, values)


class _Piece(NamedTuple):
    """Tokens of a chunk that are of one stretch, of segment number `which`; offsets of the row."""

    which: int
    stretch: Stretch
    start: int
    end: int


class _LayerOfRow:
    """What is kept of a layer while it reads the row's chunks.

    Attributes:
        seen: tokens read.
        key, value: [B, H, row, D], keys rotated.
        features: [B, row, input width].
        asking: rotated queries and norms (see `AnswerView`) of the answer that is being read, chunk
            by chunk.
        targets: the labels of each segment's answers.
    """

    def __init__(self, call: LayerCall, features: Tensor, length: int, segments: int) -> None:
        batch, heads, _, size = call.key.shape
        self.seen = 0
        self.key = call.key.new_empty(batch, heads, length, size)
        self.value = call.value.new_empty(batch, heads, length, call.value.shape[-1])
        self.features = features.new_empty(batch, length, features.shape[-1])
        self.asking: list[tuple[Tensor, Tensor]] = []
        self.targets: list[list[Tensor]] = [[] for _ in range(segments)]


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
        return self.attend(call, *self.rotated(call))[0]

    @cached_property
    def slots(self) -> list[tuple[int, int, int]]:
        """Of the row, in every layer."""
        return slots_of(self.segments)

    def rotated(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Queries and keys at their slots."""
        query, key = (call.rotate_ranges(x, self.slots) for x in (call.query, call.key))
        return query, key

    def attend(self, call: LayerCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention of a whole row, as `attend_texts` returns it; query and key are rotated
        already."""
        texts = [
            Text(
                stretch.end - stretch.start,
                *(stretch.pieces(x, stretch.end) for x in (key, call.value)),
            )
            for segment in self.segments
            for stretch in segment.stretches
        ]
        return attend_texts(query, texts, call.scaling, self.backend, call.weighting)


def norms_of(hidden: Tensor) -> Tensor:
    """Euclidean norms, float32 [B, T], of hidden states [B, T, hidden size]."""
    return hidden.norm(dim=-1, dtype=torch.float32)


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
