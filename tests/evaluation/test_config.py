"""Configurations: what they hold, and every one of configs/eval."""

import pytest
import yaml

from locret.evaluation.config import EvalConfig, find_config, overridden, read_config
from locret.system.files import CONFIGS

LEAST = {"model": "m", "tasks": "ruler_vt", "rows": {"policy": "full"}, "output": "o"}


def test_the_least_configuration():
    config = EvalConfig.from_dict(LEAST)
    assert config.tasks == ("ruler_vt",) and [row.label for row in config.table_rows()] == ["full"]
    assert EvalConfig.from_dict(config.to_dict()) == config


def test_values_are_replaced_also_within_others():
    values = {"engine": {"chunk_size": 1, "stabilizers": 2}, "limit": 3}
    found = overridden(values, {"engine.chunk_size": 5, "data.words": "w", "limit": 4})
    assert found == {
        "engine": {"chunk_size": 5, "stabilizers": 2},
        "data": {"words": "w"},
        "limit": 4,
    }
    assert values["engine"]["chunk_size"] == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": 1}, "unknown task; expected adapter"),
        ({"model": "m", "rows": []}, r"rows is \[\]"),
        ({"tasks": {}}, "expected a list"),
        ({"engine": 3}, "engine is 3; expected names and values"),
        ({"limit": 0}, "limit is 0; expected a whole number of at least 1"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"limit": True}, "limit is True; expected a whole number"),
        ({"lengths": [0]}, r"lengths is \(0,\); expected whole numbers of at least 1"),
        ({"lengths": [True]}, r"lengths is \(True,\)"),
        ({"device": 0}, "device is 0; expected a text"),
        ({"model": None}, "missing model"),
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"chat_template": "maybe"}, "chat_template is 'maybe'; expected true or false"),
        ({"dtype": "foo"}, "dtype is 'foo'; expected one of"),
        ({"output": 5}, "output is 5; expected a text"),
        ({"data": {"words": 5}}, "data is {'words': 5}; expected a path for each name"),
    ],
)
def test_what_is_no_configuration_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        EvalConfig.from_dict(LEAST | changes)
    with pytest.raises(ValueError, match="missing rows, tasks"):
        EvalConfig.from_dict({"model": "m", "output": "o"})


def test_a_value_within_one_that_has_none_is_refused():
    with pytest.raises(ValueError, match="model.x: model is 'm', and has no values by name"):
        overridden(LEAST, {"model.x": 1})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("leval_news_summ", "leval_news_summ.jsonl"),
        ("fairytaleqa", "fairytaleqa_val.jsonl.gz"),
    ],
)
def test_a_score_whose_package_is_missing_is_told_before_anything_is_asked(
    name, file, tmp_path, monkeypatch
):
    (tmp_path / file).write_text("{}\n")
    config = EvalConfig.from_dict(LEAST | {"tasks": name, "data_dir": str(tmp_path)})
    assert [task.name for task in config.make_tasks()] == [name]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="ROUGE needs the package rouge-score"):
        config.make_tasks()


def test_a_file_is_found_by_its_path_or_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    assert find_config(str(path)) == path
    assert find_config("ruler_smollm2.yaml") == find_config("eval/ruler_smollm2.yaml")
    assert read_config(str(path), {"limit": 7}).limit == 7
    with pytest.raises(ValueError, match="none.yaml is no file, nor one of configs/eval: .*ruler"):
        find_config("none.yaml")
    for text in ("a: [", "3", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="mine.yaml"):
            read_config(str(path), {})


@pytest.mark.parametrize("path", sorted((CONFIGS / "eval").glob("*.yaml")), ids=lambda p: p.name)
def test_a_configuration_of_ours_names_what_there_is(path):
    config = read_config(str(path), {})
    rows = config.table_rows()
    assert rows[0].label == "full" and len(rows) > 1
    smoke = EvalConfig.from_dict(overridden(config.to_dict(), config.smoke))
    assert smoke.limit is not None and smoke.limit <= 5
