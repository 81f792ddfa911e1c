"""Needles in haystacks over a grid of lengths and depths, under several policies.

    python -m locret needle --grid --lengths 1K,2K,4K --depths 10 --policies full,locret ...

The budget of each length is that length divided by the ratio. Every answer is stored as it comes,
so that a run that was killed goes on where it was. One seed asks the same at every length.
"""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from locret.evaluation import local_needles, needle
from locret.evaluation.needle import NeedleSettings
from locret.evaluation.provenance import environment, source
from locret.heads.heads import RetainingHeads
from locret.model.loading import LoadedModel
from locret.system.files import write_whole
from locret.tasks.synthetic import SyntheticSample

KIND = "needle_grid"
"""What the JSON calls itself."""

PROTOCOL = "query-agnostic"
"""The question is read after the context was compressed."""

Cell = dict[str, Any]
"""A `needle.NeedleResult` as a dict, with `length` (tokens asked for), `row` (0 = shallowest) and
`error`: None, or why there is no answer (`found` is then None too)."""

Progress = Callable[[int, int], None]

ASKED = "Asked: tokens of the prompt for every unit of the budget."
REAL = (
    "Real: MiB of the whole cache under policy full / under that of the row; the prompt's last "
    "{local} tokens and the answer, which no policy evicts, are part of both."
)
"""What the columns of tables say."""


@dataclass(frozen=True)
class GridSettings:
    """What is asked.

    Attributes:
        lengths: tokens of the prompts' text, ascending.
        depths: rows of the grid; a needle of row r stands in the r-th part of the haystack.
        samples_per_cell: of each task; they are spread over the row's part of the haystack.
        needle: all other settings; its `tokens` and `count` are not used.
    """

    lengths: tuple[int, ...]
    depths: int = 10
    samples_per_cell: int = 1
    needle: NeedleSettings = NeedleSettings()

    def __post_init__(self) -> None:
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths are {self.lengths}; expected different ones, ascending")
        for name in ("depths", "samples_per_cell"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    def of_length(self, length: int) -> NeedleSettings:
        """The settings of one column."""
        count = self.depths * self.samples_per_cell
        return replace(self.needle, tokens=length, count=count)


def run_grid(
    loaded: LoadedModel,
    policies: Sequence[str],
    settings: GridSettings,
    out: Path,
    heads: RetainingHeads | None = None,
    manifest: dict[str, Any] | None = None,
    progress: Progress | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Ask what `out` does not hold yet; it is written anew after every batch.

    Args:
        out: a JSON file; one that exists must be of the same settings and manifest. Policies may be
            added to it.
        manifest: what else the answers depend on (`manifest_of`).
        progress: called at the start and after every batch with the answers there are and those
            there will be.
        batch_size: samples of one length and run that are asked together.

    Returns:
        What `out` holds: `kind`, `settings`, `manifest`, `environment` (of the latest run),
        `results` (a list of `Cell`).

    Raises:
        ValueError: an unknown policy or task, heads are missing, or `out` holds something else.
    """
    record = {
        "kind": KIND,
        "settings": json.loads(json.dumps(asdict(settings))),
        "manifest": manifest or {},
        "environment": environment(loaded.model.device),
        "results": [],
    }
    results: list[Cell] = _earlier_results(out, record) if out.exists() else []
    record["results"] = results
    done = {_key(cell) for cell in results}
    total = len(needle.runs(policies, settings.needle.ratios)) * _samples_a_run(settings)
    if progress is not None:
        progress(min(len(results), total), total)
    for cells in _ask_all(loaded, policies, settings, heads, done, batch_size):
        results.extend(cells)
        write_whole(out, json.dumps(record, indent=1) + "\n")
        if progress is not None:
            progress(min(len(results), total), total)
    return record


def manifest_of(loaded: LoadedModel, heads: str | None) -> dict[str, Any]:
    """What the answers depend on beside the settings: model, adapter and heads, by name and, so
    that others under the same name are told apart, by content."""
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "adapter": loaded.adapter,
        "heads": heads,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "attention": loaded.model.config._attn_implementation,
        "protocol": PROTOCOL,
        "sources": {"adapter": source(loaded.adapter), "heads": source(heads)},
    }


def _samples_a_run(settings: GridSettings) -> int:
    tasks = len(settings.needle.tasks)
    return len(settings.lengths) * settings.depths * settings.samples_per_cell * tasks


def _ask_all(
    loaded: LoadedModel,
    policies: Sequence[str],
    settings: GridSettings,
    heads: RetainingHeads | None,
    done: set[tuple[Any, ...]],
    batch_size: int,
) -> Iterator[list[Cell]]:
    for length in settings.lengths:
        column = settings.of_length(length)
        samples = needle.make_samples(column, loaded.tokenizer)
        rows = [place % column.count // settings.samples_per_cell for place in range(len(samples))]
        for run in needle.runs(policies, column.ratios):
            engine = needle.make_engine(loaded, run, column, heads)
            left = [
                (seed, sample, row)
                for (seed, sample), row in zip(samples, rows, strict=True)
                if (*run, length, sample.task, seed) not in done
            ]
            for start in range(0, len(left), batch_size):
                batch = left[start : start + batch_size]
                asked = [(seed, sample) for seed, sample, _ in batch]
                cells = _ask(loaded, run, engine, asked, column)
                yield [cell | {"row": row} for cell, (*_, row) in zip(cells, batch, strict=True)]


def _ask(
    loaded: LoadedModel,
    run: tuple[str, int],
    engine: Any,
    samples: Sequence[tuple[int, SyntheticSample]],
    settings: NeedleSettings,
) -> list[Cell]:
    """Answers, by halves of the batch if it does not fit into memory."""
    try:
        results = needle.ask(loaded, run, engine, samples, settings)
        return [asdict(result) | {"length": settings.tokens, "error": None} for result in results]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    if len(samples) > 1:
        half = len(samples) // 2
        parts = samples[:half], samples[half:]
        return [cell for part in parts for cell in _ask(loaded, run, engine, part, settings)]
    (seed, sample), (policy, ratio) = samples[0], run
    nothing = {"policy": policy, "ratio": ratio, "task": sample.task, "seed": seed, "found": None}
    local = needle.needle_is_local(sample, loaded.tokenizer, settings)
    place = {"depth": sample.depth, "length": settings.tokens, local_needles.FIELD: local}
    return [nothing | place | {"error": "out of memory"}]


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("policy", "ratio", "length", "task", "seed"))


def _earlier_results(out: Path, record: dict[str, Any]) -> list[Cell]:
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
        different = [n for n in ("kind", "settings") if earlier.get(n) != record[n]]
        then, now = _with_sources(earlier.get("manifest")), _with_sources(record["manifest"])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{out} is there but holds no needle grid: {error}") from error
    if then != now:
        if not different:
            _check_sources(out, then, now)
        different.append("manifest")
    if different:
        raise ValueError(
            f"{out} holds answers of other {' and '.join(different)}; go on with those it was "
            "begun with, or write to another file"
        )
    return earlier["results"]


def _with_sources(manifest: dict[str, Any] | None) -> dict[str, Any]:
    """A manifest of a time when contents were not recorded: they are known where there are none."""
    named = manifest or {}
    nothing = not (named.get("adapter") or named.get("heads"))
    return ({"sources": {"adapter": None, "heads": None}} if nothing else {}) | named


def _check_sources(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Say it where only the contents of adapter and heads differ, or are not known.

    Raises:
        ValueError: nothing else differs.
    """
    if {**then, "sources": None} != {**now, "sources": None}:
        return
    why = "holds answers of an adapter or heads that have changed since, under the same name"
    if "sources" not in then:
        why = "does not say which contents its adapter and heads had, only their names"
    raise ValueError(f"{out} {why}; write to another file")


def shares(results: Sequence[Cell], policy: str, ratio: int) -> dict[tuple[int, int], float | None]:
    """Share found by (length, row) under one run; None where no sample got an answer."""
    cells: dict[tuple[int, int], list[bool]] = {}
    for cell in results:
        if (cell["policy"], cell["ratio"]) == (policy, ratio):
            found = cells.setdefault((cell["length"], cell["row"]), [])
            if cell["found"] is not None:
                found.append(cell["found"])
    return {place: sum(found) / len(found) if found else None for place, found in cells.items()}


def runs_of(results: Sequence[Cell]) -> list[tuple[str, int]]:
    """Policies and ratios in the results, in order."""
    return list(dict.fromkeys((cell["policy"], cell["ratio"]) for cell in results))


def local_tokens_of(record: Mapping[str, Any]) -> int:
    """Last tokens of the prompts that are never evicted."""
    return record["settings"].get("needle", {}).get("local_tokens", NeedleSettings.local_tokens)


def places_with_local_needles(results: Sequence[Cell]) -> set[tuple[int, int]]:
    """(length, row) of the samples whose needles no policy can evict."""
    return {(c["length"], c["row"]) for c in results if c.get(local_needles.FIELD)}


def times_smaller(results: Sequence[Cell], policy: str, ratio: int) -> dict[int, float]:
    """Bytes of the full cache for one byte of a run's, by length, where both are known."""
    full, own = _bytes_by_length(results, "full", 1), _bytes_by_length(results, policy, ratio)
    return {length: full[length] / own[length] for length in own if length in full}


def _bytes_by_length(results: Sequence[Cell], policy: str, ratio: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for cell in results:
        if (cell["policy"], cell["ratio"]) == (policy, ratio) and cell.get("bytes"):
            found[cell["length"]] = max(found.get(cell["length"], 0), cell["bytes"])
    return found


def as_table(record: dict[str, Any]) -> str:
    """The share found at each length, a line a run, then the size of the whole cache; - where
    nothing ran."""
    lengths, results = record["settings"]["lengths"], record["results"]
    places = places_with_local_needles(results)
    marks = {n: local_needles.MARK for n in lengths if any(n == of for of, _ in places)}
    runs = runs_of(results)
    found = {
        run: {n: f"{v:.2f}{marks.get(n, '')}" for n, v in _found_by_length(record, *run).items()}
        for run in runs
    }
    smaller = {
        run: {n: f"{v:.1f}x" for n, v in times_smaller(results, *run).items()} for run in runs
    }
    local = local_tokens_of(record)
    tables, said = [_table("share found", lengths, found)], [ASKED]
    if any(smaller.values()):
        tables.append(_table("real", lengths, smaller))
        said.append(REAL.format(local=local))
    said += local_needles.notes(results, local)
    return "\n\n".join([*tables, "\n".join(textwrap.fill(line, 100) for line in said)])


def _found_by_length(record: Mapping[str, Any], policy: str, ratio: int) -> dict[int, float]:
    """Mean over the depths that got answers."""
    found = shares(record["results"], policy, ratio)
    columns = {
        length: [v for (of, _), v in found.items() if of == length and v is not None]
        for length in record["settings"]["lengths"]
    }
    return {length: sum(column) / len(column) for length, column in columns.items() if column}


def _table(
    title: str, lengths: Sequence[int], rows: Mapping[tuple[str, int], Mapping[int, str]]
) -> str:
    lines = [f"{title:<20}{'asked':>6}" + "".join(f"{length:>9,}" for length in lengths)]
    for (policy, ratio), values in rows.items():
        cells = "".join(f"{values.get(length, '-'):>9}" for length in lengths)
        lines.append(f"{policy:<20}{f'{ratio}x':>6}{cells}")
    return "\n".join(lines)
