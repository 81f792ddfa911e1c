"""Samples to a batch: one row in which they stand one after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from datamodules.dataset import Item
from locret.training.segments import Segment


class SampleInfo(NamedTuple):
    """What the report needs to know of one sample; see `Sample` for all but `source`.

    It travels in the batch, because samples may be made in processes that are gone when the report
    is asked for, and as plain numbers, so that counting does not wait for a GPU.
    """

    source: str  # name of the source in the data module
    id: str
    cut: int
    answers: int
    answers_cut: int
    answers_unmatched: int
    answers_removed: int


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """A batch.

    Returns:
        input_ids: int64 [1, N], the samples one after the other; each may attend to itself only.
        segments: list of `locret.training.segments.Segment`, one a sample, offsets in the row.
        cut: int64 [samples], tokens removed from each prompt.
        samples: list of `SampleInfo`, for `ConversationDataModule.count`.
        skipped: list of `Skipped` : conversations that gave no sample, with the place and why.
    """
    samples = [item.sample for item in items]
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples])[None],
        "segments": _segments(items),
        "cut": torch.tensor([sample.cut for sample in samples]),
        "samples": [_info(item) for item in items],
        "skipped": [skipped for item in items for skipped in item.skipped],
    }


def _segments(items: Sequence[Item]) -> list[Segment]:
    segments: list[Segment] = []
    start = 0
    for item in items:
        answers = tuple((start + a, start + b) for a, b in item.sample.answers)
        end = start + len(item.sample.input_ids)
        segments.append(Segment(start, end, answers))
        start = end
    return segments


def _info(item: Item) -> SampleInfo:
    sample = item.sample
    return SampleInfo(
        source=item.source,
        id=sample.id,
        cut=sample.cut,
        answers=len(sample.answers),
        answers_cut=sample.answers_cut,
        answers_unmatched=sample.answers_unmatched,
        answers_removed=sample.answers_removed,
    )
