"""Units of the scheme `fp8`: expanded."""

import pytest
import torch

from locret.kernels.packed import E4M3, expand_units, expand_units_reference
from tests.kernels.packed import random_starts
from tests.kernels.test_kernel_packed import assert_equal

FINITE = [code for code in range(256) if code & 127 != 127]


def random_floats(lengths, size, group, device):
    """Keys and values of sequences of these lengths, of any codes, and the keys' starts."""
    starts, count = random_starts(lengths, group).to(device), sum(lengths)
    codes = torch.tensor(FINITE, dtype=torch.uint8, device=device)
    codes = codes[torch.randint(len(FINITE), (2, count, size), device=device)]

    def table(*shape):
        return (torch.randn(shape, device=device) / 448).half()

    blocks = len(starts) - 1
    keys = codes[0], table(blocks, size), 100 * table(blocks, size)
    return keys, (codes[1], table(count, 1)), starts


@pytest.mark.parametrize(
    ("lengths", "size", "group"),
    [
        ([139, 0, 90], 64, 64),
        ([70, 1], 128, 32),
        ([65], 80, 64),
        ([0, 130, 2, 40], 96, 128),
        ([9, 11], 17, 16),
        ([30], 256, 8),
        ([200], 2, 1),
        ([0], 8, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_expanded_is_bit_for_bit_what_the_twin_gives(lengths, size, group, dtype, device):
    keys, values, starts = random_floats(lengths, size, group, device)
    count = sum(lengths)
    at = torch.randperm(count + 5, device=device)[:count]
    for side, of_blocks in ((keys, starts), (values, None)):
        expected = expand_units_reference(side, E4M3, size, size, of_blocks).to(dtype)
        out = torch.full((count + 5, size + 3), torch.nan, device=device).to(dtype)
        whole = out.clone()
        expand_units(side, E4M3, size, out[2 : count + 2, :size], of_blocks)
        whole[2 : count + 2, :size] = expected
        assert_equal(out, whole)
        out.fill_(torch.nan)
        whole.fill_(torch.nan)
        expand_units(side, E4M3, size, out[:, 1:-2], of_blocks, at)
        whole[at, 1:-2] = expected
        assert_equal(out, whole)


def test_what_does_not_fit_is_refused(device):
    keys, values, starts = random_floats([9, 3], 8, 4, device)
    out = torch.empty(12, 8, device=device)
    with pytest.raises(ValueError, match="scale is torch.float16"):
        expand_units((values[0], keys[1]), E4M3, 8, out)
    with pytest.raises(ValueError, match="codes is torch.float32"):
        expand_units((values[0].float(), values[1]), E4M3, 8, out)
    with pytest.raises(ValueError, match="starts is torch.int64"):
        expand_units(keys, E4M3, 8, out, starts.long())
    with pytest.raises(ValueError, match="expected a floating type"):
        expand_units(values, E4M3, 8, out[1:])


def test_every_code_is_the_float_that_torch_knows(device):
    codes = torch.tensor(FINITE, dtype=torch.uint8, device=device)[None]
    out = torch.empty(1, len(FINITE), device=device)
    expand_units((codes, torch.ones(1, 1, device=device).half()), E4M3, len(FINITE), out)
    assert torch.equal(out, codes.view(torch.float8_e4m3fn).float())
