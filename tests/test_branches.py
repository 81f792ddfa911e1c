"""A trunk with branches: each branch goes on from the trunk as if no other branch were there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.row_loss import PackedAttention
from locret.training.segments import Segment, check_segments, with_query_in_front
from tests.stock_logits import stock_prompt_labels
from tests.tiny_models import FAMILIES, PHI3_WINDOW, prompt, tiny_heads, tiny_model

ALPHA = 0.5  # far above the paper's, so that smoothness shows in every comparison
TRUNK = 23
WAYS = [(4, 9), (0, TRUNK), (3, 1)]  # tokens before each branch's answer, and the answer's


def branched(trunk, ways, start=0):
    """A segment of a trunk and branches."""
    at, answers, branches = start + trunk, [], []
    for lead, said in ways:
        branches.append((at, at + lead + said))
        answers.append((at + lead, at + lead + said))
        at += lead + said
    return Segment(start, at, tuple(answers), tuple(branches))


def shifted(segment, by):
    answers, branches = (tuple((a + by, b + by) for a, b in x) for x in segment[2:])
    return Segment(segment.start + by, segment.end + by, answers, branches)


def alone(ids, segment):
    """Each branch of a segment as a row of its own, trunk in front, with where its answer begins;
    the segment itself if it has no branches."""
    if not segment.branches:
        return [(ids[:, segment.start : segment.end], segment.answers[-1][0] - segment.start)]
    trunk = ids[:, segment.start : segment.last_prompt_end]
    pairs = zip(segment.branches, segment.answers, strict=True)
    return [
        (torch.cat([trunk, ids[:, start:end]], dim=1), trunk.shape[1] + answer[0] - start)
        for (start, end), answer in pairs
    ]


def distill(model, ids, segments, chunk_size=None, loss="smooth_l1", **record):
    """A row's result and the gradients of its heads."""
    heads = tiny_heads(model, **record).requires_grad_(True).train()
    options = {"alpha": ALPHA, "loss": loss, "keep_scores": True, "chunk_size": chunk_size}
    result = Distillation(Backbone(model, "by_length"), heads, **options)(ids, segments)
    result.loss.backward()
    return result, [p.grad for p in heads.parameters()]


def assert_close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


BRANCHED = branched(TRUNK, WAYS)
SHORT = branched(5, [(2, 2)], start=BRANCHED.end)
ROW = [  # with branches, with one, and without
    BRANCHED,
    SHORT,
    shifted(Segment(0, 30, ((9, 12), (20, 30))), SHORT.end),
    shifted(branched(17, [(0, 12), (5, 3)]), SHORT.end + 30),
]
IDS = prompt(ROW[-1].end)


# --- against stock attention ---


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_largest_that_any_branch_gives_alone(family, kv_heads):
    model = tiny_model(family, num_key_value_heads=kv_heads)
    result, _ = distill(model, IDS[:, : BRANCHED.end], [BRANCHED])
    kept = [window is None for window in Backbone(model).windows]
    each = [
        stock_prompt_labels(model, ids, asked)[kept][..., :TRUNK]
        for ids, asked in alone(IDS, BRANCHED)
    ]
    assert_close(torch.cat(result.targets), torch.stack(each).amax(dim=0))


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2-hybrid", "smollm3", "glm"])
def test_hidden_states_are_those_of_each_way_alone(family, attn, chunk_size):
    model = tiny_model(family, attn_implementation=attn)
    states = []
    # The output of the last layer's attention, which sees what all others made.
    last = model.model.layers[-1].self_attn
    hook = last.register_forward_hook(lambda module, args, output: states.append(output[0]))
    distill(model, IDS, ROW, chunk_size)
    row = torch.cat(states, dim=1)
    for segment in ROW:
        for number, (ids, _) in enumerate(alone(IDS, segment)):
            states.clear()
            with torch.no_grad():
                model(ids, use_cache=False)
            if not segment.branches:
                assert_close(row[:, segment.start : segment.end], states[0])
                continue
            trunk = segment.last_prompt_end - segment.start
            assert_close(row[:, segment.start : segment.last_prompt_end], states[0][:, :trunk])
            assert_close(row[:, slice(*segment.branches[number])], states[0][:, trunk:])
    hook.remove()


# --- against rows without branches ---

LOSSES_AND_LABELS = [
    {"label": "max_prob"},
    {"label": "log_max_prob"},
    {"label": "log_value_weighted", "loss": "listwise"},
    {"label": "log_value_share", "tap": "hidden"},
]


def targets_alone(model, segment, **record):
    """Targets of a segment by layer, from rows without branches."""
    if not segment.branches:
        own = shifted(segment, -segment.start)
        targets = distill(model, IDS[:, segment.start : segment.end], [own], **record)[0].targets
        return targets[: len(targets) // 2], targets[len(targets) // 2 :]
    trunk = segment.last_prompt_end - segment.start
    each = [
        distill(model, ids, [Segment.single(asked, ids.shape[1])], **record)[0].targets
        for ids, asked in alone(IDS, segment)
    ]
    by_layer = zip(*each, strict=True)
    return [[torch.stack([x[..., :trunk] for x in of]).amax(dim=0)] for of in by_layer]


@pytest.mark.parametrize("record", LOSSES_AND_LABELS, ids=str)
def test_every_label_is_the_largest_of_all_branches(record):
    model = tiny_model("llama")
    result, _ = distill(model, IDS, ROW, **record)
    layers = zip(*(targets_alone(model, segment, **record) for segment in ROW), strict=True)
    expected = [target for layer in layers for targets in layer for target in targets]
    for ours, theirs in zip(result.targets, expected, strict=True):
        assert_close(ours, theirs)


def test_a_single_branch_is_a_prompt_and_an_answer():
    """But for the branch's tokens before the answer, which are not labelled."""
    model = tiny_model("llama")
    for lead in (0, 4):
        ids = prompt(40)
        ours, gradients = distill(model, ids, [branched(40 - lead - 11, [(lead, 11)])])
        theirs, expected = distill(model, ids, [Segment.single(29, 40)])
        for a, b in zip(ours.targets, theirs.targets, strict=True):
            assert_close(a, b[..., : 29 - lead], 1e-5)
        if lead == 0:
            assert torch.allclose(ours.loss, theirs.loss, rtol=1e-5)
            for a, b in zip(gradients, expected, strict=True):
                assert_close(a, b)


def test_a_sample_weighs_the_same_with_branches_or_without():
    model = tiny_model("llama")
    together, gradients = distill(model, IDS, ROW)
    each = [distill(model, IDS[:, s.start : s.end], [shifted(s, -s.start)]) for s in ROW]
    for name in ("loss", "regression", "smoothness"):
        mean = sum(getattr(result, name).detach() for result, _ in each) / len(ROW)
        assert torch.allclose(getattr(together, name), mean, rtol=1e-4), name
    for ours, *theirs in zip(gradients, *(g for _, g in each), strict=True):
        assert_close(ours, sum(theirs) / len(ROW))


# --- in chunks ---


def assert_same(chunked, whole, relative=1e-4):
    (ours, our_gradients), (theirs, their_gradients) = chunked, whole
    for name in ("loss", "regression", "smoothness"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=relative), name
    for name in ("predictions", "targets"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert_close(a, b, relative)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert_close(a, b, 3 * relative)


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_branches_in_chunks(family, kv_heads):
    model = tiny_model(family, num_key_value_heads=kv_heads)
    assert_same(distill(model, IDS, ROW, 13), distill(model, IDS, ROW))


@pytest.mark.parametrize("record", LOSSES_AND_LABELS, ids=str)
def test_every_label_reads_branches_in_chunks(record):
    model = tiny_model("llama")
    assert_same(distill(model, IDS, ROW, 10, **record), distill(model, IDS, ROW, **record))


@settings(max_examples=10)
@given(
    st.integers(2, 60),
    st.integers(1, 25),
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_any_chunk_size_and_branches(chunk_size, trunk, ways):
    first = branched(trunk, ways)
    row = [first, shifted(first, first.end)]
    model, ids = tiny_model("llama"), prompt(row[-1].end)
    assert_same(distill(model, ids, row, chunk_size), distill(model, ids, row))


def test_a_branch_beyond_the_longrope_window_turns_its_trunk_too():
    """As when the model reads both as one text; the other segment is short."""
    row = [branched(PHI3_WINDOW - 10, [(2, 3), (5, 20)]), None]
    row[1] = branched(20, [(2, 3)], start=row[0].end)
    model, ids = tiny_model("phi3"), prompt(row[1].end)
    whole = distill(model, ids, row)
    assert_same(distill(model, ids, row, 33), whole)
    long_way, asked = alone(ids, row[0])[1]
    expected = stock_prompt_labels(model, long_way, asked)[..., : PHI3_WINDOW - 10]
    assert (torch.cat(whole[0].targets[::2]) >= expected - 1e-4).all()


# --- the adapter's attention ---


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "glm", "smollm3"])
def test_packed_attention_reads_branches(family):
    model = tiny_model(family)
    backbone = Backbone(model, "by_length")
    with torch.no_grad():
        with backbone.attached(PackedAttention(ROW, backbone.backend)):
            ours = model(IDS, use_cache=False).logits
        for segment in (segment for segment in ROW if segment.branches):
            trunk = segment.last_prompt_end - segment.start
            for branch, (ids, _) in zip(segment.branches, alone(IDS, segment), strict=True):
                stock = model(ids, use_cache=False).logits
                assert_close(ours[:, slice(*branch)], stock[:, trunk:])
                assert_close(ours[:, segment.start : segment.last_prompt_end], stock[:, :trunk])


def test_gradients_of_a_branch_reach_its_trunk_and_no_other_branch():
    model = tiny_model("llama").requires_grad_(False)
    backbone = Backbone(model)
    embedded = model.model.embed_tokens(IDS).requires_grad_(True)
    with backbone.attached(PackedAttention(ROW, backbone.backend)):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    start, end = BRANCHED.branches[1]
    loss = logits[:, start:end].square().mean()
    reached = torch.autograd.grad(loss, embedded)[0].abs().sum(dim=-1)[0] > 0
    expected = torch.zeros(len(reached), dtype=torch.bool)
    expected[:TRUNK] = expected[start:end] = True
    assert torch.equal(reached, expected)


# --- what is refused ---


@pytest.mark.parametrize(
    ("answers", "branches"),
    [
        (((12, 20),), ((0, 20),)),  # no trunk
        (((12, 19),), ((10, 19),)),  # does not reach the end
        (((12, 20),), ((10, 21),)),
        (((12, 19),), ((10, 20),)),  # goes on after its answer
        (((9, 20),), ((10, 20),)),  # its answer begins in the trunk
        (((11, 14), (16, 20)), ((10, 14), (15, 20))),  # a gap
        (((11, 14), (16, 20)), ((10, 15), (14, 20))),
        (((11, 14),), ((10, 14), (14, 20))),  # a branch without an answer
        (((11, 14), (15, 20)), ((10, 20),)),
        (((16, 20), (11, 14)), ((14, 20), (10, 14))),
    ],
    ids=str,
)
def test_branches_that_cannot_be_are_refused(answers, branches):
    with pytest.raises(ValueError, match=r"segment 0 \.\. 20 has the (branches|answers)"):
        check_segments([Segment(0, 20, answers, branches)], 20)


def test_branches_that_are_right_pass():
    check_segments(ROW, IDS.shape[1])
    assert [segment.last_prompt_end - segment.start for segment in ROW] == [TRUNK, 5, 20, 17]


def test_a_question_cannot_stand_in_front_of_branches():
    with pytest.raises(ValueError, match="3 of 4 samples have branches; set query_tokens to 0"):
        with_query_in_front(IDS, ROW, 4)


def test_the_released_label_pass_takes_no_branches():
    model = tiny_model("llama")
    distillation = Distillation(Backbone(model), tiny_heads(model), prompt_keys="unrotated")
    with pytest.raises(ValueError, match="'unrotated', which samples with branches do not take"):
        distillation(IDS, ROW)
