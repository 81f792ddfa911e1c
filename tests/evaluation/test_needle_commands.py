"""`needle` and `grid`: they write a configuration of `evaluate`, ask it, and go on with it."""

import json
import shutil

import pytest
import yaml

from locret.cli import main
from locret.evaluation import evaluate
from locret.evaluation.config import EvalConfig
from locret.evaluation.questions import prepare
from locret.evaluation.records import Records
from locret.tasks.synthetic import FIRST_SEED, HAYSTACK
from tests.evaluation.eval_data import NOUNS, write_artifacts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "needles.json"


NEEDLE = "needle --policies full,random --tokens 300 --count 2 --max-new-tokens 2"
MAP = "needle --policies full,random --grid --lengths 300,400 --depths 2 --max-new-tokens 2"
GRID = (
    "grid --policies full,knorm --bits 16,4 --ratios 4 --tokens 300 --count 2 --group 8 "
    "--max-new-tokens 2"
)
COMMANDS = {"needle": (NEEDLE, 4), "map": (MAP, 8), "grid": (GRID, 8)}
"""With how many answers each takes."""


def run(folder, out, command, *more):
    args = [*command.split(), "--model", str(folder / "backbone"), "--device", "cpu"]
    return main([*args, "--json-out", str(out), *more])


def answers_of(out):
    return out.with_name(f"{out.stem}.answers")


def figures(path):
    result = json.loads(path.read_text())
    return result["cells"], result["setups"]


@pytest.fixture
def asked(monkeypatch):
    """The questions that are asked."""
    found = []
    ask = evaluate.Asker.ask

    def counted(self, batch):
        found.extend(batch)
        return ask(self, batch)

    monkeypatch.setattr(evaluate.Asker, "ask", counted)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_asked_is_a_configuration_of_evaluate(name, folder, out, asked, capsys):
    command, count = COMMANDS[name]
    assert run(folder, out, command) == 0
    assert len(asked) == len(Records(answers_of(out)).read()) == count
    config = answers_of(out) / "config.yaml"
    made = EvalConfig.from_dict(yaml.safe_load(config.read_text()))
    assert made.max_new_tokens == 2 and made.seed == 0 and made.output == str(answers_of(out))
    asked.clear()
    assert main(["evaluate", "--config", str(config)]) == 0
    assert not asked
    assert figures(answers_of(out) / "result.json") == figures(out)
    assert main(["evaluate", "--config", str(config), "--limit", "3"]) == 0
    assert {question.sample.id for question in asked} == {"2"}  # and it can be asked on
    assert json.loads(out.read_text())["name"] == "needles"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_run_goes_on_and_ends_the_same(name, folder, out, tmp_path, asked, capsys):
    command, count = COMMANDS[name]
    assert run(folder, out, command, "--minutes", "0") == 2
    said = capsys.readouterr()
    assert "there are answers to give yet: run the same command again" in said.err
    assert not said.out and not asked and not out.exists()
    assert run(folder, out, command) == 0
    assert len(asked) == count
    whole = figures(out)
    (path,) = (answers_of(out) / "predictions").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    out.unlink()
    asked.clear()
    capsys.readouterr()
    assert run(folder, out, command) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"asking: {count} of {count}")
    assert len(asked) == count - 3
    assert scores(figures(out)[0]) == scores(whole[0])


def scores(cells):
    return [(cell["setup"], cell["task"], cell["scores"], cell["bytes"]) for cell in cells]


def test_a_policy_and_a_length_can_be_added_to_what_is_there(folder, out, asked):
    assert run(folder, out, MAP) == 0
    asked.clear()
    assert run(folder, out, MAP.replace("full,random", "full,random,knorm")) == 0
    assert {question.setup.policy for question in asked} == {"knorm"} and len(asked) == 4
    assert [setup["policy"] for setup in json.loads(out.read_text())["setups"]] == [
        "full",
        "random",
        "knorm",
    ]
    asked.clear()
    assert run(folder, out, MAP.replace("300,400", "300,350,500")) == 0
    assert {question.task.length for question in asked} == {350, 500} and len(asked) == 8


def config_of(folder, out, command, *more):
    assert run(folder, out, command, "--minutes", "0", *more) == 2
    return EvalConfig.from_dict(yaml.safe_load((answers_of(out) / "config.yaml").read_text()))


def test_flags_become_values(folder, out, tmp_path):
    prose = tmp_path / "prose.txt"
    prose.write_text(" ".join(f"The {noun} went on and on for years." for noun in NOUNS))
    flags = ["--tasks", "passkey,niah_single", "--seed", str(FIRST_SEED + 7), "--batch-size", "4"]
    flags += [
        "--haystack",
        str(prose),
        "--no-answer-prefix",
        "--ratios",
        "4,8",
        "--dtype",
        "float32",
    ]
    config = config_of(folder, out, NEEDLE, *flags)
    assert (config.tasks, config.seed, config.batch_size) == (("passkey", "niah_single"), 7, 4)
    assert (config.data, config.answer_prefix, config.dtype) == (
        {HAYSTACK: str(prose)},
        False,
        "float32",
    )
    assert (config.lengths, config.depths, config.limit) == ((300,), 2, 2)
    assert [setup.label for setup in config.all_setups()] == [
        "full",
        "random 4x query_agnostic",
        "random 8x query_agnostic",
    ]
    assert config.engine == {"chunk_size": 512}


def test_the_defaults_are_those_of_before(folder, out):
    config = config_of(folder, out, "needle --policies full")
    assert (config.tasks, config.lengths, config.limit) == (("niah_single",), (3000,), 10)
    assert (config.max_new_tokens, config.depths, config.data) == (32, 10, {HAYSTACK: "noise"})
    assert config.answer_prefix and config.chat_template and config.seed == 0
    config = config_of(folder, out, "needle --policies full --grid")
    assert (config.lengths, config.limit) == ((1024, 2048, 4096), 10)
    config = config_of(folder, out, "needle --policies full --grid --depths 5 --count 2")
    assert (config.depths, config.limit) == (5, 10)
    config = config_of(folder, out, "grid --policies full,knorm --bits 16,4")
    assert config.lengths == (4096,)
    kivi = "kivi bits=4 group=64 residual=0"
    assert [setup.label for setup in config.all_setups()] == [
        "full",
        f"full {kivi}",
        *(
            f"knorm {ratio}x bytes query_agnostic{stored}"
            for ratio in (128, 64, 32)
            for stored in ("", f" {kivi}")
        ),
    ]


def test_without_the_full_cache_it_is_not_asked(folder, out, asked):
    assert run(folder, out, NEEDLE.replace("full,", "")) == 0
    assert {question.setup.policy for question in asked} == {"random"}


def test_no_prompt_is_cut(folder, out, tmp_path):
    """The full cache meets prompts beyond the model's window whole."""
    small = shutil.copytree(folder / "backbone", tmp_path / "small")
    window = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 200}
    (small / "config.json").write_text(json.dumps(window))
    command = NEEDLE.replace("--max-new-tokens 2", "--max-new-tokens 2000")
    config = config_of(folder, out, command, "--model", str(small))
    for question in prepare(config).asked:
        assert question.prompt.cut == 0 and len(question.prompt.ids) > 250


def test_prompts_are_read_at_once_or_in_chunks(folder, out):
    command = "grid --query-aware --policies snapkv --bits 16 --ratios 4 --tokens 600 --count 1"
    for extra, chunk in ((["--one-shot"], None), ([], 512)):
        assert run(folder, out, command, "--max-new-tokens", "2", *extra) == 0
        result = json.loads(out.read_text())
        engine = result["manifest"]["engines"]["snapkv 4x bytes query_aware"]
        assert (engine["chunk_size"], engine["query_aware"]) == (chunk, True)
        assert len(result["cells"]) == 1 and result["cells"][0]["protocol"] == "query_aware"


def test_a_grid_is_a_table_and_a_figure(folder, out, tmp_path, capsys):
    plot = tmp_path / "figures" / "bytes.png"
    assert run(folder, out, GRID, "--plot", str(plot)) == 0
    said = capsys.readouterr().out
    table = said.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[0].split() == ["policy", "asked", "units", "KiB", "real", "found"]
    assert len(table) == 1 + 4
    assert "twice its bytes" in " ".join(said.split())  # the tiny model computes in 32 bits
    assert f"figure   {plot}" in said and plot.stat().st_size > 10_000


def test_a_run_without_a_file_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [*NEEDLE.split(), "--model", str(folder / "backbone"), "--device", "cpu"]
    assert main(args) == 0
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "answers " not in said and "next" not in said


def test_processes_share_the_samples(folder, out, tmp_path):
    assert run(folder, out, NEEDLE) == 0
    alone = figures(out)
    out = tmp_path / "together.json"
    args = [*NEEDLE.split(), "--model", str(folder / "backbone"), "--device", "cpu"]
    assert main([*args, "--json-out", str(out), "--processes", "2"]) == 0
    assert scores(figures(out)[0]) == scores(alone[0])
    logs = sorted(path.name for path in (answers_of(out) / "logs").iterdir())
    assert logs == ["0.txt", "1.txt"]
    assert json.loads(out.read_text())["manifest"]["processes"] == 2


def test_processes_are_told_when_to_stop(folder, out, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(evaluate, "run_together", lambda *args: told.append(args))
    assert run(folder, out, NEEDLE, "--processes", "2", "--minutes", "0.5") == 2
    assert "there are answers to give yet" in capsys.readouterr().err
    ((arguments, count, logs, _),) = told
    config = str(answers_of(out) / "config.yaml")
    assert arguments == ["evaluate", "--config", config, "--minutes", "0.5"]
    assert (count, logs) == (2, answers_of(out) / "logs")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("needle --policies full --minutes 1", "--minutes needs --json-out"),
        ("needle --policies full --lengths 1K", "give --grid too"),
        ("needle --policies full --tasks ruler_vt", "tasks ruler_vt are no needles"),
    ],
)
def test_flags_that_would_be_for_nothing_are_refused(folder, command, says, capsys):
    args = [*command.split(), "--model", str(folder / "backbone"), "--device", "cpu"]
    assert main(args) == 2
    assert says in capsys.readouterr().err


def test_weights_in_fewer_bits_are_asked_anew_and_recorded(folder, out, asked, capsys):
    pytest.importorskip("torchao", reason="package torchao is not installed")
    command, count = COMMANDS["needle"]
    assert run(folder, out, command) == 0
    plain = json.loads(out.read_text())["manifest"]
    assert run(folder, out, command, "--weights", "int8") == 0
    assert len(asked) == 2 * count  # no answer of weights as saved is taken for one of theirs
    manifest = json.loads(out.read_text())["manifest"]
    assert (plain["config"]["weights"], manifest["config"]["weights"]) == (None, "int8")
    assert "weights" not in plain["computed"][0]
    told = manifest["computed"][-1]
    assert told["weights"] == "int8" and "torchao" in told["versions"]
    assert run(folder, out, command) == 0
    assert len(asked) == 2 * count  # the first are there still


def test_weights_in_fp8_are_refused_on_a_cpu(folder, out, asked, capsys):
    command, _ = COMMANDS["needle"]
    assert run(folder, out, command, "--weights", "fp8") == 2
    assert "the model goes to cpu, but weights in 'fp8' need a GPU" in capsys.readouterr().err
    assert not asked
