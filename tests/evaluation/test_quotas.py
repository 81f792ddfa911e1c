"""Head quotas in evaluations: what is asked anew, and what tables say of unequal heads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from locret.evaluation import evaluate, tables
from locret.evaluation.config import EvalConfig, Setup
from locret.evaluation.records import Records
from tests.evaluation.eval_data import write_artifacts
from tests.evaluation.result_data import asked as by_hand
from tests.evaluation.result_data import result_of

EQUAL, UNEQUAL, OTHER = ([[1, 1], [1, 1]], [[7, 1], [1, 3]], [[1, 7], [3, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("quotas"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps(UNEQUAL))
    return path


@pytest.fixture
def config(folder, file, tmp_path):
    unequal = {"policy": "knorm", "budget": "8x", "name": "uneven", "engine": {"quotas": str(file)}}
    return EvalConfig(
        model=str(folder / "backbone"),
        tasks=("niah_single",),
        setups=({"policy": "knorm", "budget": "8x"}, unequal),
        output=str(tmp_path / "out"),
        dtype="float32",
        device="cpu",
        full=False,
        lengths=(400,),
        limit=1,
        max_new_tokens=2,
        engine={"chunk_size": 64, "stabilizers": 0},
    )


def with_quotas(config, quotas):
    equal, unequal = config.setups
    return replace(config, setups=(equal, unequal | {"engine": {"quotas": quotas}}))


@pytest.fixture
def asked(monkeypatch):
    """The setup of every question that is asked."""
    found = []
    ask = evaluate.Asker.ask

    def counted(self, batch):
        found.extend(question.setup.label for question in batch)
        return ask(self, batch)

    monkeypatch.setattr(evaluate.Asker, "ask", counted)
    return found


UNEVEN = "uneven 8x query_agnostic"


def test_other_quotas_in_a_file_of_the_same_name_are_asked_anew(config, file, asked):
    evaluate.run(config)
    assert asked == ["knorm 8x query_agnostic", UNEVEN]
    evaluate.run(config)
    assert len(asked) == 2
    file.write_text(json.dumps(OTHER))
    evaluate.run(config)
    assert asked[2:] == [UNEVEN]


def test_the_same_quotas_in_another_file_or_on_another_scale_are_not(config, file, asked, tmp_path):
    evaluate.run(config)
    asked.clear()
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps([[2 * quota for quota in layer] for layer in UNEQUAL]))
    evaluate.run(with_quotas(config, str(elsewhere)))
    assert not asked


def test_quotas_of_all_setups_are_told_apart_too(config, file, asked):
    (equal, _), of_all = config.setups, config.engine | {"quotas": str(file)}
    config = replace(config, setups=(equal,), engine=of_all)
    evaluate.run(config)
    file.write_text(json.dumps(OTHER))
    evaluate.run(config)
    assert asked == ["knorm 8x query_agnostic"] * 2


def test_heads_hold_as_many_units_in_all_and_the_table_shows_the_spread(config, file):
    path = evaluate.run(config)
    equal, uneven = Records(Path(config.output)).read().values()
    assert equal.units[0] == uneven.units[0] == 50
    assert equal.head_units is None and uneven.head_units == (16, 117)
    result = json.loads(path.read_text())
    alike, apart = result["setups"]
    assert alike["units"] == {"mean": 50, "max": 50}
    assert apart["units"] == {"mean": 50, "max": 67, "fewest": 16, "most": 117}
    table = path.with_suffix(".md").read_text()
    assert "| 50 |" in table and "| 50 (16-117) |" in table
    assert list(result["manifest"]["sources"]["quotas"]) == [str(file)]


def test_equal_quotas_change_nothing(config, file):
    file.write_text(json.dumps(EQUAL))
    evaluate.run(config)
    equal, uneven = Records(Path(config.output)).read().values()
    assert (equal.answer, equal.head_units) == (uneven.answer, uneven.head_units)


@pytest.mark.parametrize(
    ("quotas", "complaint"),
    [
        ("nowhere.json", "setup uneven .*quotas is 'nowhere.json', which is not such a file"),
        ([[0, 0]], "quotas hold 0 to 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(quotas, complaint, config, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=complaint):
        evaluate.run(with_quotas(config, quotas))


def test_in_plain_text_a_column_says_who_keeps_how_much():
    full, uneven = Setup("full"), Setup("knorm", "4x", name="uneven")
    made = result_of(
        by_hand(full, [True]), by_hand(uneven, [True], units=(12.0, 15), head_units=(2, 1200))
    )
    head, alike, apart = tables.as_text(made).splitlines()[:3]
    assert head.endswith("heads keep") and alike.endswith("alike")
    assert "12/48" in apart and apart.endswith("2-1,200")
