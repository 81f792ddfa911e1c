"""Importance labels, against one answer token and one query head at a time."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.heads import targets
from locret.heads.targets import (
    LABELS,
    AnswerView,
    log_max_prob,
    log_value_share,
    log_value_weighted,
    max_logit,
    max_prob,
    value_weighted,
)

HIDDEN = 11


def naive(view, name):
    """Plain loops: what every prompt unit gets from every answer token and query head."""
    batch, heads, _, size = view.key.shape
    group, answer = view.query.shape[1] // heads, view.query.shape[2]
    prompt = view.key.shape[2] - answer
    labels = torch.empty(batch, heads, prompt)
    for b in range(batch):
        for h in range(heads):
            best = [-math.inf] * prompt
            for g in range(group):
                head = h * group + g
                for a in range(answer):
                    logits = [
                        capped(view, float(view.query[b, head, a].float() @ key.float()))
                        for key in view.key[b, h, : prompt + a + 1]
                    ]
                    total = sum(math.exp(logit) for logit in logits)
                    total += math.exp(view.sinks[head]) if view.sinks is not None else 0
                    for unit in range(prompt):
                        worth = logits[unit]
                        if name != "max_logit":
                            worth = math.exp(worth) / total
                        if "value" in name:
                            rows = view.output_weight[:, head * size : (head + 1) * size].float()
                            worth *= float((rows @ view.value[b, h, unit].float()).norm())
                        if name == "log_value_share":
                            worth /= float(view.norms[b, a])
                        best[unit] = max(best[unit], worth)
            labels[b, h] = torch.tensor(best)
    return (labels + 1e-5).log() if name.startswith("log") else labels


def capped(view, product):
    logit = view.scaling * product
    return logit if view.softcap is None else math.tanh(logit / view.softcap) * view.softcap


def random_view(batch, heads, group, answer, prompt, size=4, seed=0, scaling=0.5, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    total = prompt + answer
    shapes = [
        (batch, heads * group, answer, size),
        (batch, heads, total, size),
        (batch, heads, total, size),
        (HIDDEN, heads * group * size),
    ]
    query, key, value, weight = (
        torch.randn(shape, generator=generator).to(dtype or torch.float32) for shape in shapes
    )
    norms = torch.rand(batch, answer, generator=generator) + 0.1
    return AnswerView(query, key, value, scaling, weight, norms=norms)


@pytest.mark.parametrize("name", sorted(LABELS))
@settings(max_examples=20)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    answer=st.integers(1, 5),
    prompt=st.integers(1, 7),
    scaling=st.floats(0.01, 2),
)
def test_label_is_the_largest_of_what_a_unit_gets(
    name, batch, heads, group, answer, prompt, scaling
):
    view = random_view(batch, heads, group, answer, prompt, scaling=scaling)
    labels = LABELS[name](view)
    assert view.prompt_length == prompt
    assert labels.shape == (batch, heads, prompt)
    assert labels.dtype == torch.float32
    assert torch.allclose(labels, naive(view, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("answer", [1, 2, 3, 4, 5, 7])
def test_long_answers_are_taken_in_blocks(monkeypatch, answer, group, name):
    view = random_view(1, 2, group, answer, 6)
    whole = LABELS[name](view)
    elements_a_row = 2 * group * (6 + answer)
    for rows in (1, 2, 3):
        monkeypatch.setattr(targets, "_BLOCK_ELEMENTS_CPU", rows * elements_a_row)
        blocks = list(view.blocks())
        assert max(block.stop - block.start for block in blocks) == min(rows, answer)
        assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(answer))
        assert torch.allclose(LABELS[name](view), whole, atol=1e-6)
    assert torch.allclose(whole, naive(view, name), atol=1e-5)


def test_a_block_has_a_row_even_if_nothing_fits(monkeypatch):
    view = random_view(2, 2, 2, 3, 6)
    whole = max_prob(view)
    monkeypatch.setattr(targets, "_BLOCK_ELEMENTS_CPU", 1)
    assert len(list(view.blocks())) == 3
    assert torch.allclose(max_prob(view), whole, atol=1e-6)


@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_labels_of_half_precision_are_float32(dtype, default_dtype, name):
    view = random_view(1, 2, 2, 5, 9, dtype=dtype)
    torch.set_default_dtype(default_dtype)
    try:
        labels = LABELS[name](view)
    finally:
        torch.set_default_dtype(torch.float32)
    assert labels.dtype == torch.float32
    assert torch.allclose(labels, naive(view, name), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_softcaps_and_sinks_are_part_of_the_probabilities(softcap, with_sinks, name):
    view = random_view(2, 2, 2, 4, 5, scaling=2.0)
    sinks = torch.tensor([3.0, -1.0, 0.5, 2.0]) if with_sinks else None
    view = replace(view, softcap=softcap, sinks=sinks)
    assert torch.allclose(LABELS[name](view), naive(view, name), rtol=1e-4, atol=1e-5)


def test_a_logarithm_has_a_floor():
    view = random_view(1, 1, 1, 1, 3, scaling=400.0)
    labels = log_max_prob(view)
    assert labels.min() == pytest.approx(math.log(1e-5), abs=1e-4)
    assert labels.max() <= 1e-4


def test_negative_logits_stay_negative():
    query, key = torch.full((1, 2, 3, 4), -1.0), torch.ones(1, 1, 5, 4)
    view = AnswerView(query, key, key, 0.5)
    assert torch.equal(max_logit(view), torch.full((1, 1, 2), -2.0))


def test_an_answer_token_does_not_see_those_after_it():
    view = random_view(1, 2, 2, 4, 6)
    loud = view.key.clone()
    loud[:, :, -1] = view.query[:, ::2, 0] * 100  # the last token of the answer; the first sees it?
    louder = AnswerView(view.query[:, :, :3], loud[:, :, :-1], view.value[:, :, :-1], 0.5)
    both = AnswerView(view.query, loud, view.value, 0.5)
    # What the first three tokens see is in the maximum over all four.
    assert (max_prob(both) >= max_prob(louder) - 1e-6).all()


def test_probabilities_are_shares_of_all_that_is_seen():
    view = random_view(2, 2, 3, 1, 8)
    labels = max_prob(AnswerView(view.query[:, ::3], view.key, view.value, 0.5))
    assert (labels.sum(dim=-1) < 1).all()  # the answer's own token has the rest
    assert (labels > 0).all()


def test_a_value_that_says_nothing_is_worth_nothing():
    view = random_view(1, 2, 2, 3, 5)
    view.value[:, :, 2] = 0
    labels = value_weighted(view)
    assert (labels[..., 2] == 0).all()
    assert (labels[..., [0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("name", [name for name in LABELS if "value" in name])
def test_labels_of_values_need_the_output_projection(name):
    view = replace(random_view(1, 2, 2, 3, 5), output_weight=None)
    with pytest.raises(ValueError, match=f"'{name}' needs the attention layers' output"):
        LABELS[name](view)


def test_definitions_by_name():
    probabilities = (max_prob, value_weighted)
    functions = (max_logit, *probabilities, log_max_prob, log_value_weighted, log_value_share)
    assert {function.__name__: function for function in functions} == LABELS
