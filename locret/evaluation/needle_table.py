"""The table of `python -m locret needle`: what was found, and what the cache took for it."""

import textwrap
from collections.abc import Sequence

from locret.evaluation import local_needles
from locret.evaluation.needle import NeedleResult, NeedleSettings, PolicySummary, summarize

MIB = 2**20
WIDTH = 100
INDENT = 14


def as_table(settings: NeedleSettings, results: Sequence[NeedleResult]) -> str:
    """A plain-text table with a row a policy and ratio, and below it what its columns say."""
    summaries = summarize(results)
    full = next((row.found for row in summaries if row.policy == "full"), None)
    width = max(15, *(len(row.policy) + 1 for row in summaries))
    head = (
        f"{'policy':<{width}}{'asked':>5}{'real':>6}{'found':>8}{'of full':>9}"
        f"{'context kept':>15}{'MiB':>7}{'rest':>6}{'MiB':>7}{'cache MiB':>11}{'seconds':>9}"
    )
    rows = [_row(row, full, width) for row in summaries]
    terms = _legend(settings, with_full=full is not None)
    notes = local_needles.notes([vars(result) for result in results], settings.local_tokens)
    lines = [head, *rows, ""]
    lines += [_wrapped(f"{term:<{INDENT}}{text}", INDENT) for term, text in terms]
    return "\n".join([*lines, *(_wrapped(note, 2) for note in notes)])


def _wrapped(line: str, indent: int) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent)


def _row(row: PolicySummary, full: int | None, width: int) -> str:
    found = f"{row.found}/{row.count}" + (local_needles.MARK if row.local else "")
    of_full = "-" if full is None else f"{row.of_full}/{full}"
    kept = f"{row.context_units:,}/{row.context_tokens:,}"
    rest_bytes = row.bytes - row.context_bytes
    return (
        f"{row.policy:<{width}}{f'{row.ratio}x':>5}{f'{row.smaller:.1f}x':>6}{found:>8}{of_full:>9}"
        f"{kept:>15}{row.context_bytes / MIB:>7.1f}{row.rest_tokens:>6}{rest_bytes / MIB:>7.1f}"
        f"{row.bytes / MIB:>11.1f}{row.seconds:>9.1f}"
    )


def _legend(settings: NeedleSettings, with_full: bool) -> list[tuple[str, str]]:
    full = "cache MiB of policy full" if with_full else "MiB of the keys and values of all tokens"
    local = settings.local_tokens
    return [
        ("asked", "tokens of the prompt for every unit of the budget"),
        ("real", f"{full} / cache MiB of the row"),
        *([("of full", "found, of those that policy full finds")] if with_full else []),
        ("context kept", f"units in each KV head, of the tokens before the prompt's last {local}"),
        (
            "rest",
            f"tokens that no policy evicts: these last {local}, with the question, and the "
            "answer; their MiB include room for a longer answer",
        ),
    ]
