"""The sparse half: found, moved, put back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.quantization.codes import find_outliers


def some(generator, units, size):
    x = torch.randn(2, 3, units, size, generator=generator).half()
    x[torch.rand(x.shape, generator=generator) < 0.1] *= 40
    return x


def dense(outliers, size):
    units = outliers.counts.numel()
    x = torch.zeros(*outliers.counts.shape, size)
    outliers.write(x, torch.arange(units).view(outliers.counts.shape))
    return x


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 7, 300]))
def test_they_move_with_their_units(seed, first, second, size):
    generator = torch.Generator().manual_seed(seed)
    one, other = some(generator, first, size), some(generator, second, size)
    both = torch.cat([one, other], 2)
    index = torch.randint(first + second, (2, 3, 9), generator=generator)
    moved = find_outliers(one, 6.0).join(find_outliers(other, 6.0)).select(index)
    expected = both.where(both.abs() > 6, 0).float()
    wide = index[..., None].expand(-1, -1, -1, size)
    assert torch.equal(dense(moved, size), expected.gather(2, wide))
    rows = torch.tensor([1, 1, 0])
    assert torch.equal(dense(find_outliers(both, 6.0).select_batch(rows), size), expected[rows])


def test_none_found():
    outliers = find_outliers(torch.zeros(1, 2, 4, 8), 6.0)
    assert len(outliers.values) == 0 and not dense(outliers, 8).any()
    assert sum(tensor.nbytes for tensor in outliers.tensors) == 8


def test_bytes_of_an_outlier():
    x = torch.zeros(1, 1, 4, 8)
    x[0, 0, 1, 5] = 7
    assert sum(tensor.nbytes for tensor in find_outliers(x, 6.0).tensors) == 4 + 3
