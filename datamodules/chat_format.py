"""How a tokenizer writes a conversation: its chat template, or plain text without one.

The tokens of a conversation are those that the model will meet in use: the template over all
messages but the last, with the generation prompt, then the last answer and the token that ends a
turn. Earlier answers are found again in these tokens, never re-tokenised into them. An answer that
calls tools is what the template writes for it. Many templates write a conversation with tools and
leave the tools out, without an error: so what a template writes is tried on the conversation itself
(`missing_from`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Message, SkippedRow, Tool

Span = tuple[int, int]  # start and exclusive end

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
        if missing := missing_from(self._written, messages, tools):
            raise SkippedRow(f"the chat template takes no {missing}")

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
        text = self._written(marked, tools, add_generation_prompt=True)
        if text is None:
            raise SkippedRow("refused by the chat template")
        opening, begun, rest = text.partition(_BEGIN)
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
        try:
            found: Any = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tools=list(tools) or None,
                tokenizer_kwargs={"verbose": False},
                **options,
            )
        except _TEMPLATE_ERRORS as error:
            raise SkippedRow("refused by the chat template") from error
        # A BatchEncoding in transformers 5, plain ids in 4.
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def _written(
        self, messages: Sequence[Message], tools: Sequence[Tool], **options: Any
    ) -> str | None:
        """The text of a conversation; None if the template refuses it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    **options,
                )
            )
        except _TEMPLATE_ERRORS:
            return None

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


def missing_from(
    write: Callable[[Sequence[Message], Sequence[Tool]], str | None],
    messages: Sequence[Message],
    tools: Sequence[Tool],
) -> str | None:
    """What a chat template leaves out of a conversation with tools.

    Args:
        write: the text of messages and tools, or None if the template refuses them.

    Returns:
        "tool calls", "tool results" or "tools"; None if the template writes all of them.
    """
    probed, probed_tools, probes = _probed(messages, tools)
    if not probes:
        return None
    text = write(probed, probed_tools)
    lost = probes if text is None else [probe for probe in probes if probe not in text]
    return _TAKES_NO[lost[0].rstrip("-0123456789")] if lost else None


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
