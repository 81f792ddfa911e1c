"""Conversations to tokens: one sample each, cut to a bound where it must be.

encoder = ConversationEncoder(tokenizer, max_prompt_tokens=10240, max_answer_tokens=512)
sample = encoder(conversation)
start, end = sample.answers[0]
sample.input_ids[:start]      # what the cache holds when the first answer begins
sample.input_ids[start:end]   # the answer, whose attention labels the tokens before it

Of an over-long prompt one stretch goes: the middle, the left or the right. Where it would begin or
end inside an earlier answer of the conversation it grows until that answer is gone as a whole, for
half an answer would teach what nobody said; the prompt is then shorter than the bound by up to that
answer's length.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import ChatFormat, Conversation, Message, SkippedRow, Span, Tool

Cut = Literal["middle", "left", "right"]


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
            none where the conversation is one sequence. See `datamodules.branches`.
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
