"""The sparse half: found, moved, put back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization.codes import Outliers, find_outliers


def some(generator, units, size):
    x = torch.randn(units, size, generator=generator).half()
    x[torch.rand(x.shape, generator=generator) < 0.1] *= 40
    return x


def found_in(x):
    return find_outliers(x, x.abs() > 6)


def dense(outliers, size):
    x = torch.zeros(len(outliers.counts), size)
    outliers.write(x, torch.arange(len(x)))
    return x


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(1, 60), st.sampled_from([1, 7, 300]))
def test_they_move_with_their_units(seed, first, second, size):
    generator = torch.Generator().manual_seed(seed)
    one, other = some(generator, first, size), some(generator, second, size)
    both = torch.cat([one, other])
    index = torch.randint(first + second, (54,), generator=generator)
    joined = Outliers.join([found_in(one), found_in(other)])
    expected = both.where(both.abs() > 6, 0).float()
    assert torch.equal(dense(joined, size), expected)
    assert torch.equal(dense(joined.select(index), size), expected[index])
    square = index.view(6, 9)
    x = torch.zeros(*square.shape, size)
    joined.write(x, square)
    assert torch.equal(x, expected[square])


def test_none_found():
    outliers = found_in(torch.zeros(8, 8))
    assert len(outliers.values) == 0 and not dense(outliers, 8).any()
    assert sum(tensor.nbytes for tensor in outliers.tensors) == 8


def test_bytes_of_an_outlier():
    x = torch.zeros(4, 8)
    x[1, 5] = 7
    assert sum(tensor.nbytes for tensor in found_in(x).tensors) == 4 + 3
