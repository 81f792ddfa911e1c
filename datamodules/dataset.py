"""Conversations to batches: samples by index, kept on disk, several to a row; what became of all.

A sample may be kept on disk, so that a conversation is tokenised once for all epochs, workers and
runs: one file a sample, named by a hash of all that the sample follows from, which are the
tokenizer, the encoder's settings and the messages. Single files need no lock: they are written
aside and renamed, which is atomic on network file systems too, where several nodes share a folder
and a database would not do; and a file that is broken spoils itself only. Files are of a few tens
of KB, in 256 folders.
"""

import hashlib
import json
import os
import sys
import uuid
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow
from datamodules.encoder import ConversationEncoder, Sample
from locret.training.segments import Segment

Encode = Callable[[Conversation], Sample]

_FORMAT = 2  # raise it with every change of what a sample is or how a file is written
_SPANS = ("answers", "branches")
_NUMBERS = ("cut", "answers_cut", "answers_unmatched", "answers_removed")


class Skipped(NamedTuple):
    """A conversation that gave no sample: where it is, why, its source, its index."""

    where: str
    reason: str
    source: str
    number: int


class Item(NamedTuple):
    """What one index gives.

    Attributes:
        sample: the sample.
        source: name of the source that it is from.
        skipped: conversations that were tried before it.
    """

    sample: Sample
    source: str
    skipped: tuple[Skipped, ...]


class ConversationDataset(Dataset[Item]):
    """Samples of several sources, one after the other.

    An index whose conversation gives no sample gives the next usable one of the same source instead
    (after the last comes the first), which depends on the data alone: the length of an epoch, the
    order, the proportions of the sources and resuming are as if nothing had been skipped.

    Args:
        conversations: of each source, by the name of the source.
        encode: makes the samples; raises SkippedRow.

    Attributes:
        sizes: conversations of each source.
    """

    def __init__(self, conversations: dict[str, Sequence[Conversation]], encode: Encode) -> None:
        self.encode = encode
        self.sizes = {name: len(items) for name, items in conversations.items()}
        self._names = list(conversations)
        self._all = ConcatDataset(list(conversations.values()))
        self._skipped: dict[int, Skipped] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, i: int) -> Item:
        """The sample at an index.

        Raises:
            ValueError: if no conversation of its source gives a sample.
        """
        i, ends = range(len(self))[i], self._all.cumulative_sizes
        source = bisect_right(ends, i)
        name, end = self._names[source], ends[source]
        size = self.sizes[name]
        passed: list[Skipped] = []
        for j in (*range(i, end), *range(end - size, i)):
            found = self._try(j, name)
            if isinstance(found, Sample):
                return Item(found, name, tuple(passed))
            passed.append(found)
        reasons = dict(Counter(skipped.reason for skipped in passed))
        raise ValueError(
            f"all {size} conversations of {name} were skipped: {reasons}, the first at "
            f"{passed[0].where}; expected at least one with a prompt and an answer, so check it"
        )

    def check(self) -> None:
        """Find a usable sample in every source.

        Raises:
            ValueError: if there is none in one of them.
        """
        start = 0
        for name, size in self.sizes.items():
            if not size:
                raise ValueError(f"{name} is empty, expected at least one conversation")
            self[start]
            start += size

    def _try(self, i: int, name: str) -> Sample | Skipped:
        if i not in self._skipped:
            try:
                return self.encode(self._all[i])
            except SkippedRow as error:
                where = error.where or f"{name}[{i}]"
                self._skipped[i] = Skipped(where, error.reason, name, i)
        return self._skipped[i]


COUNTS = (
    *("used", "answers", "cut", "cut_tokens", "answers_cut", "answers_cut_tokens"),
    *("answers_unmatched", "answers_removed"),
)
"""What is counted of samples; see `count_sample`."""


def count_sample(sample: Sample) -> dict[str, int]:
    """What one sample adds to the counts.

    Returns:
        used: 1. A sample counts each time that it is trained on.
        answers: answers that label tokens.
        cut, cut_tokens: whether its prompt was cut, and by how many tokens.
        answers_cut, answers_cut_tokens: likewise for answers that were longer than the bound.
        answers_unmatched, answers_removed: as in `Sample`.
    """
    cut, short = sample.cut, sample.answers_cut
    unmatched, removed = sample.answers_unmatched, sample.answers_removed
    cuts = (int(cut > 0), cut, int(short > 0), short)
    found = (1, len(sample.answers), *cuts, unmatched, removed)
    return dict(zip(COUNTS, found, strict=True))


class Counted(NamedTuple):
    """What the report needs to know of one sample.

    It travels in the batch, because samples may be made in processes that are gone when the report
    is asked for, and as plain numbers, so that counting does not wait for a GPU.
    """

    source: str  # name of the source in the data module
    id: str
    counts: dict[str, int]  # see `count_sample`


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """A batch.

    Returns:
        input_ids: int64 [1, N], the samples one after the other; each may attend to itself only.
        segments: list of `locret.training.segments.Segment`, one a sample, offsets in the row.
        cut: int64 [samples], tokens removed from each prompt.
        samples: list of `Counted`, for `ConversationDataModule.count`.
        skipped: list of `Skipped`: conversations that gave no sample, with the place and why.
    """
    samples = [item.sample for item in items]
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "segments": _segments(items),
        "cut": torch.tensor([sample.cut for sample in samples]),
        "samples": [Counted(i.source, i.sample.id, count_sample(i.sample)) for i in items],
        "skipped": [skipped for item in items for skipped in item.skipped],
    }


def _segments(items: Sequence[Item]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for item in items:
        sample = item.sample
        answers, branches = (
            tuple((start + a, start + b) for a, b in spans)
            for spans in (sample.answers, sample.branches)
        )
        end = start + len(sample.input_ids)
        segments.append(Segment(start, end, answers, branches))
        start = end
    return segments


class Tally:
    """Counts by source, of the batches that were added.

    Attributes:
        counts: for each source, how often each of `COUNTS` occurred.
        skipped: for each source, place and reason of each skipped conversation, by its index. One
            that was met again, in a later epoch or by another worker, counts once.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.skipped: dict[str, dict[int, tuple[str, str]]] = {}

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch of `collate`."""
        for info in batch["samples"]:
            self.counts.setdefault(info.source, Counter()).update(info.counts)
        for where, reason, source, number in batch["skipped"]:
            self.skipped.setdefault(source, {})[number] = (where, reason)

    def report(self, source: str) -> dict[str, Any]:
        """The counts of a source, and under "skipped" {reason: {"count", "first"}}."""
        skipped: dict[str, dict[str, Any]] = {}
        for _, (where, reason) in sorted(self.skipped.get(source, {}).items()):
            skipped.setdefault(reason, {"count": 0, "first": where})["count"] += 1
        counts = self.counts.get(source, Counter())
        return {**{name: counts[name] for name in COUNTS}, "skipped": skipped}

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


# ---- samples on disk -----------------------------------------------------------------------------


class CachedEncoder:
    """Encodes a conversation, or reads what it was encoded to before. The result is the same.

    A file that cannot be read or does not fit its checksum is written anew. If files cannot be
    written (a full disk) a warning says so once, and the work goes on without them. Conversations
    that give no sample are not kept.

    Args:
        encoder: makes the samples that are not there yet.
        folder: where to keep them; made if missing. Delete it at any time.

    Raises:
        ValueError: if the folder cannot be made.
    """

    def __init__(self, encoder: ConversationEncoder, folder: str) -> None:
        self.encoder = encoder
        self.folder = Path(folder)
        of_file = [_FORMAT, sys.byteorder, *encoder.settings]
        self._settings = _digest([of_file, _tokenizer_facts(encoder.tokenizer)])
        self._failed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache_dir {folder!r} cannot be made: {error}") from error

    def __call__(self, conversation: Conversation) -> Sample:
        """The sample; see `ConversationEncoder.__call__`.

        Raises:
            SkippedRow: as the encoder does.
        """
        path = self.path(conversation)
        sample = _read(path, conversation)
        if sample is None:
            sample = self.encoder(conversation)
            self._write(path, sample)
        return sample

    def path(self, conversation: Conversation) -> Path:
        """The file of a conversation, whether it is there or not."""
        content: list[Any] = [[m["role"], m["content"]] for m in conversation.messages]
        if conversation.tools or any(len(m) > 2 for m in conversation.messages):
            content = [conversation.messages, conversation.tools]
        if conversation.context:
            content = [content, conversation.context, conversation.questions]
        name = _digest([self._settings, content])
        return self.folder / name[:2] / name[2:]

    def _write(self, path: Path, sample: Sample) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            # Not by tempfile: its files are their owner's alone, and others share the folder.
            aside = path.parent / f".new-{uuid.uuid4().hex}"
            try:
                with aside.open("xb") as file:
                    file.write(_to_bytes(sample))
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._failed:
                warnings.warn(f"the sample cache cannot be written: {error}", stacklevel=2)
            self._failed = True


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the tokens of a text depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = str(tokenizer.chat_template)
    return [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        repr(sorted(getattr(tokenizer, "init_kwargs", {}).items(), key=lambda pair: pair[0])),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        template,
        transformers.__version__,
        tokenizers.__version__,
        # Some templates (Llama 3.2) write today's date into the prompt.
        str(date.today()) if "strftime_now" in template else "",
    ]


def _digest(content: Any) -> str:
    # ASCII escapes, so that a text with half a surrogate pair has a hash as well.
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()


def _to_bytes(sample: Sample) -> bytes:
    """A checksum, a line of JSON, then the tokens as int32."""
    payload = sample.input_ids.int().numpy().tobytes()
    record = {name: getattr(sample, name) for name in (*_SPANS, *_NUMBERS)}
    body = json.dumps(record).encode() + b"\n" + payload
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _read(path: Path, conversation: Conversation) -> Sample | None:
    try:
        checksum, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    line, _, payload = body.partition(b"\n")
    record = json.loads(line)
    return Sample(
        input_ids=torch.frombuffer(bytearray(payload), dtype=torch.int32).long(),  # type: ignore[arg-type]
        source=conversation.source,
        id=conversation.id,
        **{name: tuple(map(tuple, record[name])) for name in _SPANS},  # type: ignore[arg-type]
        **{name: record[name] for name in _NUMBERS},
    )
