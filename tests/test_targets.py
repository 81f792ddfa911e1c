"""Importance labels, against one logit at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret import targets
from locret.targets import LABELS, max_logit


def naive(query, key, scaling):
    batch, heads, prompt, _ = key.shape
    group = query.shape[1] // heads
    labels = torch.empty(batch, heads, prompt)
    for b in range(batch):
        for h in range(heads):
            for k in range(prompt):
                logits = [
                    scaling * (query[b, h * group + g, a].float() @ key[b, h, k].float())
                    for g in range(group)
                    for a in range(query.shape[2])
                ]
                labels[b, h, k] = max(logits)
    return labels


def random_inputs(batch, heads, group, answer, prompt, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * group, answer, size, generator=generator)
    return query, torch.randn(batch, heads, prompt, size, generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    answer=st.integers(1, 5),
    prompt=st.integers(1, 7),
    scaling=st.floats(0.01, 2),
)
def test_label_is_the_largest_logit(batch, heads, group, answer, prompt, scaling):
    query, key = random_inputs(batch, heads, group, answer, prompt)
    labels = max_logit(query, key, scaling)
    assert labels.shape == (batch, heads, prompt)
    assert (labels - naive(query, key, scaling)).abs().max() < 1e-4


@pytest.mark.parametrize("answer", [1, 2, 3, 4, 5, 7])
def test_long_answers_are_taken_in_blocks(monkeypatch, answer):
    query, key = random_inputs(1, 2, 3, answer, 6)
    whole = max_logit(query, key, 0.5)
    monkeypatch.setattr(targets, "_BLOCK", 2)
    assert torch.allclose(max_logit(query, key, 0.5), whole, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16])
def test_labels_of_half_precision_are_float32(dtype, default_dtype):
    query, key = (x.to(dtype) for x in random_inputs(1, 2, 2, 5, 9))
    torch.set_default_dtype(default_dtype)
    try:
        labels = max_logit(query, key, 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert labels.dtype == torch.float32
    assert torch.allclose(labels, naive(query, key, 0.5), rtol=2e-2, atol=2e-2)


def test_negative_logits_stay_negative():
    query = torch.full((1, 2, 3, 4), -1.0)
    assert torch.equal(max_logit(query, torch.ones(1, 1, 2, 4), 0.5), torch.full((1, 1, 2), -2.0))


def test_definitions_by_name():
    assert LABELS["max_logit"] is max_logit
