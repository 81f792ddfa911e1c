"""Whole evaluations of a tiny model: what they leave behind, and what changes nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from locret import cli
from locret.evaluation import evaluate
from locret.evaluation.ask import Ranks, batches
from locret.evaluation.config import EvalConfig
from locret.evaluation.questions import prepare
from locret.evaluation.records import Records
from locret.evaluation.report import make_report
from locret.heads.heads import RetainingHeads
from locret.tasks.ruler import NeedleTask
from tests.evaluation.eval_data import DATA, write_artifacts, write_data
from tests.forked import Forked, fork_ranks

ROOT = Path(__file__).resolve().parents[2]
SETUPS = (
    {"policy": ["locret", "streaming_llm"], "budget": "8x"},
    {"policy": "locret", "budget": 40, "protocol": "query_aware"},
)
TASKS = ("ruler_niah_single_1", "ruler_niah_multiquery", "fairytaleqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder / "data")
    return write_artifacts(folder)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeedleTask, "max_new_tokens", 8)
        yield


def config_of(folder, output):
    return EvalConfig(
        model=str(folder / "backbone"),
        heads=str(folder / "heads"),
        tasks=TASKS,
        setups=SETUPS,
        output=str(output),
        dtype="float32",
        device="cpu",
        data_dir=str(folder / "data"),
        data=DATA,
        lengths=(1300,),
        limit=3,
        cache_dir=str(folder / "cache"),
        engine={"chunk_size": 64},
    )


@pytest.fixture
def config(folder, tmp_path):
    return config_of(folder, tmp_path / "out")


def answers(config):
    """By setup, task and sample: the answer and the units held."""
    found = Records(Path(config.output)).read().values()
    return {(r.setup, r.task, r.sample): (r.answer, r.units) for r in found}


@pytest.fixture(scope="module")
def once(folder, tmp_path_factory):
    """A run of one process, one question at a time."""
    config = config_of(folder, tmp_path_factory.mktemp("once"))
    told = []
    path = evaluate.run(config, "python -m locret evaluate", progress=lambda *n: told.append(n))
    assert told[0] == (0, 36) and told[-1] == (36, 36)
    return config, json.loads(path.read_text())


def test_there_is_a_cell_for_every_setup_and_task_and_the_full_cache_is_first(once):
    _, result = once
    labels = [setup["setup"] for setup in result["setups"]]
    assert labels == [
        "full",
        "locret 8x query_agnostic",
        "streaming_llm 8x query_agnostic",
        "locret 40 query_aware",
    ]
    tasks = ["ruler_niah_single_1@1300", "ruler_niah_multiquery@1300", "fairytaleqa"]
    assert [(c["setup"], c["task"]) for c in result["cells"]] == [
        (a, b) for a in labels for b in tasks
    ]
    for cell in result["cells"]:
        assert cell["count"] == 3 == len(cell["scores"]) == len(cell["samples"])
        assert cell["interval"][0] <= cell["score"] <= cell["interval"][1]
        assert ("difference" in cell) == (cell["setup"] != "full")
        others = cell.get("others", {})
        assert {m: of["score"] for m, of in others.items()} == cell["other_metrics"]
        assert list(others) == (["f1"] if cell["task"] == "fairytaleqa" else [])
        assert all(len(other["scores"]) == 3 for other in others.values())
        assert cell["protocol"] == ("any" if cell["setup"] == "full" else cell["setup"].split()[2])


def test_units_and_bytes_are_those_really_held(once):
    _, result = once
    for cell in result["cells"]:
        if cell["setup"] == "full":
            assert cell["units"]["mean"] == cell["compressed_tokens"]["mean"]
            assert cell["units_allowed"] is None
        else:
            assert cell["units"]["max"] == cell["units_allowed"]["max"]
            assert cell["bytes"]["mean"] < cell["full_cache_bytes"]["mean"]
        allowed = {"8x": 1300 // 8, 40: 40}.get(cell["budget"])
        if allowed and cell["length"]:
            assert cell["units_allowed"]["max"] == round(allowed)
        if cell["budget"] == "8x" and not cell["length"]:
            share = cell["compressed_tokens"]["mean"] / 8
            assert cell["units_allowed"]["mean"] == pytest.approx(share, abs=1)
        assert cell["bytes_after"]["mean"] >= cell["bytes"]["mean"]


def test_the_manifest_says_where_figures_come_from(once, folder):
    config, result = once
    manifest = result["manifest"]
    assert manifest["command"] == "python -m locret evaluate"
    assert EvalConfig.from_dict(manifest["config"]) == config
    assert manifest["sources"]["model"] == str(folder / "backbone")
    assert len(manifest["sources"]["heads"][config.heads]["sha256"]) == 16
    assert set(manifest["sources"]["data"]) >= {"words.txt", "fairytaleqa_val.jsonl"}
    (computed,) = manifest["computed"]
    assert computed["dtype"] == "float32" and computed["attention"] == "sdpa"
    assert {"python", "torch", "transformers"} <= set(computed["versions"])
    assert {"hardware", "commit", "generation_config", "model_revision"} <= set(computed)
    engine = manifest["engines"]["locret 8x query_agnostic"]
    assert engine["chunk_size"] == 64 and engine["positions"] == "compact"
    first = manifest["first_prompts"]["ruler_niah_multiquery@1300"]
    assert first["text"].startswith("<|user|>Some special magic numbers")
    assert first["text"].endswith("text are")
    assert 0 < first["context_tokens"] < first["tokens"]
    assert manifest["truncation"] == {"prompts_cut": 0, "tokens_cut": 0, "answer_cut": 0}
    assert manifest["stop_rules"]["fairytaleqa"] == {"max_new_tokens": 32, "strings": ["\n"]}
    assert 0 < manifest["wall_seconds"] < 600


def test_the_table_shows_every_setup(once):
    config, result = once
    text = (Path(config.output) / "result.md").read_text()
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[-5:-1]] == [
        "ruler_niah_single_1@1300",
        "ruler_niah_multiquery@1300",
        "fairytaleqa",
        "fairytaleqa f1",
    ]
    assert [line.split("|")[1].strip() for line in lines] == [
        "full",
        "locret",
        "streaming_llm",
        "locret",
    ]
    assert "3 samples a task" in text


def test_a_complete_run_is_not_asked_again_and_needs_no_model(once, monkeypatch):
    config, result = once
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **k: pytest.fail("loaded"))
    again = json.loads(evaluate.run(config).read_text())
    assert again["cells"] == result["cells"] and again["setups"] == result["setups"]


def test_a_run_that_was_stopped_goes_on(config, once, monkeypatch):
    asked = []
    real = evaluate.Asker.ask

    def failing(self, batch):
        for answered in real(self, batch):
            asked.extend(answered)
            if len(asked) == 7:
                raise KeyboardInterrupt
            yield answered

    monkeypatch.setattr(evaluate.Asker, "ask", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config)
    assert len(answers(config)) == 6
    path = evaluate.run(config)
    assert len(asked) == 7 + 30
    result = json.loads(path.read_text())
    assert answers(config) == answers(once[0])
    scores = [[cell["scores"] for cell in r["cells"]] for r in (result, once[1])]
    assert scores[0] == scores[1]


def test_other_settings_are_asked_anew(config):
    small = replace(config, tasks=("fairytaleqa",), setups=({"policy": "random", "budget": 20},))
    evaluate.run(small)
    assert len(answers(small)) == 6
    evaluate.run(replace(small, setups=({"policy": "random", "budget": 30},)))
    assert len(answers(small)) == 9  # the full cache's were there
    evaluate.run(replace(small, engine={"chunk_size": 32}))
    assert len(Records(Path(small.output)).read()) == 15
    more = json.loads(evaluate.run(replace(small, limit=4)).read_text())
    assert len(Records(Path(small.output)).read()) == 17
    assert [cell["count"] for cell in more["cells"]] == [4, 4]


def test_other_tasks_and_other_heads_leave_answers_as_they_are(config, folder, monkeypatch):
    asked = []
    real = evaluate.Asker.ask

    def ask(self, batch):
        asked.extend((question.setup.label, question.task.name) for question in batch)
        return real(self, batch)

    monkeypatch.setattr(evaluate.Asker, "ask", ask)
    setup = {"policy": "locret", "budget": 20}
    small = replace(config, tasks=("fairytaleqa",), setups=(setup,), limit=1)
    evaluate.run(small)
    assert len(asked) == 2
    asked.clear()
    more = replace(small, tasks=("fairytaleqa", "ruler_niah_single_1"))
    evaluate.run(more)
    assert {task for _, task in asked} == {"ruler_niah_single_1"}
    asked.clear()
    other = str(folder / "other_heads")
    heads = RetainingHeads.from_pretrained(folder / "heads")
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.neg_()
    heads.save_pretrained(other)
    evaluate.run(replace(small, setups=(setup, {**setup, "heads": other, "name": "b"})))
    assert asked == [("b 20 query_agnostic", "fairytaleqa")]
    asked.clear()
    evaluate.run(replace(small, heads=other))  # the setup's heads are others now
    assert asked == [("locret 20 query_agnostic", "fairytaleqa")]


def test_settings_that_heads_record_count_under_every_policy(config, folder):
    """An engine takes its chunk size from the heads, whoever ranks."""
    small = replace(config, tasks=("fairytaleqa",), engine={}, limit=1)
    small = replace(small, setups=({"policy": "random", "budget": 20},))
    heads = RetainingHeads.from_pretrained(folder / "heads")
    heads.config.defaults["chunk_size"] = 16
    other = replace(small, heads=str(heads.save_pretrained(folder / "other_settings")))
    with torch.no_grad():
        next(heads.parameters()).neg_()
    retrained = replace(small, heads=str(heads.save_pretrained(folder / "retrained")))
    keys = [{question.key for question in prepare(c).asked} for c in (small, other, retrained)]
    assert not keys[0] & keys[1]
    assert keys[1] == keys[2]  # no setup ranks by their weights


@pytest.mark.parametrize("lines", ["", '{"context": "a", "qa": []}\n'])
def test_a_task_without_samples_is_refused(lines, config, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match="task fairytaleqa has no samples: .*none.jsonl"):
        prepare(replace(config, tasks=("fairytaleqa",), data={"fairytaleqa": str(path)}))


def test_answers_that_are_no_list_name_file_and_line(config, tmp_path):
    path = tmp_path / "text.jsonl"
    row = {"context": "a", "qa": [{"question": "Where?", "answers": "Paris"}]}
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match='text.jsonl:1 has no .*"answers": \\["text"'):
        prepare(replace(config, tasks=("fairytaleqa",), data={"fairytaleqa": str(path)}))


def test_any_value_is_overridden(config, tmp_path, capsys):
    args = ["evaluate", "--config", written(config, tmp_path), "--dry-run"]
    args += ["--tasks", "fairytaleqa,ruler_niah_single_1"]
    args += ["--lengths", "900,1000", "--limit", "2", "--seed=7"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    for label in ("fairytaleqa", "ruler_niah_single_1@900", "ruler_niah_single_1@1000"):
        assert re.search(rf"{label} +2 samples", out)


def test_setups_have_budgets_of_all_forms(config, tmp_path):
    setups = ({"policy": "keydiff", "budget": ["8kB", [20, 30], "4x"]},)
    config = replace(config, tasks=("fairytaleqa",), setups=setups)
    result = json.loads(evaluate.run(config).read_text())
    _, memory, layers, share = result["setups"]
    assert memory["bytes"]["max"] <= 8_000 < share["bytes"]["max"]
    assert layers["units"] == {"mean": 25, "max": 30}
    engines = result["manifest"]["engines"]
    assert engines["keydiff 8kB query_agnostic"]["budget"] == "8000B"
    assert engines["keydiff [20, 30] query_agnostic"]["budget"] == [20, 30]
    assert "8kB" in (Path(config.output) / "result.md").read_text()
    report = make_report([Path(config.output) / "result.json"], tmp_path / "report.md")
    assert "[20, 30]" in report.read_text()


def test_setups_that_merge(config):
    setups = (
        {"policy": "keydiff", "budget": 20},
        {"policy": "keydiff", "budget": 20, "name": "merged", "engine": {"merging": "similar"}},
        {
            "policy": "keydiff",
            "budget": 20,
            "name": "all",
            "engine": {"merging": {"into": "adjacent", "threshold": None}},
        },
    )
    result = json.loads(
        evaluate.run(replace(config, tasks=("fairytaleqa",), setups=setups)).read_text()
    )
    engines = result["manifest"]["engines"]
    assert engines["keydiff 20 query_agnostic"]["merging"] is None
    assert engines["merged 20 query_agnostic"]["merging"]["threshold"] == "mean"
    assert engines["all 20 query_agnostic"]["merging"]["into"] == "adjacent"
    weights = {setup["setup"]: setup["bytes"]["mean"] for setup in result["setups"]}
    assert weights["merged 20 query_agnostic"] > weights["keydiff 20 query_agnostic"]


@pytest.mark.parametrize(("sample", "tries"), [("story-0/0", 2), ("story-0/1", 1)])
def test_of_a_context_that_is_asked_in_turn_one_answer_may_not_fit(
    sample, tries, config, monkeypatch
):
    """Those before it stay, and those behind it are asked."""
    answered, asked = evaluate.Asker._answers, []

    def one_does_not_fit(self, engine, batch, *args):
        asked.append(batch[0].sample.id)
        if asked[-1] == sample:
            raise torch.OutOfMemoryError("no")
        return answered(self, engine, batch, *args)

    monkeypatch.setattr(evaluate.Asker, "_answers", one_does_not_fit)
    config = replace(config, tasks=("fairytaleqa",), limit=12, setups=({"policy": "full"},))
    (cell,) = json.loads(evaluate.run(config).read_text())["cells"]
    assert asked.count(sample) == tries and len(asked) == 12 + tries - 1
    scores = dict(zip(cell["samples"], cell["scores"], strict=True))
    assert [name for name, score in scores.items() if score is None] == [sample]
    assert (cell["count"], cell["failed"], cell["ends"]["memory"]) == (12, 1, 1)


@pytest.mark.parametrize("size", [2, 5])
def test_the_batch_size_changes_no_answer(size, config, once):
    evaluate.run(replace(config, batch_size=size))
    assert answers(config) == answers(once[0])


def test_the_order_of_samples_changes_no_answer(config, once):
    prepared = prepare(config)
    prepared.asked.reverse()
    evaluate.ask(prepared, Ranks())
    assert answers(config) == answers(once[0])


def test_the_number_of_processes_changes_no_answer(config, once):
    assert evaluate.run(config, ranks=Ranks(1, 3)) is None
    assert 0 < len(answers(config)) < 36
    assert evaluate.run(config, ranks=Ranks(0, 3)) is None
    path = evaluate.run(config, ranks=Ranks(2, 3))
    assert answers(config) == answers(once[0])
    assert json.loads(path.read_text())["manifest"]["processes"] == 3


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_every_question_is_dealt_once(world, size, config):
    asked = prepare(config).asked
    dealt = [Ranks(rank, world).share(batches(asked, size)) for rank in range(world)]
    keys = [question.key for batch in sum(dealt, []) for question in batch]
    assert len(keys) == len(set(keys)) == len(asked)
    for batch in sum(dealt, []):
        assert len({(q.setup.label, q.task.label, q.budget) for q in batch}) == 1
        assert len(batch) <= size or size == 1


def test_query_aware_heads_get_the_question_in_front(config, folder):
    aware = {
        "policy": "locret",
        "heads": str(folder / "aware"),
        "budget": 60,
        "protocol": "query_aware",
        "name": "locret_q",
    }
    config = replace(config, setups=(aware,), tasks=("ruler_niah_multiquery",), limit=2)
    questions = [q for q in prepare(config).asked if q.setup.name]
    assert all(q.query == q.prompt.ids[q.compressed : q.prompt.question_end] for q in questions)
    assert all(q.query for q in questions)
    evaluate.run(config)
    batched = replace(config, output=config.output + "2", batch_size=2)
    evaluate.run(batched)
    assert answers(batched) == answers(config)
    with pytest.raises(ValueError, match="locret_q 60 query_agnostic: its heads are query-aware"):
        prepare(replace(config, setups=(aware | {"protocol": "query_agnostic"},)))


def test_prompts_beyond_the_limit_are_cut_and_counted(config):
    config = replace(
        config, tasks=("ruler_niah_multiquery",), max_length=600, setups=({"policy": "full"},)
    )
    result = json.loads(evaluate.run(config).read_text())
    (cell,) = result["cells"]
    assert cell["cut"] == 3 and cell["answer_cut"] > 0
    assert cell["prompt_tokens"]["max"] == 600 - 8
    assert result["manifest"]["truncation"]["prompts_cut"] == 3
    table = (Path(config.output) / "result.md").read_text()
    assert "\\* 3 prompts were cut to fit; in 3 of them an answer was cut away." in table


BAD = [
    (["--tasks", "nosuch"], "tasks nosuch are unknown"),
    (["--data-dir", "nowhere"], "is not a file; give its folder with --data-dir"),
    (["--heads", "no/such/heads"], "no/such/heads"),
    (["--config", "nosuch.yaml"], "nosuch.yaml is no file"),
    (["--setups", "[{policy: nosuch}]"], "policy 'nosuch' is unknown"),
    (["--heads", "null"], "needs trained heads"),
    (["--nosuch", "1"], "nrecognized arguments: --nosuch 1"),
    (["--adapter", "no/such/adapter"], "no/such/adapter"),
    (["--limit.x", "1"], "limit"),
    (["--engine.chunksize", "256"], "engine settings chunksize are unknown"),
    (["--setups", "[{policy: snapkv, budget: 8x, policy_args: {windows: 3}}]"], "windows"),
    (["--setups", "[{policy: snapkv, budget: 8x, quantization: kivi4}]"], "kivi4"),
    (["--setups", "[{policy: snapkv, budget: 1.5}]"], "budget of snapkv is 1.5; expected a"),
    (["--engine.chunk_size", "abc"], "setup full: chunk_size is 'abc'; expected a whole number of"),
    (["--dtype", "float8"], "dtype is float8; expected"),
    (["--device", "meta"], "device 'meta' holds no values"),
    (["--device", "hpu"], "device 'hpu' cannot be used by this torch"),
    (["--model", "nosuch.gguf"], "model 'nosuch.gguf' is not there"),
]


@pytest.mark.parametrize(("args", "complaint"), BAD)
def test_a_mistake_is_one_line_before_a_model_is_loaded(
    args, complaint, config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "load_model", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["evaluate", "--config", written(config, tmp_path), *args]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1
    assert not Path(config.output).exists()


def written(config, folder):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))
    return str(path)


def test_the_command_says_what_it_made(config, tmp_path, capsys):
    args = ["--config", written(config, tmp_path), "--tasks", "fairytaleqa", "--limit", "1"]
    assert cli.main(["evaluate", *args, "--dry-run"]) == 0
    assert "4 answers, into" in capsys.readouterr().out
    assert cli.main(["evaluate", *args]) == 0
    out = capsys.readouterr().out
    for name in ("result.md", "result.json", "predictions"):
        assert str(Path(config.output) / name) in out
    assert cli.main(["evaluate", "--list-tasks"]) == 0
    assert "ruler_qa_2" in capsys.readouterr().out


def test_an_evaluation_imports_only_what_it_needs():
    heavy = "lm_eval datasets nltk rouge_score wonderwords matplotlib pandas sklearn lightning"
    code = (
        "import sys, transformers.generation.utils\n"
        "there = {name.split('.')[0] for name in sys.modules}\n"  # some versions bring their own
        "from locret.evaluation import evaluate\n"
        "loaded = {name.split('.')[0] for name in sys.modules} - there\n"
        f"print(set({heavy.split()!r}) & loaded or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "", done.stdout + done.stderr


def test_a_killed_run_goes_on_in_two_processes(config, once, tmp_path, monkeypatch):
    config = replace(config, tasks=("fairytaleqa",))
    monkeypatch.setattr(evaluate, "_start", fork_ranks)
    command = ["evaluate", "--config", written(config, tmp_path)]
    killed = Forked(command, tmp_path / "killed.txt")
    while len(answers(config)) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = answers(config)
    assert before and not (Path(config.output) / "result.json").exists()
    log = tmp_path / "done.txt"
    assert Forked([*command, "--processes", "2"], log).wait() == 0, log.read_text()
    assert str(Path(config.output) / "result.json") in log.read_text()
    assert answers(config) == {k: v for k, v in answers(once[0]).items() if "fairytaleqa" in k}
    lines = [
        line
        for path in (Path(config.output) / "predictions").glob("*.jsonl")
        for line in path.read_text().splitlines()
        if line.endswith("}")
    ]
    assert len(lines) == 12  # nothing was asked twice


def test_a_process_that_fails_ends_the_run(config, tmp_path):
    broken = replace(config, tasks=("fairytaleqa",), engine={"chunk_size": -1})
    command = ["-m", "locret", "evaluate", "--config", written(broken, tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, "--processes", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "chunk_size is -1" in done.stderr
