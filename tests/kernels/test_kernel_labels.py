from dataclasses import replace

import pytest
import torch

from locret.heads import targets
from locret.heads.targets import LABELS, AnswerView
from locret.kernels import labels
from locret.model import varlen
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.varlen_twin import varlen_attn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(shape, device, batch=1, dtype=torch.float32, **more):
    """A view of heads, group, answer, prompt and head size; keys are cut out of wider ones."""
    heads, group, answer, prompt, size = shape
    query = torch.randn(batch, answer, heads * group, size, device=device).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, heads, prompt + answer + 3, size, device=device).to(dtype)
    weight = torch.randn(24, heads * group * size, device=device).to(dtype)
    norms = torch.rand(batch, answer, device=device) + 0.1
    cut = key[:, :, 2:-1], value[:, :, 2:-1]
    return AnswerView(query, *cut, size**-0.5, weight, norms=norms, **more)


def wide(view):
    """The view in float32, which twins compute all of."""
    names = ("query", "key", "value", "output_weight")
    return replace(view, **{name: getattr(view, name).float() for name in names})


def by_twin(name, view):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "why_not", lambda *_: "asked for twins")
        return LABELS[name](view)


def compare(name, view):
    assert labels.why_not(view.query, view.key, view.scaling) is None
    actual, expected = LABELS[name](view), by_twin(name, wide(view))
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    # Products are exact in float32, so that only the order of sums differs.
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)


SHAPES = [
    (2, 3, 7, 150, 64),
    (1, 4, 131, 300, 128),
    (2, 1, 1, 129, 80),
    (1, 2, 200, 33, 96),
    (1, 1, 70, 260, 256),
    (1, 7, 128, 128, 192),
    (3, 1, 5, 1, 20),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_equal_their_twin(shape, dtype, batch, device):
    compare("max_prob", drawn(shape, device, batch, dtype))


@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_every_label_of_every_softmax(name, softcap, with_sinks, device):
    sinks = torch.tensor([3.0, -1.0, 0.5, 2.0], device=device) if with_sinks else None
    compare(name, drawn((2, 2, 133, 140, 64), device, 2, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_label_of_half_precision(name, dtype, device):
    compare(name, drawn((2, 2, 50, 140, 128), device, 1, dtype))


def test_sinks_of_half_precision(device):
    sinks = torch.tensor([300.0, -300.0, 0.5], device=device).bfloat16()
    compare("max_prob", drawn((1, 3, 9, 20, 32), device, 1, torch.bfloat16, sinks=sinks))


@pytest.mark.parametrize("scale", [1e-6, 20.0])
def test_large_and_small_logits(scale, device):
    view = drawn((1, 2, 140, 270, 64), device)
    compare("max_prob", replace(view, query=view.query * scale))
    compare("max_logit", replace(view, query=view.query * scale))


def test_all_logits_far_below_zero(device):
    view = drawn((1, 1, 3, 200, 64), device)
    view = replace(view, query=-torch.ones_like(view.query), key=30 * torch.ones_like(view.key))
    compare("max_prob", view)
    compare("max_logit", view)


def test_an_answer_token_does_not_see_those_after_it(device):
    view = drawn((1, 1, 300, 140, 64), device)
    key = view.key.clone()
    key[:, :, -1] = 1000 * view.query[:, :, 0]  # would take all of the first token's attention
    compare("max_prob", replace(view, key=key))


def test_a_prompt_of_nothing_has_no_labels(device):
    assert LABELS["log_max_prob"](drawn((2, 2, 5, 0, 64), device)).shape == (1, 2, 0)


@pytest.mark.parametrize("name", ["max_prob", "max_logit"])
def test_what_is_not_a_number_is_seen(name, device):
    view = drawn((2, 1, 9, 20, 32), device)
    view.query[0, 1, 4, 3] = torch.nan
    found = LABELS[name](view)
    assert found[0, 1].isnan().all() and not found[0, 0].isnan().any()
    assert torch.equal(found.isnan(), by_twin(name, view).isnan())


def test_what_lies_outside_is_not_read(device):
    view = drawn((2, 1, 9, 20, 20), device)
    key = torch.full((1, 2, 60, 40), torch.nan, device=device)
    key[:, :, 5:34, 10:30] = view.key
    query = torch.full((1, 2, 40, 40), torch.nan, device=device)
    query[:, :, 7:16, 20:] = view.query
    poisoned = replace(view, key=key[:, :, 5:34, 10:30], query=query[:, :, 7:16, 20:])
    compare("max_prob", poisoned)
    compare("max_logit", poisoned)


def test_autocast_reaches_the_kernels(device, monkeypatch):
    view, seen = drawn((1, 2, 5, 30, 64), device), []
    highest = labels.highest_shares
    monkeypatch.setattr(
        labels, "highest_shares", lambda *given: [seen.append(given[0].dtype), highest(*given)][1]
    )
    with torch.autocast(device.type, torch.bfloat16):
        LABELS["max_prob"](view)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", sorted(LABELS))
def test_what_kernels_take_reaches_them(name, device, monkeypatch):
    """No block of logits is made."""
    monkeypatch.setattr(targets.AnswerView, "blocks", None)
    LABELS[name](drawn((1, 2, 5, 30, 64), device, 1, torch.bfloat16))


@pytest.mark.parametrize("name", ["max_prob", "log_value_share"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 150, 64), (1, 4, 131, 300, 128)])
def test_what_attention_has_summed_is_not_summed_again(name, shape, device, monkeypatch):
    view = drawn(shape, device, 2)
    expected = by_twin(name, view)
    logits = view.logits(slice(0, view.query.shape[2]))
    wide = torch.zeros(2, view.query.shape[1], shape[2] + 5, device=device)  # a row of more tokens
    wide[:, :, 3:-2] = logits.logsumexp(-1).flatten(1, 2)
    monkeypatch.setattr(labels, "_log_sums", None)
    found = LABELS[name](replace(view, log_sums=wide[:, :, 3:-2]))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_a_row_is_summed_up_once(device, monkeypatch):
    """Attention leaves what labels need: they are those of sums of their own."""
    if device.type == "cpu":
        monkeypatch.setattr(varlen, "takes_varlen", lambda *_: True)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = tiny_model("llama", head_dim=64).to(device, dtype)
    heads = tiny_heads(model, label="log_max_prob")
    ids = prompt(90).to(device)
    row = [Segment(0, 90, ((46, 60), (63, 90)), ((40, 60), (60, 90)))]

    def distilled():
        return Distillation(Backbone(model), heads, keep_scores=True)(ids, row)

    highest = labels.highest_shares
    with monkeypatch.context() as patch:
        patch.setattr(labels, "_log_sums", None)  # not asked for
        found = distilled()
    monkeypatch.setattr(labels, "highest_shares", lambda *given: highest(*given[:-1]))
    expected = distilled()
    for one, other in zip(found.targets, expected.targets, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if dtype.itemsize > 2 else 2e-2)


def test_what_is_not_taken_has_a_reason(device):
    view = drawn((1, 2, 5, 30, 64), device)
    query, key = view.query, view.key
    assert "float64" in labels.why_not(query.double(), key.double(), 0.1)
    assert "bfloat16" in labels.why_not(query, key.bfloat16(), 0.1)
    assert "at most 256" in labels.why_not(*2 * [torch.ones(1, 1, 2, 320, device=device)], 0.1)
    assert "not contiguous" in labels.why_not(query, key.mT.contiguous().mT, 0.1)
    assert "positive" in labels.why_not(query, key, -0.1)
    with pytest.raises(ValueError, match="do not take this: .*positive"):
        labels.highest_shares(query, key, -0.1)
    with pytest.raises(ValueError, match="do not fit keys"):
        labels.highest_shares(query, key[:, :, :4], 0.1)
    with pytest.raises(ValueError, match="of_asking is"):
        labels.highest_shares(query, key, 0.1, of_asking=torch.ones(1, 4, device=device))
    with pytest.raises(ValueError, match="log_sums is"):
        labels.highest_shares(query, key, 0.1, log_sums=torch.ones(1, 1, 5, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(LABELS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(8, 4, 2056, 10248, 128), (4, 4, 513, 4001, 256), (2, 7, 2000, 700, 64), (4, 1, 9, 20001, 96)],
)
def test_large_views(name, dtype, shape, device):
    compare(name, drawn(shape, device, 1, dtype))
