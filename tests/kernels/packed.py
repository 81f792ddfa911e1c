"""Random packed units: any codes, tables and runs, empty runs and spare room included."""

import torch

from locret.kernels.decode_quantized import PackedUnits


def random_units(batch, heads, count, size, bits, group, device, spare=3):
    """Packed units whose spare room, after the first `count`, is poisoned."""
    runs = -(-count // group) + 3
    nbytes, tables = -(-size * bits // 8), -(-size // group)
    step = 1 / 2**bits

    def table(*shape):
        return step * torch.randn(batch, heads, *shape, device=device)

    codes = torch.randint(
        0, 256, (2, batch, heads, count + spare, nbytes), dtype=torch.uint8, device=device
    )
    value_tables = table(2, count + spare, tables).half()
    value_tables[:, :, :, count:] = torch.nan
    scale, minimum = value_tables.unbind(2)
    return PackedUnits(
        codes[0, :, :, :count],
        table(runs, size).half(),
        table(runs, size).half(),
        random_starts(batch, heads, count, runs, group).to(device),
        codes[1, :, :, :count],
        scale[:, :, :count],
        minimum[:, :, :count],
        bits,
        group,
    )


def random_starts(batch, heads, count, runs, group):
    """int32 [B, H, runs + 1]: runs of 0 to `group` units that cover `count` units."""
    starts = torch.zeros(batch, heads, runs + 1, dtype=torch.int32)
    for start in starts.flatten(0, 1):
        for run in range(runs):
            left = count - int(start[run])
            least = max(0, left - group * (runs - 1 - run))
            most = min(group, left)
            start[run + 1] = start[run] + torch.randint(least, most + 1, ()).int()
    return starts
