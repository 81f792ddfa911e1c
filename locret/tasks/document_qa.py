"""Questions that people asked about documents, answered in their own words: FairytaleQA (Xu et al.,
2022) and QMSum (Zhong et al., 2021).
"""

from pathlib import Path
from typing import ClassVar

from locret.tasks import metrics
from locret.tasks.base import Prompts, Sample, Task, in_turns, read_contexts


class DocumentQATask(Task):
    """The rows of one file. The scores are ROUGE-L F1 and token F1, the best over the references.

    Attributes:
        file: its usual name; data are given under the task's name.
        before: stands in front of the document.
        asked: between the document and the question; the context ends where it begins.
        after: behind the question.
    """

    metrics = ("rouge_l", "f1")
    file: ClassVar[str]
    before: ClassVar[str] = ""
    asked: ClassVar[str] = "\n\n"
    after: ClassVar[str] = ""

    def files(self) -> list[Path]:
        return [self.settings.file(self.name, self.file)]

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """Questions go round the documents."""
        samples = (
            Sample(
                id=f"{row['id']}/{turn}",
                context=self.before + row["context"].strip(),
                question=self.asked + asked["question"].strip() + self.after,
                answers=tuple(dict.fromkeys(asked["answers"])),
                group=str(row["id"]),
            )
            for row in read_contexts(self.files()[0])
            for turn, asked in enumerate(row["qa"])
        )
        return in_turns(samples)[:limit]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {
            "rouge_l": metrics.rouge(answer, sample.answers)["rougeL"],
            "f1": metrics.token_f1(answer, sample.answers),
        }


class FairytaleQATask(DocumentQATask):
    """Questions that experts asked about whole fairy tales: the validation stories."""

    name = "fairytaleqa"
    file = "fairytaleqa_val.jsonl.gz"
    max_new_tokens = 32
    stop = ("\n",)


class QMSumTask(DocumentQATask):
    """Queries about meetings, on the stretch of the transcript that answers them: the validation
    meetings. Worded as in LongBench (Bai et al., 2023), which asks about whole meetings."""

    name = "qmsum"
    file = "qmsum_windowed_val.jsonl.gz"
    before = (
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n"
    )
    asked = (
        "\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: "
    )
    after = "\nAnswer:"
    max_new_tokens = 160  # 9 in 10 references have at most 100 words
