"""A row that layers read in chunks gives what it gives when read at once, in less memory."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from locret.heads import targets
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.tiny_models import FAMILIES, PHI3_WINDOW, prompt, tiny_heads, tiny_model

ROW = [  # two conversations of one answer, one of two
    Segment(0, 40, ((29, 40),)),
    Segment(40, 57, ((43, 57),)),
    Segment(57, 118, ((61, 70), (100, 118))),
]


def distill(model, segments, chunk_size, ids=None, training=True, **given):
    """A row's result and its gradients."""
    options = {"alpha": 0.5, "keep_scores": True, "loss": given.pop("loss", "smooth_l1")}
    heads = tiny_heads(model, **given).requires_grad_(True).train(training)
    ids = prompt(segments[-1].end) if ids is None else ids
    backbone = Backbone(model, "by_length")
    result = Distillation(backbone, heads, chunk_size=chunk_size, **options)(ids, segments)
    if training:
        result.loss.backward()
    return result, [p.grad for p in heads.parameters()]


def assert_same(chunked, whole, relative=1e-5):
    (ours, our_gradients), (theirs, their_gradients) = chunked, whole
    for name in ("loss", "regression", "smoothness"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=relative), name
    for name in ("predictions", "targets"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() < relative * b.abs().max(), name
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert (a - b).abs().max() < 3 * relative * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_in_chunks(family):
    model = tiny_model(family)
    assert_same(distill(model, ROW, 33), distill(model, ROW, None), relative=1e-4)


def test_without_grouped_queries():
    model = tiny_model("llama", num_key_value_heads=8)
    assert_same(distill(model, ROW, 13), distill(model, ROW, None), relative=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {"label": "max_prob"},
        {"label": "value_weighted"},
        {"loss": "listwise"},
        {"tap": "hidden"},
    ],
    ids=str,
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_labels_losses_and_inputs(attn, given):
    model = tiny_model("llama", attn_implementation=attn)
    assert_same(distill(model, ROW, 32, **given), distill(model, ROW, None, **given))


@settings(max_examples=10)
@given(
    st.integers(3, 60),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
)
def test_any_chunk_size_and_row(chunk_size, turns):
    """The turns are both one conversation and a row of conversations."""
    answers, segments, at = [], [], 0
    for asked, said in turns:
        segments.append(Segment(at, at + asked + said, ((at + asked, at + asked + said),)))
        answers.append(segments[-1].answers[0])
        at += asked + said
    model = tiny_model("qwen3")
    for row in ([Segment(0, at, tuple(answers))], segments):
        assert_same(distill(model, row, chunk_size), distill(model, row, None), relative=1e-4)


def test_both_sides_of_the_longrope_window():
    ends = PHI3_WINDOW - 10, 2 * PHI3_WINDOW + 10
    row = [
        Segment(0, ends[0], ((ends[0] - 10, ends[0]),)),
        Segment(ends[0], ends[1], ((ends[1] - 10, ends[1]),)),
    ]
    model = tiny_model("phi3")
    assert_same(distill(model, row, 33), distill(model, row, None), relative=1e-4)


def test_rows_of_a_batch_and_validation():
    model, ids = tiny_model("llama"), prompt(40, batch=2)
    row = [Segment.single(29, 40)]
    assert_same(distill(model, row, 7, ids), distill(model, row, None, ids))
    given, _ = distill(model, row, 7, ids, training=False)
    assert not given.loss.requires_grad


def test_nothing_is_left_on_the_model():
    model = tiny_model("llama")
    heads = tiny_heads(model)
    heads[1].forward = None
    with pytest.raises(TypeError):
        Distillation(Backbone(model), heads, chunk_size=7)(prompt(40), [Segment.single(29, 40)])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": 8, "prompt_keys": "unrotated"}, "expected at least 1 and rotated keys"),
    ],
)
def test_what_cannot_be_read_in_chunks_is_refused(options, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        Distillation(Backbone(model), tiny_heads(model), **options)


class PeakBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.storages = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        return made

    def _watch(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.storages.discard(key)
        self.alive -= size


def peak_bytes(model, segments, chunk_size, **record):
    heads = tiny_heads(model, **record).requires_grad_(True).train()
    distillation = Distillation(Backbone(model), heads, chunk_size=chunk_size)
    with PeakBytes() as seen:
        distillation(prompt(segments[-1].end), segments).loss.backward()
    return seen.peak


@pytest.fixture
def attention_of_no_memory(monkeypatch):
    """SDPA's CPU kernels take memory that grows with the row; this takes what GPUs' kernels do."""
    for module in ("model.varlen", "training.row_loss"):
        monkeypatch.setattr(
            f"locret.{module}.attend", lambda query, *_, **__: query.transpose(1, 2).contiguous()
        )


def test_chunks_take_less_memory_and_hardly_more_with_the_length(attention_of_no_memory):
    model = tiny_model("llama", intermediate_size=512, max_position_embeddings=8192)
    rows = [[Segment.single(length - 4, length)] for length in (1024, 4096)]
    (short_in_chunks, long_in_chunks) = (peak_bytes(model, row, 128) for row in rows)
    assert long_in_chunks < 0.6 * peak_bytes(model, rows[1], None)
    # Of a row read at once, by the model's own forward: a hook has to be called.
    model.model.norm.register_forward_hook(lambda *_: None)
    (short, long) = (peak_bytes(model, row, None) for row in rows)
    assert long_in_chunks < short
    assert long_in_chunks - short_in_chunks < 0.3 * (long - short)


@pytest.mark.parametrize("chunk_size", [None, 128])
def test_a_copy_takes_no_memory_of_its_length_squared(attention_of_no_memory, chunk_size):
    """All logits of the longer copy would be 268 MB; a block of them is in memory at a time."""
    model = tiny_model("llama", intermediate_size=512, max_position_embeddings=8192)
    peaks = []
    for trunk in (512, 2048):
        copy = trunk, 2 * trunk
        row = [Segment(0, 2 * trunk, (copy,), (copy,))]
        peaks.append(peak_bytes(model, row, chunk_size, label="log_max_prob"))
    blocks = 2 * 4 * targets._BLOCK_ELEMENTS_CPU  # logits and probabilities
    assert peaks[1] - peaks[0] < blocks
