"""Configurations: what they hold, and every one of configs/eval."""

from dataclasses import replace

import pytest
import yaml

from locret.evaluation.config import EvalConfig, find_config, parsed, parser, read_values
from locret.evaluation.questions import _recorded
from locret.system.files import CONFIGS

LEAST = {"model": "m", "tasks": "ruler_vt", "setups": {"policy": "full"}, "output": "o"}


def test_the_least_configuration():
    config = EvalConfig.from_dict(LEAST)
    assert config.tasks == ("ruler_vt",) and [setup.label for setup in config.all_setups()] == [
        "full"
    ]
    assert EvalConfig.from_dict(config.to_dict()) == config


def test_values_are_replaced_also_within_others():
    values = LEAST | {"engine": {"chunk_size": 1, "stabilizers": 2}, "limit": 3}
    args = ["--engine.chunk_size", "5", "--data.words=w", "--limit", "4"]
    config, given = parsed(parser(), args, values)
    assert config.engine == {"chunk_size": 5, "stabilizers": 2}
    assert config.data == {"words": "w"} and config.limit == given.limit == 4
    assert values["engine"]["chunk_size"] == 1


@pytest.mark.parametrize("given", ["ruler_vt,passkey", "[ruler_vt, passkey]"])
def test_lists_have_commas_or_are_yaml(given):
    config, _ = parsed(parser(), ["--tasks", given, "--lengths", "1K,3000"], LEAST)
    assert config.tasks == ("ruler_vt", "passkey") and config.lengths == (1024, 3000)
    config, _ = parsed(parser(), ["--lengths", "[1K, 3000]"], LEAST)
    assert config.lengths == (1024, 3000)
    assert parsed(parser(), ["--lengths", "2K"], LEAST)[0].lengths == (2048,)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": 1}, "unknown task; expected adapter"),
        ({"setups": []}, "setups is empty; expected at least one"),
        ({"tasks": {}}, "tasks is {}; expected tuple"),
        ({"engine": 3}, "engine is 3; expected"),
        ({"limit": 0}, "limit is 0; expected a whole number of at least 1"),
        ({"batch_size": "x8"}, "batch_size is x8; expected int"),
        ({"limit": True}, "limit is True; expected"),
        ({"lengths": [0]}, "'0' is less than 1"),
        ({"lengths": ["a"]}, "'a' is not a number of tokens"),
        ({"model": None}, "missing model"),
        ({"seed": "abc"}, "seed is abc; expected int"),
        ({"seed": -1}, "seed is -1"),
        ({"chat_template": "maybe"}, "chat_template is maybe; expected bool"),
        ({"dtype": "foo"}, "dtype is foo; expected one of auto, float32"),
        ({"output": 5}, "output is 5; expected str"),
        ({"rows": {"policy": "full"}}, "has rows; they are called setups now"),
        ({"full": "maybe"}, "full is maybe; expected bool"),
        ({"depths": 0}, "depths is 0; expected a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number"),
        ({"data": {"words": [5]}}, "data is .*; expected str"),
    ],
)
def test_what_is_no_configuration_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        EvalConfig.from_dict(LEAST | changes)
    with pytest.raises(ValueError, match="missing setups, tasks"):
        EvalConfig.from_dict({"model": "m", "output": "o"})


@pytest.mark.parametrize("args", [["--nosuch", "1"], ["--limit"], ["--seed", "a"]])
def test_a_command_line_that_asks_for_nothing_there_is_is_refused(args):
    with pytest.raises(ValueError, match=args[0].strip("-")):
        parsed(parser(), args, LEAST)


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
    assert read_values(str(path)) == LEAST
    with pytest.raises(ValueError, match="none.yaml is no file, nor one of configs/eval: .*ruler"):
        find_config("none.yaml")
    for text in ("a: [", "3", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="mine.yaml"):
            read_values(str(path))


@pytest.mark.parametrize("path", sorted((CONFIGS / "eval").glob("*.yaml")), ids=lambda p: p.name)
def test_a_configuration_of_ours_names_what_there_is(path):
    config = EvalConfig.from_dict(read_values(str(path)))
    setups = config.all_setups()
    assert setups[0].label == "full" and len(setups) > 1
    smoke = EvalConfig.from_dict({**config.to_dict(), **config.smoke})
    assert smoke.limit is not None
    assert smoke.limit <= 5 or smoke.limit == smoke.depths  # a needle at every depth


def test_some_of_the_setups_are_asked_by_name():
    setups = [{"policy": ["keydiff", "snapkv"], "budget": [8, 9]}]
    setups += [{"policy": "keydiff", "name": "other", "budget": 8}]
    values = LEAST | {"setups": setups}

    def labels(**changes):
        config = EvalConfig.from_dict(values | changes)
        return [setup.label.partition(" query")[0] for setup in config.all_setups()]

    assert labels(only="keydiff") == ["full", "keydiff 8", "keydiff 9"]
    assert labels(only="other,snapkv", full=False) == ["snapkv 8", "snapkv 9", "other 8"]
    assert len(labels()) == 6
    with pytest.raises(ValueError, match="only names nosuch; the setups are called full, keydiff"):
        labels(only=["nosuch"])


def test_no_data_is_named_for_nothing():
    with pytest.raises(ValueError, match="data has needle_haystak; expected some of haystack"):
        EvalConfig.from_dict(LEAST | {"data": {"needle_haystak": "noise"}})
    with pytest.raises(ValueError, match="output is empty"):
        EvalConfig.from_dict(LEAST | {"output": " "})


def test_weights_are_recorded_where_they_are_given_alone():
    """Answers from before there was the option stay valid."""
    config = EvalConfig.from_dict(LEAST)
    assert "weights" not in _recorded(config)
    assert _recorded(replace(config, weights="fp8")) == _recorded(config) | {"weights": "fp8"}
    for wrong in ("int3", "none"):  # YAML's None is null
        with pytest.raises(
            ValueError, match=f"weights is {wrong}; expected one of int8, nf4, fp8, or null"
        ):
            replace(config, weights=wrong)
