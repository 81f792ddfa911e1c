import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import locret
from locret.models import load_model
from trainers.fit import CONFIGS, _config_path, main

ROOT = Path(__file__).resolve().parents[2]
FAMILY_OF_CONFIG = {
    "llama31.yaml": "llama",
    "phi3.yaml": "phi3",
    "qwen3.yaml": "qwen3",
    "smollm2.yaml": "llama",
}


def source(rows):
    given = {"class_path": "datamodules.sources.JsonlSource", "init_args": {"path": str(rows)}}
    return f"--data.train={json.dumps([given])}"


def tiny_run(backbone, rows, folder, steps=2, config="smollm2.yaml"):
    """Arguments that turn a shipped config into a run of seconds."""
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "ckpt"), "every_n_train_steps": 2, "save_last": True},
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "logs"},
    }
    return [
        f"--config={config}",
        f"--model.model={backbone}",
        "--model.width=16",
        "--model.dtype=float32",
        "--model.warmup_steps=1",
        source(rows),
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks={json.dumps([checkpoint])}",
        f"--trainer.logger={json.dumps(logger)}",
        f"--output={folder / 'heads'}",
    ]


def run_in_process(args, **kwargs):
    command = [sys.executable, "-m", "trainers.fit", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_every_config_has_a_family_here():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(FAMILY_OF_CONFIG)


@pytest.mark.parametrize("config", FAMILY_OF_CONFIG)
def test_a_config_fits_two_steps_on_a_tiny_model(config, backbones, rows, tmp_path):
    backbone = backbones(FAMILY_OF_CONFIG[config])
    shipped = yaml.safe_load((CONFIGS / config).read_text())
    output = main(tiny_run(backbone, rows, tmp_path, config=config))
    heads = locret.RetainingHeads.from_pretrained(output)
    model = load_model(str(backbone), dtype="float32", device="cpu").model
    locret.Engine(model, heads=heads)
    for name, value in heads.config.defaults.items():
        assert value == shipped["model"][name]
    assert heads.config.backbone == str(backbone)
    assert heads.config.trained_tokens > 100
    assert "train/top10_overlap" in heads.config.metrics


def test_the_resolved_config_lies_beside_the_heads_and_repeats_the_run(backbones, rows, tmp_path):
    first = main(tiny_run(backbones("llama"), rows, tmp_path))
    again = main([f"--config={first / 'training.yaml'}", f"--output={tmp_path / 'again'}"])
    assert weights(first) == weights(again)


def test_training_changes_heads_and_nothing_else(backbones, rows, tmp_path):
    from datamodules.datamodule import ConversationDataModule
    from trainers.callbacks import ExportHeads
    from trainers.fit import FitCLI
    from trainers.module import HeadsModule

    cli = FitCLI(
        HeadsModule,
        ConversationDataModule,
        run=False,
        args=tiny_run(backbones("qwen3"), rows, tmp_path, steps=4),
        save_config_callback=ExportHeads,
        save_config_kwargs={"overwrite": True},
    )
    cli.model.configure_model()
    backbone = cli.model.backbone_model
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    heads = [p.clone() for p in cli.model.heads.parameters()]
    cli.trainer.fit(cli.model, cli.datamodule)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    changed = zip(heads, cli.model.heads.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in changed)


def test_checkpoints_hold_heads_and_optimizer_only(backbones, rows, tmp_path):
    folder = main([*tiny_run(backbones("llama"), rows, tmp_path), "--model.width=1024"])
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"heads", "longest_prompt"}
    heads = (folder / "heads.safetensors").stat().st_size
    assert (tmp_path / "ckpt" / "last.ckpt").stat().st_size < 4 * heads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_bit_for_bit(workers, backbones, rows, tmp_path):
    def arguments(name):
        given = tiny_run(backbones("llama"), rows, tmp_path / name, steps=9)
        return [*given, f"--data.num_workers={workers}"]

    whole = main(arguments("whole"))
    args = arguments("killed")
    at = next(i for i, arg in enumerate(args) if arg.startswith("--trainer.callbacks="))
    callbacks = json.loads(args[at].split("=", 1)[1])
    killer = {"class_path": "tests.trainers.killer.KillAtStep", "init_args": {"step": 5}}
    args[at] = f"--trainer.callbacks={json.dumps([*callbacks, killer])}"
    assert run_in_process(args).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "heads").exists()
    resumed = main([*arguments("killed"), "--ckpt_path=last"])
    assert weights(whole) == weights(resumed)
    assert steps_logged(tmp_path / "killed" / "logs" / "version_1") == [4, 5, 6, 7, 8]


def test_the_command_says_what_it_made(backbones, rows, tmp_path):
    done = run_in_process(tiny_run(backbones("llama"), rows, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"heads     {tmp_path / 'heads'}" in done.stdout
    assert "python -m locret generate" in done.stdout


def test_an_unknown_config_names_those_there_are():
    with pytest.raises(ValueError, match=r"nosuch.*phi3\.yaml"):
        _config_path("nosuch.yaml")


def test_a_config_of_the_users_own_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("phi3.yaml").write_text("model: {}\n")
    assert _config_path("phi3.yaml") == Path("phi3.yaml")
    assert _config_path("qwen3") == CONFIGS / "qwen3.yaml"


def steps_logged(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index("step")
    return [int(line.split(",")[at]) for line in lines[1:]]


def weights(folder):
    return (Path(folder) / "heads.safetensors").read_bytes()
