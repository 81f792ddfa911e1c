"""Greedy steps that run one ahead of the host give the answers of steps that do not."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

import locret
from locret.engine import answering
from locret.engine.answering import EAGER_STEPS, Answering, may_run_ahead
from locret.engine.steps import StepPass
from tests.tiny_models import FAMILIES, MIXED, prompt, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
AHEAD = 11 - EAGER_STEPS - 1  # of the steps of such an answer: the first replay is asked for


@pytest.fixture
def replays(monkeypatch):
    """Steps are "recorded" on the CPU: a replay runs one, and leaves Python's counters."""
    made = []

    class Known(StepPass):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def record(step, device):
        outputs, steps = step(), made[-1]
        steps.rewind()  # a recording moves Python's counters alone
        layers = steps.cache.layers

        def replay():
            before = [(layer.store.tail.count, layer.seen) for layer in layers]
            outputs.logits.copy_(step().logits)
            for layer, (count, seen) in zip(layers, before, strict=True):
                layer.store.tail.count, layer.seen = count, seen

        return SimpleNamespace(replay=replay), outputs

    monkeypatch.setattr(Answering, "fast_steps", property(lambda self: True))
    monkeypatch.setattr("locret.engine.config.why_not_graphed", lambda backbone: None)
    monkeypatch.setattr("locret.engine.answering.StepPass", Known)
    monkeypatch.setattr("locret.engine.answering.record", record)


def run_ahead(monkeypatch, on):
    """Whether steps run ahead; if not, they are the twin."""
    monkeypatch.setattr(
        "locret.engine.answering.may_run_ahead", may_run_ahead if on else lambda *_: False
    )


@pytest.fixture
def both(monkeypatch, replays):
    """Run something with and without steps answering."""

    def run(work):
        results = []
        for on in (False, True):
            run_ahead(monkeypatch, on)
            results.append(work())
        return results

    return run


def answer(engine, ids, **given):
    """Tokens, logits of the answer, and the counts of its steps."""
    output = engine.generate(ids, **GREEDY | LOGITS | given)
    return output.sequences, torch.stack(output.logits), engine.last_steps


def assert_same(plain, other, used):
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])
    assert plain[2].replayed == other[2].replayed > 0
    assert (plain[2].ahead, other[2].ahead) == (0, used)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXED])
def test_same_tokens_and_logits(both, family, positions):
    engine = locret.Engine(tiny_model(family), "random", positions=positions, graphs=True, **SMALL)
    assert_same(*both(lambda: answer(engine, prompt(60, batch=2))), AHEAD)


class StopAt(StoppingCriteria):
    """Ends a row at a length of its own, as the token at the end of an answer would."""

    eos_token_id = 1  # stock goes on with padding in rows that end so

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, ids, scores, **kwargs):
        return ids.shape[1] >= self.lengths


class Reversed(LogitsProcessor):
    """Wants the least likely token now and then."""

    def __call__(self, ids, scores):
        return -scores if ids.shape[1] == 66 else scores


@pytest.mark.parametrize(
    ("rows", "given", "used"),
    [
        (1, {"max_new_tokens": EAGER_STEPS + 2}, 0),
        (1, {"max_new_tokens": EAGER_STEPS + 3}, 1),
        (1, {"max_new_tokens": None, "max_length": 72}, AHEAD),
        (1, {"stopping_criteria": [StopAt(68)], "pad_token_id": 1}, 4),
        (2, {"stopping_criteria": [StopAt(66, 80)], "pad_token_id": 1}, 3),
        (1, {"do_sample": True}, 0),
        (1, {"logits_processor": LogitsProcessorList([Reversed()])}, 0),
        (1, {"suppress_tokens": [*range(0, 128, 2)]}, 1),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else str(x),
)
def test_answers_end_anywhere_and_may_be_of_other_tokens(both, rows, given, used):
    engine = locret.Engine(tiny_model("llama"), "random", graphs=True, **SMALL)

    def work():
        torch.manual_seed(0)
        cache = engine.prefill(prompt(56, batch=rows))
        seen = [answer(engine, prompt(4, batch=rows, seed=1), cache=cache, **given)]
        held = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        follow = answer(engine, prompt(3, batch=rows, seed=2), cache=cache)
        return *seen, torch.stack(held), follow

    (first, held, second), (first_ahead, held_ahead, second_ahead) = both(work)
    assert_same(first, first_ahead, used)
    assert torch.equal(held, held_ahead)
    assert_same(second, second_ahead, AHEAD)


def test_a_processor_that_was_not_foreseen_takes_one_step_back(both, monkeypatch):
    monkeypatch.setattr(answering, "CHANGING", ())
    engine = locret.Engine(tiny_model("llama"), "random", graphs=True, **SMALL)
    given = {"logits_processor": LogitsProcessorList([Reversed()])}
    assert_same(*both(lambda: answer(engine, prompt(60), **given)), 66 - 60 - EAGER_STEPS - 1)


def test_storage_runs_out_and_snapshots_come_back(both, monkeypatch):
    monkeypatch.setattr("locret.engine.answering.DECODE_ROOM", 3)
    monkeypatch.setattr("locret.engine.answering.MOST_ROOM", 9)
    engine = locret.Engine(tiny_model("llama"), "random", graphs=True, **SMALL)

    def work():
        cache = engine.prefill(prompt(60))
        context, fork = cache.snapshot(), cache.fork()
        given = []
        for _ in range(2):
            given += [answer(engine, prompt(4, seed=n), cache=cache) for n in range(2)]
            cache.restore(context)
        given.append(answer(engine, prompt(4), cache=fork))
        return given

    plain, other = both(work)
    for one, two in zip(plain, other, strict=True):
        assert_same(one, two, two[2].ahead)
        assert two[2].ahead > 3
    for tokens, logits, _ in (other[2], other[4]):
        assert torch.equal(tokens, other[0][0]) and torch.equal(logits, other[0][1])


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_turns_snapshots_and_memory_are_the_same(monkeypatch, rows, positions):
    model = tiny_model("llama", num_attention_heads=4, head_dim=64).to("cuda")
    engine = locret.Engine(model, "streaming_llm", positions=positions, **SMALL)
    ids, question = prompt(60, batch=rows).cuda(), prompt(4, batch=rows, seed=5).cuda()
    long = GREEDY | {"max_new_tokens": 40}
    answers, levels = [], []
    for on in (False, True, True, True):
        run_ahead(monkeypatch, on)
        cache = engine.prefill(ids)
        context, given = cache.snapshot(), []
        for asked in (long, GREEDY, long):
            given.append(engine.generate(question, cache=cache, **asked))
            assert engine.last_steps.ahead == (asked["max_new_tokens"] - 2 - EAGER_STEPS) * on
        for ended in ({}, {"eos_token_id": given[0][0, 20].item(), "pad_token_id": 0}):
            cache.restore(context)
            given.append(engine.generate(question, cache=cache, **long, **ended))
            given.append(engine.generate(question, cache=cache, **GREEDY))
        assert torch.equal(given[3], given[0]) and torch.equal(given[4], given[1])
        assert rows > 1 or given[5].shape[1] <= 21
        answers.append([each.cpu() for each in given])
        del cache, context, given
        levels.append(torch.cuda.memory_allocated())
    for each in answers[1:]:
        assert all(map(torch.equal, answers[0], each))
    assert levels[-1] <= levels[2]
