"""One-token steps with counters on the device give the answers of the plain path."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import locret
from locret.engine.answering import EAGER_STEPS, Answering
from locret.engine.steps import StepCounts, scratch_for
from locret.kernels import decode_packed, decode_sequences
from locret.model.backbone import PRENORM
from locret.model.hooks import cache_of
from locret.quantization import SCHEMES, make_scheme
from locret.quantization.base import Scheme
from tests.kept import stacked
from tests.test_batches import padded
from tests.tiny_models import EAGER_ONLY, FAMILIES, MIXED, WINDOW, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
QUOTAS = [[5.0, 0.4], [0.2, 2.4]]


@dataclass(frozen=True)
class HalfScheme(Scheme):
    """A scheme of a user's own: keys in halves less their block's first one, values in halves."""

    name = "half"
    widths = (8,)
    bits: int = 8

    def encode_keys(self, x, usable):
        first = x[..., :1, :].half()
        return ((x - first).half(),), (first.squeeze(-2),)

    def decode_keys(self, units, tables, head_size):
        return units[0].float() + tables[0].float()

    def encode_values(self, x, usable):
        return (x.half(),)

    def decode_values(self, units, head_size):
        return units[0].float()


class WaitingScheme(HalfScheme):
    """One whose decoding a graph could not hold."""

    recordable = False


def scheme_of(name, **options):
    """A scheme of small blocks, by name or `HalfScheme`."""
    options = {"group": 8, "residual": 3} | options
    if name == HalfScheme.name:
        return HalfScheme(**options | {"bits": 8})
    if name == "layerquant":
        options |= {"quant_end_layers": 1}
    return make_scheme(name, **options)


PACKING = [*(name for name, scheme in SCHEMES.items() if scheme.packs), HalfScheme.name]
EIGHT_BITS = ("fp8", HalfScheme.name)


def _are_fast(fast: bool, answering: Answering) -> bool:
    return fast and answering.backbone.takes_steps


@pytest.fixture
def both(monkeypatch):
    """Run something with and without steps; the plain twins stand in for the kernels."""

    def run(work):
        results = []
        for fast in (False, True):
            monkeypatch.setattr(Answering, "fast_steps", property(partial(_are_fast, fast)))
            results.append(work())
        return results

    return run


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers(both, family, positions):
    model = tiny_model(family)
    heads = tiny_heads(model)

    def work():
        engine = locret.Engine(model, heads=heads, positions=positions, **SMALL)
        return engine.generate(prompt(60, batch=2), **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)


@pytest.fixture
def fast(monkeypatch):
    """Every engine takes fast steps; the plain twins stand in for the kernels."""
    monkeypatch.setattr(Answering, "fast_steps", property(partial(_are_fast, True)))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EAGER_ONLY])
def test_every_step_of_an_answer_is_fast(fast, family, positions):
    model = tiny_model(family)
    engine = locret.Engine(model, heads=tiny_heads(model), positions=positions, **SMALL)
    assert engine.last_steps is None
    engine.generate(prompt(60, batch=2), **GREEDY)
    fused = model.config.model_type in PRENORM and family not in MIXED
    assert engine.last_steps == StepCounts(taken=11, fast=11, replayed=0, fused=11 * fused)
    cache = engine.prefill(prompt(60))
    # The first call after a context fixes the slots, unless they are fixed already.
    first = positions == "original" or all(x.window is not None for x in cache.layers)
    engine.generate(prompt(1, seed=1), cache=cache, **GREEDY)
    steps = 11 + first
    assert engine.last_steps == StepCounts(taken=12, fast=steps, fused=steps * fused)
    for tokens in (1, 4):  # and what the last answer left unread
        engine.generate(prompt(tokens, seed=1), cache=cache, **GREEDY)
        assert engine.last_steps == StepCounts(taken=11, fast=11, fused=11 * fused)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {}),
        ({"budget": None}, {}),
        ({"budget": [9, 30]}, {}),
        *(({"quantization": scheme_of(name, bits=8)}, {}) for name in PACKING),
        ({}, {"num_return_sequences": 2, "do_sample": True}),
        ({}, {"repetition_penalty": 1.2, "output_logits": True, "return_dict_in_generate": True}),
        ({}, {"max_new_tokens": None, "max_length": 72}),
        ({}, {"generation_config": GenerationConfig(pad_token_id=0)}),
    ],
    ids=str,
)
def test_every_step_is_fast_whatever_the_answer_is_asked_with(fast, settings, given):
    model = tiny_model("llama")
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    for empty in (0, 30, 57):
        mask[1, :empty] = 0
        engine = locret.Engine(model, "random", **SMALL | settings)
        engine.generate(ids, mask, **GREEDY | given)
        assert engine.last_steps == StepCounts(taken=11, fast=11, fused=11)


def test_steps_go_on_as_storage_runs_out_and_after_restoring(fast, monkeypatch):
    monkeypatch.setattr("locret.engine.answering.DECODE_ROOM", 3)
    engine = locret.Engine(tiny_model("llama"), "random", **SMALL)
    cache = engine.prefill(prompt(60))
    context = cache.snapshot()
    for _ in range(2):
        for tokens in (12, 30):
            engine.generate(prompt(4), cache=cache, max_new_tokens=tokens, do_sample=False)
            steps = tokens - 1
            assert engine.last_steps == StepCounts(taken=steps, fast=steps, fused=steps)
        cache.restore(context)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"decode_interval": 4}, {}),
        ({"quantization": WaitingScheme(group=8, residual=3)}, {}),
        ({"recall": {}}, {}),
        ({}, {"num_beams": 2}),
        ({}, {"output_hidden_states": True, "return_dict_in_generate": True}),
    ],
    ids=str,
)
def test_steps_that_are_not_fast_are_counted_as_such(fast, settings, given):
    engine = locret.Engine(tiny_model("llama"), "random", **SMALL | settings)
    engine.generate(prompt(60), **GREEDY | given)
    assert engine.last_steps == StepCounts(taken=11, fast=0)


@pytest.mark.parametrize("family", sorted(EAGER_ONLY))
def test_architectures_without_fast_steps_say_so(family):
    engine = locret.Engine(tiny_model(family), "random", **SMALL)
    assert not engine.fast_steps
    engine.generate(prompt(60), **GREEDY)
    assert engine.last_steps == StepCounts(taken=11, fast=0)


SLIDING = sorted(MIXED - EAGER_ONLY)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("context", [5, WINDOW - 2, WINDOW - 1, WINDOW, 60])
def test_windows_slide_on_the_device(both, family, positions, context):
    """Answers that fill a window, begin in a full one, and go round it more than once."""
    model = tiny_model(family)
    ids = prompt(context, batch=2)
    long = {"max_new_tokens": 2 * WINDOW + 3, "do_sample": False}

    def work():
        engine = locret.Engine(model, "streaming_llm", positions=positions, **SMALL)
        cache = engine.prefill(ids)
        answers, holds = [], []
        for question in (prompt(3, batch=2), prompt(1, batch=2, seed=1), prompt(1, batch=2)[:, :0]):
            answers.append(engine.generate(question, cache=cache, **long))
            holds += [cache.layers[0].keys, cache.layers[0].lengths]
            holds += [torch.stack([*row]) for row in cache.layers[0].source_positions]
        return answers, holds, engine.last_steps

    (plain, held, _), (fast, found, steps) = both(work)
    assert all(map(torch.equal, plain, fast))
    for one, other in zip(held, found, strict=True):
        torch.testing.assert_close(one, other)
    assert steps.fast == steps.taken == long["max_new_tokens"]


@pytest.mark.parametrize("context", [5, 60])
@pytest.mark.parametrize("family", [*SLIDING, "mistral-sliding"])
def test_windows_bound_what_layers_hold_however_long_an_answer_may_be(both, family, context):
    model = tiny_model(family)

    def work():
        engine, sizes = locret.Engine(model, "random", **SMALL), []

        def look(ids, scores, **kwargs):
            sizes.append(cache.layers[0].nbytes)
            return torch.full((1,), len(sizes) == 7)

        cache = engine.prefill(prompt(context))
        engine.generate(
            prompt(3), cache=cache, max_new_tokens=900, do_sample=False, stopping_criteria=[look]
        )
        return max(sizes), cache.layers[0].nbytes, engine.last_steps.fast

    (most, after, _), (of_steps, after_steps, fast) = both(work)
    assert of_steps <= most and after_steps == after
    assert fast == 6


@pytest.mark.parametrize("family", SLIDING)
def test_windows_where_storage_runs_out_and_after_restoring(both, monkeypatch, family):
    monkeypatch.setattr("locret.engine.answering.DECODE_ROOM", 3)
    model = tiny_model(family)

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        cache = engine.prefill(prompt(60))
        context, answers = cache.snapshot(), []
        for tokens in (30, 12, 30):
            given = GREEDY | {"max_new_tokens": tokens}
            answers.append(engine.generate(prompt(4), cache=cache, **given))
            cache.restore(context)
        return answers

    plain, fast = both(work)
    assert all(map(torch.equal, plain, fast))
    assert torch.equal(fast[0], fast[2])


def test_backbones_all_of_whose_layers_slide(both):
    model = tiny_model("mistral", sliding_window=WINDOW)

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        return engine.generate(prompt(60), **GREEDY), engine.last_steps

    (plain, _), (fast, steps) = both(work)
    assert torch.equal(plain, fast) and steps == StepCounts(taken=11, fast=11)


@pytest.mark.parametrize("family", SLIDING)
def test_windows_that_rows_fill_differently_are_not_fast(both, family):
    model = tiny_model(family)
    ids, mask = padded((60, 3))

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        return engine.generate(ids, mask, **GREEDY), engine.last_steps

    (plain, _), (fast, steps) = both(work)
    assert torch.equal(plain, fast) and steps.fast < steps.taken


@pytest.mark.parametrize("family", ["llama", *SLIDING])
def test_units_of_padded_rows_know_where_they_stood(both, tmp_path, family):
    """Each row's answer goes on from its own prompt, so that it can be closed, kept and asked."""
    model = tiny_model(family)
    ids, mask = padded((60, 40))

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        cache = engine.prefill(ids, mask)
        for question in (prompt(3, batch=2), prompt(9, batch=2)):
            engine.generate(question, cache=cache, **GREEDY)
        found = [[x.tolist() for x in row] for row in cache.layers[1].source_positions]
        alone = engine.together([cache.rows([1])])
        cache.save(tmp_path / str(engine.last_steps.fast))
        return found, engine.generate(prompt(3), cache=alone, **GREEDY), engine.last_steps

    (plain, spoken, _), (fast, said, steps) = both(work)
    assert plain == fast and torch.equal(spoken, said)
    assert steps.fast == 11


def test_compiled_models_take_fast_steps_too(fast):
    model = tiny_model("llama")
    expected = locret.Engine(model, "random", **SMALL).generate(prompt(60), **GREEDY)
    model.compile(backend="eager")
    engine = locret.Engine(model, "random", **SMALL)
    assert torch.equal(engine.generate(prompt(60), **GREEDY), expected)
    assert engine.last_steps == StepCounts(taken=11, fast=11, fused=11)


def test_steps_under_autocast(fast):
    engine = locret.Engine(tiny_model("llama"), "random", **SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = engine.generate(prompt(60), return_dict_in_generate=True, **GREEDY)
    assert engine.last_steps == StepCounts(taken=11, fast=11)
    assert cache_of(output).layers[0].keys.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*SLIDING, "mixtral", "qwen3_moe"])
def test_windows_and_experts_on_a_gpu_are_replayed_from_a_graph(family):
    model = tiny_model(family).to("cuda", torch.bfloat16)
    answers = []
    for graphs in (False, True):
        engine = locret.Engine(model, "random", graphs=graphs, **SMALL)
        cache = engine.prefill(prompt(60, batch=2).cuda())
        long = {"max_new_tokens": 2 * WINDOW + 3, "do_sample": False}
        for tokens in (3, 1):
            ids = prompt(tokens, batch=2).cuda()
            answers.append(engine.generate(ids, cache=cache, **long))
        replayed = engine.last_steps.fast - EAGER_STEPS if graphs else 0
        assert engine.last_steps.replayed == replayed
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_on_a_gpu_are_replayed_from_a_graph(compiled, autocast):
    model = tiny_model("llama", num_attention_heads=4, head_dim=64).to("cuda")
    if compiled:
        model.compile(backend="eager")
    answers = []
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        for graphs in (False, "auto"):
            engine = locret.Engine(model, "random", graphs=graphs, **SMALL)
            answers.append(engine.generate(prompt(60, batch=2).cuda(), **GREEDY))
            replayed, fused = 11 - EAGER_STEPS if graphs else 0, 0 if autocast else 11
            assert engine.last_steps == StepCounts(11, 11, replayed, fused, max(replayed - 1, 0))
    assert torch.equal(*answers)


@pytest.mark.parametrize("budget", [20, [9, 30]])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_padded_rows_and_layers_that_hold_different_numbers(both, budget, positions):
    model = tiny_model("llama")
    ids, mask = padded((60, 30, 3))

    def work():
        settings = SMALL | {"budget": budget, "positions": positions}
        return locret.Engine(model, "random", **settings).generate(ids, mask, **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("quotas", [None, QUOTAS], ids=["equal", "quotas"])
@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in PACKING for bits in (8, 4, 2) if bits == 8 or name not in EIGHT_BITS],
)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_steps_over_packed_units(both, monkeypatch, name, bits, positions, quotas):
    model = tiny_model("llama")
    ids, mask = padded((60, 30, 3))
    seen = {}
    for kernel in (decode_packed, decode_sequences):
        of_kernel = seen[kernel.__name__] = []
        monkeypatch.setattr(f"locret.engine.steps.{kernel.__name__}", spied(kernel, of_kernel))
    # The plain path would pack the answer as soon as it fills a block.
    scheme = scheme_of(name, bits=bits, group=16)
    settings = SMALL | {"positions": positions, "quantization": scheme}

    def work():
        engine = locret.Engine(model, "random", quotas=quotas, **settings)
        output = engine.generate(
            ids, mask, **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        return output.sequences, torch.stack(output.logits)

    plain, fast = both(work)
    assert torch.equal(plain[0], fast[0])
    assert (plain[1] - fast[1]).abs().max() < 1e-4
    straight = name not in (*EIGHT_BITS, "kvquant")
    assert len(seen["decode_packed"]) == (2 * 11 if straight else 0)
    assert len(seen["decode_sequences"]) == (0 if straight else 2 * 11)


def spied(kernel, seen):
    def decode(*args):
        seen.append(args)
        return kernel(*args)

    return decode


def test_layers_share_the_room_that_their_units_are_written_out_to(both, monkeypatch):
    """One buffer for two layers of different lengths, and no more than the longer one takes."""
    model = tiny_model("llama")
    rooms = []

    def room(cache):
        rooms.append((scratch_for(cache), [x.store.context.sequences.total for x in cache.layers]))
        return rooms[-1][0]

    monkeypatch.setattr("locret.engine.steps.scratch_for", room)

    def work():
        settings = SMALL | {"budget": [30, 9], "quantization": scheme_of("kvquant")}
        return locret.Engine(model, "random", **settings).generate(prompt(60), **GREEDY)

    plain, fast = both(work)
    assert torch.equal(plain, fast)
    ((scratch, totals),) = rooms
    assert scratch.shape == (2, max(totals), 8) and min(totals) < max(totals)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", PACKING)
def test_long_answers_are_packed_now_and_then(both, monkeypatch, name, positions):
    model = tiny_model("llama")
    monkeypatch.setattr("locret.cache.store.STEPS", 11)
    settings = SMALL | {
        "positions": positions,
        "quantization": scheme_of(name, bits=8, group=4),
    }

    def work():
        engine = locret.Engine(model, "streaming_llm", **settings)
        cache = engine.prefill(prompt(60))
        context, answers = cache.snapshot(), []
        for seed in range(2):
            for tokens in (40, 5):
                question = prompt(4, seed=seed)
                output = engine.generate(
                    question, cache=cache, max_new_tokens=tokens, do_sample=False,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
                assert engine.last_steps.fast == (tokens - 1) * engine.fast_steps
                answers.append(torch.stack(output.logits)[:3])
            for layer in cache.layers:
                known = layer.source_positions[0][0][20:].tolist()
                assert known == list(range(60, 60 + len(known)))
                assert layer.store.context.plain.longest + layer.store.tail.count < 3 + 4
            cache.restore(context)
        return answers

    plain, fast = both(work)
    assert len(plain) == len(fast)
    assert (plain[0] - fast[0]).norm() < 0.05 * plain[0].norm()


def test_turns_snapshots_and_storage_that_runs_out(both, monkeypatch):
    model = tiny_model("llama")
    heads = tiny_heads(model)
    monkeypatch.setattr("locret.engine.answering.DECODE_ROOM", 3)

    # An engine that evicts while it answers keeps the scores, whoever asks then.
    keeps_scores = locret.Engine(model, heads=heads, decode_interval=99, **SMALL)

    def work():
        engine = locret.Engine(model, heads=heads, **SMALL)
        cache = keeps_scores.prefill(prompt(60))
        context, answers = cache.snapshot(), []
        for seed in range(3):
            question = prompt(4, seed=seed)
            answers += engine.generate(question, cache=cache, **GREEDY).flatten().tolist()
            more = engine.generate(question, cache=cache, **GREEDY | {"max_new_tokens": 30})
            answers += more.flatten().tolist()
            for layer in cache.layers:
                known = layer.source_positions[0][0][20:].tolist()
                assert known == list(range(60, 60 + len(known)))
                assert (stacked(layer.scores)[:, :, 20:] == 0).all()
            cache.restore(context)
        return answers

    plain, fast = both(work)
    assert plain == fast


def test_length_given_as_max_length_and_stopping_early(both):
    model = tiny_model("llama")

    class StopAt(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= 65)

    def work():
        engine = locret.Engine(model, "random", **SMALL)
        stop = StoppingCriteriaList([StopAt()])
        return engine.generate(prompt(60), max_length=90, do_sample=False, stopping_criteria=stop)

    plain, fast = both(work)
    assert torch.equal(plain, fast)
    assert plain.shape == (1, 65)


def test_nothing_is_left_on_the_model(both):
    model = tiny_model("llama")
    before = {name: id(value) for name, value in vars(model).items()}
    kind = type(model)
    both(lambda: locret.Engine(model, "random", **SMALL).generate(prompt(60), **GREEDY))
    assert type(model) is kind
    assert {name: id(value) for name, value in vars(model).items()} == before


def test_scores_of_every_step_are_kept_apart(both):
    model = tiny_model("llama")

    def work():
        return (
            locret.Engine(model, "random", **SMALL)
            .generate(prompt(60), return_dict_in_generate=True, output_logits=True, **GREEDY)
            .logits
        )

    plain, fast = both(work)
    assert max((p - f).abs().max() for p, f in zip(plain, fast, strict=True)) < 1e-5


def test_graphs_are_refused_where_they_do_not_work():
    with pytest.raises(ValueError, match="graphs=True does not work here: the model is on cpu"):
        locret.Engine(tiny_model("llama"), "random", graphs=True, **SMALL)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("cudnn", "it needs a CUDA device"), ("flash_attn", "it needs a CUDA"), ("x", "is unknown")],
)
def test_backends_are_refused_where_they_do_not_work(backend, reason):
    with pytest.raises(ValueError, match=reason):
        locret.Engine(tiny_model("llama"), "random", backend=backend, **SMALL)
