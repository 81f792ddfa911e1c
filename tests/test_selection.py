"""Which units a full cache keeps, against a sort in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.policies.base import keep_highest


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
    kept = keep_highest(scores, budget, protected)
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


@pytest.mark.parametrize("protected", [(2, 2), (-1, 2), (2, -3)])
def test_protected_ends_beyond_the_budget_are_a_mistake_of_ours(protected):
    with pytest.raises(AssertionError):
        keep_highest(torch.zeros(1, 1, 5), 3, *protected)


@pytest.mark.parametrize(("budget", "protected"), [(3, 4), (3, -1)])
def test_more_protected_units_than_budget_is_a_mistake_of_ours(budget, protected):
    with pytest.raises(AssertionError):
        keep_highest(torch.zeros(1, 1, 5), budget, protected)
