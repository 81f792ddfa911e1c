"""Random packed units: any codes, tables and blocks."""

import torch

from locret.kernels.decode_general import PackedShares
from locret.kernels.packed import PackedKV
from locret.kernels.splits import share_out


def random_units(lengths, size, bits, group, device):
    """Packed units of sequences of these lengths."""
    count, nbytes, groups = sum(lengths), -(-size * bits // 8), -(-size // group)
    starts = random_starts(lengths, group).to(device)
    codes = torch.randint(0, 256, (2, count, nbytes), dtype=torch.uint8, device=device)

    def table(rows, columns):
        return tuple((torch.randn(2, rows, columns, device=device) / 2**bits).half())

    key_tables, value_tables = table(len(starts) - 1, size), table(count, groups)
    return PackedKV((codes[0], *key_tables), starts, (codes[1], *value_tables), bits, group)


def random_starts(lengths, group):
    """int32: blocks of 1 to `group` units, most of them full, none across a sequence's border."""
    starts = [0]
    for length in lengths:
        end = starts[-1] + length
        while starts[-1] < end:
            full = torch.rand(()) < 0.5
            block = group if full else int(torch.randint(1, group + 1, ()))
            starts.append(min(end, starts[-1] + block))
    return torch.tensor(starts, dtype=torch.int32)


def random_shares(packed, lengths, device):
    """Many small tiles of those units."""
    return PackedShares.along(packed.starts, share_out(lengths, 12, device, least=16))
