"""Training on rows longer than memory: each layer reads the row in chunks of tokens.

The chunks go through one layer before the next layer begins, so what is kept is the row's hidden
states, and of a single layer its keys, values and features: about 24 KB a token of Llama-3.1-8B in
bfloat16, where reading the row at once takes about 120 KB. The other order, every chunk through all
layers against a KV cache of the backbone, holds the keys and values of all layers instead (131 KB a
token there, 393 KB in a model without GQA) and, since labels need the answer, which comes last,
either the features of all layers or a second forward.

Heads predict chunk by chunk too, and once more when gradients are taken, one chunk at a time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from locret.heads.heads import RetainingHead
from locret.model.hooks import LayerCall
from locret.training.row_loss import RowLoss, norms_of
from locret.training.segments import Stretch


@dataclass(eq=False)
class ChunkedRowLoss(RowLoss):
    """`RowLoss` of a row of which a layer reads `chunk_size` tokens at a time."""

    chunk_size: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.length = self.segments[-1].end
        self._read_so_far: _LayerOfRow | None = None

    def reading(self, decoder: nn.Module) -> contextlib.AbstractContextManager[None]:
        return in_chunks(decoder.layers, self.chunk_size)  # type: ignore[arg-type]

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
    """Tokens of a chunk that are of one stretch.

    Attributes:
        which: number of the stretch's segment.
        stretch: what they are of.
        start, end: the tokens, by their offsets in the row.
    """

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


@contextlib.contextmanager
def in_chunks(layers: nn.ModuleList, chunk_size: int) -> Iterator[None]:
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
