"""Importance labels, against one answer token and one query head at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.heads import targets
from locret.heads.targets import LABELS, AnswerView, max_logit, max_prob, value_weighted

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
                        view.scaling * float(view.query[b, head, a].float() @ key.float())
                        for key in view.key[b, h, : prompt + a + 1]
                    ]
                    total = sum(math.exp(logit) for logit in logits)
                    for unit in range(prompt):
                        worth = logits[unit]
                        if name != "max_logit":
                            worth = math.exp(worth) / total
                        if name == "value_weighted":
                            rows = view.output_weight[:, head * size : (head + 1) * size].float()
                            worth *= float((rows @ view.value[b, h, unit].float()).norm())
                        best[unit] = max(best[unit], worth)
            labels[b, h] = torch.tensor(best)
    return labels


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
    return AnswerView(query, key, value, scaling, weight)


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
        monkeypatch.setattr(targets, "_BLOCK_ELEMENTS", rows * elements_a_row)
        blocks = list(view.blocks())
        assert max(block.stop - block.start for block in blocks) == min(rows, answer)
        assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(answer))
        assert torch.allclose(LABELS[name](view), whole, atol=1e-6)
    assert torch.allclose(whole, naive(view, name), atol=1e-5)


def test_a_block_has_a_row_even_if_nothing_fits(monkeypatch):
    view = random_view(2, 2, 2, 3, 6)
    whole = max_prob(view)
    monkeypatch.setattr(targets, "_BLOCK_ELEMENTS", 1)
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


def test_value_weighted_needs_the_output_projection():
    view = random_view(1, 2, 2, 3, 5)
    with pytest.raises(ValueError, match="'value_weighted' needs the attention layers' output"):
        value_weighted(AnswerView(view.query, view.key, view.value, 0.5))


def test_definitions_by_name():
    functions = (max_logit, max_prob, value_weighted)
    assert {function.__name__: function for function in functions} == LABELS
