"""Every command and every piece of code that the README shows is run here, on tiny models."""

import gzip
import importlib.util
import json
import logging
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model

import locret
from benchmarks import longcontext
from locret import cli
from locret.model.loading import load_model
from tests.evaluation.eval_data import DATA, write_data
from tests.serve.served import Served
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainers.runs import tiny_run
from tests.trainers.test_fit import FAMILY_OF_CONFIG
from trainers import adapt, fit

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


TRAININGS = {"trainers.fit": fit, "trainers.adapt": adapt}
STAND_INS = {
    "embedded:smollm2": "backbone",
    "checkpoints/smollm2-adapter": "adapter",
    "checkpoints/smollm2-heads": "runs/smollm2/heads",
    "eval/ruler_smollm2.yaml": "small.yaml",
}
SMALL_EVALUATION = {
    "model": "backbone",
    "heads": "runs/smollm2/heads",
    "tasks": ["fairytaleqa"],
    "limit": 1,
    "setups": [{"policy": "locret", "budget": "8x"}],
    "output": "runs/eval",
}
COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder where a tiny backbone and its heads stand for those that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    heads = tiny_heads(model)
    for name in ("runs/smollm2/heads", "checkpoints/qwen25-coder-heads"):
        heads.save_pretrained(folder / name)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        folder / "adapter"
    )
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")
    write_data(folder / "data")
    stories = (folder / "data" / DATA["fairytaleqa"]).read_bytes()
    (folder / "data" / "fairytaleqa_val.jsonl.gz").write_bytes(gzip.compress(stories))
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL_EVALUATION))
    (folder / "book.txt").write_text("It was a dark and stormy night. " * 90)
    return folder


@pytest.fixture
def no_deprecations():
    """What users see of deprecated names: FutureWarnings, and what transformers logs once."""
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    transformers.utils.logging.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        yield
    logging.getLogger("transformers").removeHandler(handler)
    told += [str(each.message) for each in caught if each.category is FutureWarning]
    assert not [text for text in told if "deprecated" in text]


def test_shown_heads_come_with_the_adapter_that_they_were_trained_on():
    shown = [command for command in COMMANDS if "checkpoints/smollm2-heads" in command]
    assert shown and all("checkpoints/smollm2-adapter" in command for command in shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_runs(command, workplace, tmp_path, monkeypatch, capsys, no_deprecations):
    words = shlex.split(command)
    if words[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        return
    monkeypatch.chdir(workplace)
    assert words[:2] == ["python", "-m"], f"no test knows how to run {command}"
    module, args = words[2], words[3:]
    if module in TRAININGS:
        run_training(TRAININGS[module], args, tmp_path)
        return
    if module == "benchmarks.longcontext":
        run_benchmark(args, tmp_path)
        return
    assert module == "locret", f"no test knows how to run {command}"
    if args[0] == "serve":
        served = Served(*map(stand_in, args[1:]), cwd=workplace)
        assert served.stop()[0] == 0
        return
    # folders of the workplace stand for what the README names
    assert cli.main([stand_in(word) for word in args]) == 0
    assert capsys.readouterr().out


def run_benchmark(args, tmp_path):
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed")
    small = "--shape=tiny --length=200 --budget=64 --chunk-size=32 --new-tokens=3 --repeats=1"
    longcontext.main([*args, *small.split(), "--heads-width=8", f"--out={tmp_path / 'r.json'}"])
    rows = json.loads((tmp_path / "r.json").read_text())["figures"]["results"]
    assert {row["status"] for row in rows} == {"ok"}


def stand_in(word):
    """The word, or the parts of a list such as `name=value,name=value`."""
    parts = re.split("([=,])", word) if "=" in word else [word]
    return "".join(STAND_INS.get(part, part) for part in parts)


def run_training(training, args, tmp_path):
    config = args[args.index("--config") + 1]
    backbone = tmp_path / "backbone"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(backbone)
    tiny_model(FAMILY_OF_CONFIG.get(config, "llama"), vocab_size=len(tokenizer)).save_pretrained(
        backbone
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "What is it, in the end?", "output": "It is."}\n' * 4)
    small = tiny_run(backbone, rows, tmp_path, config=config)
    if training is fit:
        small.append("--then=null")  # a second stage has a test of its own
    # The README's own arguments stand last and win, but for the length of the run.
    shown = [*args, "--trainer.max_steps=2", f"--output={tmp_path / 'out'}"]
    made = training.main([*shown[:2], *small[1:], *shown[2:]])
    assert (made / "training.yaml").is_file()


def test_the_shown_code_runs(workplace, monkeypatch, no_deprecations):
    monkeypatch.chdir(workplace)
    model = load_model("backbone", device="cpu").model
    names = {  # token 0 pads
        "locret": locret,
        "model": model,
        "input_ids": torch.randint(1, model.config.vocab_size, (1, 300)),
        "question_ids": torch.randint(1, model.config.vocab_size, (1, 9)),
    }
    for block in blocks("python"):
        exec(block, names)  # noqa: S102 - the README is ours
    assert names["ids"].shape[1] > 300
    assert names["answer"].shape[1] > 9
    assert names["cache"].layers[0].source_positions[0][0].dtype == torch.long


def test_the_supported_families_are_those_of_the_code():
    from locret.model.backbone import SUPPORTED

    shown = README.split("**Supported**")[1].split("---")[0].lower()
    plain = re.sub(r"[-_ \n]", "", shown)
    names = [name.removesuffix("_text").replace("_", "") for name in SUPPORTED]
    assert [name for name in names if name not in plain] == []
