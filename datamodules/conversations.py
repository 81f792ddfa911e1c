"""Conversations, and how a tokenizer writes them: by its chat template, or else as plain text.

Tools that a conversation offers and calls are in the form that chat templates take:

    a tool     {"type": "function", "function": {"name", "description", "parameters"}}
    a call     {"type": "function", "id", "function": {"name", "arguments"}}
    a result   {"role": "tool", "tool_call_id", "content"}

The tokens of a conversation are those that the model will meet in use: the template over all
messages but the last, with the generation prompt, then the last answer and the token that ends a
turn. Earlier answers are found again in these tokens, never re-tokenised into them. An answer that
calls tools is what the template writes for it. Many templates write a conversation with tools and
leave the tools out, without an error: so what a template writes is tried on the conversation
itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # start and exclusive end

Tool = dict[str, Any]
"""A function that the assistant may call, as chat templates take it."""


class _Text(TypedDict):
    role: str
    content: str


class Message(_Text, total=False):
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or, for what a call returned, "tool".
        content: the text; may be empty where there are calls.
        tool_calls: of the assistant; left out where there are none.
        tool_call_id, name: of a tool's result, if the row says them.
    """

    tool_calls: list[Any]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant.

    Attributes:
        messages: in order; the last one is the assistant's. Every message of the assistant is an
            answer to learn from.
        source: the data set that it comes from.
        id: a name within the source, for messages to people.
        place: where to find it, such as file:line; empty where there is no such place.
        tools: what the assistant may call.
        context: how the last text before the answer begins, where the row tells the context from
            the question; the question follows. Empty where it does not.
        questions: all that is asked about the context, this one included: what follows the context
            in the prompt, and the answer.
    """

    messages: tuple[Message, ...]
    source: str = ""
    id: str = ""
    place: str = ""
    tools: tuple[Tool, ...] = ()
    context: str = ""
    questions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        roles = [m["role"] for m in self.messages]
        if not roles or roles[-1] != "assistant":
            raise ValueError(
                f"conversation {self.id!r} has the roles {roles}, expected the last one to be "
                "'assistant': without an answer there is nothing to learn from"
            )
        if self.context and not self.prompt_text.startswith(self.context):
            raise ValueError(
                f"conversation {self.id!r} has a context that is not how its last text before the "
                "answer begins; expected the context, then the question"
            )

    @property
    def prompt_text(self) -> str:
        """The last text before the answer."""
        return self.messages[-2]["content"] if len(self.messages) > 1 else ""


class SkippedRow(ValueError):
    """A conversation that gives no sample. `reason` is one of a few fixed texts, for counting."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{where or 'row'} skipped: {reason}")
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[type["SkippedRow"], tuple[str, str]]:
        # The default rebuilds from the message alone, when a loader's worker hands the error over.
        return type(self), (self.reason, self.where)


def exchange(prompt: str, answer: str) -> tuple[Message, Message]:
    """One question of the user and the answer to it."""
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


def about(context: str, asked: Sequence[tuple[str, str]], source: str, name: str) -> Conversation:
    """A context with questions about it and their answers, the first of which is the prompt's."""
    questions = tuple((f"\n\n{question}", answer) for question, answer in asked)
    messages = exchange(context + questions[0][0], questions[0][1])
    return Conversation(messages, source, name, context=context, questions=questions)


_CALL, _RESULT, _TOOL = "locretcall", "locretresult", "locrettool"
"""Names and texts that no conversation holds; a number follows."""

_BEGIN, _END = "locretbegin", "locretend"
"""Where the texts of a prompt begin and end."""

_TAKES_NO = {_CALL: "tool calls", _RESULT: "tool results", _TOOL: "tools"}

# Beside their own errors, templates fail as Python does: on a missing key, on adding to None.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError)


class ChatFormat:
    """Tokens of prompts and answers.

    Args:
        tokenizer: of the backbone. Without a chat template a prompt is the plain text of its
            messages, with blank lines between.

    Attributes:
        end_of_turn_id: the token that ends an answer, None if there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end_of_turn_id = end_of_turn_id(tokenizer)

    def check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Refuse a conversation whose tools the format would leave out.

        Raises:
            SkippedRow: says whether the template takes no tools, no calls or no results.
        """
        if not tools and not any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
            return
        if self.tokenizer.chat_template is None:
            raise SkippedRow("no chat template, which tools need")
        probed, offered, probes = _probed(messages, tools)
        try:
            text = str(self._applied(probed, offered, tokenize=False))
        except SkippedRow:
            text = ""
        lost = [probe for probe in probes if probe not in text]
        if lost:
            what = _TAKES_NO[lost[0].rstrip("-0123456789")]
            raise SkippedRow(f"the chat template takes no {what}")

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Tokens of the messages, up to where the assistant begins to speak.

        Raises:
            SkippedRow: if the chat template refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            text = "".join(m["content"] + "\n\n" for m in messages)
            ids = list(self.tokenizer(text, verbose=False)["input_ids"])
            # Some tokenizers close every text with eos; here the text goes on with the answer.
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        return self._template_ids(messages, tools, add_generation_prompt=True)

    def split_prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[str, str, str]:
        """A prompt in three texts: its opening, what is said, and what ends the last turn.

        Args:
            messages: as in `prompt_ids`, whose text the three are, one after the other.

        Returns:
            opening: all that stands before the first text that is not the system's.
            said: from there to the end of the last text, and what the template puts between.
            ending: the end of the last turn, up to where the assistant begins to speak.

        Raises:
            SkippedRow: if the chat template refuses the messages or leaves a text out.
        """
        if self.tokenizer.chat_template is None:
            bos = self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]
            opening = str(self.tokenizer.bos_token) if bos else ""
            return opening, "\n\n".join(m["content"] for m in messages), "\n\n"
        marked = [m.copy() for m in messages]
        first = next((i for i, m in enumerate(marked) if m["role"] != "system"), len(marked) - 1)
        marked[first]["content"] = _BEGIN + marked[first]["content"]
        marked[-1]["content"] += _END
        text = self._applied(marked, tools, tokenize=False, add_generation_prompt=True)
        opening, begun, rest = str(text).partition(_BEGIN)
        said, ended, ending = rest.rpartition(_END)
        if not begun or not ended:
            raise SkippedRow("the chat template leaves a text out")
        return opening, said, ending

    def answer_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool], prompt: Sequence[int]
    ) -> list[int]:
        """Tokens of the last message, an answer, with the end of the turn.

        Args:
            prompt: tokens of what stands before it (`prompt_ids`).

        Raises:
            SkippedRow: the answer calls tools, and the template writes it in another way behind a
                prompt than in a conversation.
        """
        if not messages[-1].get("tool_calls"):
            return self._answer_ids(messages[-1]["content"])
        whole = self._template_ids(messages, tools, add_generation_prompt=False)
        if whole[: len(prompt)] != list(prompt):
            raise SkippedRow("tool call not written behind its prompt")
        answer = whole[len(prompt) :]
        special = special_ids(self.tokenizer)
        # Behind the end of the turn many templates write a line break, which nobody generates.
        last = max((i for i, token in enumerate(answer) if token in special), default=len(answer))
        return answer[: last + 1]

    def find_answer(
        self,
        messages: Sequence[Message],
        index: int,
        ids: Sequence[int],
        tools: Sequence[Tool] = (),
    ) -> Span | None:
        """Where the answer `messages[index]` lies in `ids`, the tokens of a longer conversation.

        It is found if the prompt before it is a prefix of `ids` and its own tokens come next, with
        the end of the turn where there is a template. Otherwise the template writes a conversation
        in another way once it has gone on, or tokens merge across the border: None.
        """
        try:
            prompt = self.prompt_ids(messages[:index], tools)
            start = len(prompt)
            if not prompt or list(ids[:start]) != prompt:
                return None
            for answer in self._ways_to_write(messages[: index + 1], tools, prompt):
                if answer and list(ids[start : start + len(answer)]) == answer:
                    return start, start + len(answer)
        except SkippedRow:
            pass  # a conversation that may not stop here, though it may go on
        return None

    def _ways_to_write(
        self, messages: Sequence[Message], tools: Sequence[Tool], prompt: Sequence[int]
    ) -> list[list[int]]:
        """Tokens that the last message, an earlier answer, may have in a longer conversation."""
        if messages[-1].get("tool_calls"):
            return [self.answer_ids(messages, tools, prompt)]
        text = messages[-1]["content"]
        texts = dict.fromkeys((text, text.strip()))  # many templates strip
        has_template = self.tokenizer.chat_template is not None
        return [self._answer_ids(t) if has_template else self.text_ids(t) for t in texts]

    def _answer_ids(self, text: str) -> list[int]:
        ids = self.text_ids(text)
        return ids if self.end_of_turn_id is None else [*ids, self.end_of_turn_id]

    def _template_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool], **options: Any
    ) -> list[int]:
        quiet = {"verbose": False}
        found = self._applied(messages, tools, tokenizer_kwargs=quiet, **options)
        return list(found["input_ids"])

    def _applied(self, messages: Sequence[Message], tools: Sequence[Tool], **options: Any) -> Any:
        """What the chat template makes of messages; SkippedRow if it refuses them."""
        try:
            return self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tools=list(tools) or None, **options
            )
        except _TEMPLATE_ERRORS as error:
            raise SkippedRow("refused by the chat template") from error

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a piece of text, without any that a tokenizer puts around a whole one."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an answer: what the chat template puts after one, else eos, else None.

    The two differ in some families: Phi-3 ends a turn with `<|end|>`, a text with `<|endoftext|>`.
    """
    if tokenizer.chat_template is not None:
        marker = "locretanswer"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except _TEMPLATE_ERRORS:
            text = ""  # a template of an unusual shape: eos is the best guess left
        tail = tokenizer(text.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
        special = special_ids(tokenizer)
        if found := [i for i in tail if i in special]:
            return int(found[0])
    return tokenizer.eos_token_id


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for no text of their own: ends of turns, roles and the like."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _probed(
    messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[Message], list[Tool], list[str]]:
    """The conversation with a probe for each call, result and tool, and these in that order."""
    probes: dict[str, list[str]] = {_CALL: [], _RESULT: [], _TOOL: []}

    def probe(kind: str) -> str:
        probes[kind].append(f"{kind}-{len(probes[kind])}-")
        return probes[kind][-1]

    made: list[Message] = []
    for message in messages:
        copy = message.copy()
        if message["role"] == "tool":
            copy["content"] = probe(_RESULT)
        if message.get("tool_calls"):
            copy["tool_calls"] = [_renamed(call, probe(_CALL)) for call in message["tool_calls"]]
        made.append(copy)
    offered = [_renamed(tool, probe(_TOOL)) for tool in tools]
    return made, offered, [name for names in probes.values() for name in names]


def _renamed(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool or call under another name."""
    if isinstance(holder.get("function"), Mapping):
        return {**holder, "function": {**holder["function"], "name": name}}
    return {**holder, "name": name}
