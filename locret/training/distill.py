"""Train retaining heads in one forward of the frozen backbone (paper section 3.2).

The backbone reads prompt + answer once, and every layer's loss and gradients are taken on the way
(`locret.training.row_loss`).

Several conversations may stand in one row (`locret.training.segments`): projections and MLPs run
over the whole row, attention and labels segment by segment, so that no mask is needed and no token
sees a stranger. A conversation may go on from its context in several ways that do not see each
other, its branches. A row that does not fit in memory is read in chunks.

In use heads score units of a model that reads in chunks, with most of its context gone.
`evicted_features` are what they meet then: the engine reads each trunk as in use, with the heads as
they are now; `Distillation` compares their scores of it with the labels of the whole context. In
memory are the features of all layers and trunks of a row, 115 KB a token for Qwen2.5-Coder-1.5B in
16 bits (28 layers of 2,048). The forward that takes the labels gives up a layer after the other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

import torch
from torch import Tensor, nn

from locret.engine.engine import Engine
from locret.heads.heads import FEATURES, RetainingHeads
from locret.heads.targets import LABELS, BoundaryLoss, Loss, by_name, make_loss
from locret.model.backbone import Backbone
from locret.model.prenorm import read_whole
from locret.policies import LocretPolicy
from locret.policies.base import LayerChunk
from locret.quantities import check_between, check_bounds
from locret.quantization import Quantization, scheme_of
from locret.training.row_loss import (
    ChunkedRowLoss,
    Distilled,
    Features,
    PromptKeys,
    Recipe,
    RowLoss,
    Share,
)
from locret.training.segments import Segment, check_segments


class Distillation:
    """Loss of retaining heads on prompt + answer sequences.

    Args:
        backbone: frozen; its parameters get no gradients and keep their mode.
        heads: what is trained; their config says what they read and which label they learn.
        alpha: weight of the smoothness loss (paper: 0.0025).
        loss: a name of `locret.heads.targets.LOSSES`, or a loss; `boundary_weight` is that of
            `BoundaryLoss`.
        keep_scores: also return predictions and targets of every layer.
        prompt_keys: "rotated" as they should be; "unrotated" is how the released Phi-3 recipe lets
            the answer meet the prompt's keys when it takes its labels. It reproduces those labels,
            and is of no other use.
        chunk_size: tokens that a layer reads at a time; None reads a row at once. Losses and
            gradients are the same up to rounding.

    Attributes:
        why_not_fused: why the last row was read by the model's own forward; None = fused kernels
            read it.

    Raises:
        ValueError: heads that do not fit the backbone, an unknown label or loss, a chunk size
            below 1 or with unrotated keys.
    """

    why_not_fused: str | None = "no row was read"

    def __init__(
        self,
        backbone: Backbone,
        heads: RetainingHeads,
        *,
        alpha: float = 0.0025,
        loss: str | Loss = "smooth_l1",
        boundary_weight: float = 0.2,
        keep_scores: bool = False,
        prompt_keys: PromptKeys = "rotated",
        chunk_size: int | None = None,
    ) -> None:
        if prompt_keys not in get_args(PromptKeys):
            raise ValueError(f"prompt_keys is {prompt_keys!r}; expected 'rotated' or 'unrotated'")
        if chunk_size is not None and (chunk_size < 1 or prompt_keys == "unrotated"):
            raise ValueError(
                f"chunk_size is {chunk_size} with prompt_keys {prompt_keys!r}; expected at least 1 "
                "and rotated keys, or None"
            )
        differences = heads.config.differences(backbone.geometry)
        if differences:
            raise ValueError(f"heads do not fit the backbone: {'; '.join(differences)}")
        self.backbone = backbone
        self.heads = heads
        self.chunk_size = chunk_size
        self.recipe = Recipe(
            heads=heads,
            features=FEATURES[heads.config.tap],
            label=by_name(LABELS, heads.config.label, "label"),
            loss=make_loss(loss, boundary_weight) if isinstance(loss, str) else loss,
            alpha=alpha,
            backend=backbone.backend,
            keep_scores=keep_scores,
            prompt_keys=prompt_keys,
        )

    def __call__(
        self,
        input_ids: Tensor,
        segments: Sequence[Segment],
        share: Share | None = None,
        features: Features | None = None,
    ) -> Distilled:
        """One row of samples.

        Args:
            input_ids: [1, N] long; for one segment also [B, N].
            segments: the samples in the row, in order, without gaps.
            share: what becomes of each layer's gradients once they are taken.
            features: what heads read, instead of this row's own features, such as those of
                `evicted_features`; the list is empty of tensors afterwards.

        Raises:
            ValueError: segments that do not fill the row, answers or branches that are not where
                they can be, or branches with unrotated keys.
        """
        length = input_ids.shape[1]
        check_segments(segments, length)
        if self.recipe.prompt_keys == "unrotated" and any(each.branches for each in segments):
            raise ValueError("prompt_keys is 'unrotated', which samples with branches do not take")
        given = self.recipe, segments, share, features
        reading: AbstractContextManager[None] = contextlib.nullcontext()
        stock = ""
        if self.chunk_size is None or length <= self.chunk_size:
            row = RowLoss(*given)
        else:
            row = ChunkedRowLoss(*given, chunk_size=self.chunk_size)
            reading = _in_chunks(self.backbone.decoder.layers, self.chunk_size)
            stock = "its layers read a row in chunks"
        with reading, self.backbone.attached(row.layer):
            read = read_whole(self.backbone, input_ids, row.layer, wanted=False, stock=stock)
        self.why_not_fused = read.why_not_fused
        if isinstance(self.recipe.loss, BoundaryLoss):
            self.recipe.loss.end_row()
        return row.result()


@contextlib.contextmanager
def _in_chunks(layers: nn.ModuleList, chunk_size: int) -> Iterator[None]:
    """Let each of a stock decoder's layers read its input in chunks, until the block ends.

    A layer's output overwrites its input, so gradients must be off. What comes after the last layer
    is not needed and sees one token only.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            reading = _LayerInChunks(chunk_size, is_last=layer is layers[-1])
            before = layer.register_forward_pre_hook(reading.before, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(layer.register_forward_hook(reading.after).remove)
        yield


class _LayerInChunks:
    """Hooks of one layer: all chunks but the last are read before its forward, which gets that."""

    def __init__(self, chunk_size: int, is_last: bool) -> None:
        self.chunk_size = chunk_size
        self.is_last = is_last
        self.hidden: Any = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.hidden, *others = args
        length = self.hidden.shape[1]
        self.last = (length - 1) // self.chunk_size * self.chunk_size
        for start in range(0, self.last, self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            # Not through the module's hooks, of which this is one: those of FSDP, for instance,
            # gather the layer's parameters once, for all of its chunks.
            output = module.forward(self.hidden[:, chunk], *others, **_of(kwargs, chunk))
            self.hidden[:, chunk] = output
        chunk = slice(self.last, length)
        return (self.hidden[:, chunk], *others), _of(kwargs, chunk)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden, self.hidden = self.hidden, None
        if self.is_last:
            return output[:, -1:]
        hidden[:, self.last :] = output
        return hidden


def _of(kwargs: dict[str, Any], chunk: slice) -> dict[str, Any]:
    """A layer's arguments for some of its tokens."""
    cos, sin = kwargs["position_embeddings"]
    given = {**kwargs, "position_embeddings": (cos[:, chunk], sin[:, chunk])}
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"][:, chunk]
    return given


# ---- features of the model as it evicts ----------------------------------------------------------


@dataclass(frozen=True)
class EvictedReading:
    """How trunks are read; what has bounds is drawn for each row, log-uniformly.

    Attributes:
        compressions: the least and the most tokens of a trunk for a unit kept, at least 1.
        chunk_sizes: the least and the most tokens read at a time.
        share: of the rows that are read so, 0 to 1; the others have features of the whole context.
        quantization: how the engine stores keys and values.

    Raises:
        ValueError: bounds in the wrong order or out of range, or no such quantization.
    """

    compressions: tuple[float, float] = (2.0, 16.0)
    chunk_sizes: tuple[int, int] = (512, 2048)
    share: float = 1.0
    quantization: Quantization = None

    def __post_init__(self) -> None:
        for name in ("compressions", "chunk_sizes"):
            check_bounds(f"evicted {name}", getattr(self, name), 1)
        check_between("evicted share", self.share, 0, 1)
        scheme_of(self.quantization)

    def drawn(self, rng: Random) -> tuple[float, int] | None:
        """Compression and chunk size of a row; None where features of the whole context do."""
        if rng.random() >= self.share:
            return None
        return self._between(rng.random(), rng.random())

    @property
    def middle(self) -> tuple[float, int]:
        """Compression and chunk size of validation."""
        return self._between(0.5, 0.5)

    def _between(self, *places: float) -> tuple[float, int]:
        """Compression and chunk size at these places, 0 to 1, between their bounds."""
        pairs = zip((self.compressions, self.chunk_sizes), places, strict=True)
        compression, chunk_size = (
            least * (most / least) ** place for (least, most), place in pairs
        )
        return compression, round(chunk_size)


class _RecordingPolicy(LocretPolicy):
    """Scores with heads, and keeps what they read: `read` has, by layer, features [B, T, input
    width] of every chunk."""

    def __init__(self, heads: RetainingHeads) -> None:
        super().__init__(heads)
        self.read: Features = [[] for _ in heads.layers]

    def score(self, chunk: LayerChunk) -> Tensor:
        features = FEATURES[self.heads.config.tap](chunk)
        self.read[chunk.layer_idx].append(features)
        return self.heads[chunk.layer_idx](features)


def evicted_features(
    backbone: Backbone,
    heads: RetainingHeads,
    input_ids: Tensor,
    segments: Sequence[Segment],
    compression: float,
    chunk_size: int,
    quantization: Quantization = None,
) -> Features:
    """What heads read of the labelled tokens of each segment in a row [B, N] while an engine reads
    and evicts them, with the quotas and the proportion of stabilizers that the heads record. The
    other arguments are those of `EvictedReading`."""
    features: Features = [[] for _ in heads.layers]
    for segment in segments:
        trunk = input_ids[:, segment.start : segment.last_prompt_end]
        policy = _RecordingPolicy(heads)
        engine = Engine(
            backbone.model,
            policy,
            budget=max(1, round(trunk.shape[1] / compression)),
            chunk_size=chunk_size,
            quantization=quantization,
        )
        engine.prefill(trunk, torch.ones_like(trunk))  # a pad_token_id in a text is no padding
        for of_layer, chunks in zip(features, policy.read, strict=True):
            of_layer.append(torch.cat(chunks, dim=1))
            chunks.clear()
    return features
