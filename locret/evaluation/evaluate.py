"""`python -m locret evaluate`: ask what was not asked yet, then write the results.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --data-dir data --processes 8

A run is prepared without its model: unknown tasks, missing data and missing heads show at once.
Answers are kept as they come; a run that was killed goes on where it was. Processes of `torchrun`
or `--processes` share the questions; whichever ends last writes the results:

    OUTPUT/config.yaml           what was asked
    OUTPUT/predictions/*.jsonl   every answer (`locret.evaluation.records`)
    OUTPUT/result.json           figures and where they come from (`locret.evaluation.results`)
    OUTPUT/result.md             the table
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from locret.evaluation import results, tables
from locret.evaluation.asking import Asker
from locret.evaluation.config import EvalConfig
from locret.evaluation.engines import Engines
from locret.evaluation.manifest import Session, manifest
from locret.evaluation.preparing import Prepared, prepare
from locret.evaluation.processes import Ranks, run_together
from locret.evaluation.questions import Question, batches, share
from locret.evaluation.records import Records
from locret.model.loading import load_model
from locret.system.files import as_json, write_whole

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
        ValueError: a configuration that cannot be run (`locret.evaluation.preparing.prepare`), or a
            process that failed.
    """
    prepared, ranks = prepare(config), ranks or Ranks()
    path = prepared.output / CONFIG
    if ranks.rank == 0:
        plain = json.loads(as_json(prepared.config.to_dict()))  # YAML has no tuples
        write_whole(path, yaml.safe_dump(plain, sort_keys=False))
    if processes > 1 and ranks.world == 1:
        arguments = ["evaluate", "--config", str(path)]
        arguments += [] if minutes is None else ["--minutes", str(minutes)]
        tell = partial(_tell, prepared, progress)
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
    last = time.monotonic() + 60 * (minutes if minutes is not None else float("inf"))
    records = Records(prepared.output, str(ranks.rank))
    done = records.read().keys()
    all_batches = batches(prepared.asked, prepared.config.batch_size)
    dealt = share(all_batches, ranks.rank, ranks.world)
    left = [[question for question in batch if question.key not in done] for batch in dealt]
    left = sorted(filter(None, left), key=_engine_of)
    total = sum(map(len, dealt))
    count = total - sum(map(len, left))
    if progress is not None:
        progress(count, total)
    if not left:
        return
    asker = _load(prepared, ranks)
    session = Session(prepared.output, ranks.rank, ranks.world, asker)
    for batch in left:
        if time.monotonic() > last:
            return
        for answered in asker.ask(batch):
            records.append(answered)
            count += len(answered)
            if progress is not None:
                progress(count, total)
        session.beat()


def _tell(prepared: Prepared, progress: Progress | None) -> None:
    if progress is not None:
        found = Records(prepared.output).read()
        keys = {question.key for question in prepared.asked}
        progress(len(keys & found.keys()), len(keys))


def _engine_of(batch: list[Question]) -> tuple[str, str]:
    """Batches of one engine stand together."""
    return batch[0].setup.label, str(batch[0].budget)


def _load(prepared: Prepared, ranks: Ranks) -> Asker:
    config = prepared.config
    chosen: dict[str, Any] = {}
    if config.attention is not None:
        chosen["attn_implementation"] = config.attention
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        device=ranks.device(config.device),
        adapter=config.adapter,
        **chosen,
    )
    engines = Engines(loaded, prepared.heads, config.heads, config.engine)
    return Asker(loaded, engines, in_turn=config.batch_size == 1)


def finish(prepared: Prepared, command: str = "") -> Path | None:
    """Write the results, if every question has its answer; else None."""
    with _alone(prepared.output):
        found = Records(prepared.output).read()
        answered = [(q, found[q.key]) for q in prepared.asked if q.key in found]
        if len(answered) < len(prepared.asked):
            return None
        result = {
            "kind": results.KIND,
            "format": results.FORMAT,
            "name": prepared.output.name.removesuffix(ANSWERS),
            "manifest": manifest(prepared, answered, command),
            **results.figures(answered),
        }
        path = prepared.output / RESULT
        write_whole(path, as_json(result))
        write_whole(prepared.output / TABLE, tables.as_markdown(result))
        return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
