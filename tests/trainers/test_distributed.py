"""Two processes (gloo, CPU) learn what one process learns that accumulates two batches."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.killer import kill_at
from tests.trainers.runs import callbacks, run_forked, run_in_process, tiny_run
from trainers.fit import main

STEPS = 4
MODEL_PARALLEL = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    },
}


def train(backbones, rows, folder, *more, processes=1, expected=0):
    args = [*tiny_run(backbones("llama"), rows, folder, steps=STEPS), *more]
    assert run_forked(main, args, processes) == expected


@pytest.fixture(scope="module")
def alone(backbones, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(backbones, rows, folder, "--trainer.accumulate_grad_batches=2")
    return folder


def losses(folder):
    """Of every batch, over all processes."""
    checkpoint = torch.load(folder / "ckpt" / "last.ckpt", weights_only=False)
    return torch.tensor(checkpoint["callbacks"]["ExportHeads"]["history"]["train/loss"])


def record(folder):
    return json.loads((folder / "heads" / "config.json").read_text())


def assert_the_same(folder, alone, **tolerance):
    ours, theirs = (load_file(run / "heads" / "heads.safetensors") for run in (folder, alone))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)
    means = losses(alone).view(-1, 2).mean(dim=1)
    torch.testing.assert_close(losses(folder), means, **tolerance)
    assert record(folder)["trained_tokens"] == record(alone)["trained_tokens"]


def test_ddp_equals_accumulation(alone, backbones, rows, tmp_path):
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    train(backbones, rows, tmp_path, *ddp, processes=2)
    assert_the_same(tmp_path, alone, rtol=1e-3, atol=1e-5)


def test_processes_that_accumulate(alone, backbones, rows, tmp_path):
    """Their sums are averaged, once."""
    train(backbones, rows, tmp_path / "one", "--trainer.accumulate_grad_batches=4")
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=2"]
    train(backbones, rows, tmp_path / "two", *both, processes=2)
    assert_the_same(tmp_path / "two", tmp_path / "one", rtol=1e-3, atol=1e-5)


def test_a_sharded_backbone_equals_accumulation_killed_and_resumed(
    alone, backbones, rows, tmp_path
):
    sharded = ["--trainer.devices=2", "--trainer.strategy=sharded", "--model.train_chunk_size=64"]
    killer = callbacks(tmp_path, kill_at(2))
    killed = {"processes": 2, "expected": -signal.SIGKILL}
    train(backbones, rows, tmp_path, *sharded, killer, **killed)
    train(backbones, rows, tmp_path, *sharded, "--ckpt_path=last", processes=2)
    assert_the_same(tmp_path, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "sharded", json.dumps(MODEL_PARALLEL)])
def test_two_gpus_equal_accumulation(strategy, backbones, rows, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def on_gpus(folder, *more):
        args = [*tiny_run(backbones("llama"), rows, folder, steps=STEPS), *more]
        done = run_in_process([*args, "--trainer.accelerator=gpu"])
        assert done.returncode == 0, done.stderr[-2000:]

    on_gpus(tmp_path / "one", "--trainer.accumulate_grad_batches=2")
    on_gpus(tmp_path / "two", "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert_the_same(tmp_path / "two", tmp_path / "one", rtol=1e-3, atol=1e-4)
