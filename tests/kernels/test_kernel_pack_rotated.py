"""Evictions of units of the scheme `rotated`: the kernels pack what the plain path does."""

import pytest
import torch

from locret.quantization.codes import unpack_planes
from locret.quantization.packed import (
    PackedKeys,
    fetch,
    pack_keys,
    pack_values,
    select_keys,
    select_values,
)
from locret.quantization.schemes import RotatedScheme


def plain(function, *arguments):
    """The same by the plain twin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("locret.quantization.schemes.takes_triton", lambda *_: False)
        return function(*arguments)


def assert_alike(packed, expected, bits):
    """A rounding apart: the same units but for elements that lie between two levels."""
    size = expected.head_size
    ours, theirs = (unpack_planes(p.units[0], bits, size).int() for p in (packed, expected))
    assert ((ours - theirs).abs() <= 1).all()
    assert (ours != theirs).float().mean() < 2e-3
    torch.testing.assert_close(packed.units[1], expected.units[1], rtol=2e-3, atol=1e-3)
    if isinstance(expected, PackedKeys):
        assert torch.equal(packed.starts, expected.starts)
        torch.testing.assert_close(packed.tables, expected.tables, rtol=1e-2, atol=1e-2)


def random_units(count, size, dtype, device, bias=3.0):
    x = torch.randn(count, size, device=device) * 2 + bias * torch.randn(size, device=device)
    return x.to(dtype)


def evicted(lengths, fresh, share, device):
    """Where the units are that stay, of packed and `fresh` ones, and how many in each sequence."""
    places, new_lengths, before, total = [], [], 0, sum(lengths)
    for i, length in enumerate(lengths):
        own = torch.arange(before, before + length, device=device)
        new = total + torch.arange(i * fresh, (i + 1) * fresh, device=device)
        both = torch.cat([own, new])
        stays = both[torch.rand(len(both), device=device) < share[i]]
        places.append(stays)
        new_lengths.append(len(stays))
        before += length
    return torch.cat(places), new_lengths


@pytest.mark.parametrize(
    ("lengths", "size", "group", "fresh", "bits", "dtype"),
    [
        ([70, 0, 33], 64, 16, 20, (3, 3), torch.bfloat16),
        ([65, 1], 128, 64, 5, (3, 2), torch.float16),
        ([63], 80, 64, 1, (2, 4), torch.float32),
        ([0, 30, 7], 96, 8, 9, (4, 8), torch.bfloat16),
        ([40, 3], 64, 16, 5, (8, 8), torch.float32),
        ([20], 32, 16, 5, (8, 4), torch.bfloat16),
        ([33], 128, 16, 5, (8, 8), torch.bfloat16),
        ([9], 256, 4, 3, (8, 3), torch.float32),
        ([9], 256, 4, 3, (4, 2), torch.float16),
    ],
)
def test_an_eviction_packs_what_the_twin_does(lengths, size, group, fresh, bits, dtype, device):
    key_bits, value_bits = bits
    scheme = RotatedScheme(key_bits=key_bits, value_bits=value_bits, group=group, residual=0)
    x = random_units(sum(lengths), size, dtype, device)
    keys, values = pack_keys(scheme, x, lengths), pack_values(scheme, x)
    expected = plain(pack_keys, scheme, x, lengths)
    assert_alike(keys, expected, key_bits)
    assert_alike(values, plain(pack_values, scheme, x), value_bits)
    new = random_units(len(lengths) * fresh, size, dtype, device)
    for _ in range(2):  # the second thins blocks out, so that some are packed anew
        share = [0.6 if length > 20 else 0.9 for length in lengths]
        index, after = evicted(lengths, fresh, share, device)
        if not len(index):
            return
        given = scheme, keys, lengths, new, index, after
        expected = plain(select_keys, *given)
        of_values = scheme, values, new, index
        expected_values = plain(select_values, *of_values)
        full = plain(fetch, keys, new, index)
        torch.testing.assert_close(fetch(keys, new, index), full, rtol=1e-4, atol=1e-4)
        full = plain(fetch, values, new, index)
        torch.testing.assert_close(fetch(values, new, index), full, rtol=1e-4, atol=1e-4)
        keys, values, lengths = select_keys(*given), select_values(*of_values), after
        assert_alike(keys, expected, key_bits)
        assert_alike(values, expected_values, value_bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 40000.0])
def test_what_cannot_be_stored_is_refused(bad, device):
    x = torch.zeros(70, 64, device=device)
    x[68, 5] = bad
    for make in (
        lambda: pack_keys(RotatedScheme(), x, [70]),
        lambda: pack_values(RotatedScheme(), x),
    ):
        with pytest.raises(ValueError, match="NaN, infinity or magnitudes above 32768"):
            make()
