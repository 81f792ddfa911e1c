"""Rotate queries and keys at chosen slots with the backbone's own rotary embedding.

The rotary module and `apply_rotary_pos_emb` are the architecture's; this file only decides *where*
a unit is rotated and, for LongRoPE, with which factors. `identity_tables` keep a stock layer from
rotating by itself.

LongRoPE rules (`LongRopeRule`):
  long       the long factors at every length, as the released Locret does for Phi-3.
  by_length  the short factors up to the original window and the long ones beyond it, as stock
             transformers does; decided once per request, by the length of its prompt.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from locret.cache.context import Sequences
from locret.heads.heads import LongRopeRule
from locret.kernels import rotate_at_slots, rotate_units
from locret.kernels.rotate import Pairing

ApplyRotary = Callable[..., tuple[Tensor, Tensor]]

_TABLES_KEPT = 4  # a chunk needs two ranges (all keys, new queries), the same in every layer
_SLOTS = 1024  # the fewest of a table for sequences of different lengths


@dataclass(frozen=True)
class Pattern:
    """How an architecture's `apply_rotary_pos_emb` turns pairs of channels.

    Channel d becomes x[d] * cos[cos_index[d]] + x[partner of d] * sign[d] * sin[sin_index[d]].
    """

    pairing: Pairing
    cos_index: Tensor
    sin_index: Tensor
    sign: Tensor

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary module's tables [B, S, R] as `rotate_at_slots` takes them: one number for each
        channel, signs in the sines."""
        device = cos.device
        if not torch.equal(self.cos_index, torch.arange(cos.shape[-1])):
            cos = cos.index_select(-1, self.cos_index.to(device, non_blocking=True))
            sin = sin.index_select(-1, self.sin_index.to(device, non_blocking=True))
        return cos, sin * self.sign.to(sin.dtype).to(device, non_blocking=True)


class PinnedRotary:
    """A copy of a rotary module, with the frequencies that it uses when it sees `position`.

    Args:
        module: the rotary module. It is copied: modules that update their frequencies in place
            never see our positions.
        position: see above.
        layer_type: whose frequencies, where layers of different types rotate differently.
    """

    def __init__(self, module: Any, position: int, layer_type: str | None = None) -> None:
        # The config is large and shared; the copy needs only frequency buffers of its own.
        pinned = copy.deepcopy(module, {id(module.config): module.config})
        self._module = pinned
        self._which = () if layer_type is None else (layer_type,)
        self.inv_freq: Tensor = getattr(pinned, "_".join([*self._which, "inv_freq"]))
        probe = torch.tensor([[position]], device=self.inv_freq.device)
        self(probe.float(), probe)
        self.inv_freq = getattr(pinned, "_".join([*self._which, "inv_freq"]))
        # From here on the frequencies stay as they are.
        pinned.rope_type = "default" if layer_type is None else {layer_type: "default"}

    def __call__(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, S, R] at `positions` [1, S], on the device of `like`."""
        # The class's forward: hooks and wrappers on the instance are the backbone's business.
        module = self._module
        return type(module).forward(module, like, positions, *self._which)

    @property
    def size(self) -> int:
        """Channels that are turned."""
        return 2 * self.inv_freq.shape[-1]


def find_pattern(apply: ApplyRotary, module: PinnedRotary) -> Pattern | None:
    """The pattern of an architecture's rotation, found by asking its function; None if it is none
    of those that the fused kernel knows."""
    device, size = module.inv_freq.device, module.size
    like, positions = torch.zeros(1, device=device), torch.zeros(1, 1, device=device).long()
    width = module(like, positions)[0].shape[-1]
    channels = torch.arange(1.0, size + 1)
    count, zero, one = torch.arange(1.0, width + 1), torch.zeros(width), torch.ones(width)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.view(1, 1, 1, size)
        return apply(x, x[:, :0], cos.view(1, 1, width), sin.view(1, 1, width))[0].flatten()

    ones = torch.ones(size)
    cos_index = turned(ones, count, zero).long() - 1
    sines, partners = turned(ones, zero, count), turned(channels, zero, one)
    sin_index, partner = sines.abs().long() - 1, partners.abs().long() - 1
    channel = torch.arange(size)
    pairings: dict[Pairing, Tensor] = {
        "half": (channel + size // 2) % size,
        "interleaved": channel ^ 1,
    }
    for pairing, expected in pairings.items():
        if torch.equal(partner, expected):
            return Pattern(pairing, cos_index, sin_index, sines.sign())
    return None


class Tables(NamedTuple):
    """cos and sin [1 or B, S, R] as the backbone's module makes them, and as the fused kernel takes
    them, where it is used."""

    cos: Tensor
    sin: Tensor
    fused: tuple[Tensor, Tensor] | None


class Rotary:
    """Rotation at contiguous slots, with the backbone's own frequencies and layout.

    Args:
        module: the backbone's rotary module, `(x, position_ids [1, S]) -> (cos, sin)`.
        apply: the architecture's `apply_rotary_pos_emb(q, k, cos, sin)`.
        longrope: which LongRoPE rule to follow; without effect for other RoPE types.
        layer_type: whose rotation, where layers of different types rotate differently: the module
            then takes it as its third argument.

    Attributes:
        longrope: the rule that is followed; None for other RoPE types.
        pattern: how pairs of channels are turned; None if no fused kernel knows it.
    """

    def __init__(
        self,
        module: Any,
        apply: ApplyRotary,
        longrope: LongRopeRule = "long",
        layer_type: str | None = None,
    ) -> None:
        if longrope not in get_args(LongRopeRule):
            raise ValueError(f"longrope is {longrope!r}; expected 'long' or 'by_length'")
        self._apply = apply
        self._switch = longrope_switch(module, layer_type)
        self.longrope = None if self._switch is None else longrope
        self._short = self._long = PinnedRotary(module, 0, layer_type)
        if self._switch is not None:
            self._long = PinnedRotary(module, self._switch, layer_type)
        self._tables: dict[tuple, Tables] = {}
        self._grown: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.pattern = find_pattern(apply, self._short)

    def rotate(self, x: Tensor, starts: Sequence[int], prompt_lengths: Sequence[int]) -> Tensor:
        """Rotate `x` [B, heads, S, D] at the slots start .. start + S - 1.

        `starts` and `prompt_lengths` are the rows', or one for all; only LongRoPE's `by_length`
        rule reads the latter.
        """
        return self._turn(x, self._for_rows(starts, x.shape[2], prompt_lengths, x))

    def rotate_sequences(
        self, x: Tensor, sequences: Sequences, prompt_lengths: Sequence[int]
    ) -> Tensor:
        """Rotate flat `x` [N, D]: the longest sequence of a row at the slots from 0 on, the others
        such that their last units share its last slot."""
        if sequences.equal:
            return sequences.flattened(self.rotate(sequences.rectangle(x), (0,), prompt_lengths))
        if len({*map(self._is_long, prompt_lengths)}) > 1:
            rows = sequences.rows()
            each = x.split([row.total for row in rows])
            turned = map(self.rotate_sequences, each, rows, ([n] for n in prompt_lengths))
            return torch.cat([*turned])
        slots = sequences.slots
        cos, sin = self._table_to(sequences.longest, prompt_lengths[0], x)
        if self._fuses(x) and self.pattern is not None:
            return rotate_units(x, cos, sin, slots, self.pattern.pairing)
        at_slots = Tables(cos[slots][None], sin[slots][None], None)
        return self._turn(x[None, None], at_slots)[0, 0]

    def _table_to(self, count: int, prompt_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the slots from 0 on, at least `count`, [S, R]; as the fused kernel takes
        them, where it is used. One table serves all layers, and grows by doubling."""
        long = self._is_long(prompt_length)
        key = long, like.device, like.dtype
        table = self._grown.get(key)
        if table is None or len(table[0]) < count:
            most = 1 << max(count - 1, _SLOTS - 1).bit_length()
            cos, sin = self._compute(0, most, long, like)
            if self._fuses(like) and self.pattern is not None:
                cos, sin = self.pattern.tables(cos, sin)
            table = cos[0], sin[0]
            # A new dict instead of a changed one: threads may share an engine.
            self._grown = self._grown | {key: table}
        return table

    def _fuses(self, like: Tensor) -> bool:
        return self.pattern is not None and like.is_cuda

    def cos_sin(
        self, starts: Sequence[int], count: int, prompt_lengths: Sequence[int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tables [1 or B, count, rotary size] for the slots from each start on, as the
        backbone's own rotary module makes them, in the dtype and on the device of `like`."""
        tables = self._for_rows(starts, count, prompt_lengths, like)
        return tables.cos, tables.sin

    def _for_rows(
        self, starts: Sequence[int], count: int, prompt_lengths: Sequence[int], like: Tensor
    ) -> "Tables":
        rows = max(len(starts), len(prompt_lengths))
        starts, lengths = ([*x] * (rows // len(x)) for x in (starts, prompt_lengths))
        ranges = tuple((s, s + count, n) for s, n in zip(starts, lengths, strict=True))
        if len({(start, self._is_long(length)) for start, _, length in ranges}) == 1:
            ranges = ranges[:1]
        return self._tables_of(ranges, like, dim=0)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` [B, heads, S, D] by tables [1 or B, S, R] as `cos_sin` gives them."""
        return self._turn(x, Tables(cos, sin, None))

    def rotate_ranges(self, x: Tensor, ranges: Sequence[tuple[int, int, int]]) -> Tensor:
        """Rotate `x` [B, heads, S, D], whose tokens fill one range of slots after the other, each
        given as its start, its stop and the length of its prompt."""
        return self._turn(x, self._tables_of(tuple(ranges), x, dim=1))

    def _turn(self, x: Tensor, tables: "Tables") -> Tensor:
        # The fused kernel knows no backward pass: gradients would end here without a word.
        learning = x.requires_grad and torch.is_grad_enabled()
        if tables.fused is not None and self.pattern is not None and not learning:
            return rotate_at_slots(x, *tables.fused, self.pattern.pairing)
        cos, sin = tables.cos, tables.sin
        turned, rest = x[..., : self._short.size], x[..., self._short.size :]
        # The architecture's function takes a pair; we turn one tensor, so the other is empty.
        turned, _ = self._apply(turned, turned[:, :0], cos, sin)
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)

    def _tables_of(
        self, ranges: tuple[tuple[int, int, int], ...], like: Tensor, dim: int
    ) -> "Tables":
        """For slots start .. stop - 1 of requests of some length: one range a row (`dim` 0), or one
        range after the other (`dim` 1)."""
        choices = tuple((start, stop, self._is_long(length)) for start, stop, length in ranges)
        key = (choices, like.device, like.dtype, dim)
        found = self._tables.get(key)
        if found is None:
            tables = [self._compute(*choice, like) for choice in choices]
            cos, sin = (torch.cat(each, dim) for each in zip(*tables, strict=True))
            fused = self.pattern.tables(cos, sin) if self.pattern and self._fuses(like) else None
            found = Tables(cos, sin, fused)
            # A new dict instead of a changed one: threads may share an engine.
            self._tables = dict([*self._tables.items()][1 - _TABLES_KEPT :]) | {key: found}
        return found

    def _compute(self, start: int, stop: int, long: bool, like: Tensor) -> tuple[Tensor, Tensor]:
        module = self._long if long else self._short
        positions = torch.arange(start, stop, device=like.device)[None]
        return module(like, positions)

    def _is_long(self, prompt_length: int) -> bool:
        if self._switch is None:
            return False
        return self.longrope == "long" or prompt_length > self._switch


def longrope_switch(module: Any, layer_type: str | None = None) -> int | None:
    """The length above which a LongRoPE module uses its long factors; None for other types."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_VIEWS = (
    Tensor.__getitem__,
    Tensor.unsqueeze,
    Tensor.float,
    Tensor.to,
    Tensor.repeat_interleave,
    torch.repeat_interleave,
)


class IdentityTable(Tensor):
    """A tensor all of whose values are `constant`, 0 or 1, and that knows it.

    An attention layer applies the rotation that it is given. To get its queries and keys before
    RoPE we give it cos = 1 and sin = 0; multiplying by these would still move all queries and keys
    through memory five times. Here a product with ones is the other factor, a product with zeros is
    zero, a sum with zeros is the other term. Every other operation computes as usual, so that
    results never depend on it.
    """

    constant: int

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not kwargs and len(args) == 2 and function in _PRODUCTS + _SUMS:
            with torch._C.DisableTorchFunctionSubclass():  # its questions would come here, too
                shortcut = _shortcut(function in _PRODUCTS, *args)
            if shortcut is not None:
                return shortcut
        plain = [arg.as_subclass(Tensor) if isinstance(arg, cls) else arg for arg in args]
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*plain, **(kwargs or {}))
        if function in _VIEWS and isinstance(args[0], cls) and isinstance(result, Tensor):
            return _table(result, args[0].constant)
        return result


def identity_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos = 1 and sin = 0 in the shapes, dtypes and on the devices of `cos` and `sin`."""
    one, zero = (_number(i, x.dtype, x.device).expand(x.shape) for i, x in ((1, cos), (0, sin)))
    return _table(one, 1), _table(zero, 0)


@functools.cache
def _number(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One element, made once: every layer of every chunk asks for it."""
    with torch.inference_mode(False):  # training may ask for what an engine asked for first
        return torch.full((), value, dtype=dtype, device=device)


def _table(values: Tensor, constant: int) -> IdentityTable:
    table = values.as_subclass(IdentityTable)
    table.constant = constant
    return table


def _shortcut(product: bool, first: Any, second: Any) -> Tensor | None:
    """The result where it is one of the operands, or zeros that are known to be."""
    for table, other in ((first, second), (second, first)):
        if not isinstance(table, IdentityTable) or not isinstance(other, Tensor):
            continue
        if isinstance(other, IdentityTable) or torch.promote_types(table.dtype, other.dtype) != (
            other.dtype
        ):
            continue
        if not _broadcasts(table.shape, other.shape):
            continue
        if product and table.constant == 0:
            return table if table.dtype == other.dtype else None
        if product == (table.constant == 1):
            return other
    return None


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of `shape` can be repeated to fill one of shape `to`;
    `torch.broadcast_shapes` takes longer than what it saves here."""
    last = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape, last, strict=True))
