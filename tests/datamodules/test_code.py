"""Code with questions: the same everywhere, within its tokens, and each has one right answer."""

import os
import pickle
import re
import sys
import sysconfig
from pathlib import Path
from random import Random

import pytest
from torch.utils.data import DataLoader

from datamodules.code import QUESTIONS, CodeSource, askable, find_code, parse, questions
from datamodules.sources import Source
from tests.datamodules.test_branches import set_up

FILE = '''
"""Module {n} of many."""

LIMIT_{n} = {n}0


def resize_{n}(image, width={n}21, mode="mode {n}"):
    """Says what it does."""
    ratio_{n} = width / image.width_{n}
    # a comment
    scaled_{n} = image.scaled(ratio_{n}, mode)
    return scaled_{n}.rounded(to={n})


class Model_{n}(Base):
    def __init__(self, layers: int = {n}32, name=None):
        self.layers_{n} = [layer(i + {n}) for i in range(layers)]

    @cached
    def forward(self, inputs, scale_{n}=1.5):
        total_{n} = inputs * self.layers_{n}[0]
        return total_{n}.sum(scale_{n})

    def shifted_{n}(self, by):
        return self.layers_{n}[by:] + self.layers_{n}[:by]
'''


@pytest.fixture
def folder(tmp_path):
    """Files that can be asked about, and some that cannot."""
    for n in range(1, 13):
        path = tmp_path / f"package_{n % 3}" / f"module_{n}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILE.format(n=n))
    (tmp_path / "broken.py").write_text("def broken(:\n" * 60)
    (tmp_path / "binary.py").write_bytes(b"\xff\0" * 600)
    (tmp_path / "short.py").write_text("def short(a, b=12):\n    return a_short + b_short\n")
    (tmp_path / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (tmp_path / "long.py").write_text("".join(FILE.format(n=n) for n in range(100, 140)))
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    return str(tmp_path)


def said(line):
    return [each.strip() for each in line.split("\n")]


def kind_and_fields(question):
    for kind, forms in QUESTIONS.items():
        for form in forms:
            named = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(form))
            if found := re.fullmatch(named, question, re.DOTALL):
                return kind, found.groupdict()
    raise AssertionError(question)


def check(context, question, answer):
    """What is asked for is in the context once, and the answer is that of the context."""
    kind, fields = kind_and_fields(question.removeprefix("\n\n"))
    of, function = fields.get("of"), fields.get("function")
    answer = answer.removeprefix("`").removesuffix("`")
    lines = said(context)
    assert fields.get("path", "") in context and 2 <= len(answer) <= 90
    if kind == "default":
        assert re.search(rf"\b{of}\b[^,\n]*= ?{re.escape(answer)}[,)]", context)
    else:
        assert lines.count(answer) == context.count(answer) == 1
    if kind in ("after", "before", "contains"):
        assert context.count(of) == 1
    if kind in ("after", "before"):
        assert lines[lines.index(of) + (1 if kind == "after" else -1)] == answer
    elif kind == "contains":
        assert of in answer
    elif kind == "assigned":
        assert answer.startswith(f"{of} = ")
    elif kind == "signature":
        assert answer.startswith(f"def {function}(")
    elif kind == "first":
        assert f"def {function}(" in lines[lines.index(answer) - 1]
    if function:
        owner, _, method = function.partition(".")
        assert len(re.findall(rf"\b{'class' if method else 'def'} {owner}\b", context)) == 1
    return kind


@pytest.mark.parametrize("tokens", [3000, (3001, 6000), 9000])
def test_every_question_has_one_right_answer(tokens, folder, tokenizer):
    kinds = set()
    for conversation in CodeSource(tokens, 40, path=folder).load(tokenizer):
        assert 1 <= len({*conversation.questions}) == len(conversation.questions) <= 4
        assert len({answer.strip("`") for _, answer in conversation.questions}) == len(
            conversation.questions
        )
        for question, answer in conversation.questions:
            kinds.add(check(conversation.context, question, answer))
    assert kinds == {*QUESTIONS}


def test_contexts_have_close_to_their_tokens_and_whole_lines_of_files(folder, tokenizer):
    known = {line for path in Path(folder).rglob("module*.py") for line in said(path.read_text())}
    known |= {*said((Path(folder) / "long.py").read_text())}
    for conversation in CodeSource(5000, 30, path=folder).load(tokenizer):
        found = len(tokenizer(conversation.context)["input_ids"])
        assert 0.75 * 5000 < found <= 5000
        ours = [line for line in said(conversation.context) if line and line not in known]
        assert len(ours) <= 40 and "def broken" not in conversation.context
        paths = re.findall(r"(?:package_\d/module_\d+|long)\.py", conversation.context)
        assert 1 <= len(set(paths)) == len(paths)


def test_contexts_follow_from_the_index_in_every_process(folder, tokenizer):
    source = CodeSource((3000, 4000), 4, path=folder, seed=1)
    assert isinstance(source, Source) and str(source) == f"CodeSource({folder}, seed 1)"
    found = [*source.load(tokenizer)]
    assert found[3] == source.load(tokenizer)[-1]
    assert found[3] != CodeSource((3000, 4000), 4, path=folder).load(tokenizer)[3]
    loaded = pickle.loads(pickle.dumps(source.load(tokenizer)))
    workers = DataLoader(loaded, batch_size=None, num_workers=2, collate_fn=lambda each: each)
    assert [*workers] == found


def test_files_are_the_same_wherever_they_are(folder, tokenizer, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "place"
    os.symlink(folder, other)
    here, there = (CodeSource(3000, 3, path=str(p)).load(tokenizer) for p in (folder, other))
    assert [*here] == [*there]


def test_another_tokenizer_has_contexts_of_its_own(folder, tokenizer):
    source = CodeSource(3000, 2, path=folder)
    first = source.load(tokenizer)
    before = first[1]
    source.load(lambda text, **options: {"input_ids": text.split()})
    assert first[1] == before


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch, tokenizer):
    package = tmp_path / "named_here"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "code.py").write_text(FILE.format(n=1))
    monkeypatch.syspath_prepend(tmp_path)
    source = CodeSource(3000, 2, packages=["named_here"])
    (conversation, _) = source.load(tokenizer)
    assert "named_here/code.py" in conversation.context and "named_here" not in sys.modules
    assert str(source) == "CodeSource(named_here, seed 0)"


def test_files_of_the_default_are_those_of_packages_that_are_needed():
    source = CodeSource(512, 1)
    assert str(source) == "CodeSource(torch, transformers, lightning, seed 0)"
    files = find_code(source.packages, source.path)
    assert files == sorted(files) and len(files) > 3000
    assert {path.split("/")[0] for path, _ in files} == {"torch", "transformers", "lightning"}


def test_code_trains_by_its_questions(folder):
    data = set_up(CodeSource(3000, 2, path=folder), branches=["answer"])
    for batch in data.train_dataloader():
        assert 1 <= len(batch["segments"][0].branches) <= 4


TEXT = '''
    @first
    def method(self, one, two=22, three=None):
        value = one + two  # a comment
        value = one * two
        other = self.of(value)
        text = """
        other = self.of(nothing)
        """
        return other, text

class Twice:
    def __init__(self, size=10): ...
    def __init__(self, size=11): ...
'''


def test_what_can_be_asked_about_lines_that_begin_within_a_class():
    code = parse("a.py", TEXT.strip("\n"))
    found = {(each.kind, each.function, each.of, each.answer) for each in askable(code)}
    assert {each for each in found if each[0] != "contains"} == {
        ("default", "method", "two", "22"),
        ("default", "__init__", "size", "10"),
        ("default", "__init__", "size", "11"),
        ("signature", "method", "", "def method(self, one, two=22, three=None):"),
        ("assigned", "method", "other", "other = self.of(value)"),
        ("after", "", "value = one * two", "other = self.of(value)"),
        ("before", "", "other = self.of(value)", "value = one * two"),
    }
    asked = questions(Random(0), [code], f"a.py {TEXT}")
    kinds = [check(f"a.py {TEXT}", f"\n\n{question}", answer) for question, answer in asked]
    assert kinds.count("default") == 1 and len(kinds) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 255}, "tokens is .255, 255.; expected two numbers of at least 256"),
        ({"tokens": (400, 300)}, "the smaller one first"),
        ({"size": 0}, "size is 0"),
        ({"packages": ["torch"], "path": "here"}, "expected one of them"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CodeSource(**{"tokens": 400, "size": 1} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "nosuch"}, "nosuch has no .py files .working directory"),
        ({"packages": []}, "no package has no .py files"),
        ({"packages": ["nosuch"]}, "names 'nosuch', which is not an installed package"),
        ({"packages": ["torch.nn"]}, "names 'torch.nn', which is not an installed package"),
        ({"packages": ["ast"]}, "names 'ast', which is not an installed package"),
        ({"packages": ["json"]}, "json.* is of Python's standard library"),
        ({"path": sysconfig.get_path("stdlib") + "/email"}, "is of Python's standard library"),
    ],
)
def test_what_is_not_code_to_train_on_is_refused(given, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        CodeSource(400, 1, **given).load(tokenizer)


def test_a_folder_above_the_standard_library_is_refused_and_one_inside_it_is_not(
    tmp_path, monkeypatch, tokenizer
):
    library, installed = tmp_path / "python", tmp_path / "python" / "site-packages" / "some"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text(FILE.format(n=1))
    (library / "ast.py").write_text(FILE.format(n=2))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    assert len(CodeSource(3000, 1, path=str(installed)).load(tokenizer)) == 1
    with pytest.raises(ValueError, match=r"ast.py is of Python's standard library"):
        CodeSource(3000, 1, path=str(tmp_path)).load(tokenizer)


def test_files_without_functions_and_lengths_without_room_are_refused(folder, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="files gave no context with questions in 8 tries"):
        CodeSource(256, 1, path=folder).load(tokenizer)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "data.py").write_text("\n".join(f"VALUE_{i} = {i}" for i in range(200)))
    with pytest.raises(ValueError, match="1 files gave no context with questions"):
        CodeSource(4000, 1, path=str(empty)).load(tokenizer)
