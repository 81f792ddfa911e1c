"""Conversations and texts to trunks with branches: what a cache will hold, and ways to go on.

    trunk      opening of the user's turn + context
    answer     question + end of the turn + answer           a branch for each question
    replay     "Repeat the previous context ..." + end of the turn + the context once more

No branch sees another one. Replay (KVzip, 2505.23416) needs no answers, so that any text is one to
train on; a long context is copied in pieces, each a branch of its own. All pieces of text are
tokenised on their own, and a copy holds the trunk's own token ids.
"""

from dataclasses import astuple, dataclass
from random import Random
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Conversation, SkippedRow, Span, exchange
from datamodules.encoder import (
    ConversationEncoder,
    Cut,
    Sample,
    check_texts,
    cut_window,
    is_blank,
    is_unicode,
)
from locret.policies.kvzip import REPEAT, REPEAT_AFTER

Kind = Literal["answer", "replay"]

LEAD_TOKENS = 8  # of the context, told to a copy that does not begin at its start
ASKING_TOKENS = 256  # bound on what stands before an answer in its branch


@dataclass(frozen=True)
class Branching:
    """Which branches a sample has, and how many.

    Args:
        kinds: "answer", "replay" or both.
        max_answers: the most questions about one context; the conversation's own is among them.
        copy_tokens: the most tokens of the context in one copy.
        copies: the most copies; of a longer context, those to make are drawn. None makes all.

    Raises:
        ValueError: no or unknown kinds, or a number below 1.
    """

    kinds: tuple[Kind, ...]
    max_answers: int = 4
    copy_tokens: int = 2048
    copies: int | None = None

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(get_args(Kind)):
            raise ValueError(f"branches is {list(self.kinds)}, expected answer, replay or both")
        if min(self.max_answers, self.copy_tokens, self.copies or 1) < 1 or self.copies == 0:
            raise ValueError(
                f"max_answers is {self.max_answers}, copy_tokens is {self.copy_tokens} and copies "
                f"is {self.copies}; each must be at least 1 (copies may be none: all)"
            )

    def most_tokens(self, trunk: int, answer: int) -> int:
        """The most tokens of a sample whose trunk and answers have these bounds."""
        total = trunk
        if "answer" in self.kinds:
            total += self.max_answers * (ASKING_TOKENS + answer)
        if "replay" in self.kinds:
            pieces = len(range(0, trunk, self.copy_tokens)[: self.copies])
            total += pieces * ASKING_TOKENS + min(trunk, pieces * self.copy_tokens)
        return total


class _Branch(NamedTuple):
    """Token ids of one way to go on, and how many a bound took from the answer."""

    asking: list[int]
    answer: list[int]
    cut: int = 0


class BranchEncoder(ConversationEncoder):
    """Turns conversations and texts into trunks with branches.

    Where a conversation says which of its text is context, the trunk ends with it, and the question
    is part of the branch; else the trunk is the whole prompt, up to the end of its last text. Where
    the trunk has too many tokens, some of the context go: of a conversation what `cut` says; a text
    without questions keeps a window that is drawn. What is drawn follows from the texts alone.

    Args:
        tokenizer: of the backbone.
        branching: which branches.
        max_prompt_tokens: bound on the trunk, template included.
        max_answer_tokens: bound on the answer to each question, end-of-turn token included.
        cut: as in `ConversationEncoder`.

    Raises:
        ValueError: as `ConversationEncoder`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        branching: Branching,
        max_prompt_tokens: int = 10240,
        max_answer_tokens: int = 512,
        cut: Cut = "middle",
    ) -> None:
        super().__init__(tokenizer, max_prompt_tokens, max_answer_tokens, cut)
        self.branching = branching

    @property
    def settings(self) -> list[Any]:
        return [*super().settings, astuple(self.branching)]

    def _encode(self, conversation: Conversation) -> Sample:
        check_texts(conversation.messages, conversation.tools)
        self.format.check_tools(conversation.messages, conversation.tools)
        context = conversation.context or conversation.prompt_text
        question = conversation.prompt_text[len(context) :]
        opening, said, ending = self._split(conversation, context)
        rng = Random(f"locret branches {said} {question}")
        answers = self._answers(conversation, question, ending, rng)
        head, body = self.format.text_ids(opening), self.format.text_ids(said)
        kept = self._cut(body, self.max_prompt_tokens - len(head), None if answers else rng)
        asked = [*answers, *self._copies(kept, ending, rng)]
        usable = [branch for branch in asked if len(branch.asking) <= ASKING_TOKENS]
        if not usable:
            raise SkippedRow(f"question over {ASKING_TOKENS} tokens" if asked else "no answer")
        ids, spans, branches = _lay_out(head + kept, usable)
        return Sample(
            input_ids=torch.tensor(ids),  # type: ignore[arg-type]
            answers=spans,
            cut=len(body) - len(kept),
            answers_cut=sum(branch.cut for branch in usable),
            source=conversation.source,
            id=conversation.id,
            answers_removed=len(asked) - len(usable),
            branches=branches,
        )

    def _split(self, conversation: Conversation, context: str) -> tuple[str, str, str]:
        """The prompt as `ChatFormat.split_prompt` has it, ending with the context."""
        *earlier, last = conversation.messages[:-1]
        last = last.copy()
        last["content"] = context
        return self.format.split_prompt([*earlier, last], conversation.tools)

    def _answers(
        self, conversation: Conversation, question: str, ending: str, rng: Random
    ) -> list[_Branch]:
        """The conversation's own question and others about the same context, with their answers."""
        if "answer" not in self.branching.kinds:
            return []
        messages, tools = conversation.messages, conversation.tools
        own = (question, messages[-1]["content"])
        found: list[tuple[str, list[int]]] = []
        if not is_blank(messages[-1]):
            calls = messages[-1].get("tool_calls")
            prompt = self.format.prompt_ids(messages[:-1], tools) if calls else ()
            found.append((question, self.format.answer_ids(messages, tools, prompt)))
        others = [pair for pair in conversation.questions if pair != own and _is_usable(*pair)]
        count = min(len(others), self.branching.max_answers - len(found))
        for other, answer in rng.sample(others, count):
            found.append((other, self.format.answer_ids(exchange(other, answer), (), ())))
        bound = self.max_answer_tokens
        return [
            _Branch(self.format.text_ids(asked + ending), ids[:bound], max(0, len(ids) - bound))
            for asked, ids in found
        ]

    def _cut(self, ids: list[int], room: int, rng: Random | None) -> list[int]:
        """What of the context is kept: a window drawn by `rng`, or what `cut` leaves without it."""
        if room < 1:
            raise SkippedRow("nothing of the prompt left after cutting")
        if rng is not None and len(ids) > room:
            start = rng.randrange(len(ids) - room + 1)
            return ids[start : start + room]
        start, end = cut_window(len(ids), room, self.cut)
        return ids[:start] + ids[end:]

    def _copies(self, context: list[int], ending: str, rng: Random) -> list[_Branch]:
        """The context once more, in pieces; each but the first is told what stands before it."""
        if "replay" not in self.branching.kinds:
            return []
        size, copies = self.branching.copy_tokens, self.branching.copies
        starts = list(range(0, len(context), size))
        if copies is not None and copies < len(starts):
            starts = sorted(rng.sample(starts, copies))
        whole, after, end = map(self.format.text_ids, (REPEAT + ending, REPEAT_AFTER, ending))
        return [
            _Branch(
                after + context[max(0, start - LEAD_TOKENS) : start] + end if start else whole,
                context[start : start + size],
            )
            for start in starts
        ]


def _lay_out(
    trunk: list[int], branches: list[_Branch]
) -> tuple[list[int], tuple[Span, ...], tuple[Span, ...]]:
    """All tokens, one branch after the other; the spans of their answers; those of the branches."""
    ids, answers, spans = list(trunk), list[Span](), list[Span]()
    for branch in branches:
        start, begins = len(ids), len(ids) + len(branch.asking)
        ids += branch.asking + branch.answer
        answers.append((begins, len(ids)))
        spans.append((start, len(ids)))
    return ids, tuple(answers), tuple(spans)


def _is_usable(question: str, answer: str) -> bool:
    return bool(answer.strip()) and is_unicode(question) and is_unicode(answer)
