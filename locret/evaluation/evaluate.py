"""`python -m locret evaluate`: ask what was not asked yet, then write the results.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --data-dir data --processes 8

A run is prepared without its model: unknown tasks, missing data and missing heads show at once.
Answers are kept as they come; a run that was killed goes on where it was. Processes of `torchrun`
or `--processes` share the questions; whichever ends last writes the results:

    OUTPUT/predictions/*.jsonl   every answer (`locret.evaluation.records`)
    OUTPUT/result.json           figures and where they come from (`locret.evaluation.results`)
    OUTPUT/result.md             the table
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from locret.evaluation import results
from locret.evaluation.asking import Asker
from locret.evaluation.config import EvalConfig
from locret.evaluation.engines import Engines
from locret.evaluation.manifest import manifest
from locret.evaluation.preparing import Prepared, prepare
from locret.evaluation.questions import Question, batches, share
from locret.evaluation.ranks import Ranks
from locret.evaluation.records import Records
from locret.evaluation.sessions import Session
from locret.model.loading import load_model
from locret.system.files import as_json, write_whole

RESULT = "result.json"
TABLE = "result.md"

Progress = Callable[[int, int], None]
"""Called with the answers there are and those there will be."""


def run(
    config: EvalConfig,
    command: str = "",
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Path | None:
    """Ask this process's share, and write the results if no answer is missing then.

    Args:
        command: that the manifest tells of.

    Returns:
        The result's file; None if other processes have answers to give yet.

    Raises:
        ValueError: a configuration that cannot be run (`locret.evaluation.preparing.prepare`).
    """
    prepared = prepare(config)
    ask(prepared, ranks or Ranks(), progress)
    return finish(prepared, command)


def ask(prepared: Prepared, ranks: Ranks, progress: Progress | None = None) -> None:
    """Ask what of this process's share has no answer yet."""
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
        for answered in asker.ask(batch):
            records.append(answered)
            count += len(answered)
            if progress is not None:
                progress(count, total)
        session.beat()


def _engine_of(batch: list[Question]) -> tuple[str, str]:
    """Batches of one engine stand together."""
    return batch[0].row.label, str(batch[0].budget)


def _load(prepared: Prepared, ranks: Ranks) -> Asker:
    config = prepared.config
    chosen: dict[str, Any] = {}
    if config.attention is not None:
        chosen["attn_implementation"] = config.attention
    loaded = load_model(
        config.model,
        dtype=config.dtype,  # type: ignore[arg-type]
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
            "kind": "evaluation",
            "format": results.FORMAT,
            "name": prepared.output.name,
            "manifest": manifest(prepared, answered, command),
            **results.figures(answered),
        }
        path = prepared.output / RESULT
        write_whole(path, as_json(result))
        write_whole(prepared.output / TABLE, results.table(result))
        return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
