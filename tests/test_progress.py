"""What long commands say while they run and when they end."""

import io
import json
import shlex
import threading
import time

import pytest

from locret.cli import main
from locret.commands import progress
from locret.commands.progress import Progress
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds(clock, capsys):
    asking = Progress("asking")
    for done in range(101):
        asking(done, 100)
        clock[0] += 1
    assert capsys.readouterr().err.splitlines()[:3] == [
        "asking: 0 of 100 answers",
        "asking: 5 of 100 answers, about 1:35 left",
        "asking: 10 of 100 answers, about 1:30 left",
    ]


def test_the_end_is_told_once(clock, capsys):
    asking = Progress("asking", "things")
    asking(0, 3)
    clock[0] += 3700
    for _ in range(3):
        asking(3, 3)
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "asking: 0 of 3 things",
        "asking: 3 of 3 things, 1:01:40 in all",
    ]
    assert "\r" not in said


def test_what_an_earlier_run_did_does_not_make_this_one_faster(clock, capsys):
    asking = Progress("asking")
    asking(90, 100)
    clock[0] += 10
    asking(91, 100)
    assert capsys.readouterr().err.splitlines()[-1] == "asking: 91 of 100 answers, about 1:30 left"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    asking = Progress("asking")
    asking(0, 4)
    asking(2, 4)
    shown = progress.sys.stderr.getvalue()
    assert "\r" in shown and "asking:   0%" in shown and "0/4" in shown
    asking(4, 4)


@pytest.fixture
def said(monkeypatch):
    """Lines as they are told: what another thread writes could be lost while capsys is read."""
    lines = []
    monkeypatch.setattr(progress, "_print", lines.append)
    return lines


def next_of(said):
    """The next line, waited for."""
    for _ in range(2000):
        if said:
            return said.pop(0)
        time.sleep(0.01)
    raise AssertionError("nothing was said")


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "LOOKS_EVERY", 0.001)


def test_work_that_takes_long_is_heard_of_before_and_between_calls(clock, often, said):
    with Progress("asking") as asking:
        clock[0] += 6
        assert next_of(said) == "asking: 0:06 so far"
        asking(0, 3)
        asking(1, 3)
        assert next_of(said) == "asking: 0 of 3 answers"
        clock[0] += 4
        time.sleep(0.05)
        assert not said
        clock[0] += 2
        assert next_of(said) == "asking: 1 of 3 answers, 0:12 so far"
        asking(3, 3)
        assert next_of(said) == "asking: 3 of 3 answers, 0:06 in all"
        clock[0] += 60
        time.sleep(0.05)
    assert not said


def test_nothing_is_told_behind_the_block_even_after_an_error(clock, often, capsys):
    threads = threading.active_count()
    with pytest.raises(OSError), Progress("asking"):
        raise OSError("stopped")
    clock[0] += 60
    time.sleep(0.05)
    assert capsys.readouterr().err == "" and threading.active_count() == threads


def test_a_bar_shows_the_time_while_nothing_is_done(often, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress("asking") as asking:
        asking(1, 4)
        before = len(progress.sys.stderr.getvalue())
        for _ in range(2000):
            if len(progress.sys.stderr.getvalue()) > before:
                break
            time.sleep(0.01)
        assert len(progress.sys.stderr.getvalue()) > before
        asking(4, 4)
    assert "so far" not in progress.sys.stderr.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    tiny_heads(model).save_pretrained(folder / "heads")
    return folder


def test_an_answer_that_is_not_shown_is_counted(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("One quiet otter. " * 9)
    args = ["--prompt-file", str(tmp_path / "prompt.txt"), "--device", "cpu", "--json"]
    assert main(["generate", "--model", str(folder / "backbone"), *args]) == 0
    said = capsys.readouterr()
    new = json.loads(said.out)["new_tokens"]
    told = [line for line in said.err.splitlines() if line.startswith("answering: ")]
    assert told[0] == "answering: 0 of 128 tokens"
    assert told[-1].startswith(f"answering: {new} of {new} tokens, ")


NEEDLE = "needle --policies full,locret --max-new-tokens 2"
COMMANDS = {
    "needle": f"{NEEDLE} --tokens 500 --count 2",
    "needle_grid": f"{NEEDLE} --grid --lengths 300,500 --depths 1",
    "grid": "grid --policies full,locret --bits 16 --ratios 4 --tokens 500 --count 2 "
    "--max-new-tokens 2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_tell_how_far_they_are_and_what_comes_next(name, folder, tmp_path, capsys):
    out = tmp_path / "answers.json"
    model = ["--model", str(folder / "backbone"), "--heads", str(folder / "heads")]
    args = [*COMMANDS[name].split(), *model, "--device", "cpu", "--json-out", str(out)]
    assert main(args) == 0
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("asking: ")]
    assert told[0] == "asking: 0 of 4 answers"
    assert told[-1].startswith("asking: 4 of 4 answers, ")
    assert f"result   {out.resolve()}" in said.out
    assert f"answers  {out.with_name('answers.answers').resolve()}" in said.out
    (report,) = [line for line in said.out.splitlines() if " report " in line]
    words = shlex.split(report.removeprefix("next"))
    assert words[:3] == ["python", "-m", "locret"]
    assert main(words[3:]) == 0
    assert (tmp_path / "answers-report" / "report.md").is_file()


def test_a_run_without_heads_and_file_has_no_next_command(folder, capsys):
    args = "needle --policies full --tokens 300 --count 1 --max-new-tokens 1 --device cpu"
    assert main([*args.split(), "--model", str(folder / "backbone")]) == 0
    assert "next" not in capsys.readouterr().out
