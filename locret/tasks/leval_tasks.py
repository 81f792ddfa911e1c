"""L-Eval's tasks (`locret.tasks.leval`) as tasks of an evaluation: `leval_tpo` and so on."""

from pathlib import Path
from typing import ClassVar

from locret.tasks import leval, metrics
from locret.tasks.base import Measure, Sample, Task


class LEvalTask(Task):
    """One of L-Eval's tasks; its data is `leval_TASK.jsonl` or the like in the data folder, or
    what `data.leval` names: a file or folder."""

    of: ClassVar[str]

    def files(self) -> list[Path]:
        place = self.settings.data.get("leval") or self.settings.data_dir
        if place is None:
            raise ValueError(f"{self.name} needs data: give its folder with --data-dir")
        return [leval.find_data(self.of, place)]

    def check_packages(self) -> None:
        if self.metrics == metrics.ROUGE:
            metrics.check_rouge()

    def samples(self, limit: int | None, measure: Measure, fingerprint: str) -> list[Sample]:
        """The questions, one of each document, then another of each, and so on."""
        asked, _ = leval.load_questions(self.of, self.files()[0])
        turns: dict[str, int] = {}
        ordered: list[tuple[int, Sample]] = []
        for question in asked:
            group = question.group or question.id
            turn = turns[group] = turns.get(group, -1) + 1
            sample = Sample(
                id=question.id,
                context=question.context,
                question=question.question,
                answers=question.references,
                group=question.group,
            )
            ordered.append((turn, sample))
        ordered.sort(key=lambda pair: pair[0])  # stable: documents stay in order
        return [sample for _, sample in ordered][:limit]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return leval.score(self.of, answer, sample.answers)


def _task(of: str, kind: leval.Kind) -> type[LEvalTask]:
    values = {
        "__doc__": f"L-Eval's {of}.",
        "of": of,
        "name": f"leval_{of}",
        "metrics": kind.metrics,
        "max_new_tokens": kind.max_new_tokens,
    }
    return type(f"LEval_{of}", (LEvalTask,), values)


LEVAL_TASKS: tuple[type[LEvalTask], ...] = tuple(
    _task(of, kind) for of, kind in leval.TASKS.items()
)
