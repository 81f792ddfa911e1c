"""The compressed cache of one request: a transformers `Cache` that holds a bounded set of units.

`get_seq_length()` is the number of tokens **seen**, so stock `generate()` slices its inputs
rightly; the number of units **held** is separate and stays within the budget while a prompt is
read. Everything a request needs to go on is here; nothing of it is kept on the model.

Positions (`Positions`):
  compact   units held fill the slots 0 .. S-1 in order, and keys are stored unrotated until
            decoding begins; as released. Any input length fits the backbone's window.
  original  keys are rotated once, at their source position; bounded by the backbone's window.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from locret.units import Units

Positions = Literal["compact", "original"]

DECODE_ROOM = 256  # units of spare storage a growing layer takes, so that decoding appends in place


@dataclass(frozen=True)
class Eviction:
    """What a layer does after attending: keep `budget` units.

    The last `stabilizers` units and the first `query` ones are among them whatever they scored.
    """

    budget: int
    stabilizers: int
    query: int = 0


class RetainedLayer(CacheLayerMixin):
    """The units of one layer and how many tokens it has seen.

    `keys`, `values` [B, H, S, D], `scores` [B, H, S] and `source_positions` [B, H, S] are views of
    what is held. `rotated` says whether the keys already carry their rotation.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, rotated: bool) -> None:
        # The base class would make keys and values plain attributes; here they are views.
        self.units = Units()
        self.seen = 0
        self.rotated = rotated
        self._rotated_at_first = rotated
        self._handed_over = False

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        return self.units.keys

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.units.values

    @property
    def scores(self) -> Tensor:
        return self.units.scores

    @property
    def source_positions(self) -> Tensor:
        return self.units.source_positions

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def held(self) -> int:
        """Units held in each head."""
        return self.units.held

    def get_seq_length(self) -> int:
        """Tokens seen, not units held."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Storage is made by the first append; there is nothing to do before."""

    def expect_hand_over(self) -> None:
        """Let the next `update` pass: its caller's keys and values go to our attention function."""
        self._handed_over = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which stores them.

        Raises:
            ValueError: the model is not attached, so keys would arrive rotated and unscored.
        """
        if not self._handed_over:
            raise ValueError(
                "a RetainedCache was given to a model that no engine is attached to; "
                "call engine.generate(..., cache=cache), or model.generate inside `with engine:`"
            )
        self._handed_over = False
        return key_states, value_states

    def reset(self) -> None:
        self.units.clear()
        self.seen = 0
        self.rotated = self._rotated_at_first

    def crop(self, tokens_to_remove: int) -> None:
        """Evicted units cannot be brought back, so nothing can be cropped.

        Raises:
            ValueError: `tokens_to_remove` is not zero.
        """
        if tokens_to_remove:
            raise ValueError(
                "a RetainedCache cannot be rolled back; use a decoding method that does not "
                "draft tokens (greedy, sampling, beam search)"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.units.select_batch(indices.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.units.select_batch(rows.repeat_interleave(repeats))


class RetainedCache(Cache):
    """The cache of one request.

    Args:
        num_layers: layers of the backbone.
        budget: units a KV head keeps while the prompt is read; None = all.
        positions: see the file's head.

    Attributes:
        eviction: what layers do after attending now; None = nothing is evicted.
        prompt_length: tokens of the first prompt (it decides LongRoPE's `by_length` rule).
        query_length: tokens of the question that were read in front of the prompt (Locret-Q).
        token_ids: [B, seen] long, on the CPU: the tokens read so far, evicted ones included.
        unread_ids: [B, 0 or 1] long, on the CPU: the last token of the answer, which ends a call
            without being read; the next turn reads it first.
    """

    layers: list[RetainedLayer]  # type: ignore[assignment]

    def __init__(
        self, num_layers: int, budget: int | None = None, positions: Positions = "compact"
    ) -> None:
        if positions not in get_args(Positions):
            raise ValueError(f"positions is {positions!r}; expected 'compact' or 'original'")
        super().__init__(
            layers=[RetainedLayer(rotated=positions == "original") for _ in range(num_layers)]
        )
        self.budget = budget
        self.positions = positions
        self.eviction: Eviction | None = None
        self.prompt_length = 0
        self.query_length = 0
        self.token_ids: Tensor | None = None
        self.unread_ids = torch.empty(0, 0, dtype=torch.long)

    def __bool__(self) -> bool:
        """False, so that stock Phi-3 keeps the cache; ask `cache is None` or `cache.seen` instead.

        Phi-3's generation code drops a true cache, to read everything again, when a sequence grows
        past LongRoPE's original window. Here the factors are fixed for a request: nothing has to be
        read again, and what was evicted could not be. No other stock code asks.
        """
        return False

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of all storage: keys, values, scores, positions and spare room."""
        return sum(layer.units.nbytes for layer in self.layers)

    def reset(self) -> None:
        super().reset()
        self.eviction = None
        self.prompt_length = 0
        self.query_length = 0
        self.token_ids = None
        self.unread_ids = self.unread_ids[:, :0]

    def report(self) -> dict[str, Any]:
        """What is held, in units and real bytes, against what a full cache would take.

        Returns:
            `seen_tokens`, `budget`, `positions`, per layer `units` (held in each head) and `bytes`
            (storage of keys, values, scores, positions, spare room), their sum `total_bytes`,
            `full_cache_bytes` (keys and values of every token seen) and `ratio` = total / full.
        """
        full = sum(_full_bytes(layer) for layer in self.layers)
        return {
            "seen_tokens": self.seen,
            "budget": self.budget,
            "positions": self.positions,
            "units": [layer.held for layer in self.layers],
            "bytes": [layer.units.nbytes for layer in self.layers],
            "total_bytes": self.nbytes,
            "full_cache_bytes": full,
            "ratio": self.nbytes / full if full else 0.0,
        }


def _full_bytes(layer: RetainedLayer) -> int:
    if not layer.held:
        return 0
    a_token = (layer.keys[:, :, :1].nbytes) + (layer.values[:, :, :1].nbytes)
    return a_token * layer.seen
