"""The Lightning data module: sources -> samples -> batches of one, in an order that can be resumed.

The order of an epoch is a permutation that depends on the seed and the number of the epoch. A
checkpoint written in the middle of an epoch holds how many of its batches are done; resuming starts
the permutation there, so no sample is repeated, left out or made just to be thrown away, with any
number of workers.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from random import Random
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, ConversationEncoder, Cut, Sample, SkippedRow
from datamodules.sources import Source


class ConversationDataset(Dataset[Sample]):
    """Samples of several sources, one after the other.

    An index whose conversation gives no sample gives the next usable one instead (after the last
    comes the first), which depends on the data alone: the length of an epoch, the order and
    resuming are as if nothing had been skipped.

    Args:
        conversations: of each source, by the name of the source.
        encoder: makes the samples.

    Attributes:
        skipped: reasons of the conversations skipped so far in this process, by index.
        cuts: samples with a cut prompt, samples with a cut answer and removed tokens, so far in
            this process; a sample counts once each time that it is made.
    """

    def __init__(
        self, conversations: dict[str, Sequence[Conversation]], encoder: ConversationEncoder
    ) -> None:
        self.encoder = encoder
        self.sizes = {name: len(items) for name, items in conversations.items()}
        self.skipped: dict[int, str] = {}
        self.cuts: Counter[str] = Counter()
        self._parts = list(conversations.values())
        self._ends = list(accumulate(self.sizes.values()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Sample:
        """The sample at an index.

        Raises:
            ValueError: if no conversation at all gives a sample.
        """
        for j in (*range(i, len(self)), *range(i)):
            if j in self.skipped:
                continue
            try:
                return self._counted(self.encoder(self._conversation(j)))
            except SkippedRow as error:
                self.skipped[j] = error.reason
        raise ValueError(
            f"all {len(self)} conversations were skipped: {dict(Counter(self.skipped.values()))}; "
            "expected at least one with a prompt and an answer, so check the sources"
        )

    def report(self) -> dict[str, Any]:
        """What is known so far in this process (a loader's workers keep their own counts)."""
        return {
            "samples": dict(self.sizes),
            "skipped": dict(Counter(self.skipped.values())),
            "cut": dict(self.cuts),
        }

    def _conversation(self, i: int) -> Conversation:
        part = bisect_right(self._ends, i)
        return self._parts[part][i - self._ends[part] + len(self._parts[part])]

    def _counted(self, sample: Sample) -> Sample:
        self.cuts["prompts"] += sample.cut > 0
        self.cuts["prompt_tokens"] += sample.cut
        self.cuts["answers"] += sample.answer_cut > 0
        self.cuts["answer_tokens"] += sample.answer_cut
        return sample


class ResumableSampler(DistributedSampler[int]):
    """A permutation of the data set for each epoch, from a position on.

    It is a DistributedSampler, with one replica for one process, so that Lightning neither replaces
    it in a distributed run nor forgets to tell it the epoch. Replicas get equally many indices; the
    first ones of the permutation are repeated where that does not work out.

    Attributes:
        epoch: what the trainer says the epoch is.
        order: number of the permutation that the next pass takes; set by `ResumableLoader`.
        start: indices to leave out at the start of the next pass; set by `ResumableLoader`.
    """

    order: int = 0
    start: int = 0

    def __iter__(self) -> Iterator[int]:
        # A string, so that (seed 0, order 1) is not (seed 1, order 0).
        seed = Random(f"locret order {self.seed} {self.order}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        padded = indices.repeat(-(-self.total_size // len(indices)))[: self.total_size]
        return iter(padded[self.rank :: self.num_replicas][self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader with the state_dict / load_state_dict that Lightning calls for checkpoints.

    The state says which permutation is in use and how many of its batches are done. It is gone on
    with if the trainer goes on with the epoch that it was in; if the trainer begins an epoch, so
    does the loader, with the next permutation: a checkpoint may stem from the end of an epoch, also
    of one that limit_train_batches ended early.

    The loader numbers its permutations itself, as the trainer's epoch number and one `shift`:
    resumed at the end of an epoch with max_steps set, Lightning counts that epoch twice.

    The length stays that of a whole epoch, for Lightning's own count goes on from the checkpoint's.

    Args:
        dataset: map-style.
        in_flight: how many batches were yielded and are not done, asked when the state is taken.
            A checkpoint that is written because a step failed has one.
        **options: of DataLoader; `sampler` is a `ResumableSampler`. Lightning puts another in its
            place to overfit on a few batches, and then nothing is resumed.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        in_flight: Callable[[], int] = int,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.in_flight = in_flight
        self._state = {"order": 0, "shift": 0, "batches": 0}
        self._loaded = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, for Lightning calls iter() before it tells the sampler the epoch: nothing may
        # be settled, and no worker started, until the first batch is asked for.
        start = self._begin(getattr(self.sampler, "epoch", 0))
        for n, batch in enumerate(super().__iter__(), start=start + 1):
            self._state["batches"] = n
            yield batch

    def _begin(self, epoch: int) -> int:
        """Settle the permutation of a pass in the trainer's epoch, and where it starts."""
        state, loaded, self._loaded = self._state, self._loaded, False
        start = 0
        if loaded and epoch == state["order"] - state["shift"]:
            start = state["batches"]
        elif loaded:
            state["shift"] = state["order"] + 1 - epoch
        order = epoch + state["shift"]
        self._state = {"order": order, "shift": state["shift"], "batches": start}
        self.sampler.order, self.sampler.start = order, start  # type: ignore[attr-defined]
        return start

    def state_dict(self) -> dict[str, int]:
        """The permutation in use, how it follows from the epoch, and the batches done of it."""
        # Between loading and the first batch nothing is in flight.
        flying = 0 if self._loaded else self.in_flight()
        return {**self._state, "batches": max(0, self._state["batches"] - flying)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over a state; the next pass goes on from it, as the class says."""
        self._state, self._loaded = dict(state), True
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(state["order"] - state["shift"])


class ConversationDataModule(lightning.LightningDataModule):
    """Conversations for training and validation, a prompt and its answer a batch.

    The tokenizer is `self.tokenizer` if a caller has set it, else the `tokenizer` of the module
    that is being trained, so that there is one place that names the backbone.

    Args:
        train: sources to train on, concatenated and shuffled anew every epoch.
        val: sources to validate on, in order; None for no validation.
        max_prompt_tokens: bound on the prompt, chat template included; longer ones are cut.
        max_answer_tokens: bound on the answer; longer ones are truncated.
        cut: the part of a long prompt that goes: "middle", "left" or "right".
        seed: of the order.
        num_workers: processes that make samples; 0 makes them in the training process.
        batch_size: 1. Prompts are long, and of different lengths.

    Raises:
        ValueError: for a batch size other than 1 or no source to train on.
    """

    def __init__(
        self,
        train: list[Source],
        val: list[Source] | None = None,
        max_prompt_tokens: int = 10240,
        max_answer_tokens: int = 512,
        cut: Cut = "middle",
        seed: int = 0,
        num_workers: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        if batch_size != 1:
            raise ValueError(
                f"batch_size is {batch_size}, but only 1 is supported; "
                "raise the trainer's accumulate_grad_batches instead"
            )
        if not train:
            raise ValueError("train is empty, expected at least one source")
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train = list(train)
        self.val = list(val or [])
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.cut = cut
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: dict[str, ConversationDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the sources, once.

        Raises:
            ValueError: if there is no tokenizer, or a source has nothing usable.
        """
        if self._datasets:
            return
        tokenizer = self._find_tokenizer()
        encoder = ConversationEncoder(
            tokenizer, self.max_prompt_tokens, self.max_answer_tokens, self.cut
        )
        for name, sources in (("train", self.train), ("val", self.val)):
            if sources:
                loaded = _load(sources, tokenizer)
                self._datasets[name] = ConversationDataset(loaded, encoder)

    def train_dataloader(self) -> ResumableLoader:
        """Batches as `collate` makes them, in the order of the epoch."""
        dataset = self._datasets["train"]
        trainer = self.trainer
        sampler = ResumableSampler(
            dataset,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )
        return ResumableLoader(
            dataset,
            sampler=sampler,
            in_flight=self._in_flight,
            num_workers=self.num_workers,
            collate_fn=collate,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches as `collate` makes them, in the order of the sources; none without `val`."""
        if "val" not in self._datasets:
            return []
        return DataLoader(self._datasets["val"], num_workers=self.num_workers, collate_fn=collate)

    def report(self) -> dict[str, Any]:
        """For "train" and "val": samples by source, skipped conversations by reason, cuts; and what
        the sources themselves report. Skips and cuts are those of this process so far."""
        sources = [s for s in (*self.train, *self.val) if hasattr(s, "report")]
        return {
            **{name: dataset.report() for name, dataset in self._datasets.items()},
            "sources": {str(s): dict(s.report) for s in sources},
        }

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        module = self.trainer.lightning_module if self.trainer else None
        tokenizer = self.tokenizer or getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "the data module has no tokenizer; set its attribute `tokenizer`, or train a "
                "module that has one"
            )
        return tokenizer

    def _in_flight(self) -> int:
        """Batches that the trainer has taken and not finished: 1 while a step runs, else 0."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return progress.ready - progress.processed  # type: ignore[attr-defined]


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """A batch of one sample.

    Returns:
        input_ids: int64 [1, n], prompt then answer.
        prompt_length: int64 [1], where the answer starts.
        cut: int64 [1], tokens removed from the prompt.
    """
    (sample,) = samples
    return {
        "input_ids": sample.input_ids[None],
        "prompt_length": torch.tensor([sample.prompt_length]),
        "cut": torch.tensor([sample.cut]),
    }


def _load(
    sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Sequence[Conversation]]:
    loaded: dict[str, Sequence[Conversation]] = {}
    for source in sources:
        name = str(source)
        # The same source twice is a way to weigh it, and each needs a name of its own.
        while name in loaded:
            name += "'"
        loaded[name] = source.load(tokenizer)
    return loaded
