"""Arguments that turn a shipped config into a run of seconds, and what is read off a run."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

ROOT = Path(__file__).resolve().parents[2]


def source(rows, stage="train"):
    given = {"class_path": "datamodules.sources.JsonlSource", "init_args": {"path": str(rows)}}
    return f"--data.{stage}={json.dumps([given])}"


def callbacks(folder, *more):
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "ckpt"), "every_n_train_steps": 2, "save_last": True},
    }
    return f"--trainer.callbacks={json.dumps([checkpoint, *more])}"


def tiny_run(backbone, rows, folder, steps=2, config="smollm2.yaml", width=16):
    """For all trainings: heads, with an adapter config the adapter, and with a config of the second
    stage (`_kl`) heads that tell their width themselves."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "logs"},
    }
    own = [f"--model.width={width}", "--model.adapter=null"]
    if "adapter" in config:
        own = ["--model.rank=2"]
    elif "_kl" in config:
        own = []
    return [
        f"--config={config}",
        f"--model.model={backbone}",
        *own,
        "--model.dtype=float32",
        "--model.warmup_steps=1",
        source(rows),
        "--data.num_workers=0",
        "--data.weights=null",
        "--data.batch_size=1",
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        callbacks(folder),
        f"--trainer.logger={json.dumps(logger)}",
        f"--output={folder / 'heads'}",
    ]


def run_in_process(args, module="trainers.fit", **kwargs):
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def run_forked(main, args, processes=1):
    """The exit codes of `main(args)` in processes of their own that need not import anything; as
    one, if they are equal."""
    forked = multiprocessing.get_context("fork")
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    started = []
    for rank in range(processes):
        environment = {**where, "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(forked.Process(target=_on_one_thread, args=(main, args, environment)))
        started[-1].start()
    for process in started:
        process.join()
    codes = {process.exitcode for process in started}
    return codes.pop() if len(codes) == 1 else codes


def _on_one_thread(main, args, environment):
    os.environ.update(environment)
    torch.set_num_threads(1)  # the parent's threads are not there after a fork
    main(args)


def logged(folder, name):
    """One column of a run's CSV log, without the steps that have no such value."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index(name)
    return [float(cell) for line in lines[1:] if (cell := line.split(",")[at])]


def weights(folder):
    return (Path(folder) / "heads.safetensors").read_bytes()
