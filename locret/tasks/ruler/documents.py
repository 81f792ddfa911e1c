"""RULER's question answering: SQuAD (qa_1) and HotpotQA (qa_2) among other documents."""

from pathlib import Path
from random import Random
from typing import ClassVar

from locret.tasks.base import Sample
from locret.tasks.metrics import string_match_part
from locret.tasks.rows import read_contexts
from locret.tasks.ruler.base import RulerTask

REQUEST = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\n"
)
CONTEXT = REQUEST + "The following are given documents.\n\n{documents}"
QUESTION = "\n\n" + REQUEST + "Question: {question}"
ANSWER = " Answer:"


class DocumentTask(RulerTask):
    """A question, the documents that answer it, and others of the same file, in seeded order.

    Which questions come first is seeded too: neighbours in the file ask about the same text.
    """

    max_new_tokens = 32
    match = staticmethod(string_match_part)
    data: ClassVar[str]
    file: ClassVar[str]

    def files(self) -> list[Path]:
        return [self.settings.file(self.data, self.file)]

    def prepare(self) -> None:
        self._questions = [
            (asked["question"].strip(), tuple(dict.fromkeys(asked["answers"])), documents)
            for documents, row in (
                (self.documents_of(row["context"]), row) for row in read_contexts(self.files()[0])
            )
            for asked in row["qa"]
        ]
        Random(f"{self.name} {self.settings.seed}").shuffle(self._questions)
        self._documents = sorted({text for _, _, own in self._questions for text in own})
        self.most = len(self._documents)

    def documents_of(self, context: str) -> list[str]:
        """The documents that a row's context holds."""
        return [context.strip()]

    def available(self) -> int | None:
        return len(self._questions)

    def draft(self, rng: Random, index: int, size: int) -> Sample:
        question, answers, own = self._questions[index]
        others = rng.sample(self._documents, min(size + len(own), len(self._documents)))
        chosen = own + [text for text in others if text not in own][: max(size - len(own), 0)]
        rng.shuffle(chosen)
        numbered = [f"Document {i}:\n{text}" for i, text in enumerate(chosen, start=1)]
        return Sample(
            id=str(index),
            context=CONTEXT.format(documents="\n\n".join(numbered)),
            question=QUESTION.format(question=question),
            answers=answers,
            answer_prefix=ANSWER,
        )


class Squad(DocumentTask):
    name = "ruler_qa_1"
    data, file = "squad", "squad_dev_short.jsonl.gz"


class HotpotQA(DocumentTask):
    name = "ruler_qa_2"
    data, file = "hotpotqa", "hotpotqa_dev.jsonl.gz"

    def documents_of(self, context: str) -> list[str]:
        """Paragraphs, each under its title, with a blank line between them."""
        return [text.strip() for text in context.split("\n\n") if text.strip()]
