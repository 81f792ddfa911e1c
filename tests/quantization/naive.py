"""Plain twins, in lists: the formulas unit by unit, and what an eviction does to one sequence."""

import torch

from locret.quantization.blocks import block_limit, costs_of


def affine(x, bits):
    """KIVI's formula for one group [n], in float32, with a float16 scale and minimum."""
    low, high, last = x.min(), x.max(), 2**bits - 1
    for _ in range(2):  # the scale of the range, then of the range as it comes back
        scale = ((high - low) / last).clamp(min=2.0 ** (bits - 24)).half().float()
        high = (low + scale * ((high - low) / scale).round().clamp(0, last)).half().float()
    codes = ((x - low) / scale).round().clamp(0, last)
    return low + scale * codes


def kivi_keys(x, bits, group):
    """Restored keys [S, D] of one head: groups of `group` tokens, a channel at a time."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], group):
        for channel in range(x.shape[1]):
            part = x[start : start + group, channel]
            out[start : start + group, channel] = affine(part, bits)
    return out


def kivi_values(x, bits, group):
    """Restored values [S, D] of one head: a token at a time, groups of `group` channels."""
    out = torch.empty_like(x)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            out[token, start : start + group] = affine(x[token, start : start + group], bits)
    return out


class KeySequence:
    """The packed keys of one sequence: a list of blocks, each of an entry and a list of units; a
    unit is its codes, its outliers (channel -> value) and, as long as it is fresh, what it was."""

    def __init__(self, scheme, size):
        self.scheme, self.size, self.blocks = scheme, size, []

    def select(self, kept, fresh, element_size=2):
        """Keep the units `kept` (numbers, ascending) and `fresh` [F, D] after them."""
        first, every = 0, self.blocks
        self.blocks = []
        for entry, units in every:
            left = [unit for i, unit in enumerate(units) if first + i in kept]
            first += len(units)
            self.blocks += [(entry, left)] if left else []
        # What was never packed is encoded in the type it came in, else in float32.
        fresh = fresh.float() if every else fresh
        self.blocks += self._encoded(fresh)
        total = sum(len(units) for _, units in self.blocks)
        costs = costs_of(self.scheme, self.size, element_size)
        excess = len(self.blocks) - block_limit(costs, total, self.scheme.residual)
        if every and excess > 0:
            self._repack(excess)
        self.blocks = [
            (entry, [(*unit[:2], None) for unit in units]) for entry, units in self.blocks
        ]

    def dense(self):
        """float32 [N, D]."""
        units = [self._decoded(entry, unit) for entry, units in self.blocks for unit in units]
        return torch.stack(units) if units else torch.empty(0, self.size)

    def _repack(self, excess):
        stretches = [self.blocks[i : i + 4] for i in range(0, len(self.blocks), 4)]
        counts = [sum(len(units) for _, units in blocks) for blocks in stretches]
        saved = [
            len(blocks) + -count // self.scheme.group
            for blocks, count in zip(stretches, counts, strict=True)
        ]
        order = [i for i in range(len(saved)) if saved[i] > 0]
        order.sort(key=lambda i: counts[i] / saved[i])
        while excess > 0 and order:
            chosen = order.pop(0)
            excess -= saved[chosen]
            stretches[chosen] = self._again(stretches[chosen])
        if excess > 0:
            stretches = [self._again(self.blocks)]
        self.blocks = sum(stretches, [])

    def _again(self, blocks):
        twin = KeySequence(self.scheme, self.size)
        twin.blocks = blocks
        return self._encoded(twin.dense())

    def _encoded(self, x):
        blocks = []
        for start in range(0, len(x), self.scheme.group):
            own = x[start : start + self.scheme.group]
            filled = own[torch.arange(self.scheme.group).clamp(max=len(own) - 1)]
            large = self.scheme.outlying_keys(filled)
            units, entry = self.scheme.encode_keys(filled, None if large is None else ~large)
            blocks.append((entry, [self._unit(units, own, large, i) for i in range(len(own))]))
        return blocks

    def _unit(self, units, x, large, i):
        found = {} if large is None else {c: x[i, c].half() for c in large[i].nonzero()[:, 0]}
        return tuple(tensor[i] for tensor in units), found, x[i]

    def _decoded(self, entry, unit):
        codes, outliers, exact = unit
        if exact is not None:
            return exact.float()
        x = self.scheme.decode_keys(codes, entry, self.size)
        for channel, value in outliers.items():
            x[channel] = value.float()
        return x
