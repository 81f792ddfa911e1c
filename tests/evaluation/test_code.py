"""The task of code: questions have one answer, in one file of many, whatever is asked beside."""

import dataclasses
import re

import pytest

from locret.evaluation.questions import Renderer
from locret.tasks import TASKS, TaskSettings, code
from locret.tasks.code import SourceFile, definitions, library_files, library_origin
from locret.tasks.metrics import code_match

LENGTH = 12_000
SETTINGS = TaskSettings(length=LENGTH)
HEAD = re.compile(r"^# ==== file: (\S+) ====$", re.MULTILINE)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer, chat=True)


@pytest.fixture(scope="module")
def samples(renderer):
    return TASKS["code"](SETTINGS).samples(6, renderer)


@pytest.fixture(autouse=True, scope="module")
def few_files():
    """Tokens of the tiny tokenizer are letters: some files of few are enough."""
    short = tuple(file for file in library_files() if len(file.text) < 4000)
    assert len(short) > 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("locret.tasks.code.library_files", lambda: short)
        yield


def test_many_whole_files_fill_the_length(samples, renderer):
    texts = {file.path: file.text for file in library_files()}
    for sample in samples:
        assert 0.8 * LENGTH < renderer.measure(sample) + 64 <= LENGTH
        paths = HEAD.findall(sample.context)
        assert len(set(paths)) == len(paths) >= 3
        assert all(texts[path] in sample.context for path in paths)
    assert len({sample.context for sample in samples}) == len(samples)


def test_the_answer_is_in_the_file_asked_about_and_its_function_is_defined_once(samples):
    for number, sample in enumerate(samples):
        path = re.search(r"In the file (\S+),", sample.question)[1]
        files = dict(
            zip(HEAD.findall(sample.context), HEAD.split(sample.context)[2::2], strict=True)
        )
        (answer,) = sample.answers
        assert sample.answer_prefix.endswith(" is `")
        assert answer in files[path]
        if number % 2:
            line = re.search(r"after the line `(.+?)`\?", sample.question)[1]
            function = re.match(r"(?:async )?def (\w+)", line)[1]
            lines = [each.strip() for each in files[path].splitlines()]
            assert lines[lines.index(line) + 1] == answer
        else:
            parameter, function = re.findall(r"`(\w+)`", sample.question)
            assert re.search(rf"\b{parameter}\b[^,]*= ?{re.escape(answer)}", files[path])
        assert len(re.findall(rf"def {function}\b", sample.context)) == 1


def test_samples_depend_on_seed_and_number_alone(samples, renderer, tmp_path):
    kept = dataclasses.replace(SETTINGS, cache_dir=tmp_path)
    assert TASKS["code"](kept).samples(2, renderer) == samples[:2]
    assert TASKS["code"](kept).samples(2, renderer) == samples[:2]
    (file,) = (tmp_path / "samples").iterdir()
    assert file.name.startswith(f"code-{LENGTH}-")
    other = TASKS["code"](dataclasses.replace(SETTINGS, seed=1)).samples(2, renderer)
    assert other[0].context != samples[0].context


def test_a_length_without_room_is_refused(renderer):
    with pytest.raises(ValueError, match="code does not fit 300 tokens with 64 for the answer"):
        TASKS["code"](TaskSettings(length=300)).samples(1, renderer)


def test_the_manifest_tells_the_python_that_the_files_are_of(monkeypatch):
    ((name, content),) = TASKS["code"](SETTINGS).origins().items()
    assert re.fullmatch(r"CPython 3\.\d+\.\d+\S*", name) and len(content) == 16
    monkeypatch.setattr(code, "library_files", lambda: (SourceFile("a.py", "x = 1"),))
    assert library_origin()[name] != content


TEXT = '''
def first(a, b=10, c=None, d=1, e="", *, f="red", g=LIMIT.most, h=h):
    return a * b + c_of(d)

class Some:
    async def second(self, pause=0.5):
        """Told in words."""
        return pause

    def third(self):
        x = 1

    def fourth(self, x):
        return self.second(  # comment
            x)

    def twice(self, y=12): return y
    def twice(self, y=13): return y
    def __eq__(self, other=77):
        return self.same_as(other)
'''


def test_what_can_be_asked_about_a_file():
    found = definitions(SourceFile("a.py", TEXT))
    assert {(d.function, d.of, d.answer) for d in found if d.kind == "default"} == {
        ("first", "b", "10"),
        ("first", "f", '"red"'),
        ("first", "g", "LIMIT.most"),
        ("second", "pause", "0.5"),
    }
    lines = [(d.function, d.answer) for d in found if d.kind == "line"]
    assert lines == [("first", "return a * b + c_of(d)")]


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("`10`", "10", 1),
        ("10", "10", 1),
        ("The default value is `10`.", "10", 1),
        ("It is 10.", "10", 0),
        ("```python\n    x = f(1)\n```", "x = f(1)", 1),
        ("```x = f(1)```", "x = f(1)", 1),
        ("```\nx = f(1)\ny = 2\n```", "x = f(1)", 1),
        ("x  = f(1)\nand so on", "x = f(1)", 1),
        ("'red'", '"red"', 1),
        ("red", '"red"', 1),
        ("`y` and `x`", "x", 0),
        ("10`.", "10", 1),
        ("x = f(1)` and\n`y`", "x = f(1)", 1),
        ("10`, which `x` has", "10", 1),
        ("", "x", 0),
    ],
)
def test_the_first_code_of_an_answer_counts(answer, wanted, score):
    assert code_match(answer, [wanted]) == score
