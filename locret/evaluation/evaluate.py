"""`python -m locret evaluate`: ask what was not asked yet, then write the results.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --data-dir data --processes 8
    python -m locret reproduce docs/results --data-dir data

A run is prepared without its model: unknown tasks, missing data and missing heads show at once.
Answers are kept as they come; a run that was killed goes on where it was. Processes of `torchrun`
or `--processes` share the questions; the last one to finish writes the results:

    OUTPUT/config.yaml           what was asked
    OUTPUT/predictions/*.jsonl   every answer (`locret.evaluation.records`)
    OUTPUT/result.json           figures and where they come from (`locret.evaluation.results`)
    OUTPUT/result.md             the table

`reproduce` runs of every result of an evaluation the slice that its configuration calls `smoke`
again, from scratch, on the same samples. A setup is reproduced if its mean over the slice lies
within what so many draws of the committed scores give (95 %). Tasks whose data is not here are left
out, and said.
"""

import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from locret.evaluation import results, tables
from locret.evaluation.ask import Asker, Engines, Ranks, batches
from locret.evaluation.config import EvalConfig
from locret.evaluation.questions import Prepared, prepare
from locret.evaluation.records import Records, Session, manifest
from locret.evaluation.results import FORMAT, KIND, interval, resampled_means
from locret.model.loading import load_model
from locret.quantities import check_between, check_whole
from locret.system import interrupts
from locret.system.files import as_json, write_whole
from locret.tasks import task_names

ANSWERS = ".answers"
"""Ends the name of a folder that lies beside its result."""

CONFIG = "config.yaml"
RESULT = "result.json"
TABLE = "result.md"

Progress = Callable[[int, int], None]
"""Called with the answers there are and those there will be."""


def run(
    config: EvalConfig,
    command: str = "",
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    processes: int = 1,
    minutes: float | None = None,
) -> Path | None:
    """Ask this process's share, and write the results if no answer is missing then.

    Args:
        command: that the manifest tells of.
        processes: that share the questions, if this is not one of several already.
        minutes: ask no more after that time.

    Returns:
        The result's file; None if there are answers to give yet, by other processes or later.

    Raises:
        ValueError: a configuration that cannot be run (`locret.evaluation.questions.prepare`), or a
            process that failed.
    """
    check_whole("processes", processes, 1)
    if minutes is not None:
        check_between("minutes", minutes, 0)
    prepared, ranks = prepare(config), ranks or Ranks()
    path = prepared.output / CONFIG
    if ranks.rank == 0:
        plain = json.loads(as_json(prepared.config.to_dict()))  # YAML has no tuples
        write_whole(path, yaml.safe_dump(plain, sort_keys=False))
        for name in (RESULT, TABLE):  # those of another configuration would stand beside this one
            (prepared.output / name).unlink(missing_ok=True)
    if processes > 1 and ranks.world == 1:
        arguments = ["evaluate", "--config", str(path)]
        arguments += [] if minutes is None else ["--minutes", str(minutes)]

        def tell() -> None:
            if progress is not None:
                keys = {question.key for question in prepared.asked}
                progress(len(keys & Records(prepared.output).read().keys()), len(keys))

        run_together(arguments, processes, prepared.output / "logs", tell)
    else:
        ask(prepared, ranks, progress, minutes)
    return finish(prepared, command)


def ask(
    prepared: Prepared,
    ranks: Ranks,
    progress: Progress | None = None,
    minutes: float | None = None,
) -> None:
    """Ask what of this process's share has no answer yet, for so many minutes at most."""
    records = Records(prepared.output, str(ranks.rank))
    done = records.read().keys()
    all_batches = batches(prepared.asked, prepared.config.batch_size)
    dealt = ranks.share(all_batches)
    left = [[question for question in batch if question.key not in done] for batch in dealt]
    # Batches of one engine stand together.
    left = sorted(filter(None, left), key=lambda of: (of[0].setup.label, str(of[0].budget)))
    total = sum(map(len, dealt))
    count = total - sum(map(len, left))
    if progress is not None:
        progress(count, total)
    if not left:
        return
    asker = load_asker(prepared, ranks)
    session = Session(prepared.output, ranks.rank, ranks.world, asker.loaded, asker.engines.used)
    last = time.monotonic() + 60 * (minutes if minutes is not None else float("inf"))
    for batch in left:
        if time.monotonic() > last:
            return
        for answered in asker.ask(batch):
            records.append(answered)
            count += len(answered)
            if progress is not None:
                progress(count, total)
        session.beat()


def load_asker(prepared: Prepared, ranks: Ranks) -> Asker:
    """What asks a run's questions, with the model on this process's device."""
    config = prepared.config
    chosen = dict(prepared.sources.get("model_config", {}))
    if config.attention is not None:
        chosen["attn_implementation"] = config.attention
    loaded = load_model(
        config.model,
        dtype=config.dtype,  # type: ignore[arg-type]
        device=ranks.device(config.device),
        adapter=config.adapter,
        quantization=config.weights,  # type: ignore[arg-type]
        **chosen,
    )
    chat = config.chat_template
    engines = Engines(loaded, prepared.heads, config.heads, config.engine, chat)
    return Asker(loaded, engines, in_turn=config.batch_size == 1)


def finish(prepared: Prepared, command: str = "") -> Path | None:
    """Write the results, if every question has its answer; else None."""
    prepared.output.mkdir(parents=True, exist_ok=True)
    with (prepared.output / ".lock").open("w") as lock:  # which goes with the process
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = Records(prepared.output).read()
        answered = [(q, found[q.key]) for q in prepared.asked if q.key in found]
        if len(answered) < len(prepared.asked):
            return None
        result = {
            "kind": KIND,
            "format": FORMAT,
            "name": prepared.output.name.removesuffix(ANSWERS),
            "manifest": manifest(prepared, answered, command),
            **results.figures(answered),
        }
        path = prepared.output / RESULT
        write_whole(path, as_json(result))
        write_whole(prepared.output / TABLE, tables.as_markdown(result))
        return path


# ---- several processes ---------------------------------------------------------------------------

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 10.0  # for processes that are asked to end
TOLD = 2000  # characters of what a failed process said


def run_together(
    arguments: Sequence[str], count: int, folder: Path, tell: Callable[[], None]
) -> None:
    """Run `python -m locret ARGUMENTS` in so many processes, which know their ranks, and call
    `tell` now and then. What they say goes into the folder, a file each. SIGTERM, which schedulers
    send, and SIGINT end them too, and this process (`locret.system.interrupts`).

    Raises:
        ValueError: one of them failed; says what it said. The others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"{rank}.txt" for rank in range(count)]
    running: list[subprocess.Popen[bytes]] = []
    with interrupts.raised():
        try:
            for rank, log in enumerate(logs):
                with interrupts.delayed():  # a process that is started must also be in the list
                    running.append(_start(arguments, rank, count, log))
            while any(process.poll() is None for process in running):
                _refuse_failed(running, logs)
                tell()
                time.sleep(POLL_SECONDS)
            _refuse_failed(running, logs)
            tell()
        finally:
            with interrupts.delayed():
                _end(running)


def _end(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, whatever they are doing."""
    for process in running:
        process.terminate()
    last = time.monotonic() + PATIENCE_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # such as one that waits for a device, and handles no signals meanwhile
            process.wait()


def _start(arguments: Sequence[str], rank: int, count: int, log: Path) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    command = [sys.executable, "-m", "locret", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _refuse_failed(running: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path]) -> None:
    for process, log in zip(running, logs, strict=True):
        if process.poll():
            said = log.read_text(encoding="utf-8", errors="replace").strip()[-TOLD:]
            raise ValueError(f"a process ended with status {process.returncode} ({log}):\n{said}")


# ---- again ---------------------------------------------------------------------------------------

ON_A_CPU = {"device": "cpu", "dtype": "float32", "weights": None, "batch_size": 1}

Scores = Mapping[str, Any]
"""`samples`, their ids, and `scores`, one each."""


@dataclass(frozen=True)
class Comparison:
    """A setup of a table, again.

    Attributes:
        table, setup: which.
        count: samples of the slice.
        committed: their mean in the file; again: their mean now.
        low, high: where the mean of so many samples may lie by the committed figures.
        equal: samples with the very same score.
    """

    table: str
    setup: str
    count: int
    committed: float
    again: float
    low: float
    high: float
    equal: int

    @property
    def reproduced(self) -> bool:
        return self.low <= self.again <= self.high


def compare(table: str, setup: str, pairs: Sequence[tuple[Scores, Scores]]) -> Comparison:
    """A setup of a table, again. `pairs` are for every task the committed scores, and those of the
    slice; samples that were not committed are left out, and a task with no others is a
    ValueError."""
    same, now, draws = [], [], []
    equal = count = 0
    for seed, (old, new) in enumerate(pairs):
        by_sample = dict(zip(old["samples"], old["scores"], strict=True))
        asked = zip(new["samples"], new["scores"], strict=True)
        known = [(by_sample[sample], score) for sample, score in asked if sample in by_sample]
        known = [(a, b) for a, b in known if a is not None and b is not None]
        if not known:
            raise ValueError(f"{table}, {setup}: none of the samples asked was committed")
        count += len(known)
        same.append(sum(a for a, _ in known) / len(known))
        now.append(sum(b for _, b in known) / len(known))
        equal += sum(abs(a - b) < 1e-6 for a, b in known)
        answered = [score for score in old["scores"] if score is not None]
        draws.append(resampled_means(answered, seed=seed, count=len(known)))
    low, high = interval(torch.stack(draws).mean(0))
    return Comparison(table, setup, count, fmean(same), fmean(now), low, high, equal)


def as_table(compared: Sequence[Comparison]) -> str:
    """A line a setup, in per cent."""
    wide = max([36, *(len(one.setup) + 2 for one in compared)])
    head = (
        f"{'table':<24}{'setup':<{wide}}{'samples':>8}{'committed':>11}{'again':>8}{'allowed':>14}"
    )
    lines = [head]
    for one in compared:
        allowed = f"{100 * one.low:.1f}-{100 * one.high:.1f}"
        lines.append(
            f"{one.table:<24}{one.setup:<{wide}}{one.count:>8}{100 * one.committed:>11.1f}"
            f"{100 * one.again:>8.1f}{allowed:>14}  "
            + ("reproduced" if one.reproduced else "NOT reproduced")
            + f", {one.equal} of {one.count} alike"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Reproduction:
    """What was run again, and what was not for which reason."""

    compared: tuple[Comparison, ...]
    left_out: tuple[str, ...]

    @property
    def reproduced(self) -> bool:
        return bool(self.compared) and all(setup.reproduced for setup in self.compared)


def result_files(places: Sequence[Path]) -> list[Path]:
    """JSON files that can be run again, of files and folders; ValueError if there are none."""
    files = [sorted(place.glob("*.json")) if place.is_dir() else [place] for place in places]
    found = [path for those in files for path in those if _is_evaluation(path)]
    if not found:
        raise ValueError(f"{', '.join(map(str, places))}: no results of `evaluate` there")
    return found


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = isinstance(found, dict) and found.get("kind") == KIND
    if named and found.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {found.get('format')}; expected {FORMAT}: ask again, with "
            "`python -m locret evaluate`"
        )
    return named


def reproduce(
    path: Path, output: Path, changes: Mapping[str, Any], progress: Progress | None = None
) -> Reproduction:
    """Run the slice of one file again, in the folder `output`, with changes of the configuration,
    such as `data_dir`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    values = result["manifest"]["config"]
    values = {**values, "limit": 1, **(values.get("smoke") or {}), **ON_A_CPU, **changes}
    config = EvalConfig.from_dict({**values, "output": str(output)})
    here, left_out = _with_data(config)
    if not here:
        return Reproduction((), left_out)
    config = replace(config, tasks=here)
    pairs = itertools.product(config.all_setups(), config.make_tasks())
    asked = {(setup.label, task.label) for setup, task in pairs}
    if not asked & {(cell["setup"], cell["task"]) for cell in result["cells"]}:
        slice_of = ", ".join(sorted({task for _, task in asked}))
        return Reproduction((), (*left_out, f"its slice ({slice_of}) is not among its results"))
    made = run(config, "python -m locret reproduce", progress=progress)
    assert made is not None
    again = json.loads(made.read_text(encoding="utf-8"))
    return Reproduction(tuple(_compared(name_of(path), result, again)), left_out)


def name_of(path: Path) -> str:
    """What a result is called: by its file, or its folder, if the file is `evaluate`'s own."""
    return path.resolve().parent.name if path.name == RESULT else path.stem


def _with_data(config: EvalConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tasks whose data is here, and why the others are left out."""
    here, left_out = [], []
    for name in task_names(tuple(config.tasks)):
        try:
            replace(config, tasks=(name,)).make_tasks()
        except ValueError as error:
            left_out.append(f"{name}: {error}")
        else:
            here.append(name)
    return tuple(here), tuple(left_out)


def _compared(
    table: str, committed: Mapping[str, Any], again: Mapping[str, Any]
) -> Iterator[Comparison]:
    before = {(cell["setup"], cell["task"]): cell for cell in committed["cells"]}
    for setup in dict.fromkeys(cell["setup"] for cell in again["cells"]):
        pairs = [
            (before[setup, cell["task"]], cell)
            for cell in again["cells"]
            if cell["setup"] == setup and (setup, cell["task"]) in before
        ]
        if pairs:
            yield compare(table, setup, pairs)
