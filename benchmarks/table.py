"""Results of `benchmarks.longcontext` side by side: ratios, a table, remarks over lengths and rows.

A result is a row of the JSON: system, length, batch, status and, where that is "ok", figures.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.columns import cells

Result = dict[str, Any]

COLUMNS = (
    ("system", "<9", "system"),
    ("tokens", ">8", "length"),
    ("rows", ">5", "batch"),
    ("1st token", ">10.3f", "first_token_seconds"),
    ("x full", ">7.2f", "prefill_speed_up"),
    ("x floor", ">8.2f", "prefill_over_floor"),
    ("prefill/s", ">10.0f", "prefill_tokens_per_second"),
    ("us/token", ">9.2f", "microseconds_per_prompt_token"),
    ("decode/s", ">9.1f", "decode_tokens_per_second"),
    ("steady/s", ">9.1f", "steady_tokens_per_second"),
    ("x full", ">7.2f", "decode_speed_up"),
    ("x floor", ">8.2f", "step_over_floor"),
    ("peak GiB", ">9.2f", "peak_gib"),
    ("units", ">8", "units"),
)
"""Heading, format and the figure's name."""
WHICH = 3  # columns that say what was run


def add_ratios(results: Sequence[Result]) -> None:
    """Add to each result its ratios to its floors and to `full` on the same prompts.

    Higher is faster for a speed-up; over a floor, 1 is the best there is.
    """
    done = [r for r in results if r["status"] == "ok"]
    full = {(r["length"], r["batch"]): r for r in done if r["system"] == "full"}
    for r in done:
        decode = r.get("decode_tokens_per_second")
        r["prefill_over_floor"] = r["first_token_seconds"] / r["prefill_floor_seconds"]
        if decode:
            r["step_over_floor"] = r["batch"] / decode / r["step_floor_seconds"]
        base = full.get((r["length"], r["batch"]))
        if base is None:
            continue
        r["prefill_speed_up"] = base["first_token_seconds"] / r["first_token_seconds"]
        if decode:
            r["decode_speed_up"] = decode / base["decode_tokens_per_second"]
        if r["peak_gib"]:
            r["peak_of_full"] = r["peak_gib"] / base["peak_gib"]


def line(result: Result) -> str:
    """A result in one line; one without figures says why there are none."""
    if result["status"] == "ok":
        return cells(result, COLUMNS)
    reason = str(result.get("wanted") or result.get("error") or "").partition("\n")[0]
    return f"{cells(result, COLUMNS[:WHICH])}  {result['status']}  {reason}".rstrip()


def remarks(results: Sequence[Result]) -> list[str]:
    """How each system grows from the shortest prompt to the longest, and from few rows to many."""
    done = [r for r in results if r["status"] == "ok"]
    return [*_over("length", "batch", done), *_over("batch", "length", done)]


def _over(axis: str, fixed: str, results: Sequence[Result]) -> list[str]:
    def key(result: Result) -> tuple[str, int]:
        return result["system"], result[fixed]

    lines = []
    for (system, value), group in groupby(sorted(results, key=key), key=key):
        rows = sorted(group, key=lambda r: r[axis])
        if len(rows) > 1:
            lines.append(f"{system}, {fixed} {value}: {_growth(axis, rows[0], rows[-1])}")
    return lines


def _growth(axis: str, low: Result, high: Result) -> str:
    names = {
        "time per prompt token": "microseconds_per_prompt_token",
        "decode tokens/s": "decode_tokens_per_second",
        "peak memory": "peak_gib",
    }
    ratios = [
        f"{said} x {high[name] / low[name]:.3f}"
        for said, name in names.items()
        if low.get(name) and high.get(name)
    ]
    return ", ".join([f"{axis} {low[axis]} -> {high[axis]}", *ratios])
