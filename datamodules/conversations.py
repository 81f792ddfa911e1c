"""Conversations to tokens: a prompt, cut to a bound where it must be, followed by its answer.

encoder = ConversationEncoder(tokenizer, max_prompt_tokens=10240, max_answer_tokens=512)
sample = encoder(conversation)
sample.input_ids[: sample.prompt_length]   # what the cache will hold and the heads will score
sample.input_ids[sample.prompt_length :]   # the answer, whose attention gives the labels
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch
from jinja2 import TemplateError
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

Cut = Literal["middle", "left", "right"]


class Message(TypedDict):
    """One turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the answer of the assistant.

    Attributes:
        messages: in order; the last one is the assistant's and is the answer to learn from.
        source: the data set that it comes from.
        id: a name within the source, for messages to people.
    """

    messages: tuple[Message, ...]
    source: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        roles = [m["role"] for m in self.messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(
                f"conversation {self.id!r} has the roles {roles}, expected the last one to be "
                "'assistant': without an answer there is nothing to learn from"
            )


@dataclass
class Sample:
    """Tokens of one conversation.

    Attributes:
        input_ids: int64 [n], prompt then answer; 0 < prompt_length < n.
        prompt_length: tokens of the prompt after cutting; the answer starts at this index.
        cut: tokens that were removed from the prompt, 0 for most.
        answer_cut: tokens that were removed from the end of the answer, 0 for most.
        source: as in the conversation.
        id: as in the conversation.
    """

    input_ids: LongTensor
    prompt_length: int
    cut: int
    answer_cut: int
    source: str
    id: str


class SkippedRow(ValueError):
    """A conversation that gives no sample. `reason` is one of a few fixed texts, for counting."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{where or 'row'} skipped: {reason}")
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[type["SkippedRow"], tuple[str, str]]:
        # The default rebuilds from the message alone, when a loader's worker hands the error over.
        return type(self), (self.reason, self.where)


class ConversationEncoder:
    """Turns conversations into samples.

    The prompt is the chat template over all messages but the last, with the generation prompt; for
    a tokenizer without a template it is the plain text of these messages with blank lines between.
    The answer is the last message, tokenised by itself, then the token that ends a turn.

    Cut tokens never include the answer: each of the two parts has a bound of its own, and a prompt
    is cut before the answer is appended.

    Args:
        tokenizer: of the backbone.
        max_prompt_tokens: bound on the prompt, template included.
        max_answer_tokens: bound on the answer, end-of-turn token included.
        cut: which part of a long prompt goes. "middle" keeps the first and the last half, and so
            the template's frame, the opening and the question; "left" removes the start; "right"
            the end.

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
        self.end_of_turn_id = end_of_turn_id(tokenizer)

    def __call__(self, conversation: Conversation) -> Sample:
        """Encode one conversation.

        Raises:
            SkippedRow: if answer or prompt is blank, or the chat template refuses the roles.
        """
        *prompt, answer = conversation.messages
        if not answer["content"].strip():
            raise SkippedRow("no answer", conversation.id)
        if not any(m["content"].strip() for m in prompt):
            raise SkippedRow("empty prompt", conversation.id)
        prompt_ids = self._prompt_ids(prompt, conversation.id)
        answer_ids = self._answer_ids(answer["content"])
        kept = cut_tokens(prompt_ids, self.max_prompt_tokens, self.cut)
        ids = torch.tensor(kept + answer_ids[: self.max_answer_tokens], dtype=torch.long)
        return Sample(
            input_ids=ids,  # type: ignore[arg-type]
            prompt_length=len(kept),
            cut=len(prompt_ids) - len(kept),
            answer_cut=max(0, len(answer_ids) - self.max_answer_tokens),
            source=conversation.source,
            id=conversation.id,
        )

    def _prompt_ids(self, messages: list[Message], where: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            text = "".join(m["content"] + "\n\n" for m in messages)
            ids = list(self.tokenizer(text, verbose=False)["input_ids"])
            # Some tokenizers close every text with eos; here the text goes on with the answer.
            return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
        try:
            found = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                add_generation_prompt=True,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise SkippedRow("refused by the chat template", where) from error
        # A BatchEncoding in transformers 5, plain ids in 4.
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def _answer_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if self.end_of_turn_id is None else [*ids, self.end_of_turn_id]


def cut_tokens(ids: list[int], limit: int, cut: Cut) -> list[int]:
    """At most `limit` ids, the rest removed from the middle, the left or the right.

    Without its middle an odd limit keeps one token more at the start than at the end.
    """
    if len(ids) <= limit:
        return ids
    first = {"middle": (limit + 1) // 2, "left": 0, "right": limit}[cut]
    return ids[:first] + ids[len(ids) - (limit - first) :]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: what the chat template puts after one, else eos, else None.

    The two differ in some families: Phi-3 ends a turn with `<|end|>`, a text with `<|endoftext|>`.
    """
    if tokenizer.chat_template is not None:
        marker = "locretanswer"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError:
            text = ""  # a template of an unusual shape: eos is the best guess left
        tail = tokenizer(text.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        if found := [i for i in tail if i in special]:
            return int(found[0])
    return tokenizer.eos_token_id
