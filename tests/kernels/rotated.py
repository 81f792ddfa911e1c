"""Random units of the scheme `rotated`: any codes, scales, means and blocks."""

import torch

from locret.kernels.packed import RotatedKV
from tests.kernels.packed import random_starts

LEVELS = {
    2: (0.4527800346, 1.5104176085),
    3: (0.2450941789, 0.7560052813, 1.3439092785, 2.1519457045),
    4: (
        *(0.1283950299, 0.3880482995, 0.6567591185, 0.9423404565),
        *(1.2562311973, 1.6180463860, 2.0690172265, 2.7325895710),
    ),
    8: tuple(step + 0.5 for step in range(128)),
}


def random_rotated(lengths, size, key_bits, value_bits, device, group=64):
    """Units of sequences of these lengths, elements about 1."""
    starts, count = random_starts(lengths, group).to(device), sum(lengths)

    def side(bits):
        shape = (count, size * bits // 8)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        scale = 0.5 + torch.rand(count, 1, device=device)
        return codes, (scale / (127.5 if bits == 8 else 1.0)).half()

    mean = torch.randn(len(starts) - 1, size, device=device).bfloat16()
    levels = LEVELS[key_bits], LEVELS[value_bits]
    return RotatedKV((*side(key_bits), mean), starts, side(value_bits), *levels, group)
