"""Random packed units: any codes, tables and blocks, empty blocks and spare room included."""

import torch

from locret.kernels.packed import PackedKV


def random_units(batch, heads, count, size, bits, group, device, spare=3):
    """Packed units whose spare room, after the first `count`, is poisoned."""
    blocks = -(-count // group) + 3
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
    return PackedKV(
        (codes[0, :, :, :count], table(blocks, size).half(), table(blocks, size).half()),
        random_starts(batch, heads, count, blocks, group).to(device),
        (codes[1, :, :, :count], scale[:, :, :count], minimum[:, :, :count]),
        bits,
        group,
    )


def random_starts(batch, heads, count, blocks, group):
    """int32 [B, H, blocks + 1]: blocks of 0 to `group` units that cover `count` units."""
    starts = torch.zeros(batch, heads, blocks + 1, dtype=torch.int32)
    for start in starts.flatten(0, 1):
        for block in range(blocks):
            left = count - int(start[block])
            least = max(0, left - group * (blocks - 1 - block))
            most = min(group, left)
            start[block + 1] = start[block] + torch.randint(least, most + 1, ()).int()
    return starts
