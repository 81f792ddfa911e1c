"""From messages and texts to token ids, by the tokenizer's chat template.

A context is read up to the end of the user's last text, and the turn stays open. A question goes on
in that turn: a blank line, the question, the end of the turn and the start of the answer. So both
together are what one prompt with the text and the question would be.
"""

from collections.abc import Sequence
from typing import Any

from locret.serve.errors import Refused

PLACE = "<<locret: the text>>"
"""Stands for the text of a context while the template is filled in."""
BETWEEN = "\n\n"
"""Between the text of a context and the question."""

Messages = Sequence[dict[str, str]]


class Prompts:
    """Makes token ids for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = len(tokenizer)

    def chat(self, messages: Messages) -> tuple[list[int], int]:
        """The prompt of a conversation, and how many of its first tokens are all messages but the
        last. Raises Refused: no chat template, or one that refuses the messages."""
        text = self._filled(messages, answer=True)
        earlier = self._shared_text(messages, text)
        if not earlier or not self.tokenizer.is_fast:
            return self._ids(text), 0
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        ends = (end for _, end in encoded["offset_mapping"])
        ids = list(encoded["input_ids"])
        shared = next((i for i, end in enumerate(ends) if end > len(earlier)), len(ids))
        return ids, min(shared, len(ids) - 1)

    def completion(self, prompt: str | list[int], follows: bool = False) -> list[int]:
        """The ids of a plain prompt, special tokens as the tokenizer adds them.

        Args:
            prompt: a text, or ids.
            follows: it follows a context, so that nothing is added.

        Raises:
            Refused: ids that the tokenizer does not have, or no tokens.
        """
        ids = self._ids(prompt, special=not follows) if isinstance(prompt, str) else prompt
        if not ids:
            raise Refused(400, "the prompt has no tokens; send some text")
        if not all(0 <= token < self.vocabulary for token in ids):
            raise Refused(400, f"a token id of the prompt is not in 0 to {self.vocabulary - 1}")
        return ids

    def context(self, messages: Messages) -> list[int]:
        """What is read of a context: up to the end of the last text, which must be the user's.
        Raises Refused: no text, the last message is not the user's, or as `chat`."""
        *earlier, last = messages
        text = last["content"].strip()
        if not text:
            raise Refused(400, "the context has no text; send some")
        if last["role"] != "user":
            raise Refused(
                400, f"the last message of a context is the {last['role']}'s; expected the user's"
            )
        if not self.tokenizer.chat_template:
            return self._ids(text, special=True)
        standing = {"role": "user", "content": PLACE}
        before, _, _ = self._filled([*earlier, standing], answer=True).rpartition(PLACE)
        return self._ids(before + text)

    def question(self, messages: Messages) -> list[int]:
        """What is asked about a context; later messages follow as further turns. Raises Refused:
        the first message is not the user's, or as `chat`."""
        first, *later = messages
        if first["role"] != "user":
            raise Refused(
                400,
                f"the first message about a context is the {first['role']}'s; expected the user's "
                "(system messages belong in the context itself)",
            )
        standing = first | {"content": PLACE + BETWEEN + first["content"].strip()}
        _, _, behind = self._filled([standing, *later], answer=True).partition(PLACE)
        return self._ids(behind)

    def asked(self, messages: Messages, follows: bool) -> tuple[list[int], int]:
        """As `question`, where it follows a context, else as `chat`: ids, how many are shared."""
        return (self.question(messages), 0) if follows else self.chat(messages)

    def _shared_text(self, messages: Messages, text: str) -> str:
        """How the prompt begins that other last messages would have too."""
        if len(messages) < 2:
            return ""
        try:
            earlier = self._filled(messages[:-1], answer=False)
        except Refused:  # of templates that want a user's message last
            return ""
        return earlier if text.startswith(earlier) else ""

    def _filled(self, messages: Messages, answer: bool) -> str:
        from jinja2.exceptions import TemplateError

        if not self.tokenizer.chat_template:
            raise Refused(400, "this model has no chat template; use /v1/completions")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(
                400, f"the model's chat template refuses the messages: {reason}"
            ) from error
        return str(text)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
