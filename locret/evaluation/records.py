"""What a run leaves on disk as it goes, and where its figures come from.

Predictions are one JSON line each, appended as they come, so that a killed run goes on. Every
process of a run appends to a file of its own; all of them read all files. A line is taken for a
sample only if it was made under the same settings for the same prompt. Beside them every process
writes a session: commit, hardware, versions, and how long it was at work. The manifest of a result
is made of both.
"""

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from locret.engine.arguments import end_tokens
from locret.evaluation.questions import Prepared, Question
from locret.model.loading import LoadedModel
from locret.model.weights import PACKAGES as WEIGHTS_PACKAGES
from locret.system.files import append_json, write_whole

FOLDER = "predictions"
OUT_OF_MEMORY = "memory"
"""Why there is no answer."""


COUNTS = ("new_tokens", "prompt_tokens", "compressed_tokens", "bytes", "full_bytes", "bytes_after")


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        settings: recognises everything that the answer depends on but the sample.
        prompt: recognises the prompt's tokens.
        setup, task, sample: whose answer it is.
        answer: the text, before any stop string.
        end: why it ended: "eos", "stop" or "length"; "memory": there is no answer, since the sample
            alone did not fit into the device's memory.
        new_tokens: of the answer.
        prompt_tokens, compressed_tokens: of the prompt, and of its part that was compressed.
        cut: tokens taken out of the context to fit; answer_cut: an answer among them.
        budget: units a KV head may keep; None = all.
        units: that a head holds on average after the context was compressed, [mean, largest] over
            layers; head_units: of the head that holds [fewest, most], None where all heads of a
            layer hold equally many.
        bytes: of the cache then; room_bytes: of them, room for an answer; full_bytes: of the keys
            and values of a full cache.
        bytes_after: of the cache after the answer, room for more of it included.
        seconds: a share of the batch's time.
    """

    settings: str
    prompt: str
    setup: str
    task: str
    sample: str
    answer: str
    end: str
    new_tokens: int
    prompt_tokens: int
    compressed_tokens: int
    cut: int
    answer_cut: bool
    budget: int | None
    units: tuple[float, int]
    bytes: int
    full_bytes: int
    bytes_after: int
    seconds: float
    room_bytes: int = 0
    head_units: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What a sample's answer is found by."""
        return self.settings, self.sample, self.prompt


class Records:
    """The predictions under a run's folder; `writer` names the file that this process appends
    to."""

    def __init__(self, folder: Path, writer: str = "0") -> None:
        self.folder = folder / FOLDER
        self.path = self.folder / f"{writer}.jsonl"

    def read(self) -> dict[tuple[str, str, str], Record]:
        """All predictions, by `Record.key`. Lines that were not written to their end are left."""
        files = sorted(self.folder.glob("*.jsonl"))
        return {record.key: record for path in files for record in _records(path)}

    def append(self, records: Iterable[Record]) -> None:
        """Add predictions in one write."""
        append_json(self.path, map(asdict, records))


def _records(path: Path) -> Iterator[Record]:
    for line in path.read_bytes().split(b"\n"):
        try:
            values: Any = json.loads(line)
            pairs = {name: values[name] for name in ("units", "head_units") if values.get(name)}
            record = Record(**values | {name: tuple(pair) for name, pair in pairs.items()})
        except (ValueError, TypeError, AttributeError):
            continue  # unfinished, or of another version: the sample is asked again
        if all(isinstance(getattr(record, name), int) for name in COUNTS):
            yield record


# ---- commit, hardware and versions ---------------------------------------------------------------

PACKAGES = ("locret", "torch", "transformers", "tokenizers", "peft", "lm_eval", "triton")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _packages_of(loaded: LoadedModel) -> Sequence[str]:
    """`PACKAGES`, and the one that stores the weights in fewer bits, if any."""
    stored = loaded.quantization
    return PACKAGES if stored is None else (*PACKAGES, WEIGHTS_PACKAGES[stored])


def hardware(device: torch.device) -> dict[str, Any]:
    """The device, and the processor beside it."""
    found: dict[str, Any] = {
        "device": str(device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {
            "accelerator": torch.cuda.get_device_name(device),
            "accelerator_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30),
        }
    return found


def commit() -> str | None:
    """The commit of this source tree, marked if files differ from it; None where none is known."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is None:  # installed; a repository around the environment is another one
        return None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head} with changes" if changed else head


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- sessions and the manifest -------------------------------------------------------------------

SHOWN = 700  # characters of a prompt's beginning and end
OF_ONE_PROCESS = ("rank", "world", "started", "ended", "engines")
SESSIONS = "sessions"


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

    def __init__(
        self, folder: Path, rank: int, world: int, loaded: LoadedModel, engines: dict[str, Any]
    ) -> None:
        started = time.time()
        self._path = folder / SESSIONS / f"{started:.3f}-{rank}.json"
        model: Any = loaded.model
        self._facts = {
            "rank": rank,
            "world": world,
            "started": started,
            "model_revision": loaded.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            **({} if loaded.quantization is None else {"weights": loaded.quantization}),
            "attention": model.config._attn_implementation,
            "parameters": model.num_parameters(),  # those that packed bytes stand for
            "generation_config": model.generation_config.to_diff_dict(),
            "end_tokens": end_tokens(model, loaded.tokenizer),
            "hardware": hardware(model.device),
            "versions": versions(_packages_of(loaded)),
            "commit": commit(),
        }
        self._engines = engines
        self.beat()

    def beat(self) -> None:
        """Still at work."""
        now = {"ended": time.time(), "engines": self._engines}
        write_whole(self._path, json.dumps(self._facts | now, indent=1, default=str))


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a run wrote, earliest first."""
    files = (folder / SESSIONS).glob("*.json")
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
