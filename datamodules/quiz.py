"""Questions that a model asks itself about texts, and its answers to them.

    python -m datamodules.quiz --model MODEL --output quiz.jsonl \\
        --source datamodules.texts.TextSource --source.path books --source.tokens [512,4096]

They are generated once, greedily, by the stock model: a question from a passage alone, the answer
from the whole text, in the words in which training asks (self-study, arXiv 2506.06266). So heads
and adapters learn what is asked for in texts to which nobody wrote questions. Each text gives a row
`{"context", "qa"}`, which `JsonlSource` reads. A command that is repeated goes on where it stopped.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jsonargparse import auto_cli

from datamodules.conversations import ChatFormat, Conversation, SkippedRow, exchange
from datamodules.sources import Source
from locret.commands.progress import Progress
from locret.engine.arguments import end_tokens, padded
from locret.model.loading import Dtype, LoadedModel, load_model
from locret.system.interrupts import run_command

ASK = "Write one question that the text above answers. Write the question and nothing else."
NOTE = "stopped; the same command goes on with the next text"


@dataclass
class Quiz:
    """Asks a model about texts.

    Args:
        loaded: the model.
        questions: about a text, one from each stretch of it.
        passage_tokens: what a question is made from, at a place in its stretch that is drawn.
        max_question_tokens, max_answer_tokens: what is longer is cut.
        seed: another seed, other passages.
    """

    loaded: LoadedModel
    questions: int
    passage_tokens: int
    max_question_tokens: int
    max_answer_tokens: int
    seed: int

    def __post_init__(self) -> None:
        self.format = ChatFormat(self.loaded.tokenizer)

    def about(self, text: str) -> list[dict[str, object]]:
        """Questions, each with an answer, as a row's "qa"."""
        asked = self._said(
            [f"{each}\n\n{ASK}" for each in self._passages(text)], self.max_question_tokens
        )
        lines = [each.strip().partition("\n")[0].strip() for each in asked]
        questions = [*dict.fromkeys(filter(_is_question, lines))]
        answers = self._said([f"{text}\n\n{each}" for each in questions], self.max_answer_tokens)
        pairs = zip(questions, answers, strict=True)
        return [{"question": q, "answers": [a.strip()]} for q, a in pairs if a.strip()]

    def _passages(self, text: str) -> list[str]:
        ids, rng = self.format.text_ids(text), Random(f"locret quiz {self.seed} {text}")
        last = max(0, len(ids) - self.passage_tokens)
        places = ((i + rng.random()) / self.questions for i in range(self.questions))
        starts = (min(int(place * len(ids)), last) for place in places)
        return [self.loaded.tokenizer.decode(ids[at : at + self.passage_tokens]) for at in starts]

    @torch.no_grad()
    def _said(self, prompts: Sequence[str], most: int) -> list[str]:
        """What the model answers to each."""
        if not prompts:
            return []
        rows = [self.format.prompt_ids(exchange(prompt, "")[:1]) for prompt in prompts]
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        ids, mask = padded(rows, model.device)
        ends = end_tokens(model, tokenizer)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most,
            **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
            repetition_penalty=1.0,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def _is_question(line: str) -> bool:
    """Whether it is one and came to its end: small models also repeat what they read."""
    return line.endswith(("?", "？"))


def write_quiz(
    model: str,
    source: Source,
    output: str,
    texts: int = 1000,
    questions: int = 4,
    passage_tokens: int = 96,
    max_question_tokens: int = 64,
    max_answer_tokens: int = 128,
    max_text_tokens: int = 8192,
    seed: int = 0,
    dtype: Dtype = "auto",
    adapter: str | None = None,
    revision: str | None = None,
) -> None:
    """Write questions and answers about the first texts of a source.

    Args:
        model: a Hub id, a folder, or `embedded:smollm2`.
        source: of texts or conversations; of the latter the context counts, else the prompt.
        output: a `.jsonl` file, written on if it is there.
        texts: how many; all if the source has fewer.
        questions, passage_tokens, max_question_tokens, max_answer_tokens, seed: see `Quiz`.
        max_text_tokens: longer texts are left out.
        dtype, adapter, revision: of the model, as for `locret.model.loading.load_model`.

    Raises:
        ValueError: a number below 1, or an output that is something else.
    """
    counts = questions, passage_tokens, max_question_tokens, max_answer_tokens
    if min(texts, max_text_tokens, *counts) < 1:
        raise ValueError(f"texts is {texts}, and other numbers are {counts}; expected at least 1")
    path = Path(output)
    first = _next(path)
    loaded = load_model(model, dtype=dtype, adapter=adapter, revision=revision)
    found, quiz = source.load(loaded.tokenizer), Quiz(loaded, *counts, seed)
    total = min(texts, len(found))
    with path.open("a", encoding="utf-8") as file, Progress("asking", "texts") as progress:
        progress(min(first, total), total)
        for number in range(first, total):
            row = _row(quiz, found, number, max_text_tokens)
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
            progress(number + 1, total)


def _row(
    quiz: Quiz, found: Sequence[Conversation], number: int, most: int
) -> dict[str, object] | None:
    """What is written of a text; None if it cannot be used."""
    try:
        conversation = found[number]
    except SkippedRow:
        return None
    text = conversation.context or conversation.prompt_text
    if len(quiz.format.text_ids(text)) > most or not (qa := quiz.about(text)):
        return None
    return {"number": number, "source": f"quiz/{conversation.source}", "context": text, "qa": qa}


def _next(path: Path) -> int:
    """The number of the text to go on with. What was broken off within a row is cut away.

    Raises:
        ValueError: the file is something else.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    rows, _, rest = content.rpartition(b"\n")
    try:
        last: int = json.loads(rows.splitlines()[-1])["number"] if rows else -1
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output {path} has rows of something else; name another file") from error
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    return last + 1


def main(args: list[str] | None = None) -> None:
    """The command (`write_quiz`)."""
    auto_cli(write_quiz, args=args, as_positional=False, prog="python -m datamodules.quiz")


if __name__ == "__main__":
    sys.exit(run_command("datamodules.quiz", main, note=NOTE))
