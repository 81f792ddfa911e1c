"""Rows of several conversations: every one learns and attends as if it stood alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.row_loss import PackedAttention
from locret.training.segments import Segment, with_query_in_front
from tests.tiny_models import FAMILIES, PHI3_WINDOW, prompt, tiny_heads, tiny_model

ALPHA = 0.5  # far above the paper's, so that smoothness shows in every comparison
SAMPLES = [(29, 40), (3, 17), (60, 61)]  # prompt and length, all different


def distill(model, ids, row, **given):
    """The result of one row and the gradients of its heads."""
    settings = {"alpha": ALPHA, "keep_scores": True, "loss": given.pop("loss", "smooth_l1")}
    heads = tiny_heads(model, **given).requires_grad_(True).train()
    result = Distillation(Backbone(model, "by_length"), heads, **settings)(ids, row)
    result.loss.backward()
    return result, [p.grad for p in heads.parameters()]


def packed(samples):
    """Rows of samples one by one, and the row of all of them with its segments."""
    rows = [prompt(length, seed=i) for i, (_, length) in enumerate(samples)]
    segments, at = [], 0
    for asked, length in samples:
        segments.append(Segment(at, at + length, ((at + asked, at + length),)))
        at += length
    return rows, torch.cat(rows, dim=1), segments


def assert_mean(together, alone, relative=1e-5):
    """A result and its gradients are the mean of others'."""
    for name in ("loss", "regression", "smoothness"):
        mean = sum(getattr(result, name).detach() for result, _ in alone) / len(alone)
        assert torch.allclose(getattr(together[0], name), mean, rtol=relative), name
    for ours, *theirs in zip(together[1], *(gradients for _, gradients in alone), strict=True):
        mean = sum(theirs) / len(theirs)
        assert (ours - mean).abs().max() < relative * mean.abs().max()


# --- training ---


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"loss": "listwise"},
        {"label": "max_prob"},
        {"label": "value_weighted"},
        {"tap": "hidden"},
    ],
    ids=str,
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_row_of_samples_is_their_mean(attn, given):
    model = tiny_model("llama", attn_implementation=attn)
    rows, row, segments = packed(SAMPLES)
    alone = [
        distill(model, ids, [Segment.single(*sample)], **given)
        for ids, sample in zip(rows, SAMPLES, strict=True)
    ]
    together = distill(model, row, segments, **given)
    assert_mean(together, alone)
    one_by_one = zip(*(result.targets for result, _ in alone), strict=True)
    expected = [target for layer in one_by_one for target in layer]  # those of a layer together
    for ours, theirs in zip(together[0].targets, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_packed(family):
    model = tiny_model(family)
    rows, row, segments = packed([(9, 12), (20, 31)])
    alone = [
        distill(model, ids, [Segment.single(*sample)])
        for ids, sample in zip(rows, [(9, 12), (20, 31)], strict=True)
    ]
    assert_mean(distill(model, row, segments), alone, relative=1e-4)


def test_segments_on_both_sides_of_the_longrope_window():
    samples = [(PHI3_WINDOW - 20, PHI3_WINDOW - 10), (PHI3_WINDOW + 9, PHI3_WINDOW + 20)]
    model = tiny_model("phi3")
    rows, row, segments = packed(samples)
    alone = [
        distill(model, ids, [Segment.single(*sample)])
        for ids, sample in zip(rows, samples, strict=True)
    ]
    assert_mean(distill(model, row, segments), alone, relative=1e-4)


def test_two_answers_are_the_mean_of_one_answer_at_a_time():
    """Each answer labels the tokens before it; the tokens after it are nobody's business."""
    model, ids = tiny_model("llama"), prompt(50)
    first, last = (10, 15), (31, 50)
    both, gradients = distill(model, ids, [Segment(0, 50, (first, last))])
    alone = [
        distill(model, ids[:, :end], [Segment.single(start, end)]) for start, end in (first, last)
    ]
    mean = sum(result.regression for result, _ in alone) / 2
    assert torch.allclose(both.regression, mean, rtol=1e-5)
    assert torch.allclose(both.smoothness, alone[1][0].smoothness, rtol=1e-5)  # of all the tokens
    assert [t.shape[-1] for t in both.targets] == [10, 31] * 2
    for layer in range(2):
        for answer, (result, _) in enumerate(alone):
            which = 2 * layer + answer
            assert torch.allclose(both.targets[which], result.targets[layer], atol=1e-5)
            assert torch.allclose(both.predictions[which], result.predictions[layer], atol=1e-5)

    without = [
        Distillation(Backbone(model), tiny_heads(model).requires_grad_(True).train(), alpha=0)
        for _ in range(3)
    ]
    rows = [[Segment(0, 50, (first, last))], [Segment.single(*first)], [Segment.single(*last)]]
    for distillation, row in zip(without, rows, strict=True):
        distillation(ids[:, : row[0].end], row).loss.backward()
    for ours, *theirs in zip(*(one.heads.parameters() for one in without), strict=True):
        mean = sum(p.grad for p in theirs) / 2
        assert (ours.grad - mean).abs().max() < 1e-5 * mean.abs().max()
    assert all(gradient.any() for gradient in gradients)


def test_a_sample_weighs_the_same_with_one_answer_or_two():
    model = tiny_model("llama")
    ids = [prompt(50, seed=1), prompt(17, seed=2)]
    two, one = Segment(0, 50, ((10, 15), (31, 50))), Segment.single(3, 17)
    alone = [distill(model, ids[0], [two]), distill(model, ids[1], [one])]
    row = [two, Segment(50, 67, ((53, 67),))]
    assert_mean(distill(model, torch.cat(ids, dim=1), row), alone)


def test_tokens_after_the_last_answer_change_nothing():
    model, ids = tiny_model("llama"), prompt(50)
    short = distill(model, ids[:, :40], [Segment.single(29, 40)])
    long = distill(model, ids, [Segment(0, 50, ((29, 40),))])
    assert_mean(long, [short])


@pytest.mark.parametrize(
    "row",
    [
        [Segment(0, 39, ((29, 39),))],
        [Segment(0, 41, ((29, 41),))],
        [Segment(1, 40, ((29, 40),))],
        [Segment(0, 20, ((9, 20),)), Segment(21, 40, ((29, 40),))],
        [Segment(0, 20, ((9, 20),)), Segment(19, 40, ((29, 40),))],
        [Segment(20, 40, ((29, 40),)), Segment(0, 20, ((9, 20),))],
        [Segment(0, 20, ((9, 20),))],
        [],
    ],
    ids=str,
)
def test_segments_that_do_not_fill_the_row_are_refused(row):
    model = tiny_model("llama")
    heads = tiny_heads(model)
    with pytest.raises(ValueError, match="do not fill the row of 40 tokens"):
        Distillation(Backbone(model), heads)(prompt(40), row)
    assert model.config._attn_implementation == "sdpa"


def test_unmerged_adapters_on_the_output_projection_are_told_apart():
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        distill(model, prompt(40), [Segment.single(29, 40)], label="value_weighted")
    distill(model.merge_and_unload(), prompt(40), [Segment.single(29, 40)], label="value_weighted")


# --- attention ---


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "glm", "smollm3"])
def test_packed_attention_is_separate_forwards(family, attn):
    model = tiny_model(family, attn_implementation=attn)
    lengths = [30, 1, PHI3_WINDOW + 20, 13]
    rows = [prompt(length, seed=length) for length in lengths]
    ends = [sum(lengths[: i + 1]) for i in range(4)]
    segments = [Segment(end - n, end, ()) for n, end in zip(lengths, ends, strict=True)]
    backbone = Backbone(model, "by_length")
    with torch.no_grad():
        stock = torch.cat([model(ids, use_cache=False).logits for ids in rows], dim=1)
        with backbone.attached(PackedAttention(segments, backbone.backend)):
            ours = model(torch.cat(rows, dim=1), use_cache=False).logits
    assert (ours - stock).abs().max() < 1e-4


def test_gradients_flow_through_packed_attention_and_stay_within_a_sample():
    model = tiny_model("llama").requires_grad_(False)
    rows = [prompt(12, seed=1), prompt(9, seed=2)]
    segments = [Segment(0, 12, ()), Segment(12, 21, ())]
    backbone = Backbone(model)
    embedded = model.model.embed_tokens(torch.cat(rows, dim=1)).requires_grad_(True)
    with backbone.attached(PackedAttention(segments, backbone.backend)):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    loss = logits[:, 12:].square().mean()
    (packed_gradient,) = torch.autograd.grad(loss, embedded)
    alone = model.model.embed_tokens(rows[1]).requires_grad_(True)
    stock = model(inputs_embeds=alone, use_cache=False).logits.square().mean()
    (stock_gradient,) = torch.autograd.grad(stock, alone)
    assert (packed_gradient[:, :12] == 0).all()
    assert torch.allclose(packed_gradient[:, 12:], stock_gradient, rtol=1e-3, atol=1e-6)


# --- segments ---


@pytest.mark.parametrize("prompt_length", [-1, 0, 10, 11])
def test_a_single_segment_needs_a_prompt_and_an_answer(prompt_length):
    with pytest.raises(ValueError, match=f"prompt_length is {prompt_length} of 10 tokens; both"):
        Segment.single(prompt_length, 10)


def test_a_single_segment_is_the_whole_row():
    assert Segment.single(7, 10) == Segment(0, 10, ((7, 10),))
    assert Segment(5, 30, ((9, 11), (20, 30))).last_prompt_end == 20


@st.composite
def rows_of_segments(draw):
    segments, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        start, answers = at, []
        for _ in range(draw(st.integers(1, 3))):
            at += draw(st.integers(1, 6))  # what is asked
            answers.append((at, at := at + draw(st.integers(1, 5))))
        at += draw(st.integers(0, 3))  # what stands after the last answer
        segments.append(Segment(start, at, tuple(answers)))
    return segments


@settings(max_examples=150)
@given(segments=rows_of_segments(), query_tokens=st.integers(0, 12))
def test_the_question_is_repeated_in_front_of_its_own_segment(segments, query_tokens):
    ids = torch.arange(segments[-1].end)[None]  # every token says where it stood
    longer, moved = with_query_in_front(ids, segments, query_tokens)
    expected, at = [], 0
    for before, after in zip(segments, moved, strict=True):
        here = list(range(before.start, before.end))
        asked = list(range(before.start, before.last_prompt_end))
        query = asked[-query_tokens:] if query_tokens else []
        expected += query + here
        assert after.start == at
        assert after.end - after.start == len(query) + len(here)
        assert len(after.answers) == len(before.answers)
        for old, new in zip(before.answers, after.answers, strict=True):
            assert longer[0, slice(*new)].tolist() == list(range(*old))
        assert after.last_prompt_end - after.start > 0
        at = after.end
    assert longer[0].tolist() == expected
    assert longer.shape == (1, at)
    if query_tokens == 0:
        assert moved == segments
        assert torch.equal(longer, ids)


def test_heads_learn_with_the_question_in_front():
    model = tiny_model("llama")
    rows, row, segments = packed(SAMPLES)
    alone = []
    for ids, sample in zip(rows, SAMPLES, strict=True):
        alone.append(distill(model, *with_query_in_front(ids, [Segment.single(*sample)], 4)))
    together = distill(model, *with_query_in_front(row, segments, 4))
    assert_mean(together, alone)
    assert [t.shape[-1] for t in together[0].targets] == [33, 3 + 3, 64] * 2
