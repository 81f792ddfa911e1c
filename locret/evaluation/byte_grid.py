"""Quality against bytes: policies, budgets and bits, at equal bytes, on synthetic retrieval.

    python -m locret grid --model embedded:smollm2 --policies snapkv,keydiff --bits 16,8,4 ...

A ratio says how many units 16-bit keys and values get, prompt tokens for every unit. Fewer bits get
as many units more as fit into the same bytes (`locret.cache.sizing`: codes, scales, scores and
source positions counted). Every answer is stored as it comes; a run that was stopped goes on.
Several processes take the samples in turn, each with a file of its own.
"""

import json
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from locret.cache.sizing import Sizing
from locret.engine.engine import Engine
from locret.evaluation import local_needles, needle
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.padding import padded
from locret.evaluation.provenance import environment
from locret.evaluation.ranks import Ranks
from locret.heads.heads import RetainingHeads
from locret.model.backbone import Backbone
from locret.model.loading import LoadedModel
from locret.policies import POLICIES
from locret.quantization import NO_SCHEME, Scheme, scheme_of
from locret.system.files import write_whole
from locret.tasks.synthetic import SyntheticSample

KIND = "byte_grid"
"""What the JSON calls itself."""

HALF = 2  # bytes of a number in 16 bits
Cell = dict[str, Any]
Progress = Callable[[int, int], None]


class ByteRun(NamedTuple):
    """One way to hold a cache: `ratio` prompt tokens a unit in 16 bits, or as many bytes in `bits`
    a number; ratio 1 = all is kept."""

    policy: str
    ratio: int
    bits: int


@dataclass(frozen=True)
class ByteGridSettings:
    """What is asked.

    Attributes:
        needle: tasks, prompts and ratios.
        bits: of keys and values; 16 = as they are.
        quantization: the scheme of those below 16.
        group, residual: its options. The residual is small beside the smallest budgets by default:
            what it holds in full is missing for units.
        query_aware: policies see the prompt's local tokens, with the question, before they evict.
    """

    needle: NeedleSettings
    bits: tuple[int, ...] = (16, 8, 4)
    quantization: str = "kivi"
    group: int = 64
    residual: int = 0
    query_aware: bool = False

    def __post_init__(self) -> None:
        for bits in self.bits:
            self.scheme(bits)

    def scheme(self, bits: int) -> Scheme:
        """
        Raises:
            ValueError: the scheme does not have such bits.
        """
        if bits == NO_SCHEME.bits:
            return NO_SCHEME
        options = {"bits": bits, "group": self.group, "residual": self.residual}
        return scheme_of({"name": self.quantization} | options)


def runs(policies: Sequence[str], settings: ByteGridSettings) -> list[ByteRun]:
    """Policies, ratios and bits to run; a policy that keeps all has ratio 1."""
    return [
        ByteRun(policy, ratio, bits)
        for policy, ratio in needle.runs(policies, settings.needle.ratios)
        for bits in settings.bits
    ]


def budget_of(run: ByteRun, settings: ByteGridSettings, geometry: Any) -> int:
    """Units a KV head keeps on average."""
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_size, HALF)
    plain = settings.needle.tokens // run.ratio
    allowed = Sizing(NO_SCHEME, *shape).cache_bytes([plain] * geometry.num_layers)
    sizing = Sizing(settings.scheme(run.bits), *shape)
    return max(1, sizing.units_within(allowed, settings.needle.tokens))


def run_byte_grid(
    loaded: LoadedModel,
    policies: Sequence[str],
    settings: ByteGridSettings,
    out: Path,
    heads: RetainingHeads | None = None,
    manifest: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    minutes: float | None = None,
    progress: Progress | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Ask what `out` does not hold yet, batch after batch of samples under every run.

    Args:
        out: a JSON file; one that exists must be of the same settings and manifest.
        manifest: what else the answers depend on.
        ranks: of several processes, this one asks every `world`-th sample.
        minutes: ask no more after that time.
        progress: called at the start and after every batch with the answers there are and those
            there will be.
        batch_size: samples that are asked together.

    Returns:
        What `out` holds: `kind`, `settings`, `manifest`, `environment`, `results`.

    Raises:
        ValueError: an unknown policy or task, heads are missing, or `out` holds something else.
    """
    started = time.monotonic()
    record = new_record(settings, manifest or {}, loaded.model.device)
    if out.exists():
        record["results"] = read(out, record)["results"]
    results: list[Cell] = record["results"]
    done = {_key(cell) for cell in results}
    samples = _samples(loaded, settings, ranks or Ranks())
    all_runs = runs(policies, settings)
    if progress is not None:
        progress(len(results), len(samples) * len(all_runs))
    engine_of = lru_cache(maxsize=None)(lambda run: make_engine(loaded, run, settings, heads))
    for start in range(0, len(samples), batch_size):
        for run in all_runs:
            batch = [
                asked
                for asked in samples[start : start + batch_size]
                if (*run, asked.sample.task, asked.seed) not in done
            ]
            if not batch:
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return record
            results.extend(_ask(loaded, run, engine_of(run), batch, settings))
            write_whole(out, json.dumps(record, indent=1) + "\n")
            if progress is not None:
                progress(len(results), len(samples) * len(all_runs))
    return record


def new_record(
    settings: ByteGridSettings, manifest: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """A record without results."""
    return {
        "kind": KIND,
        "settings": json.loads(json.dumps(asdict(settings))),
        "manifest": manifest,
        "environment": environment(device),
        "results": [],
    }


def read(path: Path, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record in a file.

    Raises:
        ValueError: the file holds none, or not one of the same settings and manifest as `like`.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        other = found["kind"] != KIND
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no byte grid: {error}") from error
    names = [n for n in ("settings", "manifest") if like and found.get(n) != like.get(n)]
    if other or names:
        raise ValueError(
            f"{path} holds answers of other {' and '.join(names) or 'kinds'}; go on with those it "
            "was begun with, or write to another file"
        )
    return found


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on in a file of other settings, before a model is loaded.

    Raises:
        ValueError: the file holds no grid, or one of other settings.
    """
    read(path, {"settings": settings, "manifest": read(path).get("manifest")})


def merge(parts: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the answers of several files, of the same settings and manifest, to one.

    Raises:
        ValueError: a file holds something else.
    """
    if not parts:
        raise ValueError("there are no files of answers to merge")
    record = read(parts[0])
    cells: dict[tuple[Any, ...], Cell] = {}
    for part in parts:
        cells |= {_key(cell): cell for cell in read(part, record)["results"]}
    record["results"] = [cells[key] for key in sorted(cells)]
    write_whole(out, json.dumps(record, indent=1) + "\n")
    return record


def make_engine(
    loaded: LoadedModel, run: ByteRun, settings: ByteGridSettings, heads: RetainingHeads | None
) -> Engine:
    """The engine of one run."""
    return Engine(
        loaded.model,
        run.policy,
        heads=heads,
        budget=budget_of(run, settings, Backbone(loaded.model).geometry),
        chunk_size=settings.needle.chunk_size,
        local_tokens=settings.needle.local_tokens,
        quantization=settings.scheme(run.bits),
        query_aware=settings.query_aware and POLICIES[run.policy].evicts,
    )


class Asked(NamedTuple):
    """A sample, its seed, its prompt's tokens, and whether no policy can evict its needle."""

    seed: int
    sample: SyntheticSample
    ids: list[int]
    needle_is_local: bool


def _samples(loaded: LoadedModel, settings: ByteGridSettings, ranks: Ranks) -> list[Asked]:
    """Those of a process. Samples of different tasks alternate, so that a run that is stopped has
    some of each."""
    asked, tokenizer = settings.needle, loaded.tokenizer
    samples = needle.make_samples(asked, tokenizer)
    by_place = [samples[i :: asked.count] for i in range(asked.count)]
    mixed = [sample for of_tasks in by_place for sample in of_tasks]
    return [
        Asked(
            seed,
            sample,
            needle.needle_prompt(sample, tokenizer, asked.answer_prefix)[0].tolist(),
            needle.needle_is_local(sample, tokenizer, asked),
        )
        for seed, sample in mixed[ranks.rank :: ranks.world]
    ]


def _ask(
    loaded: LoadedModel,
    run: ByteRun,
    engine: Engine,
    batch: Sequence[Asked],
    settings: ByteGridSettings,
) -> list[Cell]:
    local, rows, device = settings.needle.local_tokens, len(batch), loaded.model.device
    started = time.perf_counter()
    question = torch.tensor([asked.ids[-local:] for asked in batch], device=device)
    cache = engine.prefill(
        *padded([asked.ids[:-local] for asked in batch], device),
        query_ids=question if engine.config.reading.query_aware else None,
    )
    held = cache.report()
    limit = settings.needle.max_new_tokens
    mask = torch.ones_like(question)
    output = engine.generate(question, mask, cache=cache, max_new_tokens=limit, do_sample=False)
    answers = loaded.tokenizer.batch_decode(output[:, local:], skip_special_tokens=True)
    seconds = (time.perf_counter() - started) / rows
    return [
        {
            **run._asdict(),
            "task": sample.task,
            "seed": seed,
            "depth": sample.depth,
            "found": sample.score(answer) == 1.0,
            "answer": answer,
            "expected": list(sample.expected),
            "budget": engine.config.reading.budget,
            "units": held["units"],
            "kv_bytes": held["kv_bytes"] // rows,
            "total_bytes": held["total_bytes"] // rows,
            "full_bytes": held["full_cache_bytes"] // rows,
            "prompt_tokens": len(ids),
            "seconds": seconds,
            local_needles.FIELD: is_local,
        }
        for (seed, sample, ids, is_local), answer in zip(batch, answers, strict=True)
    ]


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in (*ByteRun._fields, "task", "seed"))


@dataclass(frozen=True)
class ByteSummary:
    """A run over all its samples: share found, `budget` and mean bytes after the context.

    `local`: samples whose needles no policy can evict (`locret.evaluation.local_needles`).
    """

    policy: str
    ratio: int
    bits: int
    found: int
    count: int
    budget: int | None
    kv_bytes: float
    total_bytes: float
    by_task: dict[str, float]
    local: int = 0


def summarize(results: Sequence[Cell]) -> list[ByteSummary]:
    """One row a run, policies as they came, bytes descending."""
    by_run: dict[ByteRun, list[Cell]] = {}
    for cell in results:
        by_run.setdefault(ByteRun(*(cell[name] for name in ByteRun._fields)), []).append(cell)
    return [_summary(run, cells) for run, cells in sorted(by_run.items(), key=_order)]


def _order(item: tuple[ByteRun, Any]) -> tuple[Any, ...]:
    run = item[0]
    return POLICIES[run.policy].evicts, run.policy, run.ratio, -run.bits


def _summary(run: ByteRun, cells: Sequence[Cell]) -> ByteSummary:
    tasks = sorted({cell["task"] for cell in cells})
    of_task = {task: [cell["found"] for cell in cells if cell["task"] == task] for task in tasks}
    return ByteSummary(
        *run,
        found=sum(cell["found"] for cell in cells),
        count=len(cells),
        budget=cells[0]["budget"],
        kv_bytes=sum(cell["kv_bytes"] for cell in cells) / len(cells),
        total_bytes=sum(cell["total_bytes"] for cell in cells) / len(cells),
        by_task={task: sum(found) / len(found) for task, found in of_task.items()},
        local=sum(bool(cell.get(local_needles.FIELD)) for cell in cells),
    )


def times_smaller(row: ByteSummary, rows: Sequence[ByteSummary]) -> str:
    """How many times smaller the context is than the full cache in the most bits; - without it."""
    whole = [other for other in rows if other.budget is None]
    if not whole:
        return "-"
    full = max(whole, key=lambda other: other.bits)
    return f"{full.total_bytes / row.total_bytes:.1f}x"


def as_table(record: dict[str, Any]) -> str:
    """A plain-text table of the runs, and what its columns say."""
    rows = summarize(record["results"])
    head = f"{'policy':<20}{'asked':>6}{'bits':>6}{'budget':>8}{'KiB':>10}{'real':>7}{'found':>10}"
    lines = [head, *(_table_line(row, rows) for row in rows), ""]
    return "\n".join([*lines, *(textwrap.fill(note, 100) for note in notes(record))])


def _table_line(row: ByteSummary, rows: Sequence[ByteSummary]) -> str:
    budget = "all" if row.budget is None else row.budget
    found = f"{row.found}/{row.count}" + (local_needles.MARK if row.local else "")
    return (
        f"{row.policy:<20}{f'{row.ratio}x':>6}{row.bits:>6}{budget:>8}"
        f"{row.total_bytes / 1024:>10,.0f}{times_smaller(row, rows):>7}{found:>10}"
    )


def notes(record: Mapping[str, Any]) -> list[str]:
    """What is to be said beside a grid's figures: what is counted, whether bytes are equal at all,
    and which samples no policy can lose."""
    local = record["settings"]["needle"].get("local_tokens", NeedleSettings.local_tokens)
    said = [
        "Asked: tokens of the prompt for every unit in 16 bits; fewer bits get as many units as "
        "fit into the same bytes. Bytes are those of the compressed context; the prompt's last "
        f"{local} tokens, with the question, and the answer come on top, whole under every policy. "
        "Real: bytes of the context under policy full in the most bits / those of the row."
    ]
    if record["manifest"].get("dtype") == "float32":
        said.append(
            "The model computes in float32: what is not quantized takes twice the bytes of the 16 "
            "bits that budgets are reckoned in. With --dtype bfloat16 bytes are equal."
        )
    return said + local_needles.notes(record["results"], local)
