"""Synthetic tasks as a source, made when asked for."""

from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow
from datamodules.rows import exchange
from locret.tasks.synthetic import TASKS, make_sample, prompt_text

PROBES = 8  # samples of a task tried at the least length: how much text they need differs


class SyntheticSource:
    """Synthetic tasks, made when asked for and the same for one index everywhere.

    Args:
        tasks: names in `locret.tasks.synthetic.TASKS`, taken in turn.
        tokens: tokens of the user message, or the (least, most) of lengths to draw from evenly. The
            chat template comes on top: leave it room below the data module's max_prompt_tokens.
        size: number of samples.
        seed: another seed, other samples. Evaluation should use another one than training.
        haystack: path of a text file; None is the language reference that ships with CPython.

    Raises:
        ValueError: for no or unknown tasks, lengths that are not 0 < least <= most, or size < 1.
    """

    def __init__(
        self,
        tasks: list[str],
        tokens: int | tuple[int, int],
        size: int,
        seed: int = 0,
        haystack: str | None = None,
    ) -> None:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            raise ValueError(f"tasks is {tasks}, expected some of {', '.join(TASKS)}")
        least, most = (tokens, tokens) if isinstance(tokens, int) else tokens
        if not 0 < least <= most or size < 1:
            raise ValueError(
                f"tokens is {tokens} and size is {size}; expected a length or (least, most), "
                "with 0 < least <= most, and a size of at least 1"
            )
        self.tasks = list(tasks)
        self.tokens = (least, most)
        self.size = size
        self.seed = seed
        self.haystack = haystack

    def __str__(self) -> str:
        return f"SyntheticSource({', '.join(self.tasks)}, seed {self.seed})"

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Conversation]:
        """See `Source.load`.

        Raises:
            ValueError: an unusable haystack, or a least length that is too short for a task.
        """
        least, _ = self.tokens
        for task in dict.fromkeys(self.tasks):
            for seed in range(PROBES):
                try:
                    make_sample(task, least, tokenizer, seed, haystack=self.haystack)
                except ValueError as error:
                    raise ValueError(f"{self}: no sample of {task} can be made: {error}") from error
        return SyntheticConversations(self, tokenizer)


class SyntheticConversations(Sequence[Conversation]):
    """The samples of a `SyntheticSource` for one tokenizer, a few milliseconds each.

    A rare one that needs more tokens than all that were tried raises SkippedRow.
    """

    def __init__(self, source: SyntheticSource, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = source
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, i: int) -> Conversation:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        source = self._source
        rng = Random(f"locret source {source.seed} {i}")
        task, tokens = source.tasks[i % len(source.tasks)], rng.randint(*source.tokens)
        seed = rng.getrandbits(63)
        name = f"{task}:{source.seed}:{i}"
        try:
            sample = make_sample(task, tokens, self._tokenizer, seed, haystack=source.haystack)
        except ValueError as error:
            raise SkippedRow("tokens too few for the task", name) from error
        messages = exchange(prompt_text(sample), sample.answer)
        return Conversation(messages, f"synthetic/{task}", name)
