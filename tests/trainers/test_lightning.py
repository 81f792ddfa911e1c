"""What Lightning offers by config works with our trainings: early stopping, learning-rate search,
loggers."""

import json

import pytest
import torch

from tests.trainers.runs import callbacks, source, tiny_run, weights
from trainers.fit import main

EARLY = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "val/loss", "min_delta": 1e9, "patience": 1},
}
FINDER = {
    "class_path": "lightning.pytorch.callbacks.LearningRateFinder",
    "init_args": {"min_lr": 1e-5, "max_lr": 1.0, "num_training_steps": 20},
}


def last_checkpoint(folder):
    return torch.load(folder / "ckpt" / "last.ckpt", weights_only=False)


def history(folder):
    return last_checkpoint(folder)["callbacks"]["ExportHeads"]["history"]


def test_early_stopping_ends_a_run_and_exports(backbones, rows, tmp_path):
    validated = [source(rows, "val"), "--trainer.val_check_interval=2"]
    short = "--trainer.limit_val_batches=1"
    args = [*tiny_run(backbones("llama"), rows, tmp_path, steps=20), *validated, short]
    folder = main([*args, callbacks(tmp_path, EARLY)])
    assert last_checkpoint(tmp_path)["global_step"] == 4
    assert weights(folder)


def test_a_run_goes_on_with_the_rate_that_was_found(backbones, rows, tmp_path):
    """As if it had been given, and as if nobody had looked for it."""

    def arguments(name, lr):
        return [*tiny_run(backbones("llama"), rows, tmp_path / name, steps=4), f"--model.lr={lr}"]

    finding = main([*arguments("finding", 1e-7), callbacks(tmp_path / "finding", FINDER)])
    found = last_checkpoint(tmp_path / "finding")["hyper_parameters"]["lr"]
    assert found >= FINDER["init_args"]["min_lr"]
    assert weights(finding) == weights(main(arguments("given", found)))
    assert history(tmp_path / "finding") == history(tmp_path / "given")


def logger(name, folder, **options):
    folder.mkdir()
    given = {"save_dir": str(folder), **options}
    given = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": given}
    return f"--trainer.logger={json.dumps(given)}"


def test_tensorboard_by_config(backbones, rows, tmp_path):
    pytest.importorskip("tensorboard")
    seen = tmp_path / "seen"
    main([*tiny_run(backbones("llama"), rows, tmp_path), logger("TensorBoardLogger", seen)])
    (events,) = seen.glob("**/events.out.tfevents*")
    assert b"train/top10_overlap" in events.read_bytes()


def test_weights_and_biases_by_config(backbones, rows, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    offline = logger("WandbLogger", tmp_path / "seen", offline=True, project="heads")
    main([*tiny_run(backbones("llama"), rows, tmp_path), offline])
    wandb.finish()
    (run,) = (tmp_path / "seen").glob("**/*.wandb")
    assert b"train/top10_overlap" in run.read_bytes()
