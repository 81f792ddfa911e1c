"""From a sample to token ids, and where in them context and question end.

The whole prompt is tokenized at once and then cut, so that both protocols and a full cache read the
very same tokens. A token that reaches over a cut belongs to what follows.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from locret.tasks import Sample

Protocol = Literal["query_agnostic", "query_aware"]
"""What is known when the context is compressed.

query_agnostic  the context alone is read and compressed
query_aware     the policy sees the question, behind the context's last chunk, before the final
                eviction; query-aware heads get it in front of the context

Either way the question follows the compressed context, and is never evicted.
"""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: all of it.
        ids: its tokens.
        context_end: tokens before the question; at least one token comes after.
        question_end: tokens before the end of the user's turn; likewise.
        cut: tokens that were taken out of the context to fit a limit.
        answer_cut: an answer stood in what was taken out and stands in the context no more.
    """

    text: str
    ids: tuple[int, ...]
    context_end: int
    question_end: int
    cut: int = 0
    answer_cut: bool = False

    @cached_property
    def key(self) -> str:
        """Recognises the prompt's tokens and cuts."""
        cuts = f"{self.context_end} {self.question_end} "
        return hashlib.sha256((cuts + " ".join(map(str, self.ids))).encode()).hexdigest()[:16]


class Renderer:
    """Renders samples for one tokenizer.

    Args:
        tokenizer: a fast one: it must tell where its tokens stand in the text.
        chat: put the user's turn into the tokenizer's chat template.
        answer_prefix: let prompts end with the first words of the answer, where samples have them.

    Raises:
        ValueError: the tokenizer is no fast one, or has no chat template to apply.
    """

    def __init__(self, tokenizer: Any, chat: bool, answer_prefix: bool = True) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, which does not tell where its "
                "tokens stand in the text; a fast tokenizer is needed"
            )
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; set chat_template to false for raw prompts"
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.answer_prefix = answer_prefix

    @property
    def fingerprint(self) -> str:
        """Recognises the tokenizer and its template."""
        both = (
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.chat and self.tokenizer.chat_template),
        )
        return hashlib.sha256("\n".join(both).encode()).hexdigest()[:16]

    def measure(self, sample: Sample) -> int:
        """Tokens of the rendered prompt."""
        text = self._text(sample)[0]
        return len(self._encode(text)["input_ids"])

    def render(self, sample: Sample, limit: int | None = None) -> Prompt:
        """The prompt of a sample, its context cut in the middle to fit `limit` tokens. ValueError
        if the chat template changes the user's text, or the limit leaves no room."""
        text, context_end, question_end = self._text(sample)
        encoded = self._encode(text, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        prompt = Prompt(
            text=text,
            ids=tuple(ids),
            context_end=min(_tokens_before(ends, context_end), len(ids) - 1),
            question_end=min(_tokens_before(ends, question_end), len(ids) - 1),
        )
        return prompt if limit is None else self._cut(prompt, sample, limit)

    def _text(self, sample: Sample) -> tuple[str, int, int]:
        """The text, and the characters at which context and question end."""
        turn = sample.context + sample.question
        prefix = sample.answer_prefix if self.answer_prefix else ""
        if not self.chat:
            text = turn + prefix
            return text, len(sample.context), len(turn)
        # Templates may strip the turn, so that it is stripped here.
        lead = len(turn) - len(turn.lstrip())
        turn = turn.strip()
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        start = text.find(turn)
        if start < 0:
            raise ValueError("the chat template changes the user's text: question cannot be found")
        context = max(0, min(len(sample.context) - lead, len(turn)))
        return text + prefix.lstrip(), start + context, start + len(turn)

    def _encode(self, text: str, **wanted: Any) -> Any:
        # verbose=False: a text above model_max_length is meant, and no reason for a warning.
        return self.tokenizer(text, add_special_tokens=not self.chat, verbose=False, **wanted)

    def _cut(self, prompt: Prompt, sample: Sample, limit: int) -> Prompt:
        over = len(prompt.ids) - limit
        if over <= 0:
            return prompt
        if over >= prompt.context_end:
            raise ValueError(
                f"sample {sample.id} has a prompt of {len(prompt.ids)} tokens, "
                f"{prompt.context_end} of them context; it cannot be cut to {limit} tokens: raise "
                "max_length"
            )
        start = (prompt.context_end - over) // 2
        ids = prompt.ids[:start] + prompt.ids[start + over :]
        left = self.tokenizer.decode(ids[: prompt.context_end - over]).casefold()
        lost = [a for a in sample.answers if a.casefold() in sample.context.casefold()]
        return Prompt(
            text=self.tokenizer.decode(ids),
            ids=ids,
            context_end=prompt.context_end - over,
            question_end=prompt.question_end - over,
            cut=over,
            answer_cut=any(answer.casefold() not in left for answer in lost),
        )


def _tokens_before(ends: list[int], character: int) -> int:
    """Tokens that end at or before a character."""
    return next((i for i, end in enumerate(ends) if end > character), len(ends))
