"""Two processes (gloo, CPU) learn what one process learns that accumulates two batches."""

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.runs import run_in_process, tiny_run


def train(backbones, rows, folder, *more, steps=4):
    args = [*tiny_run(backbones("llama"), rows, folder, steps=steps), *more]
    done = run_in_process(args)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "heads" / "heads.safetensors")


def losses(folder):
    """Of every batch, over all processes."""
    checkpoint = torch.load(folder / "ckpt" / "last.ckpt", weights_only=False)
    return torch.tensor(checkpoint["callbacks"]["ExportHeads"]["history"]["train/loss"])


def test_two_processes_equal_accumulation_of_two(backbones, rows, tmp_path):
    alone = train(backbones, rows, tmp_path / "one", "--trainer.accumulate_grad_batches=2")
    both = train(backbones, rows, tmp_path / "two", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert alone.keys() == both.keys()
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-3, atol=1e-5)
    means = losses(tmp_path / "one").view(-1, 2).mean(dim=1)
    torch.testing.assert_close(losses(tmp_path / "two"), means, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_fsdp_exports_the_same_tensors(backbones, rows, tmp_path):
    strategy = (
        '--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", '
        '"init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, '
        '"save_distributed_checkpoint": false}}'
    )
    alone = train(backbones, rows, tmp_path / "one")
    on_gpus = ["--trainer.accelerator=gpu", "--trainer.devices=2", strategy]
    both = train(backbones, rows, tmp_path / "two", *on_gpus)
    assert {n: t.shape for n, t in alone.items()} == {n: t.shape for n, t in both.items()}
