"""The plain twin of a layer's store: for every row and head, lists of units."""

import copy

import torch

from locret.quantization.packed import pack_values
from tests.quantization.naive import KeySequence


class TwinSequence:
    """The units of one row and head. The first ones are packed, the last `tail` ones are the
    tail; those between and these are (key, value) as they are held.

    `exact` has, by name, what is never packed of every unit.
    """

    def __init__(self, scheme, size):
        self.packed_keys, self.packed_values = KeySequence(scheme, size), []
        self.plain, self.exact, self.tail = [], [], 0

    def __len__(self):
        return len(self.exact)

    @property
    def packed(self):
        return len(self.packed_values)

    def held(self, dtype):
        """(key, value) of every unit."""
        keys = self.packed_keys.dense().to(dtype)
        values = [packed.dense(dtype)[0] for packed in self.packed_values]
        return [*zip(keys, values, strict=True), *self.plain]

    def add(self, units, exact):
        self.plain, self.exact = self.plain + units, self.exact + exact


class TwinStore:
    def __init__(self, scheme, size, dtype, rows, heads):
        self.scheme, self.dtype = scheme, dtype
        self.rows = [[TwinSequence(scheme, size) for _ in range(heads)] for _ in range(rows)]

    @property
    def sequences(self):
        return [sequence for row in self.rows for sequence in row]

    @property
    def tail(self):
        return self.rows[0][0].tail

    def counts(self, of=len):
        return tuple(tuple(map(of, row)) for row in self.rows)

    def append(self, new):
        """New units `[B][H]`: lists of (key, value) and of what is exact, by name."""
        for sequence, (units, exact) in zip(self.sequences, sum(new, []), strict=True):
            sequence.add(units, exact)
            sequence.tail += len(units)

    def retain(self, numbers):
        """Keep the units of these numbers, a list for each sequence."""
        self._hold(numbers, [max(len(kept) - self.scheme.residual, 0) for kept in numbers])

    def pack(self, tight=False):
        if not self.scheme.packs or not self.tail:
            return
        unit = 1 if tight else self.scheme.group
        packed = [
            s.packed + max(len(s) - s.packed - self.scheme.residual, 0) // unit * unit
            for s in self.sequences
        ]
        if tight or packed != [s.packed for s in self.sequences]:
            self._hold([list(range(len(s))) for s in self.sequences], packed)

    def freeze(self, rotate):
        for s in self.sequences:
            units, packed = s.held(self.dtype), s.packed
            units = [(rotate(key), value) for key, value in units]
            s.plain = units[packed:]
            s.packed_keys.blocks = []
            if packed:
                s.packed_keys.select([], torch.stack([key for key, _ in units[:packed]]))

    def drop_last(self, count):
        for s in self.sequences:
            s.plain, s.exact = s.plain[: len(s.plain) - count], s.exact[: len(s) - count]
            s.tail -= count

    def take(self, rows):
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    def absorb_tail(self):
        for s in self.sequences:
            s.tail = 0

    def _hold(self, numbers, packed):
        if not self.scheme.packs:
            packed = [0] * len(packed)
        # What no sequence had packed is packed as it comes.
        some = any(s.packed for s in self.sequences)
        for s, kept, count in zip(self.sequences, numbers, packed, strict=True):
            units = s.held(self.dtype)
            old = [n for n in kept[:count] if n < s.packed]
            late = [units[n] for n in kept[:count] if n >= s.packed]
            s.plain = [units[n] for n in kept[count:]]
            if late or old or s.packed:
                size = s.packed_keys.size
                keys = torch.stack([k for k, _ in late]) if late else torch.empty(0, size)
                element_size = self.dtype.itemsize
                s.packed_keys.select(old, keys.float() if some else keys, element_size)
            values = [pack_values(self.scheme, value[None]) for _, value in late]
            s.packed_values = [s.packed_values[n] for n in old] + values
            s.exact = [s.exact[n] for n in kept]
            s.tail = 0
