"""Samples by index, with what had to be skipped to get them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset

from datamodules.conversations import Conversation, Sample, Skipped, SkippedRow
from datamodules.joined import Joined

Encode = Callable[[Conversation], Sample]


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
        self._all = Joined(list(conversations.values()))
        self._skipped: dict[int, Skipped] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, i: int) -> Item:
        """The sample at an index.

        Raises:
            ValueError: if no conversation of its source gives a sample.
        """
        part, offset = self._all.locate(i)
        start, size, name = self._all.start(part), len(self._all.parts[part]), self._names[part]
        passed: list[Skipped] = []
        for j in (*range(offset, size), *range(offset)):
            found = self._try(start + j, name)
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
        for part, (name, size) in enumerate(self.sizes.items()):
            if not size:
                raise ValueError(f"{name} is empty, expected at least one conversation")
            self[self._all.start(part)]

    def _try(self, i: int, name: str) -> Sample | Skipped:
        if i in self._skipped:
            return self._skipped[i]
        try:
            conversation = self._all[i]
        except SkippedRow as error:
            return self._skip(i, Skipped(error.where, error.reason, name, i))
        try:
            return self.encode(conversation)
        except SkippedRow as error:
            where = error.where or f"{name}[{i}]"
            return self._skip(i, Skipped(where, error.reason, name, i))

    def _skip(self, i: int, skipped: Skipped) -> Skipped:
        self._skipped[i] = skipped
        return skipped
