"""Slices of results, again: what counts as reproduced, and what is said."""

import json
from dataclasses import replace

import pytest

from locret import cli
from locret.evaluation import evaluate
from locret.evaluation.config import EvalConfig
from locret.evaluation.evaluate import (
    Comparison,
    as_table,
    compare,
    reproduce,
    result_files,
)
from locret.evaluation.results import resampled_means
from tests.evaluation.eval_data import DATA, write_artifacts, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    write_data(folder / "data")
    return write_artifacts(folder)


@pytest.fixture(scope="module")
def committed(folder):
    """A results folder with one table."""
    config = EvalConfig(
        model=str(folder / "backbone"),
        heads=str(folder / "heads"),
        tasks=("fairytaleqa", "leval_tpo"),
        setups=({"policy": ["locret", "streaming_llm"], "budget": 30},),
        output=str(folder / "run"),
        data_dir=str(folder / "data"),
        data={"fairytaleqa": DATA["fairytaleqa"]},
        dtype="float32",
        device="cpu",
        limit=3,
        cache_dir=str(folder / "cache"),
        smoke={"limit": 2, "setups": [{"policy": "locret", "budget": 30}]},
    )
    path = evaluate.run(config)
    results = folder / "results"
    results.mkdir()
    (results / "tales.json").write_text(path.read_text())
    (results / "other.json").write_text("{}")
    return results


def changed(committed, folder, score):
    """The results with another score everywhere."""
    result = json.loads((committed / "tales.json").read_text())
    for cell in result["cells"]:
        cell["scores"] = [score for _ in cell["scores"]]
    (folder / "tales.json").write_text(json.dumps(result))
    return folder


def test_a_slice_of_the_same_samples_gives_the_same(committed, folder, tmp_path):
    (path,) = result_files([committed])
    found = reproduce(path, tmp_path / "again", {"data_dir": str(folder / "data")})
    assert found.reproduced and not found.left_out
    assert [(one.setup, one.count, one.equal) for one in found.compared] == [
        ("full", 4, 4),
        ("locret 30 query_agnostic", 4, 4),
    ]
    assert all(one.committed == one.again for one in found.compared)


def test_another_figure_is_not_reproduced(committed, folder, tmp_path, capsys):
    args = ["--data-dir", str(folder / "data"), "--output", str(tmp_path / "again")]
    assert cli.main(["reproduce", str(committed), *args]) == 0
    assert "all 2 setups reproduced" in capsys.readouterr().out
    assert cli.main(["reproduce", str(changed(committed, tmp_path, 1.0)), *args]) == 2
    said = capsys.readouterr()
    assert "NOT reproduced, 0 of 4 alike" in said.out
    assert "not reproduced: tales, full; tales, locret 30 query_agnostic" in said.err


def test_tasks_without_their_data_are_left_out_and_said(committed, folder, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    (some / "leval_tpo.jsonl").write_text((folder / "data" / "leval_tpo.jsonl").read_text())
    args = ["--output", str(tmp_path / "again"), "--limit", "1"]
    assert cli.main(["reproduce", str(committed), "--data-dir", str(some), *args]) == 0
    out = capsys.readouterr().out
    assert "left out  tales: fairytaleqa: " in out and "all 2 setups reproduced" in out
    assert cli.main(["reproduce", str(committed), "--data-dir", str(tmp_path / "no"), *args]) == 2
    assert "nothing could be run again" in capsys.readouterr().err


def test_no_file_of_others_is_removed(committed, folder, tmp_path, capsys):
    output = tmp_path / "again"
    args = [
        "reproduce",
        str(committed),
        "--data-dir",
        str(folder / "data"),
        "--output",
        str(output),
    ]
    assert cli.main(args) == 0
    assert cli.main(args) == 0  # what it made itself is made anew
    precious = output / "tales" / "precious.txt"
    precious.write_text("mine")
    assert cli.main(args) == 2
    assert "holds precious.txt" in capsys.readouterr().err and precious.read_text() == "mine"


def test_the_answers_of_an_evaluation_are_not_removed(committed, folder, tmp_path, capsys):
    args = ["--data-dir", str(folder / "data"), "--output"]
    run = tmp_path / "tales"
    (run / "predictions").mkdir(parents=True)
    assert cli.main(["reproduce", str(committed), *args, str(tmp_path)]) == 2
    assert "tales would be emptied, but holds predictions" in capsys.readouterr().err
    assert (run / "predictions").is_dir()
    result = tmp_path / "x" / "x.json"
    result.parent.mkdir()
    result.write_text((committed / "tales.json").read_text())
    assert cli.main(["reproduce", str(result), *args, str(tmp_path)]) == 2
    assert "holds x.json" in capsys.readouterr().err and result.is_file()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tales").write_text("")
    assert cli.main(["reproduce", str(committed), *args, str(tmp_path / "file")]) == 2
    assert "tales is no folder" in capsys.readouterr().err


def test_more_samples_than_were_committed_are_left_out(committed, folder, tmp_path, capsys):
    args = ["--data-dir", str(folder / "data"), "--output", str(tmp_path / "again")]
    assert cli.main(["reproduce", str(committed), *args, "--limit", "5"]) == 0
    assert "all 2 setups reproduced" in capsys.readouterr().out


def needles_of(folder, output, **values):
    """The file of a result of needles."""
    config = EvalConfig(
        model=str(folder / "backbone"),
        heads=str(folder / "heads"),
        output=str(output / "run"),
        dtype="float32",
        device="cpu",
        max_new_tokens=2,
        seed=0,
        engine={"chunk_size": 64, "stabilizers": 4},
        **values,
    )
    made = evaluate.run(config)
    path = output / "needles.json"
    path.write_text(made.read_text())
    return path


def test_a_map_of_needles_is_asked_again_at_one_length(folder, tmp_path):
    path = needles_of(
        folder,
        tmp_path,
        tasks=("niah_single",),
        lengths=(300, 400),
        depths=2,
        limit=2,
        setups=({"policy": ["locret", "streaming_llm"], "budget": "8x"},),
        smoke={"lengths": [300], "limit": 2, "setups": [{"policy": "locret", "budget": "8x"}]},
    )
    found = reproduce(path, tmp_path / "again", {})
    assert [one.setup for one in found.compared] == ["full", "locret 8x query_agnostic"]
    assert found.reproduced and all(one.equal == one.count == 2 for one in found.compared)


def test_needles_at_equal_bytes_are_asked_again_at_one_budget(folder, tmp_path):
    kivi = [{"name": "kivi", "bits": bits, "group": 8, "residual": 0} for bits in (8, 4)]
    again = {"policy": "locret", "budget": "4x bytes", "quantization": [None, kivi[1]]}
    path = needles_of(
        folder,
        tmp_path,
        tasks=("passkey",),
        lengths=(400,),
        depths=2,
        limit=2,
        full=False,
        setups=(
            {
                "policy": ["knorm", "locret"],
                "budget": ["8x bytes", "4x bytes"],
                "quantization": [None, *kivi],
            },
        ),
        smoke={"limit": 1, "setups": [again]},
    )
    found = reproduce(path, tmp_path / "again", {})
    assert [one.setup for one in found.compared] == [
        "locret 4x bytes query_agnostic",
        "locret 4x bytes query_agnostic kivi bits=4 group=8 residual=0",
    ]
    assert found.reproduced and all(one.equal == one.count == 1 for one in found.compared)


def test_samples_without_an_answer_are_not_compared():
    committed = {"samples": ["a", "b"], "scores": [1.0, None]}
    again = {"samples": ["a", "b"], "scores": [1.0, 0.0]}
    one = compare("t", "setup", [(committed, again)])
    assert (one.count, one.committed, one.low, one.high) == (1, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="none of the samples asked"):
        compare("t", "setup", [({"samples": ["a"], "scores": [None]}, again)])


def test_results_of_another_format_are_refused(committed, tmp_path):
    result = json.loads((committed / "tales.json").read_text()) | {"format": 1}
    (tmp_path / "old.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="old.json is of format 1; expected 2: ask again"):
        result_files([tmp_path])


def test_samples_that_both_have_are_compared():
    committed = {"samples": ["a", "b"], "scores": [1.0, 0.0]}
    one = compare("t", "setup", [(committed, {"samples": ["b", "c"], "scores": [0.0, 1.0]})])
    assert (one.count, one.committed, one.again, one.equal) == (1, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="t, setup: none of the samples asked"):
        compare("t", "setup", [(committed, {"samples": ["c"], "scores": [1.0]})])


def test_what_is_allowed_is_what_so_many_draws_give():
    means = resampled_means([0.0, 1.0], count=4)
    assert sorted(set(means.tolist())) == [0, 0.25, 0.5, 0.75, 1]
    inside = Comparison("t", "setup", 4, 0.5, 0.75, 0.1, 0.9, 3)
    assert inside.reproduced and not replace(inside, again=0.95).reproduced
    assert "10.0-90.0  reproduced, 3 of 4 alike" in as_table([inside])


def test_no_results_are_no_reproduction(tmp_path, capsys):
    with pytest.raises(ValueError, match="no results of `evaluate`"):
        result_files([tmp_path])
    (tmp_path / "bad.json").write_text("{")
    assert cli.main(["reproduce", str(tmp_path)]) == 2
