"""One report of many results: tables and figures in Markdown, and in one HTML file.

    python -m locret report results/*.json --out report/

Read are the JSON files of `python -m locret evaluate` (which `needle` and `grid` write too) and of
`benchmarks/`. Written are `report.md` with its pictures in
`figures/`, and `report.html`, which needs no other file.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.evaluation import figures, report_benchmark, report_evaluation
from locret.evaluation.report_blocks import Block, Figure, Heading, Paragraph, as_html, as_markdown
from locret.evaluation.results import FORMAT, KIND

MARKDOWN, PAGE, FIGURES = "report.md", "report.html", "figures"

Made = Iterator[tuple[str, str, Any]]


def _no_figures(result: Mapping[str, Any]) -> Made:
    return iter(())


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        title: of its part of the report.
        is_it: whether a JSON object is one, by its names.
        blocks: its text and tables.
        figures: name, caption and matplotlib figure of each of its pictures.
    """

    title: str
    is_it: Callable[[Mapping[str, Any]], bool]
    blocks: Callable[[Any], Iterator[Block]]
    figures: Callable[[Any], Made] = _no_figures


KINDS = (
    Kind(
        "Benchmarks of quality",
        lambda found: (found.get("kind"), found.get("format")) == (KIND, FORMAT),
        report_evaluation.blocks,
        figures.figures,
    ),
    Kind(
        "Speed and memory",
        lambda found: {"settings", "figures", "hardware", "versions"} <= found.keys(),
        report_benchmark.blocks,
        report_benchmark.figures,
    ),
)
"""The kinds of results, in the order of the report."""


@dataclass(frozen=True)
class Source:
    """A file of results and what it holds."""

    path: Path
    kind: Kind
    content: Mapping[str, Any]


def make_report(paths: Sequence[str | Path], out: str | Path, title: str = "Results") -> Path:
    """Write the report into the folder `out`; nothing is written if a file is not as it should be.

    Returns:
        The HTML file.

    Raises:
        ValueError: no files, one that is no known result, or matplotlib is missing; says which.
    """
    if not paths:
        raise ValueError("no files of results were given")
    sources = [read_source(Path(path)) for path in paths]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = Path(aside)
        blocks = [Heading(1, title), *_all_blocks(sources, folder)]
        (folder / MARKDOWN).write_text(as_markdown(blocks), encoding="utf-8")
        (folder / PAGE).write_text(as_html(blocks, folder), encoding="utf-8")
        _move(folder, out)
    return out / PAGE


def read_source(path: Path) -> Source:
    """Read a file of results.

    Raises:
        ValueError: it cannot be read, or is no result that is known.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    kind = next((k for k in KINDS if isinstance(content, dict) and k.is_it(content)), None)
    if kind is None:
        raise ValueError(
            f"{path} holds no result that is known here; expected the JSON of `locret evaluate`, "
            f"`locret needle` or `locret grid` (format {FORMAT}), or of one of benchmarks/"
        )
    return Source(path, kind, content)


def _all_blocks(sources: Sequence[Source], folder: Path) -> Iterator[Block]:
    for kind in KINDS:
        of_kind = [source for source in sources if source.kind is kind]
        if of_kind:
            yield Heading(2, kind.title)
        for source in of_kind:
            yield from _source_blocks(source, folder, sources.index(source))


def _source_blocks(source: Source, folder: Path, number: int) -> Iterator[Block]:
    yield Heading(3, source.content.get("name") or source.path.stem)
    try:
        yield from list(source.kind.blocks(source.content))
        for name, caption, figure in source.kind.figures(source.content):
            file = Path(FIGURES) / f"{number:02d}-{source.path.stem}-{name}.png"
            figures.save(figure, folder / file)
            yield Figure(file, caption)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source.path} looks like a result of '{source.kind.title}', but is not whole ({what})"
        ) from error
    yield Paragraph(f"From {source.path.name}.")


def _move(made: Path, out: Path) -> None:
    """Put the files of a finished report into its folder, those of the last one replaced."""
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        target = out / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
