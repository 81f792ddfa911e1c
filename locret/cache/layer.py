"""One layer of a compressed cache: the units it holds, and what it knows of tokens seen.

A cache unit is one token's key, value, score and source position in one KV head, and its weight
where evicted values are merged (`locret.cache.merging`).

Shapes: B batch, H KV heads, S units of the longest sequence, T new units, D head size.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from locret.cache.context import Sequences
from locret.cache.host_blocks import HostBlocks
from locret.cache.merging import Mergeable, Merging, merge_evicted
from locret.cache.recall import Recall
from locret.cache.store import NewTokens, Store
from locret.quantization import NO_SCHEME, Scheme

_VALUES = ("seen", "rotated")
"""What a view of a layer holds beside units, state and what waits on the host."""


class RetainedLayer(CacheLayerMixin):
    """The units of one layer and how many tokens it has seen.

    Every row and head holds as many units as it needs (`lengths`); of a prompt, those that
    evictions have left are `store.context`, what came after is `store.tail`. `keys` and `values`
    [B, H, S, D] show them as a rectangle, filled up in front with zeros where sequences are
    shorter than others; what is packed is expanded each time. `rotated` says whether the keys
    already carry their rotation.

    `state` is what a policy remembers of this layer and request, by name. `host` holds what was
    evicted, for recall; None = what is evicted is gone. Units hold weights if the layer `merges`
    evicted values.

    A layer with a `window` attends to so many tokens, the newest included: it holds the last
    window - 1 units, unrotated, whatever the budget and the positions are.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        rotated: bool,
        window: int | None = None,
        scheme: Scheme = NO_SCHEME,
        merges: bool = False,
        recall: Recall | None = None,
    ) -> None:
        # The base class would make keys and values plain attributes; here they are views.
        self.store = Store(scheme, merges and window is None)
        self.window = window
        self.host = HostBlocks(recall) if recall is not None and window is None else None
        self._rotated_at_first = rotated and window is None
        self._handed_over = False
        self._start_anew()

    def _start_anew(self) -> None:
        self.seen = 0
        self.rotated = self._rotated_at_first
        self.state: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self.store.rectangle("keys")

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.store.rectangle("values")

    @property
    def lengths(self) -> Tensor:
        """Units that each row and head holds, [B, H] long."""
        return self.store.sequences.lengths

    @property
    def source_positions(self) -> list[list[Tensor]]:
        """Where each row's and head's units stood in their text, [B][H] long, ascending."""
        return [[x.long() for x in row] for row in self.store.split("source_positions")]

    @property
    def scores(self) -> list[list[Tensor]]:
        """The scores of each row's and head's units, [B][H] float32; higher = keep. ValueError: the
        context was read to the end, so that they are dropped."""
        if not self.store.scored:
            raise ValueError(
                "the cache holds no scores: nothing is evicted any more; an engine with "
                "decode_interval keeps them"
            )
        return self.store.split("scores")

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def is_empty(self) -> bool:
        """It holds no unit."""
        return self.store.is_empty

    @property
    def longest(self) -> int:
        """Units of the longest sequence."""
        return 0 if self.store.is_empty else self.store.sequences.longest

    @property
    def quantized(self) -> bool:
        """Whether keys and values are held in few bits."""
        return self.store.scheme.packs

    @property
    def nbytes(self) -> int:
        """Bytes of all storage on the device."""
        return self.store.nbytes + (self.host.nbytes if self.host else 0)

    def get_seq_length(self) -> int:
        """Tokens seen, not units held."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by the first append; there is nothing to do before."""

    def first_tail_slots(self) -> tuple[int, ...]:
        """At compact positions, the slot of each row's first unit in the tail, or of all rows': the
        units before fill the slots from 0 on, those of shorter heads the last of these."""
        context = self.store.context
        if context is None:
            return (0,)
        rows = context.sequences.longest_of_rows
        return rows if len(set(rows)) > 1 else rows[:1]

    def next_slots(self) -> tuple[int, ...]:
        """The same of the units that come next."""
        return tuple(slot + self.store.tail.count for slot in self.first_tail_slots())

    def evict(
        self,
        index: Tensor,
        kept: Sequences,
        new: NewTokens | None = None,
        merging: Merging | None = None,
        query: int = 0,
    ) -> None:
        """Hold what is kept of the units held and the `new` ones.

        Args:
            index: long [K], which of each sequence's units stay, ascending.
            kept: how many each sequence keeps.
            new: units that are not held yet; None = none.
            merging: how the values of the others are merged into them; None = they are lost.
            query: first tokens that nothing is merged into: a question read in front.
        """
        store = self.store
        if new is not None and (self.host is not None or merging is not None):
            store.append(new)
            new = None
        merged = None
        if self.host is not None or merging is not None:
            empty = None if self.store.sequences.equal else store.sequences.empty
            fillers = kept.empty
            at = _in_rectangle(index, kept, store.sequences)
            if self.host is not None:
                whole = [store.rectangle(x) for x in ("keys", "values", "source_positions")]
                self.host.take(whole, [x[:, :, :0] for x in whole], at, fillers, empty)
            if merging is not None:
                names = ["keys", "values", "source_positions", "weights"]
                names += ["scores"] * merging.fold
                before = Mergeable(*map(store.rectangle, names))
                merged = merge_evicted(
                    before, at, merging, empty=empty, fillers=fillers, query=query
                )
        store.retain(index, kept, new)
        if merged is not None:
            store.replace_values(*map(kept.flattened, merged))

    def close(self, tight: bool) -> None:
        """Nothing is evicted any more: hold no scores from here on, and source positions in less.

        Args:
            tight: hold keys in nearly full blocks, however evictions have thinned them out.
        """
        self.store.drop_scores()
        context = self.store.context
        if context is not None and self.window is None:
            context = context.tightened() if tight else context
            self.store.context = context.closed()

    def place(self, device: torch.device) -> None:
        """Be on the layer's device, wherever the tensors came from."""
        if not self.store.is_empty and self.store.like.device != device:
            self.store.move(device)
            if self.host:
                self.host.move(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}

    def view(self) -> SimpleNamespace:
        """What the layer is now, for `restore`. Nothing is copied."""
        values = {name: getattr(self, name) for name in _VALUES} | {"state": dict(self.state)}
        return SimpleNamespace(
            **values, store=self.store.view(), host=self.host and self.host.view()
        )

    def restore(self, view: SimpleNamespace) -> None:
        """Be again what the layer was when `view` was taken."""
        self.store.restore(view.store)
        self.state = dict(view.state)
        if self.host:
            self.host.restore(view.host)
        for name in _VALUES:
            setattr(self, name, getattr(view, name))
        self._handed_over = False

    def expect_hand_over(self) -> None:
        """Let the next `update` pass: its caller's keys and values go to our attention function."""
        self._handed_over = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which stores them. ValueError:
        the model is not attached, so keys would arrive rotated and unscored."""
        if not self._handed_over:
            raise ValueError(
                "a RetainedCache was given to a model that no engine is attached to; "
                "call engine.generate(..., cache=cache), or model.generate inside `with engine:`"
            )
        self._handed_over = False
        return key_states, value_states

    def reset(self) -> None:
        self.store.clear()
        if self.host:
            self.host.clear()
        self._start_anew()

    def crop(self, tokens_to_remove: int) -> None:
        """Evicted units cannot be brought back, so nothing can be cropped. ValueError:
        `tokens_to_remove` is not zero."""
        if tokens_to_remove:
            raise ValueError(
                "a RetainedCache cannot be rolled back; use a decoding method that does not "
                "draft tokens (greedy, sampling, beam search)"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices, indices.tolist())

    def select_rows(self, indices: Tensor, known: Sequence[int]) -> None:
        """Hold only the rows `indices` [B'] (long) of the batch, which Python knows as `known`."""
        if not self.store.is_empty:
            indices = indices.to(self.store.like.device)
            self.store.select_rows(known, indices)
            if self.host:
                self.host.select_batch(indices, known)
        self.state = {name: x[indices.to(x.device)] for name, x in self.state.items()}


def _in_rectangle(index: Tensor, kept: Sequences, whole: Sequences) -> Tensor:
    """`index`, which counts within sequences, for rectangles of the `whole`: long [B, H, K], filled
    up in front with zeros where sequences keep fewer units than others."""
    if not whole.equal:
        empty = (whole.longest - whole.lengths).flatten()
        index = index + empty[kept.owner]
    return kept.rectangle(index)
