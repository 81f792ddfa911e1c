"""The engine's settings: sorted into groups, refused without a model, the same for all who take
them."""

import inspect
from dataclasses import fields

import pytest

import locret
from locret.engine.config import DEFAULTS, Compute, EngineConfig, Reading, Storage
from locret.evaluation.config import Setup
from locret.policies.compose import AdaptiveHeads
from locret.quantities import ByteShare, Memory, budget_of
from tests.tiny_models import tiny_heads, tiny_model

BESIDE = {"model", "policy", "heads", "progress", "budget_bytes"}


def test_the_groups_hold_the_settings_of_the_engine():
    grouped = [entry.name for group in (Reading, Storage, Compute) for entry in fields(group)]
    given = inspect.signature(locret.Engine).parameters
    assert sorted(grouped) == sorted(DEFAULTS) == sorted(set(given) - BESIDE)
    assert {name: given[name].default for name in DEFAULTS} == DEFAULTS


def test_settings_are_sorted_into_their_groups():
    config = EngineConfig.of("random", budget="8x", merging="similar", backend="sdpa")
    assert config.reading.budget == 0.125
    assert config.storage.merging.into == "similar"
    assert config.compute.backend == "sdpa"
    assert set(config.flat()) == set(DEFAULTS)


def test_an_engine_keeps_its_config():
    model = tiny_model("llama")
    engine = locret.Engine(model, "random", budget="40kB", chunk_size=7)
    assert engine.config.reading.budget == Memory(40_000)
    assert engine.config.reading.chunk_size == 7
    assert engine.config.compute == Compute("sdpa", False)


@pytest.mark.parametrize("policy", ["full", AdaptiveHeads("full")], ids=["full", "heads"])
def test_a_policy_that_keeps_all_has_no_budget(policy):
    reading = EngineConfig.of(policy, budget=20, decode_interval=4, stabilizers=30).reading
    assert (reading.budget, reading.decode_interval) == (None, None)


REFUSED = [
    ({"chunksize": 5}, "engine settings chunksize are unknown; expected some of backend, budget"),
    ({"heads": 5, "policy": 5}, "engine settings heads, policy are unknown"),
    ({"query_tokens": 5}, "engine settings query_tokens are unknown"),
    ({"budget": 20, "stabilizers": 21}, "lower stabilizers or raise the budget"),
    ({"budget": [30, 20], "stabilizers": 21}, "lower stabilizers or raise the budget"),
    ({"quantization": "kivi", "merging": "similar"}, "does not encode again"),
    ({"quantization": "kivi", "recall": {}}, "has only codes of them"),
    ({"merging": "similar", "recall": {}}, "would count twice"),
    ({"backend": "minference"}, "use it with policy='full' and chunk_size=None"),
    ({"backend": "fast"}, "backend 'fast' is unknown; expected one of"),
    ({"graphs": "yes"}, "graphs is 'yes'; expected True or False or 'auto'"),
    ({"query_aware": "yes"}, "query_aware is 'yes'; expected True or False"),
    ({"longrope": "short"}, "longrope is 'short'; expected 'long' or 'by_length'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_works_with_no_model_is_refused_without_one(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.of(**settings)
    if not {"budget", "query_aware"} & settings.keys():
        others = {name: value for name, value in settings.items() if name != "quantization"}
        setup = Setup("random", "8x", quantization=settings.get("quantization"))
        with pytest.raises(ValueError, match=f"setup random 8x query_agnostic.*: .*{message}"):
            setup.check(others)


@pytest.mark.parametrize(
    "settings", [{"budget": 5}, {"quantization": "kivi"}, {"query_aware": True}], ids=str
)
def test_what_is_a_setups_own_is_no_setting_of_all(settings):
    for setup, all_of in (
        (Setup("random", "8x"), settings),
        (Setup("random", engine=settings), {}),
    ):
        with pytest.raises(ValueError, match=f"engine settings hold {next(iter(settings))}; give"):
            setup.check(all_of)


def test_heads_that_read_the_question_need_no_switch():
    record = tiny_heads(tiny_model("llama"), query_tokens=3).config
    assert EngineConfig.of("locret", record).recorded.query_tokens == 3
    assert EngineConfig.of("random", record, query_aware=True).recorded.query_tokens == 0
    with pytest.raises(ValueError, match="read the question in front of the prompt already"):
        EngineConfig.of("locret", record, query_aware=True)
    with pytest.raises(ValueError, match="and the heads keep 3 query tokens but the budget is 20"):
        EngineConfig.of("locret", record, budget=20, stabilizers=18)


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (7, 7),
        (0.125, 0.125),
        ("8x", 0.125),
        ("2GiB", Memory(2**31)),
        ("600 B", Memory(600)),
        ([9, 30], (9, 30)),
        ((9, 30), (9, 30)),
        (Memory(5), Memory(5)),
        (str(Memory(5)), Memory(5)),
        ("8x bytes", ByteShare(1 / 8)),
        (str(ByteShare(1 / 8)), ByteShare(1 / 8)),
        *((str(ByteShare(1 / ratio)), ByteShare(1 / ratio)) for ratio in (2, 3, 7, 49, 1000)),
        (None, None),
    ],
)
def test_budgets_have_these_forms(given, budget):
    assert budget_of(given) == budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "budget is 0; expected at least 1, or None"),
        (True, "budget is True; expected units"),
        (1.0, "budget is 1.0; expected a share of the context, between 0 and 1"),
        ("1x", "budget is '1x'; expected a number of units"),
        ("12", "budget is '12'; expected a number of units"),
        ("0x bytes", "budget is '0x bytes'; expected a number of units"),
        ("x bytes", "budget is 'x bytes'; expected a number of units"),
        ("1x bytes", "budget is '1x bytes'; expected a number of units"),
        ("0MiB", "'0MiB' is less than 1; expected an amount of memory"),
        ([9, True], "one whole number of at least 1 for each layer"),
        ({"units": 9}, "expected units"),
    ],
)
def test_what_is_not_a_budget_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        budget_of(given)
