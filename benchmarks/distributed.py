"""Several devices of one host against one: the same losses, how much faster, the same files.

    python -m benchmarks.distributed --shape llama-3.2-1b --prompt 8192 --out r.json
    python -m benchmarks.distributed --shape tiny --prompt 200 --answer 20 --device cpu --out r.json

Heads of a model with random weights are trained through the command line that users have:
  one      one device that accumulates as many batches as there are devices elsewhere
  ddp      a batch on each device
  sharded  the same with the backbone sharded by FSDP2 (`trainers.distributed`)
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import record
from benchmarks.shapes import SHAPES, random_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "llama31.yaml"
WORDS = ("river", "stone", "seven", "lantern", "northern", "account", "paper", "engine")


@dataclass(frozen=True)
class Run:
    """What one training left behind: what each process's `StepClock` saw, and the heads."""

    ranks: list[dict[str, Any]]
    heads: dict[str, torch.Tensor]

    @property
    def samples_per_second(self) -> float:
        return sum(rank["batches"] for rank in self.ranks) / self.ranks[0]["seconds"]

    @property
    def peak_gib(self) -> float | None:
        return max(rank["peak_gib"] or 0 for rank in self.ranks) or None

    def curve(self, devices: int) -> torch.Tensor:
        """Loss of every optimizer step: the mean over its batches."""
        of_ranks = torch.tensor([rank["losses"] for rank in self.ranks])  # [ranks, batches]
        return of_ranks.T.reshape(-1, devices).mean(dim=1)


def main() -> None:
    """Train in every way, compare; writes the JSON after each. Exits with 1 if ways disagree or
    fail."""
    given = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        work = Path(folder)
        _make_backbone(work / "model", given)
        _write_rows(work / "rows.jsonl", given)
        tried: dict[str, Run | None] = {}
        for name in given.ways:
            tried[name] = _train(name, work, given)
            figures = _figures(tried, given)
            record.write(given.out, vars(given), figures, announce=False)
    for name, value in figures.items():
        if name not in ("losses", "tensors"):
            print(f"{name:<36} {round(value, 5) if isinstance(value, float) else value}")
    record.write(given.out, vars(given), figures)
    if not all(value for name, value in figures.items() if name.endswith("_ok")):
        sys.exit(1)


def _make_backbone(folder: Path, given: argparse.Namespace) -> None:
    """A checkpoint with random weights whose tokenizer makes one token of each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    names = {"vocab_size": len(vocabulary), "bos_token_id": None, "eos_token_id": 0}
    model = random_model(given.shape, torch.device(given.device), dtype, **names)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    del model
    if given.device == "cuda":
        torch.cuda.empty_cache()


def _write_rows(path: Path, given: argparse.Namespace) -> None:
    """As many conversations as are trained on, all of the same number of tokens."""
    draw = random.Random(0)

    def text(length: int) -> str:
        words = " ".join(draw.choices(WORDS, k=length))  # no word has fewer than one byte
        return words[:length].strip().ljust(length, ".")

    rows = (
        {"instruction": text(given.prompt), "output": text(given.answer)}
        for _ in range(given.steps * given.devices)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train(way: str, work: Path, given: argparse.Namespace) -> Run | None:
    """None if it failed or took too long; the others are still worth comparing."""
    command = [sys.executable, "-m", "trainers.fit", *_arguments(way, work, given)]
    print(f"{way}: {shlex.join(command)}", flush=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "0"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        if process.wait(given.seconds) != 0:
            return None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()
        return None
    ranks = [json.loads(p.read_text()) for p in sorted((work / way / "clock").glob("*.json"))]
    return Run(ranks, load_file(work / way / "heads" / "heads.safetensors"))


def _arguments(way: str, work: Path, given: argparse.Namespace) -> list[str]:
    source = {
        "class_path": "datamodules.sources.JsonlSource",
        "init_args": {"path": str(work / "rows.jsonl")},
    }
    clock = {
        "class_path": "benchmarks.clock.StepClock",
        "init_args": {"folder": str(work / way / "clock"), "warmup": given.warmup},
    }
    ways = {
        "one": ["--trainer.devices=1", f"--trainer.accumulate_grad_batches={given.devices}"],
        "ddp": [f"--trainer.devices={given.devices}", "--trainer.strategy=ddp"],
        "sharded": [f"--trainer.devices={given.devices}", "--trainer.strategy=sharded"],
    }
    on_cpu = given.device == "cpu"
    return [
        f"--config={CONFIG}",
        f"--model.model={work / 'model'}",
        f"--model.width={given.width}",
        f"--model.dtype={'float32' if on_cpu else 'bfloat16'}",
        f"--model.warmup_steps={max(1, given.steps // 4)}",
        f"--data.train={json.dumps([source])}",
        f"--data.max_prompt_tokens={given.prompt}",
        f"--data.max_answer_tokens={given.answer}",
        f"--data.num_workers={given.workers}",
        f"--trainer.accelerator={'cpu' if on_cpu else 'gpu'}",
        "--trainer.precision=bf16-mixed",
        f"--trainer.max_steps={given.steps}",
        "--trainer.log_every_n_steps=10",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        f"--trainer.default_root_dir={work / way}",
        f"--trainer.callbacks={json.dumps([clock])}",
        "--trainer.logger=false",
        f"--output={work / way / 'heads'}",
        *ways[way],
    ]


def _figures(tried: dict[str, Run | None], given: argparse.Namespace) -> dict[str, Any]:
    runs = {name: run for name, run in tried.items() if run is not None}
    return {f"{name}_ran_ok": name in runs for name in tried} | _compared(runs, given)


def _compared(runs: dict[str, Run], given: argparse.Namespace) -> dict[str, Any]:
    curves = {name: run.curve(given.devices) for name, run in runs.items()}
    one = runs.get("one")
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        figures[f"{name}_samples_per_second"] = run.samples_per_second
        figures[f"{name}_peak_gib"] = run.peak_gib
        figures[f"{name}_average_gib_per_second"] = run.ranks[0]["average_gib_per_second"]
        if name == "one" or one is None:
            continue
        figures[f"{name}_speed_up"] = run.samples_per_second / one.samples_per_second
        difference = ((curves[name] - curves["one"]).abs() / curves["one"].abs()).max().item()
        figures[f"{name}_loss_difference"] = difference
        figures[f"{name}_loss_ok"] = difference <= given.tolerance
        figures[f"{name}_same_tensors_ok"] = _described(run.heads) == _described(one.heads)
        figures[f"{name}_weights_difference"] = max(
            (run.heads[key].float() - tensor.float()).abs().max().item()
            for key, tensor in one.heads.items()
        )
        if name == "ddp" and given.device != "cpu":
            figures["ddp_speed_ok"] = figures["ddp_speed_up"] >= 0.9 * given.devices
    figures["phases_ms"] = {name: run.ranks[0]["phases"] for name, run in runs.items()}
    figures["losses"] = {name: curve.tolist() for name, curve in curves.items()}
    figures["tensors"] = {
        way: {name: str(found) for name, found in _described(run.heads).items()}
        for way, run in runs.items()
    }
    return figures


def _described(heads: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in heads.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--prompt", type=int, default=8192, help="tokens")
    parser.add_argument("--answer", type=int, default=256, help="tokens")
    parser.add_argument("--width", type=int, default=1024, help="hidden width of a head")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each training")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="data processes of each training")
    parser.add_argument("--seconds", type=float, default=600, help="the most a training may take")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of losses, relative")
    parser.add_argument(
        "--ways", nargs="+", default=["one", "ddp", "sharded"], choices=["one", "ddp", "sharded"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=None, help="for scratch files")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
