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

import fcntl
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from locret.evaluation import provenance, results, tables
from locret.evaluation.asking import Asker
from locret.evaluation.config import EvalConfig
from locret.evaluation.processes import Ranks, run_together
from locret.evaluation.questions import Prepared, Question, batches, prepare, share
from locret.evaluation.records import Record, Records
from locret.evaluation.setups import Engines
from locret.model.loading import load_model
from locret.quantities import check_between, check_whole
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
    dealt = share(all_batches, ranks.rank, ranks.world)
    left = [[question for question in batch if question.key not in done] for batch in dealt]
    # Batches of one engine stand together.
    left = sorted(filter(None, left), key=lambda of: (of[0].setup.label, str(of[0].budget)))
    total = sum(map(len, dealt))
    count = total - sum(map(len, left))
    if progress is not None:
        progress(count, total)
    if not left:
        return
    asker = _load(prepared, ranks)
    session = Session(prepared.output, ranks.rank, ranks.world, asker)
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


def _load(prepared: Prepared, ranks: Ranks) -> Asker:
    config = prepared.config
    chosen = dict(prepared.sources.get("model_config", {}))
    if config.attention is not None:
        chosen["attn_implementation"] = config.attention
    loaded = load_model(
        config.model,
        dtype=config.dtype,  # type: ignore[arg-type]
        device=ranks.device(config.device),
        adapter=config.adapter,
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


# ---- where the figures come from -----------------------------------------------------------------

SHOWN = 700  # characters of a prompt's beginning and end
OF_ONE_PROCESS = ("rank", "world", "started", "ended", "engines")
FOLDER = "sessions"


def manifest(
    prepared: Prepared, answered: Sequence[tuple[Question, Record]], command: str
) -> dict[str, Any]:
    """The manifest of a run that is complete."""
    sessions = read_sessions(prepared.output)
    facts = [{k: v for k, v in s.items() if k not in OF_ONE_PROCESS} for s in sessions]
    tasks = {question.task.label: question.task for question, _ in answered}
    records = [record for _, record in answered]
    return {
        "command": command,
        "config": prepared.config.to_dict(),
        "sources": prepared.sources,
        "computed": [fact for i, fact in enumerate(facts) if fact not in facts[:i]],
        "engines": {setup: made for s in sessions for setup, made in s["engines"].items()},
        "processes": max((session["world"] for session in sessions), default=0),
        "protocols": {
            "query_agnostic": "the context is compressed before the question is read",
            "query_aware": "the policy sees the question before the final eviction; query-aware "
            "heads get it in front of the context",
        },
        "decoding": "greedy",
        "stop_rules": {
            label: {"max_new_tokens": task.max_new_tokens, "strings": list(task.stop)}
            for label, task in tasks.items()
        },
        "first_prompts": _first_prompts(answered),
        "truncation": {
            "prompts_cut": sum(record.cut > 0 for record in records),
            "tokens_cut": sum(record.cut for record in records),
            "answer_cut": sum(record.answer_cut for record in records),
        },
        "setups": {q.setup.label: q.setup.to_dict() for q, _ in answered},
        "wall_seconds": wall_seconds(sessions),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _first_prompts(answered: Sequence[tuple[Question, Record]]) -> dict[str, Any]:
    first: dict[str, Any] = {}
    for question, _ in answered:
        prompt = question.prompt
        if question.task.label not in first:
            text, left_out = prompt.text, len(prompt.text) - 2 * SHOWN
            short = f"{text[:SHOWN]} [... {left_out} characters ...] {text[-SHOWN:]}"
            first[question.task.label] = {
                "text": text if left_out <= 0 else short,
                "tokens": len(prompt.ids),
                "context_tokens": prompt.context_end,
                "question_tokens": prompt.question_end - prompt.context_end,
                "sha256_of_tokens": prompt.key,
            }
    return first


class Session:
    """One process's part in a run. Its file in the run's folder says how far it came, should it be
    killed."""

    def __init__(self, folder: Path, rank: int, world: int, asker: Asker) -> None:
        started = time.time()
        self._path = folder / FOLDER / f"{started:.3f}-{rank}.json"
        model = asker.model
        self._facts = {
            "rank": rank,
            "world": world,
            "started": started,
            "model_revision": asker.loaded.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "generation_config": model.generation_config.to_diff_dict(),
            "end_tokens": asker.end_tokens,
            "hardware": provenance.hardware(model.device),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
        }
        self._asker = asker
        self.beat()

    def beat(self) -> None:
        """Still at work."""
        now = {"ended": time.time(), "engines": self._asker.engines.used}
        write_whole(self._path, json.dumps(self._facts | now, indent=1, default=str))


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a run wrote, earliest first."""
    files = (folder / FOLDER).glob("*.json")
    found = []
    for path in files:
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; remove it") from error
    return sorted(found, key=lambda session: session["started"])


def wall_seconds(sessions: list[dict[str, Any]]) -> float:
    """Time during which any process was at work."""
    total, until = 0.0, 0.0
    for session in sorted(sessions, key=lambda session: session["started"]):
        total += max(0.0, session["ended"] - max(session["started"], until))
        until = max(until, session["ended"])
    return round(total, 1)
