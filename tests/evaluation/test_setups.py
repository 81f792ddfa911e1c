"""The setups of a table: how entries are spelt out, and which budgets they mean."""

import pytest

from locret.evaluation.config import Setup, expand
from locret.quantities import ByteShare, Memory


def test_lists_stand_for_all_combinations_and_the_full_cache_comes_first():
    setups = expand(
        [
            {"policy": ["locret", "random"], "budget": ["4x", 64]},
            {"policy": "locret", "budget": "8x", "protocol": "query_aware", "name": "aware"},
        ]
    )
    assert [setup.label for setup in setups] == [
        "full",
        "locret 4x query_agnostic",
        "locret 64 query_agnostic",
        "random 4x query_agnostic",
        "random 64 query_agnostic",
        "aware 8x query_aware",
    ]


def test_a_full_cache_may_be_given_and_is_one_setup():
    setups = expand([{"policy": "random", "budget": 8}, {"policy": "full", "engine": {"a": 1}}])
    assert [setup.label for setup in setups] == ["full", "random 8 query_agnostic"]
    assert setups[0].engine == {"a": 1}
    assert expand([]) == [Setup("full")]
    assert expand([], with_full=False) == []
    assert [setup.label for setup in expand([{"policy": "full"}], with_full=False)] == ["full"]
    with pytest.raises(ValueError, match="setups full are given twice"):
        expand([{"policy": "full"}, {"policy": "full", "engine": {"a": 1}}])


@pytest.mark.parametrize(
    ("budget", "units", "share"),
    [
        ("8x", 12, 0.125),
        (0.5, 50, 0.5),
        (7, 7, 7),
        (None, None, None),
        ("1000x", 1, 0.001),
        ("2MiB", Memory(2**21), Memory(2**21)),
        ([9, 30], (9, 30), (9, 30)),
        ("8x bytes", ByteShare(0.125), ByteShare(0.125)),
    ],
)
def test_budgets(budget, units, share):
    assert Setup("random", budget).engine_budget(100) == units
    assert Setup("random", budget).engine_budget(None) == share
    assert Setup("full", budget).engine_budget(100) is None


def test_without_a_limit_the_protocol_makes_no_difference():
    assert Setup("random").keeps_all and Setup("random").label == "random"
    assert Setup("random", 8, quantization="kivi4").label == "random 8 query_agnostic kivi4"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"budget": 8}, "is no setup; expected a policy"),
        ({"policy": "full", "chunk": 8}, "is no setup; expected a policy and some of budget"),
        ({"policy": "nosuch", "budget": 8}, "policy 'nosuch' is unknown; expected one of"),
        ({"policy": "random", "budget": "8"}, "budget of random is '8'; expected a number"),
        ({"policy": "random", "budget": 0}, "budget of random is 0"),
        ({"policy": "random", "budget": 1.5}, "budget of random is 1.5"),
        ({"policy": "random", "budget": "1x"}, "budget of random is '1x'"),
        ({"policy": "random", "budget": "1x bytes"}, "budget of random is '1x bytes'"),
        ({"policy": "random", "budget": "0x bytes"}, "budget of random is '0x bytes'"),
        ({"policy": "random", "budget": "x bytes"}, "budget of random is 'x bytes'"),
        ({"policy": "random", "budget": True}, "budget of random is True"),
        ({"policy": "random", "budget": "²x"}, "budget of random is '²x'"),
        ({"policy": "random", "budget": float("nan")}, "budget of random is nan"),
        ({"policy": "full", "budget": "abc"}, "budget of full is 'abc'; expected a number"),
        ({"policy": "random", "protocol": "blind"}, "protocol 'blind' is unknown"),
        ({"policy": []}, "has an empty list"),
        ({"policy": [["random"]], "budget": 8}, "expected a policy's name"),
        ({"policy": "random", "budget": 8, "engine": 5}, "engine is 5; expected settings by name"),
        ({"policy": "locret", "budget": 8, "heads": 5}, "heads is 5; expected a folder"),
        ({"policy": "random", "budget": [8, 8]}, "random 8 query_agnostic are given twice"),
    ],
)
def test_what_is_no_setup_is_refused(entry, complaint):
    with pytest.raises(ValueError, match=complaint):
        expand([entry])
