"""FairytaleQA (Xu et al., 2022): questions that experts asked about whole fairy tales."""

from pathlib import Path

from locret.tasks.base import Measure, Sample, Task
from locret.tasks.metrics import token_f1
from locret.tasks.rows import read_contexts
from locret.tasks.text_metrics import rouge_l


class FairytaleQATask(Task):
    """The validation stories; the score is ROUGE-L F1, the best over the references."""

    name = "fairytaleqa"
    metrics = ("rouge_l", "f1")
    max_new_tokens = 32
    stop = ("\n",)

    def files(self) -> list[Path]:
        return [self.settings.file("fairytaleqa", "fairytaleqa_val.jsonl.gz")]

    def samples(self, limit: int | None, measure: Measure, fingerprint: str) -> list[Sample]:
        """Of every story the first question, then of every story the second one, and so on."""
        rounds: dict[int, list[Sample]] = {}
        for row in read_contexts(self.files()[0]):
            for turn, asked in enumerate(row["qa"]):
                sample = Sample(
                    id=f"{row['id']}/{turn}",
                    context=row["context"].strip(),
                    question="\n\n" + asked["question"].strip(),
                    answers=tuple(dict.fromkeys(asked["answers"])),
                    group=str(row["id"]),
                )
                rounds.setdefault(turn, []).append(sample)
        return [sample for turn in sorted(rounds) for sample in rounds[turn]][:limit]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {
            "rouge_l": rouge_l(answer, sample.answers),
            "f1": token_f1(answer, sample.answers),
        }
