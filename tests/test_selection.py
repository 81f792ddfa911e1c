"""Which units full caches keep, against a sort in plain Python."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.kernels import select_sequences


def numbers(values):
    return torch.tensor(values, dtype=torch.int32)


def keep_highest(scores, budget, tail=0, head=0, old=0):
    """Indices that equally long sequences keep, [B, H, K].

    Args:
        scores: [B, H, S], of which the first `old` are given as the context's.
    """
    batch, heads, size = scores.shape
    count, keep = batch * heads, min(budget, size)
    offsets = numbers([old * i for i in range(count + 1)])
    out = numbers([keep * i for i in range(count + 1)])
    each = (numbers([x] * count) for x in (tail, head))
    index = select_sequences(
        scores[..., :old].reshape(-1).float(), scores[..., old:].float(), offsets,
        numbers([keep] * count), out, *each, keep * count, size,
    )  # fmt: skip
    return index.view(batch, heads, keep)


def naive(scores, budget, protected_tail):
    """One head's kept indices: the tail, then the highest of the others."""
    if len(scores) <= budget:
        return list(range(len(scores)))
    others = range(len(scores) - protected_tail)
    tail = list(range(len(scores) - protected_tail, len(scores)))
    best = sorted(others, key=lambda i: -scores[i])[: budget - protected_tail]
    return sorted(best) + tail


@settings(max_examples=200)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_keeps_the_highest_in_order(data, dtype):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 63))
    budget = data.draw(st.integers(1, 70))
    protected = data.draw(st.integers(0, min(budget, size)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.stack(
        [torch.randperm(size, generator=generator) for _ in range(batch * heads)]
    ).reshape(batch, heads, size)
    scores = scores.to(dtype) - size / 2  # all different, some negative
    before = scores.clone()
    kept = keep_highest(scores, budget, protected, old=data.draw(st.integers(0, size)))
    assert kept.dtype == torch.long
    assert torch.equal(scores, before)
    for row in range(batch):
        for head in range(heads):
            ours = kept[row, head].tolist()
            assert ours == naive(scores[row, head].tolist(), budget, protected)


@settings(max_examples=100)
@given(
    scores=st.lists(st.integers(-2, 2), min_size=1, max_size=40),
    budget=st.integers(1, 45),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equal_scores_keep_as_many_and_none_that_is_lower(scores, budget, share, dtype):
    protected = int(share * min(budget, len(scores)))
    kept = keep_highest(torch.tensor(scores).to(dtype)[None, None], budget, protected)[
        0, 0
    ].tolist()
    assert len(kept) == min(budget, len(scores))
    assert kept == sorted(set(kept))
    expected = naive(scores, budget, protected)
    assert sorted(scores[i] for i in kept) == sorted(scores[i] for i in expected)
    if protected:
        assert kept[-protected:] == list(range(len(scores) - protected, len(scores)))


@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).max, -torch.inf])
def test_protected_units_stay_whatever_the_others_scored(extreme):
    scores = torch.full((1, 1, 9), extreme)
    scores[..., -2:] = -torch.inf
    assert keep_highest(scores, 4, 2)[0, 0, -2:].tolist() == [7, 8]


@settings(max_examples=100)
@given(data=st.data(), size=st.integers(1, 40), budget=st.integers(0, 45))
def test_protected_ends_stay_and_the_highest_between_them(data, size, budget):
    head = data.draw(st.integers(0, budget))
    tail = data.draw(st.integers(0, budget - head))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randperm(size, generator=generator).float()
    kept = keep_highest(scores[None, None], budget, tail, head)[0, 0].tolist()
    if size <= budget:
        assert kept == list(range(size))
        return
    between = sorted(range(head, size - tail), key=lambda i: -scores[i])[: budget - head - tail]
    assert kept == [*range(head), *sorted(between), *range(size - tail, size)]


@settings(max_examples=100)
@given(data=st.data())
def test_sequences_of_each_their_own_lengths_and_budgets(data):
    rows, heads, new = (data.draw(st.integers(1, 3)) for _ in range(3))
    count = rows * heads
    old = data.draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    keep = [data.draw(st.integers(0, n + new)) for n in old]
    tails = [data.draw(st.integers(0, n)) for n in keep]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = [torch.randperm(n + new, generator=generator).float() for n in old]
    index = select_sequences(
        torch.cat([x[:n] for x, n in zip(scores, old, strict=True)]),
        torch.stack([x[n:] for x, n in zip(scores, old, strict=True)]).view(rows, heads, new),
        numbers([0, *accumulate(old)]), numbers(keep), numbers([0, *accumulate(keep)]),
        numbers(tails), numbers([0] * count), sum(keep), max(old) + new,
    )  # fmt: skip
    found = [x.tolist() for x in index.split(keep)]
    assert found == [naive(x.tolist(), *how) for x, *how in zip(scores, keep, tails, strict=True)]
