"""The Lightning data module: sources -> samples -> batches, in an order that can be resumed."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from itertools import count as numbers
from typing import Any

import lightning
import torch
from torch import LongTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation
from datamodules.dataset import CachedEncoder, ConversationDataset, Encode, Tally, collate
from datamodules.encoder import BranchEncoder, Branching, ConversationEncoder, Cut, Kind
from datamodules.epochs import (
    Epochs,
    InOrder,
    Mixed,
    ResumableLoader,
    ResumableSampler,
    Shuffled,
)
from datamodules.sources import Source
from locret.commands.progress import Progress


class ConversationDataModule(lightning.LightningDataModule):
    """Conversations for training and validation, packed into rows; `collate` says how.

    The tokenizer is `self.tokenizer` if a caller has set it, else the `tokenizer` of the module
    that is being trained, so that there is one place that names the backbone.

    Several processes share an epoch as `ResumableSampler` says.

    Args:
        train: sources to train on, shuffled anew every epoch.
        val: sources to validate on, in order; None for no validation.
        max_prompt_tokens: bound on what stands before the last answer of a conversation, chat
            template included; longer ones are cut.
        max_answer_tokens: bound on each answer; longer ones are truncated.
        cut: what of a long prompt goes: "middle", "left" or "right".
        seed: of the order.
        num_workers: processes that make samples; 0 makes them in the training process.
        batch_size: samples that are packed into one row; the last row of an epoch may have fewer.
        max_batch_tokens: the most tokens that a row may have, whatever is drawn; None for no bound.
        weights: proportions in which the sources of `train` are drawn, one above 0 each; None
            takes every sample once an epoch.
        samples_per_epoch: with weights, samples of an epoch over all processes; None makes it as
            long as it takes to see the source of the largest weight once.
        cache_dir: folder to keep tokenised samples in, also for other runs; None keeps none.
        branches: what goes on from a context, each a branch of its own: "answer" (question and
            answer), "replay" (the context once more), see `datamodules.encoder`; None reads each
            conversation as one sequence. The settings below are for branches.
        max_answers: the most questions about one context.
        copy_tokens: the most tokens of the context that one branch copies.
        copies: the most branches that copy; those of a longer context are drawn. None copies all.

    Raises:
        ValueError: for no source to train on, a number below 1, weights that are not one above 0
            for each source, or a bound on the row that batch_size full samples exceed.
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
        max_batch_tokens: int | None = None,
        weights: list[float] | None = None,
        samples_per_epoch: int | None = None,
        cache_dir: str | None = None,
        branches: list[Kind] | None = None,
        max_answers: int = 4,
        copy_tokens: int = 2048,
        copies: int | None = None,
    ) -> None:
        super().__init__()
        if not train:
            raise ValueError("train is empty, expected at least one source")
        if weights is not None and len(weights) != len(train):
            raise ValueError(f"weights is {weights}, expected one for each of {len(train)} sources")
        if samples_per_epoch is not None and (weights is None or samples_per_epoch < 1):
            raise ValueError(
                f"samples_per_epoch is {samples_per_epoch} and weights is {weights}; expected at "
                "least 1, and weights, without which an epoch is every sample once"
            )
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train = list(train)
        self.val = list(val or [])
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.cut = cut
        self.seed = seed
        self.num_workers = num_workers
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.weights = weights
        self.samples_per_epoch = samples_per_epoch
        self.cache_dir = cache_dir
        self.branching = (
            None
            if branches is None
            else Branching(tuple(branches), max_answers, copy_tokens, copies)
        )
        self._datasets: dict[str, ConversationDataset] = {}
        self._read: dict[str, dict[str, dict[str, Any]]] = {}
        self._tally = Tally()
        self._check_batches()

    def setup(self, stage: str | None = None) -> None:
        """Load the sources and try each, once.

        Raises:
            ValueError: if there is no tokenizer, or a source has nothing usable.
        """
        if self._datasets:
            return
        first = self.trainer is None or self.trainer.is_global_zero
        with Progress("loading the data") if first else contextlib.nullcontext():
            found = self._load_sources()
        self._train_epochs = self._make_epochs(found["train"], self.seed)
        self._datasets = found

    def _load_sources(self) -> dict[str, ConversationDataset]:
        tokenizer = self._find_tokenizer()
        encoder = self._make_encoder(tokenizer)
        encode: Encode = CachedEncoder(encoder, self.cache_dir) if self.cache_dir else encoder
        found: dict[str, ConversationDataset] = {}
        for name, sources in (("train", self.train), ("val", self.val)):
            if sources:
                loaded = _load(sources, tokenizer)
                found[name] = ConversationDataset(loaded, encode)
                found[name].check()
                self._read[name] = _what_was_read(sources, loaded)
        return found

    def train_dataloader(self) -> ResumableLoader:
        """Batches as `collate` makes them, in the order of the epoch."""
        return ResumableLoader(
            self._datasets["train"],
            sampler=self._sampler("train", self._train_epochs),
            in_flight=self._in_flight,
            **self._options,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches as `collate` makes them, in the order of the sources; none without `val`."""
        if "val" not in self._datasets:
            return []
        dataset = self._datasets["val"]
        return DataLoader(
            dataset,
            sampler=self._sampler("val", InOrder(len(dataset))),
            **self._options,
        )

    def contexts(self, count: int) -> Iterator[LongTensor]:
        """What a cache would hold before the answers of samples that are drawn as in training.

        The order is that of another seed. There is no end to it: past an epoch comes the next one.

        Args:
            count: how many to yield.

        Yields:
            int64 [n], trunks, or prompts of conversations that are one sequence.
        """
        self.setup()
        dataset = self._datasets["train"]
        epochs = self._make_epochs(dataset, self.seed + 1)
        drawn = chain.from_iterable(epochs.indices(n).tolist() for n in numbers())
        for i in islice(drawn, count):
            sample = dataset[i].sample
            yield sample.input_ids[: sample.prompt_length]  # type: ignore[misc]

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count a batch that was trained on; the trainer calls it when a step is done.

        The counts go into checkpoints and are gone on with from them. Call `gather_counts` at the
        end where several processes train.
        """
        self._tally.add(batch)

    def gather_counts(self) -> None:
        """Add up the counts of all processes; a collective, to be called once, by all of them."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        states: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(states, self._tally.state_dict())
        self._tally = Tally()
        for state in states:
            self._tally.merge(state)

    def report(self) -> dict[str, Any]:
        """What became of the data.

        Returns:
            For "train", and "val" if there is one, and each source by its name: "rows" read and
            "conversations" found in them; the counts of `count_sample` for the batches given
            to `count`; and "skipped": {reason: {"count", "first" place}}, of broken rows, which
            are known from the start, and of conversations that gave no sample, known once drawn.
            For "val", of which nothing is counted, only what was read.
            "repeated" is the number of samples that an epoch takes twice, to give all processes
            equally many.
        """
        report: dict[str, Any] = {stage: {**sources} for stage, sources in self._read.items()}
        for name, read in report.get("train", {}).items():
            counted = self._tally.report(name)
            skipped = {**read["skipped"], **counted.pop("skipped")}
            report["train"][name] = {**read, **counted, "skipped": skipped}
        if self._datasets:
            report["repeated"] = self._sampler("train", self._train_epochs).repeated
        return report

    def state_dict(self) -> dict[str, Any]:
        """The counts, for the checkpoint."""
        return self._tally.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint. It holds the counts of the first process only."""
        self._tally = Tally()
        if self.trainer is None or self.trainer.is_global_zero:
            self._tally.merge(state_dict)

    @property
    def _options(self) -> dict[str, Any]:
        """Of both loaders; asked when they are made, for Lightning may look for a batch size."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "collate_fn": collate,
        }

    def _check_batches(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        bounds = self.max_prompt_tokens, self.max_answer_tokens
        most = self.batch_size * (
            self.branching.most_tokens(*bounds) if self.branching else sum(bounds)
        )
        if self.max_batch_tokens is not None and most > self.max_batch_tokens:
            raise ValueError(
                f"a batch of {self.batch_size} may have {most} tokens (max_prompt_tokens "
                f"{self.max_prompt_tokens} + max_answer_tokens {self.max_answer_tokens} each"
                f"{', ' + str(self.branching) if self.branching else ''}), but "
                f"max_batch_tokens is {self.max_batch_tokens}; lower one of the former or "
                "batch_size, and raise the trainer's accumulate_grad_batches instead"
            )

    def _make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> ConversationEncoder:
        bounds = self.max_prompt_tokens, self.max_answer_tokens, self.cut
        if self.branching is None:
            return ConversationEncoder(tokenizer, *bounds)
        return BranchEncoder(tokenizer, self.branching, *bounds)

    def _make_epochs(self, dataset: ConversationDataset, seed: int) -> Epochs:
        if self.weights is None:
            return Shuffled(len(dataset), seed)
        sizes = list(dataset.sizes.values())
        return Mixed(sizes, self.weights, seed, self.samples_per_epoch)

    def _sampler(self, name: str, epochs: Epochs) -> ResumableSampler:
        # The strategy knows: with tensor parallelism several processes work on the same data.
        replicas = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return ResumableSampler(self._datasets[name], seed=self.seed, epochs=epochs, **replicas)

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


def _what_was_read(
    sources: Sequence[Source], loaded: Mapping[str, Sequence[Conversation]]
) -> dict[str, dict[str, Any]]:
    """For each source by name: rows, conversations, and broken rows with the first place."""
    found: dict[str, dict[str, Any]] = {}
    for source, (name, conversations) in zip(sources, loaded.items(), strict=True):
        counts = getattr(source, "report", {})
        broken = getattr(source, "first_broken", {})
        found[name] = {
            "rows": counts.get("rows", len(conversations)),
            "conversations": len(conversations),
            "skipped": {why: {"count": counts[why], "first": at} for why, at in broken.items()},
        }
    return found
