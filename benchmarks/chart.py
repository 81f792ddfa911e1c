"""A picture of `benchmarks.longcontext` over the lengths of the prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = {
    "seconds to the first token": ("first_token_seconds", "prefill_floor_seconds"),
    "decode tokens/s": ("decode_tokens_per_second", None),
    "peak memory, GiB": ("peak_gib", None),
}


def draw(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """One panel a figure, one line a system and number of rows; floors are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ok = [r for r in results if r["status"] == "ok"]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4.5 * len(PANELS), 3.6))
    for axis, (label, (name, floor)) in zip(axes, PANELS.items(), strict=True):
        for system, rows in sorted({(r["system"], r["batch"]) for r in ok}):
            line = [r for r in ok if (r["system"], r["batch"]) == (system, rows) and r.get(name)]
            line.sort(key=lambda r: r["length"])
            lengths = [r["length"] / 1024 for r in line]
            said = f"{system} x {rows}" if rows > 1 else system
            (drawn,) = axis.plot(lengths, [r[name] for r in line], marker="o", label=said)
            if floor:
                values = [r[floor] for r in line]
                axis.plot(lengths, values, "--", color=drawn.get_color(), linewidth=1)
        axis.set(xlabel="prompt, K tokens", title=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"wrote {path.resolve()}")
