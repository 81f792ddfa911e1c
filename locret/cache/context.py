"""What evictions have left of a layer: flat, ragged tensors that never change where they stand.

Of a context that stays, source positions are a bit for every token read, set where a unit is held;
a row whose heads hold few of very many tokens keeps its numbers, which are fewer bytes then.

N units of Q = B * H sequences, D head size.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from locret.cache.sequences import Sequences, alike, sequences_of
from locret.quantization import Scheme
from locret.quantization.base import Tensors
from locret.quantization.codes import Outliers, pack, unpack
from locret.quantization.packed import Expansion, PackedKeys, PackedValues, join, select_keys, take

POSITIONS = "source_positions"
BYTE = 8


@dataclass(frozen=True)
class StoredContext:
    """What evictions have left of a layer.

    Attributes:
        sequences: of all N units.
        packed: of the first units of each, which are packed.
        plain: of the others, which stand as they came.
        keys, values: of the plain units, flat [*, D].
        exact: what is never packed, of all units, by name: "source_positions" [N] int32, "scores"
            [N] float32 (higher = keep), "weights" [N] float32, how many tokens the value of a unit
            is the mean of.
        packed_keys, packed_values: None = nothing is packed.
        positions: source positions of each row (`packed_positions`), which `exact` has no
            more then; None = it has.
        appended: of each row, how many of every head's last units came after its last eviction.
    """

    sequences: Sequences
    packed: Sequences
    plain: Sequences
    keys: Tensor
    values: Tensor
    exact: dict[str, Tensor]
    packed_keys: PackedKeys | None = None
    packed_values: PackedValues | None = None
    positions: tuple[Tensor, ...] | None = None
    appended: tuple[int, ...] = field(kw_only=True)

    @property
    def kv_tensors(self) -> tuple[Tensor, ...]:
        """All storage of keys and values."""
        packed = [p.tensors for p in (self.packed_keys, self.packed_values) if p is not None]
        return (self.keys, self.values, *sum(packed, ()))

    def all_keys(self) -> Tensor:
        """[N, D] in the order of slots; packed ones are expanded."""
        return self._whole(self.keys, self.packed_keys)

    def all_values(self) -> Tensor:
        """[N, D] in the order of slots; packed ones are expanded."""
        return self._whole(self.values, self.packed_values)

    def flat(self, name: str) -> Tensor:
        """[N, *] of one of `NAMES`, in the order of slots."""
        if name in ("keys", "values"):
            return self.all_keys() if name == "keys" else self.all_values()
        return self.in_full[name]

    @property
    def in_full(self) -> dict[str, Tensor]:
        """`exact` with the source positions."""
        if self.positions is None:
            return self.exact
        return {POSITIONS: unpacked_positions(self.positions)} | self.exact

    def closed(self, packed: tuple[Tensor, ...] | None = None) -> "StoredContext":
        """The same units, their source positions in less, which may be known as `packed`: nothing
        is evicted any more."""
        if self.positions is not None:
            return self
        exact = {name: x for name, x in self.exact.items() if name != POSITIONS}
        packed = packed or packed_positions(self.exact[POSITIONS], self.sequences)
        return replace(self, exact=exact, positions=packed)

    def _whole(self, plain: Tensor, packed: PackedKeys | PackedValues | None) -> Tensor:
        if packed is None:
            return plain
        whole = plain.new_empty(self.sequences.total, plain.shape[1])
        Expansion(packed, places(self.sequences, self.packed, at_end=False)).write(whole)
        whole.index_copy_(0, places(self.sequences, self.plain, at_end=True), plain)
        return whole

    def tightened(self) -> "StoredContext":
        """The same units, thin blocks of keys packed anew but for few."""
        keys, lengths = self.packed_keys, self.packed.flat
        if keys is None:
            return self
        every = torch.arange(keys.count, device=keys.device)
        unused = self.keys.new_zeros(1, keys.head_size)  # kernels want an address
        keys = select_keys(keys.scheme, keys, lengths, unused, every, lengths, tight=True)
        return replace(self, packed_keys=keys)

    def take(self, rows: Sequence[int]) -> "StoredContext":
        """Some rows, which may repeat."""
        index, plain = self.sequences.index_of(rows), self.plain.index_of(rows)
        keys, values = self.packed_keys, self.packed_values
        if keys is not None and values is not None:
            heads = self.sequences.shape[1]
            which = [row * heads + head for row in rows for head in range(heads)]
            keys = take(keys, self.packed.flat, which)
            values = take(values, self.packed.flat, which)
        return StoredContext(
            self.sequences.take(rows),
            self.packed.take(rows),
            self.plain.take(rows),
            self.keys.index_select(0, plain),
            self.values.index_select(0, plain),
            {name: x.index_select(0, index) for name, x in self.exact.items()},
            keys,
            values,
            self.positions and tuple(self.positions[row] for row in rows),
            appended=tuple(self.appended[row] for row in rows),
        )


def nothing(names: Sequence[str], fresh: Sequence[Tensor]) -> StoredContext:
    """A context without units, like fresh ones: their tensors [B, H, T, *] by name, keys and values
    first."""
    keys, values, *exact = (x.new_empty(0, *x.shape[3:]) for x in fresh)
    rows, heads = fresh[0].shape[:2]
    none, named = alike(rows, (0,) * heads, keys.device), zip(names[2:], exact, strict=True)
    return StoredContext(none, none, none, keys, values, dict(named), appended=(0,) * rows)


@functools.lru_cache(maxsize=4)  # a layer's keys and values; what is kept keeps memory
def places(whole: Sequences, some: Sequences, at_end: bool) -> Tensor:
    """Where in flat tensors of `whole` the first, or the last, units of each sequence are, of which
    there are as many as `some` has; long [units of `some`]."""
    first = whole.offsets[:-1].long()
    if at_end:
        first = first + (whole.lengths - some.lengths).flatten()
    return first[some.owner] + some.local


def stack(rows: Sequence[StoredContext | None]) -> StoredContext | None:
    """Contexts of one row each as one, closed if one is; None = a row without units, or no row has
    any."""
    if any(row is not None and row.positions is not None for row in rows):
        rows = [row and row.closed() for row in rows]
    some = [row for row in rows if row is not None]
    if not some:
        return None
    heads, device = some[0].sequences.shape[1], some[0].sequences.device

    def joined(which: Callable[[StoredContext], Sequences]) -> Sequences:
        none = (0,) * heads
        counts = tuple(none if row is None else which(row).counts[0] for row in rows)
        return sequences_of(counts, device)

    keys = [row.packed_keys for row in some if row.packed_keys is not None]
    values = [row.packed_values for row in some if row.packed_values is not None]
    none = some[0].sequences.offsets.new_empty(0)  # int32
    positions = [(none,) if row is None else row.positions or () for row in rows]
    return StoredContext(
        joined(lambda row: row.sequences),
        joined(lambda row: row.packed),
        joined(lambda row: row.plain),
        torch.cat([row.keys for row in some]),
        torch.cat([row.values for row in some]),
        {name: torch.cat([row.exact[name] for row in some]) for name in some[0].exact},
        join(keys) if keys else None,
        join(values) if values else None,
        None if some[0].positions is None else sum(positions, ()),
        appended=tuple(0 if row is None else row.appended[0] for row in rows),
    )


def in_storage(context: StoredContext, index: Tensor, owner: Tensor, tokens: int) -> Tensor:
    """Where units are: the packed ones of the context, its plain ones, fresh ones, one after the
    other.

    Args:
        index: long [K], within each unit's sequence.
        owner: long [K], that sequence.
        tokens: fresh units of each sequence.
    """
    packed, plain = context.packed, context.plain
    # Each sequence is three stretches: their lengths, and where they begin in storage.
    lengths = [(*both, tokens) for both in zip(packed.flat, plain.flat, strict=True)]
    first_plain, first_fresh = packed.total, packed.total + plain.total
    stored = [
        (packed.bounds[i], first_plain + plain.bounds[i], first_fresh + i * tokens)
        for i in range(len(lengths))
    ]
    ends = torch.tensor(lengths).flatten().cumsum(0)
    starts = ends - torch.tensor(lengths).flatten()
    table = torch.stack([starts, ends, torch.tensor(stored).flatten() - starts])
    starts, ends, shifts = table.to(index.device, non_blocking=True)
    unit = index + starts[::3][owner]  # all stretches counted through
    return unit + shifts[torch.searchsorted(ends, unit, right=True)]


def to_named(keys: PackedKeys | None, values: PackedValues | None) -> dict[str, Tensor]:
    """All tensors by name, for files."""
    if keys is None or values is None:
        return {}
    named = {
        "key_units": keys.units,
        "key_tables": keys.tables,
        "key_outliers": keys.outliers.tensors if keys.outliers else (),
        "value_units": values.units,
        "value_outliers": values.outliers.tensors if values.outliers else (),
    }
    flat = {f"{name}.{i}": x for name, tensors in named.items() for i, x in enumerate(tensors)}
    return flat | {"key_starts": keys.starts}


def from_named(
    scheme: Scheme, head_size: int, named: dict[str, Tensor]
) -> tuple[PackedKeys | None, PackedValues | None]:
    """What `to_named` was told of; there may be other tensors among them."""
    if "key_starts" not in named:
        return None, None

    def tensors(name: str) -> Tensors:
        count = sum(other.startswith(f"{name}.") for other in named)
        return tuple(named[f"{name}.{i}"] for i in range(count))

    found = [tensors(f"{side}_outliers") for side in ("key", "value")]
    of_keys, of_values = (Outliers(*each) if each else None for each in found)
    tables = tensors("key_tables"), named["key_starts"]
    keys = PackedKeys(scheme, head_size, tensors("key_units"), of_keys, *tables)
    return keys, PackedValues(scheme, head_size, tensors("value_units"), of_values)


def packed_positions(positions: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
    """A tensor for each row: bits uint8 [H, W], or its numbers int32, whichever is smaller.

    The host waits for the device, to learn how many tokens a row has read.

    Args:
        positions: int32 [N], ascending in each of the `sequences`, at least 0.
    """
    rows = [sequences.take([row]) for row in range(sequences.shape[0])]
    each = zip(positions.split([row.total for row in rows]), rows, strict=True)
    return tuple(_packed(own, row) for own, row in each)


def _packed(positions: Tensor, row: Sequences) -> Tensor:
    heads, last = row.shape[1], int(positions.max()) if len(positions) else -1
    tokens = (last // BYTE + 1) * BYTE
    if not 0 < heads * tokens < BYTE * positions.nbytes:
        return positions.clone()
    bits = torch.zeros(heads, tokens, dtype=torch.uint8, device=positions.device)
    bits[row.owner, positions.long()] = 1
    return pack(bits, 1)


def unpacked_positions(rows: Sequence[Tensor]) -> Tensor:
    """The int32 [N] that `packed_positions` was given."""
    return torch.cat([_unpacked(row) if row.dtype == torch.uint8 else row for row in rows])


def _unpacked(bits: Tensor) -> Tensor:
    return unpack(bits, 1, bits.shape[1] * BYTE).nonzero()[:, 1].int()


def positions_bytes(units: int, heads: int, tokens: int) -> int:
    """Most bytes of a row of that many units in all heads, of so many tokens read."""
    return min(units * torch.int32.itemsize, heads * -(-tokens // BYTE))
