"""FairytaleQA (Xu et al., 2022): questions that experts asked about whole fairy tales."""

from pathlib import Path

from locret.tasks import metrics
from locret.tasks.base import Prompts, Sample, Task, in_turns, read_contexts


class FairytaleQATask(Task):
    """The validation stories; the score is ROUGE-L F1, the best over the references."""

    name = "fairytaleqa"
    metrics = ("rouge_l", "f1")
    max_new_tokens = 32
    stop = ("\n",)

    def files(self) -> list[Path]:
        return [self.settings.file("fairytaleqa", "fairytaleqa_val.jsonl.gz")]

    def check_packages(self) -> None:
        metrics.check_rouge()

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """Questions go round the stories."""
        samples = (
            Sample(
                id=f"{row['id']}/{turn}",
                context=row["context"].strip(),
                question="\n\n" + asked["question"].strip(),
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
