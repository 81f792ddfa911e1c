"""`locret answer`: every prompt of a file, once, however often the command was stopped."""

import json

import pytest

from locret.cli import main
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytest.importorskip("fastapi")

SETTINGS = ["--device", "cpu", "--policy", "full", "--max-tokens", "5"]
TALE = "The quiet otter of Uppsala collects stamps. " * 5
LINES = [
    {"id": "first", "prompt": "Who?"},
    {"prompt": "What does it collect?", "context": TALE},
    {"prompt": "Where does it live?", "context": TALE},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer") / "model"
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def answer(model, tmp_path, monkeypatch):
    """Runs the command on lines; its exit status, and the answers by line."""
    monkeypatch.chdir(tmp_path)

    def run(lines=LINES, *more):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "prompts.jsonl").write_text("\n".join(texts))
        status = main(["answer", "prompts.jsonl", "--model", str(model), *SETTINGS, *more])
        file = tmp_path / "answers.jsonl"
        written = file.read_text().splitlines() if file.exists() else []
        found = [json.loads(line) for line in written if line.endswith("}")]
        return status, {each["line"]: each for each in found}

    return run


def test_every_line_is_answered_as_if_asked_alone(answer, tmp_path):
    status, together = answer()
    assert status == 0 and list(together) == [1, 2, 3, 4]
    assert together[1]["id"] == "first" and together[1]["finish_reason"] == "length"
    read = [together[line]["usage"]["prompt_tokens_details"]["cached_tokens"] for line in together]
    assert read[0] == read[3] == 0 and read[1] == read[2] > 0  # the tale was read once
    (tmp_path / "answers.jsonl").unlink()
    _, alone = answer(LINES, "--batch", "1")
    assert alone == together


def test_the_same_command_goes_on_where_it_was_stopped(answer, tmp_path, capsys):
    _, before = answer()
    file = tmp_path / "answers.jsonl"
    written = file.read_text()
    kept = written[: written.index('{"line": 3') + 20]  # killed in the middle of a line
    file.write_text(kept)
    _, after = answer()
    assert after == before
    assert file.read_text().startswith(kept + "\n")
    assert "4 answers in answers.jsonl, 2 of them from earlier" in capsys.readouterr().out


def test_other_settings_or_prompts_are_asked_again(answer, capsys):
    answer()
    answer(LINES, "--max-tokens", "4")
    assert "0 of them from earlier" in capsys.readouterr().out.splitlines()[-1]
    answer([LINES[1], *LINES[1:]])
    assert "3 of them from earlier" in capsys.readouterr().out.splitlines()[-1]


def test_a_prompt_that_cannot_be_answered_is_told_and_asked_again(answer, capsys):
    too_long = {"prompt": "otter " * 2000}
    for _ in range(2):
        status, found = answer([LINES[0], too_long, {"messages": [{"role": "cook"}]}, LINES[3]])
        assert status == 2 and list(found) == [1, 4]
        told = capsys.readouterr().err
        assert "line 2: " in told and "fit" in told and "line 3: messages.0.role" in told
        assert "2 of 4 prompts have no answer" in told


def test_raw_prompts_skip_the_chat_template(answer):
    _, found = answer([{"prompt": "Who?"}, {"prompt": "Who?", "context": "A"}], "--raw")
    first, second = (found[line]["usage"]["prompt_tokens"] for line in (1, 2))
    assert second == first + 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2 of prompts.jsonl is not JSON"),
        ("[]", "expected an object with either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "expected an object with either"),
        ('{"prompt": 3}', "must be texts"),
        (r'{"prompt": "a\ud800"}', "half of a surrogate pair"),
        (r'{"prompt": "a", "id": "\ud800"}', "line 2 of prompts.jsonl holds half"),
        ('{"prompt": "a", "context": ["b"]}', "must be texts"),
    ],
)
def test_lines_that_are_no_prompts_are_refused_before_a_model_is_loaded(answer, capsys, line, told):
    assert answer(["", line])[0] == 2
    assert told in capsys.readouterr().err


def test_a_file_without_prompts(answer, capsys):
    assert answer([""])[0] == 2
    assert "there are no prompts in prompts.jsonl" in capsys.readouterr().err
