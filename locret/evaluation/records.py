"""Predictions on disk: one JSON line each, appended as they come, so that a killed run goes on.

Every process of a run appends to a file of its own; all of them read all files. A line is taken for
a sample only if it was made under the same settings for the same prompt.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locret.system.files import append_json

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
