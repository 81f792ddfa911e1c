"""The pages of docs/: every command that they show is understood, their code runs, the site builds.

README's commands are run (`test_readme.py`). Those here take minutes, a GPU, or models and data of
the Hub: each is read by its own parser, with the configuration that it names.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import locret
from benchmarks import memory_chart
from locret import cli
from locret.commands import evaluate
from tests.lock import PROJECT
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
RUN_ELSEWHERE = {"serving", "transformers"}
"""Pages whose code tests/serve/test_openai.py and tests/integrations/test_documented.py run."""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands_of(page):
    """In blocks, and in running text, where a word alone names a command."""
    for block in blocks(page, "bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())
    for text in re.findall(r"`((?:python -m|locret) [^`]+)`", PAGES[page]):
        if " -" in text.removeprefix("python -m"):
            yield text.replace("\n", " ")


COMMANDS = sorted({command for page in sorted(PAGES) for command in commands_of(page)})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_understood(command, monkeypatch):
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    program, args = words[0], words[1:]
    if program == "locret" and args[0] in cli.TRAININGS:
        program, args = f"trainers.{args[0]}", args[1:]
    if program == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = re.findall(r"\[(.+)\]", words[-1])
        assert set(extras) <= PROJECT["optional-dependencies"].keys()
    elif program.startswith(("trainers.", "datamodules.")):
        read_training(program, args)
    elif program.startswith("benchmarks."):
        assert importlib.import_module(program)._parser().parse_args(args).out is not None
    elif program in ("ray", "export"):
        pass  # not ours
    elif program == "jupyter":
        assert (ROOT / args[-1]).is_file()
    elif "lm_eval" in words[:2]:
        harness = pytest.importorskip("lm_eval._cli")
        given = shlex.split(re.sub(r"\$\(.+\)", "plugin.yaml", command), comments=True)
        given = given[given.index("lm_eval") :]
        monkeypatch.setattr(sys, "argv", given)
        harness.HarnessCLI().parse_args()
    elif args[0] == evaluate.NAME:
        evaluate._configured([evaluate._with_underscores(word) for word in args[1:]])
    else:
        assert program == "locret", f"no test knows how to read {command}"
        cli._parsed(args)


def read_training(program, args):
    with pytest.raises(SystemExit) as ended:  # parsed, printed, and no more
        importlib.import_module(program).main([*args, "--print_config"])
    assert ended.value.code == 0


def test_the_shown_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    heads = tiny_heads(model)
    for name in ("runs/heads", "runs/smollm2/heads"):
        heads.save_pretrained(name)
    Path("keydiff.json").write_text("[[1, 1], [2, 1]]")
    ids = torch.arange(300)[None] % 90 + 9
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "heads": heads,
        "input_ids": ids,
        "question_ids": ids[:, :9],
        "torch": torch,
        "locret": locret,
        "LocretPolicy": locret.POLICIES["locret"],
    }
    names |= {name: getattr(locret, name) for name in locret.__all__} | packing_by_hand()
    for page in sorted(PAGES.keys() - RUN_ELSEWHERE):
        for block in blocks(page, "python"):
            exec(block, names)  # noqa: S102 - the pages are ours
    assert names["context"].seen > 300 and names["packed"].nbytes


def packing_by_hand():
    """Two sequences of 70 units, of which every other one stays, and no new ones."""
    keys, index = torch.randn(140, 16), torch.arange(0, 140, 2)
    lengths = {"lengths": (70, 70), "new_lengths": (35, 35)}
    return {"keys": keys, "fresh": keys[:0], "index": index, **lengths}


OURS = ("benchmarks", "datamodules", "locret", "trainers")
TEXTS = [
    *(path for name in ("*.md", "docs/*.md", "docs/reference/*.md") for path in ROOT.glob(name)),
    *(path for name in OURS for path in (ROOT / name).rglob("*.py")),
    *(path for path in (ROOT / "configs").rglob("*.yaml")),
]
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(OURS)})(?:\.(?!md\b|py\b)\w+)+")
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(OURS)}|tests|configs|checkpoints)/[\w./*-]*[\w*]")
PLACEHOLDER = "NAME"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_files_that_a_text_names_are_there(path):
    """In prose, docstrings and comments as in code: `locret.x.y`, and `locret/x.py`."""
    text = path.read_text(encoding="utf-8")
    names = {name for name in DOTTED.findall(text) if PLACEHOLDER not in name}
    assert [name for name in sorted(names) if not is_there(name)] == []
    patterns = {file: (file, f"{file}.py") for file in FILE.findall(text)}
    found = {file: [*ROOT.glob(a), *ROOT.glob(b)] for file, (a, b) in patterns.items()}
    assert [file for file in sorted(found) if not found[file]] == []


def is_there(dotted):
    """Whether a dotted name leads to a module or something in one."""
    names = dotted.split(".")
    within = len(names)
    while not any(ROOT.joinpath(*names[:within]).with_suffix(s).exists() for s in ("", ".py")):
        within -= 1
    try:
        owner = importlib.import_module(".".join(names[:within]))
    except ImportError:  # of a package that is not installed
        return True
    for name in names[within:]:
        if not hasattr(owner, name):
            return name in getattr(owner, "__annotations__", {})
        owner = getattr(owner, name)
    return True


def test_names_of_what_is_not_there_are_found():
    assert is_there("locret.model.hooks.Weighting.softcap")
    for name in ("locret.model.columns", "locret.nothing.x", "locret.engine.engine.Engine.ask"):
        assert not is_there(name)


def test_the_chart_of_memory_is_drawn(tmp_path):
    args = ["--shape=tiny", "--context=4K", "--budget=1024", f"--out={tmp_path / 'memory.svg'}"]
    assert "1,024 units" in memory_chart.main(args).read_text()


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(http[^"]+)', start)
    assert loaded == []  # no reader's browser asks anybody else
    assert "budget" in (tmp_path / "reference" / "engine.html").read_text(encoding="utf-8")
