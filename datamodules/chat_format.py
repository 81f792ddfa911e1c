"""How a tokenizer writes a conversation: its chat template, or plain text without one.

The tokens of a conversation are those that the model will meet in use: the template over all
messages but the last, with the generation prompt, then the last answer and the token that ends a
turn. Earlier answers are found again in these tokens, never re-tokenised into them.
"""

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from datamodules.conversations import Message, SkippedRow
from datamodules.cutting import Span

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

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the messages, up to where the assistant begins to speak.

        Raises:
            SkippedRow: if the chat template refuses the messages.
        """
        if self.tokenizer.chat_template is None:
            text = "".join(m["content"] + "\n\n" for m in messages)
            ids = list(self.tokenizer(text, verbose=False)["input_ids"])
            # Some tokenizers close every text with eos; here the text goes on with the answer.
            return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        try:
            found = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                add_generation_prompt=True,
                tokenizer_kwargs={"verbose": False},
            )
        except _TEMPLATE_ERRORS as error:
            raise SkippedRow("refused by the chat template") from error
        # A BatchEncoding in transformers 5, plain ids in 4.
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def answer_ids(self, text: str) -> list[int]:
        """Tokens of an answer by itself, with the end of the turn."""
        ids = self._text_ids(text)
        return ids if self.end_of_turn_id is None else [*ids, self.end_of_turn_id]

    def find_answer(
        self, messages: Sequence[Message], index: int, ids: Sequence[int]
    ) -> Span | None:
        """Where the answer `messages[index]` lies in `ids`, the tokens of a longer conversation.

        It is found if the prompt before it is a prefix of `ids` and its own tokens come next, with
        the end of the turn where there is a template. Otherwise the template writes a conversation
        in another way once it has gone on, or tokens merge across the border: None.
        """
        try:
            prompt = self.prompt_ids(messages[:index])
        except SkippedRow:
            return None  # a conversation that may not stop here, though it may go on
        start, text = len(prompt), messages[index]["content"]
        if not prompt or list(ids[:start]) != prompt:
            return None
        for written in dict.fromkeys((text, text.strip())):  # many templates strip
            has_template = self.tokenizer.chat_template is not None
            answer = self.answer_ids(written) if has_template else self._text_ids(written)
            if answer and list(ids[start : start + len(answer)]) == answer:
                return start, start + len(answer)
        return None

    def _text_ids(self, text: str) -> list[int]:
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
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        if found := [i for i in tail if i in special]:
            return int(found[0])
    return tokenizer.eos_token_id
