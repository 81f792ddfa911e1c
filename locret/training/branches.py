"""What losses on the branches of trunks are made of: reading them again, gates, divergence.

A trunk sees no branch, so that its keys, values and scores are the same whatever happens to its
units afterwards. `Trunks` collects them while a row is read; `BranchAttention` is a row of the
branches' tokens alone, which see the collected units through gates:

    gate = sigmoid((score - threshold) / temperature)

A score at its threshold has gate 1/2; far above it 1, the unit is kept; far below it 0, the unit is
gone. The colder, the fewer units are in between. Thresholds are such that so many scores are above
them as a cache of that compression would keep. A unit's gate is added as log(gate) to its logits,
by further channels of its key, so that attention is the fused one.

`divergence` is the KL of two predictions of every token of an answer. Only answers meet the
vocabulary, a block of tokens at a time. Gradients are taken on the spot, so that layers may be
computed again for them while something is attached to the model: by the gradient checkpointing of
stock layers, which asks that a layer is in training mode (`recomputing`).

B batch (1), L layers with heads, H KV heads, G query heads a KV head, T tokens, P units of a trunk,
D head size. Scores are [L, H, P]; higher = keep.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, logsigmoid
from torch.utils.checkpoint import checkpoint

from locret.heads.quotas import Quotas, unit_counts
from locret.model.attend import Past, with_bias_in_channels
from locret.model.backbone import Backbone
from locret.model.backends import Backend
from locret.model.hooks import LayerCall, LayerFunction, without_autocast, without_compiling
from locret.model.varlen import Text, attend_texts
from locret.quantization import NO_SCHEME, Scheme
from locret.quantization.packed import pack_keys, pack_values
from locret.training.row_loss import Recipe, WithGradients
from locret.training.segments import Segment, Way, slots_of

MeanOver = Literal["tokens", "branches", "both"]
"""What counts alike in the mean of the divergence: every token, every answer, or half of each."""

FLOOR = -20.0
"""Of a gate's logarithm: 2e-9 of the weight, and no infinity in any dtype."""

_LOGITS = 2**27  # of a block of tokens that meets the vocabulary: 512 MiB


@dataclass
class Trunks:
    """What the branches of a row see of its trunks.

    Args:
        recipe: its heads and their features.
        segments: the row's, all with branches.
        scheme: how keys and values are stored; they are as they come back from it.
        learning: scores get gradients.

    Attributes:
        units: for each layer, keys (rotated) and values [B, H, P of all trunks, D].
        scores: for each layer with heads, [H, P of all trunks] float32, higher = keep.
    """

    recipe: Recipe
    segments: Sequence[Segment]
    scheme: Scheme = NO_SCHEME
    learning: bool = True
    units: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """P of each trunk."""
        return [segment.last_prompt_end - segment.start for segment in self.segments]

    def add(self, call: LayerCall) -> None:
        """Collect a layer of the row."""
        key = self._of_trunks(call.rotate_ranges(call.key, slots_of(self.segments)), 2)
        value = self._of_trunks(call.value, 2)
        i = call.retained_idx
        if i is not None:
            key, value = stored(self.scheme.for_layer(i), key, value, self.lengths)
            features = self._of_trunks(self.recipe.features(call), 1)
            head = self.recipe.heads[i]
            with torch.set_grad_enabled(self.learning):
                # At least float32, whatever autocast makes of a head's products.
                scores = head(features)[0]
                self.scores[i] = scores.to(torch.promote_types(scores.dtype, torch.float32))
        self.units[call.layer_idx] = key, value

    def collecting(self, read: LayerFunction) -> LayerFunction:
        """`read`, and each layer that it reads is collected."""

        def layer(call: LayerCall) -> Tensor:
            self.add(call)
            return read(call)

        return layer

    def scores_of_segments(self) -> list[Tensor]:
        """[L, H, P] of each trunk."""
        together = torch.stack([self.scores[i] for i in sorted(self.scores)])
        return [*together.split(self.lengths, dim=-1)]

    def _of_trunks(self, x: Tensor, dim: int) -> Tensor:
        """A copy of the trunks' tokens: a view would keep the whole row in memory."""
        each = zip(self.segments, self.lengths, strict=True)
        return torch.cat([x.narrow(dim, segment.start, n) for segment, n in each], dim)


def stored(
    scheme: Scheme, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, T, D] of texts of these lengths as they come back from a scheme."""
    if not scheme.packs:
        return key, value
    heads, size = key.shape[1], key.shape[3]
    with without_autocast(key.device):
        sequences = [x for text in key[0].split(list(lengths), dim=1) for x in text]
        flat = torch.cat(sequences)
        of_heads = [length for length in lengths for _ in range(heads)]
        keys = pack_keys(scheme, flat, of_heads).dense(key.dtype).split(of_heads)
        by_text = [torch.stack(keys[i : i + heads]) for i in range(0, len(keys), heads)]
        values = pack_values(scheme, value.reshape(-1, size)).dense(value.dtype)
    return torch.cat(by_text, dim=1)[None], values.view(value.shape)


class BranchAttention:
    """A layer function for a row of branches: each sees its trunk, through gates, and itself.

    Args:
        ways: what stands in the row, in order, without gaps.
        trunks: what they see.
        gates: for each segment, logarithms of its gates [L, H, P]; None = all units are seen.
    """

    def __init__(
        self, ways: Sequence[Way], trunks: Trunks, gates: Sequence[Tensor] | None, backend: Backend
    ) -> None:
        self.ways = ways
        self.trunks = trunks
        self.gates = None if gates is None else torch.cat(list(gates), dim=-1)
        self.backend = backend
        self.slots = [way.stretch.slots(way.stretch.start, way.stretch.end) for way in ways]

    def __call__(self, call: LayerCall) -> Tensor:
        query, key = (call.rotate_ranges(x, self.slots) for x in (call.query, call.key))
        past = Past(*self.trunks.units[call.layer_idx])
        if self.gates is not None and call.retained_idx is not None:
            past = past._replace(bias=self.gates[call.retained_idx][None])
        query, units, new = unbiased(query, past, (key, call.value), call.scaling)
        lengths = [way.stretch.end - way.stretch.start for way in self.ways]
        trunks = list(zip(*(x.split(self.trunks.lengths, dim=2) for x in units), strict=True))
        own = zip(*(x.split(lengths, dim=2) for x in new), strict=True)
        texts = [
            Text(length, *zip(trunks[way.segment], each, strict=True))
            for way, length, each in zip(self.ways, lengths, own, strict=True)
        ]
        output, _ = attend_texts(query, texts, call.scaling, self.backend, call.weighting)
        return output[..., : call.query.shape[3]]


def unbiased(
    query: Tensor, past: Past, new: tuple[Tensor, Tensor], scaling: float
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries, past and new keys and values, with channels that carry the past's bias if it has
    one (`with_bias_in_channels`): any attention takes them, and gradients flow to the bias."""
    if past.bias is None:
        return query, (past.keys, past.values), new
    query, (past,), fresh = with_bias_in_channels(query, [past], new, scaling)
    assert fresh is not None
    return query, (past.keys, past.values), fresh


def thresholds_for(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Between the scores of the units that stay and those of the others.

    Args:
        scores: without gradients.
        compression: 1 / so much of all units stays, at least one; 1 = all.
        quotas: how many units each head keeps; None = the best of all heads and layers.

    Returns:
        [1, 1, 1] or, with quotas, [L, H, 1]; -inf where all units stay.
    """
    best_first = _compared(scores, quotas).sort(dim=-1, descending=True).values
    kept = _kept(scores, compression, quotas)
    last = best_first.shape[-1] - 1
    # The middle of the last score that is kept and the first that is not.
    middle = (best_first.gather(-1, kept - 1) + best_first.gather(-1, kept.clamp(max=last))) / 2
    return middle.masked_fill(kept > last, -torch.inf)


def log_mask(scores: Tensor, compression: float, quotas: Quotas | None = None) -> Tensor:
    """Logarithms of gates that are as cold as can be: 0 where a unit stays, `FLOOR` elsewhere, like
    the scores. Of equal scores the first stay: the same tokens have the same in a first layer.

    Args: as of `thresholds_for`.
    """
    compared = _compared(scores, quotas)
    place = compared.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    gone = place >= _kept(scores, compression, quotas)
    return torch.zeros_like(compared).masked_fill(gone, FLOOR).view_as(scores)


def _compared(scores: Tensor, quotas: Quotas | None) -> Tensor:
    """Scores with those of which the best stay along the last axis: a head's, or all, [1, 1, *]."""
    return scores.reshape(1, 1, -1) if quotas is None else scores


def _kept(scores: Tensor, compression: float, quotas: Quotas | None) -> Tensor:
    """How many of them stay, [1, 1, 1] or [L, H, 1]."""
    if quotas is None:
        kept = max(1, round(scores.numel() / compression))
        return torch.tensor([[[kept]]], device=scores.device)
    units = scores.shape[-1]
    budget = max(1, round(units / compression))
    counts = unit_counts(quotas.at(compression), budget, units)
    return torch.tensor(counts, device=scores.device)[..., None]


def log_gates(scores: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
    """Logarithms of gates, from `FLOOR` to 0.

    The threshold follows the scores near it: how many units stay is given, so a change that lifts
    all scores of a threshold alike opens no gate, and its gradient is zero. Without this, what all
    heads have in common, to keep more, would hide in what they differ.

    Args:
        scores: with gradients.
        temperature: above 0, in the scores' unit.
    """
    with torch.no_grad():
        gates = ((scores - thresholds) / temperature).sigmoid()
        near = gates * (1 - gates)
        total = near.sum_to_size(thresholds.shape).clamp(min=torch.finfo(near.dtype).tiny)
    mean = (near / total * scores).sum_to_size(thresholds.shape)
    moving = thresholds + (mean - mean.detach())
    return logsigmoid((scores - moving) / temperature).clamp(min=FLOOR)


class Divergence(NamedTuple):
    """How much a student's predictions differ from a teacher's.

    Attributes:
        loss: scalar, KL(teacher || student) in nats, mean over the answers' tokens; its backward
            gives the parameters their gradients, once.
        agreement: scalar, for how many of these tokens both find the same one most likely, 0 to 1.
    """

    loss: Tensor
    agreement: Tensor


def divergence(
    backbone: Backbone,
    teacher: Tensor,
    student: Tensor,
    counts: Sequence[int],
    mean_over: MeanOver,
    parameters: Sequence[nn.Parameter] = (),
) -> Divergence:
    """Compare what two readings predict.

    Args:
        backbone: whose output layer both share.
        teacher, student: the decoder's output [A, hidden size] of the tokens that predict answers.
        counts: tokens of each answer, A together.
        mean_over: what counts alike.
        parameters: of which the student's output is a function; none = no gradients.
    """
    weights = _weights(counts, mean_over).to(
        teacher.device, torch.promote_types(teacher.dtype, torch.float32)
    )
    learning = bool(parameters)
    lost, agreement, of_student = _by_blocks(backbone, teacher, student, weights, learning)
    taken = torch.autograd.grad(student, parameters, of_student) if learning else ()
    total = weights.sum().clamp(min=1)  # last, so that no dtype is too coarse for gradients
    loss = lost / total
    if learning:
        loss = WithGradients.apply(loss, *parameters, *(g / total for g in taken))
    return Divergence(loss, agreement / max(len(teacher), 1))


def _weights(counts: Sequence[int], mean_over: MeanOver) -> Tensor:
    """What the tokens of all answers count, [A]: 1 on average."""
    mean = sum(counts) / max(sum(map(bool, counts)), 1)
    by_branch = torch.tensor([mean / max(count, 1) for count in counts])
    share = {"tokens": 0.0, "branches": 1.0, "both": 0.5}[mean_over]
    return (share * by_branch + 1 - share).repeat_interleave(torch.tensor(counts))


def _by_blocks(
    backbone: Backbone, teacher: Tensor, student: Tensor, weights: Tensor, learning: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) by the weights, summed up over tokens; how many of their likeliest
    next tokens agree; and, while learning, the gradients of the former for `student`."""
    rows = max(1, _LOGITS // backbone.config.vocab_size)
    lost, agreement = weights.new_zeros(()), weights.new_zeros(())
    gradients = torch.empty_like(student)
    for start in range(0, len(teacher), rows):
        block = slice(start, start + rows)
        own = student[block].detach().requires_grad_(learning)
        with torch.no_grad():
            expected = backbone.logits(teacher[block]).log_softmax(dim=-1)
        found = backbone.logits(own).log_softmax(dim=-1)
        each = kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1)
        total = (each * weights[block]).sum()
        lost += total.detach()
        agreement += (found.argmax(dim=-1) == expected.argmax(dim=-1)).sum()
        if learning:
            (gradients[block],) = torch.autograd.grad(total, own)
    return lost, agreement, gradients


@contextlib.contextmanager
def recomputing(layers: Iterable[Any]) -> Iterator[None]:
    """Until the block ends, `layers` keep nothing but their input for the backward pass, which has
    to take place inside the block.

    Args:
        layers: stock decoder layers, in evaluation mode.
    """
    given: dict[str, Any] = {"gradient_checkpointing": True, "training": True}
    given["_gradient_checkpointing_func"] = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False
    )
    with contextlib.ExitStack() as stack:
        for layer in map(without_compiling, layers):
            own = vars(layer)
            for name, value in given.items():
                if name in own:
                    stack.callback(own.__setitem__, name, own[name])
                else:
                    stack.callback(own.pop, name)
                own[name] = value
        yield
