import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from locret.kernels import select
from locret.kernels.select import select_sequences, select_sequences_reference

SCORES = st.sampled_from([-0.0, 0.0, 1.0, -1.0, 1e-40, -3e38, torch.inf, -torch.inf, torch.nan])


def running(numbers, device):
    return torch.tensor([0, *numbers], device=device).cumsum(0).int()


def compare(old, new, lengths, kept, tails, heads):
    """Scores of sequences of these lengths, of which each keeps and protects so many."""
    device, sizes = old.device, [length + new.shape[2] for length in lengths]
    counts = [min(pair) for pair in zip(kept, sizes, strict=True)]
    kept, tails, heads = (torch.tensor(x, device=device).int() for x in (kept, tails, heads))
    given, protected = (old, new, running(lengths, device), kept), (tails, heads)
    out_offsets = running(counts, device)
    actual = select_sequences(*given, out_offsets, *protected, sum(counts), max(sizes))
    assert actual.dtype == torch.long and actual.shape == (sum(counts),)
    assert torch.equal(actual, select_sequences_reference(*given, *protected))
    return actual


@pytest.mark.parametrize(
    ("shape", "lengths", "kept"),
    [
        ((1, 3, 5), [0, 1, 40], [3, 6, 11]),
        ((2, 2, 17), [63, 0, 300, 9], [79, 17, 1, 100]),
        ((1, 2, 0), [31, 0], [30, 4]),
        ((1, 1, 3000), [70], [2048]),
        ((2, 1, 1), [0, 2], [0, 0]),
    ],
)
def test_kernel_equals_twin(shape, lengths, kept, device):
    old = torch.randn(sum(lengths), device=device)
    new = torch.randn(shape, device=device)
    compare(old, new, lengths, kept, [n // 3 for n in kept], [n // 4 for n in kept])


def test_highest_as_topk(device):
    scores = torch.randperm(6 * 100, device=device).view(2, 3, 100).float() - 300
    old, new = scores[..., :70].flatten(), scores[..., 70:]
    index = compare(old, new, [70] * 6, [33] * 6, [0] * 6, [0] * 6)
    assert torch.equal(index.view(2, 3, 33), scores.topk(33).indices.sort().values)


def test_sequences_in_tiles(device, monkeypatch):
    monkeypatch.setattr(select, "_RESIDENT", 64)
    monkeypatch.setattr(select, "_TILE", 32)
    lengths, kept = [301, 0, 7], [200, 10, 3]
    old = torch.randn(308, device=device).round(decimals=1)
    new = torch.randn(1, 3, 45, device=device).round(decimals=1)
    compare(old, new, lengths, kept, [100, 1, 0], [50, 0, 1])


def test_more_tiles_than_a_program_sums_at_once(device, monkeypatch):
    monkeypatch.setattr(select, "_RESIDENT", 0)
    monkeypatch.setattr(select, "_TILE", 2)
    old, new = (torch.randn(n, device=device).round(decimals=1) for n in (520, 3))
    compare(old, new.view(1, 1, 3), [520], [300], [20], [10])


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_on_both_sides_of_the_longest_that_one_program_takes(device, extra):
    count = select._RESIDENT + extra
    old = torch.randn(count - 5, device=device).round(decimals=2)
    new = torch.randn(1, 1, 5, device=device).round(decimals=2)
    compare(old, new, [count - 5], [count // 3], [7], [9])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(SCORES, max_size=15), min_size=1, max_size=4), st.data())
def test_ties_infinities_and_nan(device, old, data):
    lengths = [len(scores) for scores in old]
    count = data.draw(st.integers(0, 6))
    draw = st.lists(st.lists(SCORES, min_size=count, max_size=count), min_size=len(old))
    new = data.draw(draw.map(lambda rows: rows[: len(old)]))
    kept = [data.draw(st.integers(0, length + count)) for length in lengths]
    heads = [data.draw(st.integers(0, n)) for n in kept]
    tails = [data.draw(st.integers(0, n - head)) for n, head in zip(kept, heads, strict=True)]
    flat = torch.tensor([score for scores in old for score in scores], device=device).float()
    fresh = torch.tensor(new, device=device).float().view(1, len(old), count)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            for name in ("_RESIDENT", "_TILE"):
                patch.setattr(select, name, 4)
        compare(flat, fresh, lengths, kept, tails, heads)


def test_views(device):
    new = torch.randn(9, 2, 2, device=device).permute(1, 2, 0)
    old = torch.randn(40, device=device)[3:25]
    compare(old, new, [4, 0, 17, 1], [5, 5, 5, 5], [1] * 4, [2] * 4)
