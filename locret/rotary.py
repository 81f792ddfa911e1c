"""Rotate queries and keys at chosen slots with the backbone's own rotary embedding.

The rotary module and `apply_rotary_pos_emb` are the architecture's; this file only decides *where*
a unit is rotated and, for LongRoPE, with which factors.

LongRoPE rules (`LongRopeRule`):
  long       the long factors at every length, as the released Locret does for Phi-3.
  by_length  the short factors up to the original window and the long ones beyond it, as stock
             transformers does; decided once per request, by the length of its prompt.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

LongRopeRule = Literal["long", "by_length"]
ApplyRotary = Callable[..., tuple[Tensor, Tensor]]

_TABLES_KEPT = 4  # a chunk needs two ranges (all keys, new queries), the same in every layer


class Rotary:
    """Rotation at contiguous slots, with the backbone's own frequencies and layout.

    Args:
        module: the backbone's rotary module, `(x, position_ids [1, S]) -> (cos, sin)`. It is
            copied: modules that update their frequencies in place never see our positions.
        apply: the architecture's `apply_rotary_pos_emb(q, k, cos, sin)`.
        longrope: which LongRoPE rule to follow; without effect for other RoPE types.
    """

    def __init__(self, module: Any, apply: ApplyRotary, longrope: LongRopeRule = "long") -> None:
        if longrope not in get_args(LongRopeRule):
            raise ValueError(f"longrope is {longrope!r}; expected 'long' or 'by_length'")
        self._apply = apply
        self._longrope = longrope
        self._switch = longrope_switch(module)
        self._short = _pinned(module, position=0)
        self._long = self._short if self._switch is None else _pinned(module, self._switch)
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def rotate(self, x: Tensor, starts: Sequence[int], prompt_lengths: Sequence[int]) -> Tensor:
        """Rotate `x` [B, heads, S, D] at the slots start .. start + S - 1.

        `starts` and `prompt_lengths` are the rows', or one for all; only LongRoPE's `by_length`
        rule reads the latter.
        """
        return self._turn(x, *self.cos_sin(starts, x.shape[2], prompt_lengths, x))

    def cos_sin(
        self, starts: Sequence[int], count: int, prompt_lengths: Sequence[int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tables [1 or B, count, rotary size] for the slots from each start on, as the
        backbone's own rotary module makes them, in the dtype and on the device of `like`."""
        rows = max(len(starts), len(prompt_lengths))
        starts, lengths = ([*x] * (rows // len(x)) for x in (starts, prompt_lengths))
        ranges = tuple((s, s + count, n) for s, n in zip(starts, lengths, strict=True))
        if len({(start, self._is_long(length)) for start, _, length in ranges}) == 1:
            ranges = ranges[:1]
        return self._cos_sin(ranges, like, dim=0)

    def rotate_packed(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Rotate `x` [B, heads, S, D], in which sequences of these lengths stand one after the
        other, each from slot 0 on."""
        cos, sin = self._cos_sin(tuple((0, length, length) for length in lengths), x, dim=1)
        return self._turn(x, cos, sin)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotary_size = cos.shape[-1]
        turned, rest = x[..., :rotary_size], x[..., rotary_size:]
        # The architecture's function takes a pair; we turn one tensor, so the other is empty.
        turned, _ = self._apply(turned, turned[:, :0], cos, sin)
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)

    def _cos_sin(
        self, ranges: tuple[tuple[int, int, int], ...], like: Tensor, dim: int
    ) -> tuple[Tensor, Tensor]:
        """For slots start .. stop - 1 of requests of some length: one range a row (`dim` 0), or one
        range after the other (`dim` 1)."""
        choices = tuple((start, stop, self._is_long(length)) for start, stop, length in ranges)
        key = (choices, like.device, like.dtype, dim)
        found = self._tables.get(key)
        if found is None:
            parts = [self._compute(*choice, like) for choice in choices]
            found = torch.cat([c for c, _ in parts], dim), torch.cat([s for _, s in parts], dim)
            # A new dict instead of a changed one: threads may share an engine.
            self._tables = dict([*self._tables.items()][1 - _TABLES_KEPT :]) | {key: found}
        return found

    def _compute(self, start: int, stop: int, long: bool, like: Tensor) -> tuple[Tensor, Tensor]:
        module = self._long if long else self._short
        positions = torch.arange(start, stop, device=like.device)[None]
        return type(module).forward(module, like, positions)

    def _is_long(self, prompt_length: int) -> bool:
        if self._switch is None:
            return False
        return self._longrope == "long" or prompt_length > self._switch


def longrope_switch(module: Any) -> int | None:
    """The length above which a LongRoPE module uses its long factors; None for other types."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])


def _pinned(module: Any, position: int) -> Any:
    """A copy of a rotary module, with the frequencies that it uses when it sees `position`."""
    # The config is large and shared; the copy needs only frequency buffers of its own.
    pinned = copy.deepcopy(module, {id(module.config): module.config})
    probe = torch.tensor([[position]], device=pinned.inv_freq.device)
    # The class's forward: hooks and wrappers on the instance are the backbone's business.
    type(pinned).forward(pinned, probe.float(), probe)
    pinned.rope_type = "default"  # from here on the frequencies stay as they are
    return pinned
