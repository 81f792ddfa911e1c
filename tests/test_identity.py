"""Tables that turn nothing: the shortcuts give what plain ones and zeros give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.model.backbone import Backbone
from locret.model.rotary import IdentityTable, identity_tables
from tests.tiny_models import FAMILIES, tiny_model

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_pass_through_every_architecture_untouched(family):
    rotary = Backbone(tiny_model(family)).rotary
    x = torch.randn(2, 3, 5, 8)
    cos, sin = rotary.cos_sin((0,), 5, (5,), x)
    x = x[..., : rotary._short.size]
    query, key = rotary._apply(x, x + 1, *identity_tables(cos, sin))
    for out, expected in ((query, x), (key, x + 1)):
        assert torch.equal(out, expected)
        assert type(out) is torch.Tensor


@settings(max_examples=60)
@given(table=DTYPES, other=DTYPES, rows=st.integers(1, 3))
def test_shortcuts_are_what_plain_tables_give(table, other, rows):
    cos, sin = identity_tables(*torch.rand(2, 1, 4, 6).to(table))
    plain_cos, plain_sin = torch.ones(1, 4, 6, dtype=table), torch.zeros(1, 4, 6, dtype=table)
    x = torch.randn(rows, 1, 4, 6).to(other)
    for mine, plain in (
        (x * cos + rotate_half(x) * sin, x * plain_cos + rotate_half(x) * plain_sin),
        (cos * x, plain_cos * x),
        (x + sin, x + plain_sin),
        (sin + x, plain_sin + x),
        (x - cos, x - plain_cos),
        (x * 2 * cos.unsqueeze(1), x * 2 * plain_cos.unsqueeze(1)),
        (cos.sum(), plain_cos.sum()),
    ):
        assert mine.dtype == plain.dtype
        assert mine.shape == plain.shape
        assert torch.equal(torch.as_tensor(mine), plain)


def test_a_sum_that_grows_is_computed():
    _, sin = identity_tables(torch.rand(1, 4, 6), torch.rand(1, 4, 6))
    assert (torch.ones(6) + sin).shape == (1, 4, 6)
    assert type(torch.ones(6) + sin) is torch.Tensor
    assert isinstance(sin[..., :3], IdentityTable)


def test_gradients_flow_through_tables_first_asked_for_by_an_engine():
    like, x = torch.rand(1, 4, 6, dtype=torch.float16), torch.randn(1, 4, 6, requires_grad=True)
    with torch.inference_mode():
        identity_tables(like, like)
    cos, _ = identity_tables(like, like)
    (x / cos).square().sum().backward()  # division keeps the table for later
    assert torch.equal(x.grad, 2 * x)
