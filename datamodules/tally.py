"""What became of the data: counts that batches bring along, added up by source."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from datamodules.batches import SampleInfo


class Tally:
    """Counts by source, of the batches that were added.

    Attributes:
        counts: for each source, how often each of the `count_sample` names occurred.
        skipped: for each source, place and reason of each skipped conversation, by its index. One
            that was met again, in a later epoch or by another worker, counts once.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.skipped: dict[str, dict[int, tuple[str, str]]] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch of `datamodules.batches.collate`."""
        for info in batch["samples"]:
            self.counts.setdefault(info.source, Counter()).update(count_sample(info))
        for where, reason, source, number in batch["skipped"]:
            self.skipped.setdefault(source, {})[number] = (where, reason)

    def report(self, source: str) -> dict[str, Any]:
        """The counts of a source, and under "skipped" {reason: {"count", "first"}}."""
        skipped: dict[str, dict[str, Any]] = {}
        for _, (where, reason) in sorted(self.skipped.get(source, {}).items()):
            skipped.setdefault(reason, {"count": 0, "first": where})["count"] += 1
        counts = self.counts.get(source, Counter())
        return {**{name: counts[name] for name in _NAMES}, "skipped": skipped}

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain dicts, for a checkpoint."""
        counts = {source: dict(counter) for source, counter in self.counts.items()}
        return {"counts": counts, "skipped": {s: dict(found) for s, found in self.skipped.items()}}

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add another tally's `state_dict`: of an earlier part of the run, or of another rank."""
        for source, counts in state["counts"].items():
            self.counts.setdefault(source, Counter()).update(counts)
        for source, skipped in state["skipped"].items():
            self.skipped.setdefault(source, {}).update(skipped)


def count_sample(info: SampleInfo) -> dict[str, int]:
    """What one sample adds to the counts.

    Returns:
        used: 1. A sample counts each time that it is trained on.
        answers: answers that label tokens.
        cut, cut_tokens: whether its prompt was cut, and by how many tokens.
        answers_cut, answers_cut_tokens: likewise for answers that were longer than the bound.
        answers_unmatched, answers_removed: as in `Sample`.
    """
    return {
        "used": 1,
        "answers": info.answers,
        "cut": int(info.cut > 0),
        "cut_tokens": info.cut,
        "answers_cut": int(info.answers_cut > 0),
        "answers_cut_tokens": info.answers_cut,
        "answers_unmatched": info.answers_unmatched,
        "answers_removed": info.answers_removed,
    }


_NAMES = tuple(count_sample(SampleInfo("", "", 0, 0, 0, 0, 0)))
