"""Packed codes come back exactly, whatever the shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locret.quantization.codes import pack, packed_size, unpack


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bits=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_codes_come_back(shape, bits, seed):
    codes = torch.randint(
        2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.shape[-1] == packed_size(shape[-1], bits)
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)


@pytest.mark.parametrize(
    ("bits", "size", "expected"), [(4, 64, 32), (4, 7, 4), (2, 9, 3), (1, 9, 2), (8, 5, 5)]
)
def test_packed_size(bits, size, expected):
    assert packed_size(size, bits) == expected


def test_halves_of_the_bytes_are_halves_of_the_channels():
    codes = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.uint8)
    packed = pack(codes, 4)
    assert (packed & 15).tolist() == [1, 2, 3]
    assert (packed >> 4).tolist() == [4, 5, 6]


def test_packed_codes_of_a_token_are_contiguous():
    assert pack(torch.zeros(2, 3, 5, 64, dtype=torch.uint8), 4).is_contiguous()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits is 3; expected one of 1, 2, 4, 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 3)
