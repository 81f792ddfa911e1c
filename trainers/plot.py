"""The picture of a run: losses by step and, for heads, how well each layer picks what matters."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw(path: Path, history: Mapping[str, Sequence[float]], layers: Sequence[float]) -> None:
    """Write a PNG.

    Args:
        path: where to.
        history: `step`, and the values of each metric at these steps.
        layers: the overlap of each layer at the end; empty = no such panel.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    from matplotlib import pyplot

    metrics = [name for name in history if name != "step"]
    panels = len(metrics) + bool(layers)
    figure, axes = pyplot.subplots(1, panels, figsize=(4 * panels, 3), squeeze=False)
    for axis, name in zip(axes[0], metrics, strict=False):
        axis.plot(history["step"], history[name], linewidth=0.8, alpha=0.4)
        axis.plot(history["step"], _smooth(history[name]), linewidth=1.5)
        axis.set(title=name, xlabel="step")
    if layers:
        axes[0][-1].bar(range(len(layers)), layers)
        axes[0][-1].set(title="top-10% overlap at the end", xlabel="layer", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else weight * smooth[-1] + (1 - weight) * value)
    return smooth
