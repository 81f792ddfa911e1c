"""Conversations to tokens: one sequence each, or a trunk with branches, cut to bounds.

encoder = ConversationEncoder(tokenizer, max_prompt_tokens=10240, max_answer_tokens=512)
sample = encoder(conversation)
start, end = sample.answers[0]
sample.input_ids[:start]      # what the cache holds when the first answer begins
sample.input_ids[start:end]   # the answer, whose attention labels the tokens before it

Of an over-long prompt one stretch goes: the middle, the left or the right. Where it would begin or
end inside an earlier answer of the conversation it grows until that answer is gone as a whole, for
half an answer would teach what nobody said; the prompt is then shorter than the bound by up to that
answer's length.

A trunk is what a cache will hold, its branches are ways to go on; no branch sees another one:

    trunk      opening of the user's turn + context
    answer     question + end of the turn + answer           a branch for each question
    replay     "Repeat the previous context ..." + end of the turn + the context once more

Replay (KVzip, 2505.23416) needs no answers, so that any text is one to train on; a long context is
copied in pieces, each a branch of its own. All pieces of text are tokenised on their own, and a
copy holds the trunk's own token ids.
"""

import json
from dataclasses import astuple, dataclass
from random import Random
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import (
    ChatFormat,
    Conversation,
    Message,
    SkippedRow,
    Span,
    Tool,
    exchange,
)
from locret.policies.kvzip import REPEAT, REPEAT_AFTER

Cut = Literal["middle", "left", "right"]
Kind = Literal["answer", "replay"]

LEAD_TOKENS = 8  # of the context, told to a copy that does not begin at its start
ASKING_TOKENS = 256  # bound on what stands before an answer in its branch


@dataclass
class Sample:
    """Tokens of one conversation.

    Attributes:
        input_ids: int64 [n], the conversation; it ends with the last answer.
        answers: (start, end) of each answer, offsets in `input_ids`, end exclusive, in order and
            without overlap; at least one token stands before the first; the last ends at n.
        cut: tokens that were removed before the last answer, 0 for most.
        answers_cut: tokens that the bound took from answers, 0 for most: the end of the last answer
            is removed; of an earlier one it stays, as prompt of the later ones, and labels nothing.
        source: as in the conversation.
        id: as in the conversation.
        answers_unmatched: earlier answers that the chat template renders in another way once the
            conversation has gone on (it drops reasoning, say); they are prompt and label nothing.
        answers_removed: earlier answers that went with the tokens in `cut`.
        branches: (start, end) of each way to go on from the tokens before them, one answer in each;
            none where the conversation is one sequence. See `datamodules.encoder`.
    """

    input_ids: LongTensor
    answers: tuple[tuple[int, int], ...]
    cut: int
    answers_cut: int
    source: str
    id: str
    answers_unmatched: int = 0
    answers_removed: int = 0
    branches: tuple[tuple[int, int], ...] = ()

    @property
    def prompt_length(self) -> int:
        """Tokens before the last answer, or before the branches where there are any."""
        return self.branches[0][0] if self.branches else self.answers[-1][0]


class ConversationEncoder:
    """Turns conversations into samples. `ChatFormat` says which tokens, `cut_window` which go.

    Every answer of the assistant labels the tokens before it. Prompt and last answer have a bound
    each, and the prompt is cut before the answer is appended; earlier answers belong to the prompt.

    Args:
        tokenizer: of the backbone.
        max_prompt_tokens: bound on what stands before the last answer, template included.
        max_answer_tokens: bound on each answer, end-of-turn token included.
        cut: what of a long prompt goes. "middle" keeps the first and the last half, and so
            the template's frame, the opening and the question; "left" removes the start, with it
            the oldest turns; "right" the end.

    Raises:
        ValueError: for a bound below 1 or an unknown `cut`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int = 10240,
        max_answer_tokens: int = 512,
        cut: Cut = "middle",
    ) -> None:
        if max_prompt_tokens < 1 or max_answer_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens is {max_prompt_tokens} and max_answer_tokens is "
                f"{max_answer_tokens}; both must be at least 1"
            )
        if cut not in get_args(Cut):
            raise ValueError(f"cut is {cut!r}, expected one of {', '.join(get_args(Cut))}")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self.cut = cut
        self.format = ChatFormat(tokenizer)

    @property
    def settings(self) -> list[Any]:
        """What a sample depends on beside tokenizer and conversation."""
        return [self.max_prompt_tokens, self.max_answer_tokens, self.cut]

    def __call__(self, conversation: Conversation) -> Sample:
        """Encode one conversation.

        Raises:
            SkippedRow: if the last answer or the prompt is blank, the chat template refuses the
                roles or leaves tools out, or a text cannot be written as UTF-8.
        """
        try:
            return self._encode(conversation)
        except SkippedRow as error:
            where = conversation.place or conversation.id
            raise SkippedRow(error.reason, where) from error.__cause__

    def _encode(self, conversation: Conversation) -> Sample:
        messages, tools = conversation.messages, conversation.tools
        if is_blank(messages[-1]):
            raise SkippedRow("no answer")
        check_texts(messages, tools)
        self.format.check_tools(messages, tools)
        prompt = self.format.prompt_ids(messages[:-1], tools)
        answer = self.format.answer_ids(messages, tools, prompt)
        if not prompt or not answer:
            raise SkippedRow("no token")
        earlier, unmatched = self._earlier_answers(messages, prompt, tools)
        window = cut_window(len(prompt), self.max_prompt_tokens, self.cut, earlier)
        kept = prompt[: window[0]] + prompt[window[1] :]
        if not kept:
            raise SkippedRow("nothing of the prompt left after cutting")
        spans = (*cut_spans(earlier, window), (len(kept), len(kept) + len(answer)))
        bound = self.max_answer_tokens
        ids = torch.tensor(kept + answer[:bound], dtype=torch.long)
        return Sample(
            input_ids=ids,  # type: ignore[arg-type]
            answers=tuple((a, min(b, a + bound)) for a, b in spans),
            cut=len(prompt) - len(kept),
            answers_cut=sum(max(0, b - a - bound) for a, b in spans),
            source=conversation.source,
            id=conversation.id,
            answers_unmatched=unmatched,
            answers_removed=len(earlier) + 1 - len(spans),
        )

    def _earlier_answers(
        self, messages: tuple[Message, ...], prompt: list[int], tools: tuple[Tool, ...]
    ) -> tuple[tuple[Span, ...], int]:
        """Spans of the answers before the last one, and how many were not found again."""
        found: list[Span] = []
        unmatched = 0
        for i, message in enumerate(messages[:-1]):
            if message["role"] != "assistant" or not _asked(messages[:i]):
                continue  # a greeting answers nothing
            if is_blank(message):
                continue
            span = self.format.find_answer(messages, i, prompt, tools)
            if span is not None and (not found or span[0] >= found[-1][1]):
                found.append(span)
            else:
                unmatched += 1
        return tuple(found), unmatched


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


# ---- texts and cuts ------------------------------------------------------------------------------


def _asked(messages: tuple[Message, ...]) -> bool:
    return any(m["role"] != "assistant" and m["content"].strip() for m in messages)


def is_blank(message: Message) -> bool:
    """Whether a message says nothing and calls nothing."""
    return not message["content"].strip() and not message.get("tool_calls")


def check_texts(messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> None:
    """Refuse a prompt without text, and texts that no tokenizer takes.

    Raises:
        SkippedRow: says which of the two.
    """
    if not _asked(messages[:-1]):
        raise SkippedRow("empty prompt")
    # JSON can escape half a surrogate pair, which no tokenizer takes.
    rest = json.dumps([tools, *({**m, "content": ""} for m in messages)], ensure_ascii=False)
    if not all(map(is_unicode, (rest, *(m["content"] for m in messages)))):
        raise SkippedRow("not valid Unicode")


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, and so can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cut_window(length: int, limit: int, cut: Cut, answers: tuple[Span, ...] = ()) -> Span:
    """The stretch of a prompt that goes, so that at most `limit` tokens are left.

    Args:
        length: tokens of the prompt.
        limit: the most to keep, at least 1.
        cut: what goes. Without its middle an odd limit keeps one token more at the start
            than at the end.
        answers: earlier answers within the prompt, none of them at its very start.

    Returns:
        Start and exclusive end; both are `length` when nothing has to go.
    """
    if length <= limit:
        return length, length
    start = {"middle": (limit + 1) // 2, "left": 0, "right": limit}[cut]
    end = start + length - limit
    for first, last in answers:
        start = first if first < start < last else start
        end = last if first < end < last else end
    return start, end


def cut_spans(spans: tuple[Span, ...], window: Span) -> tuple[Span, ...]:
    """Where the spans lie once the window is gone; without those that went with it.

    A span that the cut left with no token before it is dropped too: there is nothing to label.
    """
    start, end = window
    gone = end - start
    kept = ((a, b) for a, b in spans if b <= start or a >= end)
    moved = ((a - gone, b - gone) if a >= end else (a, b) for a, b in kept)
    return tuple((a, b) for a, b in moved if a > 0)
