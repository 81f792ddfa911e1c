"""Quality against bytes: one panel a policy, one line a number of bits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret.evaluation.byte_grid import ByteSummary, summarize
from locret.evaluation.figures import plotting, save
from locret.evaluation.report_needle import wilson

COLORS = {16: "tab:gray", 8: "tab:blue", 4: "tab:red", 2: "tab:orange"}


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the figure of a record.

    Raises:
        ValueError: matplotlib is not installed, or the record holds no results of a budget.
    """
    return save(figure(record), path)


def figure(record: dict[str, Any]) -> Any:
    """The matplotlib figure of a record."""
    rows = summarize(record["results"])
    bounded = [row for row in rows if row.budget is not None]
    policies = list(dict.fromkeys(row.policy for row in bounded))
    if not policies:
        raise ValueError("the grid holds no results of a policy that evicts; run it first")
    made, axes = plotting().subplots(
        1,
        len(policies),
        figsize=(3.2 * len(policies) + 0.6, 3.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    kept = [row for row in rows if row.budget is None]
    for axis, policy in zip(axes.flat, policies, strict=True):
        _panel(axis, [row for row in bounded if row.policy == policy], kept)
        axis.set_title(policy, fontsize=10)
    axes[0, 0].set_ylabel("share of needles found")
    axes[0, 0].legend(fontsize=8)
    return made


def _panel(axis: Any, rows: Sequence[ByteSummary], kept: Sequence[ByteSummary]) -> None:
    for bits in sorted({row.bits for row in rows}, reverse=True):
        line = sorted((row for row in rows if row.bits == bits), key=lambda row: row.total_bytes)
        shares = [row.found / row.count for row in line]
        ranges = [wilson(row.found, row.count) for row in line]
        axis.errorbar(
            [row.total_bytes / 2**20 for row in line],
            shares,
            yerr=[
                [max(share - low, 0) for share, (low, _) in zip(shares, ranges, strict=True)],
                [max(high - share, 0) for share, (_, high) in zip(shares, ranges, strict=True)],
            ],
            label=f"{bits} bit",
            color=COLORS.get(bits),
            marker="o",
            capsize=2,
        )
    for row in kept:
        if row.bits == max(other.bits for other in kept):
            axis.axhline(row.found / row.count, color="black", linestyle=":", linewidth=1)
    axis.set_xscale("log")
    places = sorted({round(row.total_bytes / 2**20, 2) for row in rows if row.bits == 16})
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.set_xlabel("MiB of the context")
    axis.set_ylim(-0.02, 1.02)
