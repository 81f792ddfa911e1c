"""Evaluation tasks by name."""

from collections.abc import Sequence

from locret.tasks.base import Prompts, Sample, Task, TaskSettings
from locret.tasks.code import CodeTask
from locret.tasks.document_qa import FairytaleQATask, QMSumTask
from locret.tasks.leval import LEVAL_TASKS
from locret.tasks.ruler import RULER_TASKS
from locret.tasks.synthetic import HAYSTACK, NEEDLE_TASKS

__all__ = ["DATA", "GROUPS", "TASKS", "Prompts", "Sample", "Task", "TaskSettings", "task_names"]

_DOCUMENTS: tuple[type[Task], ...] = (FairytaleQATask, QMSumTask, CodeTask)

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (*RULER_TASKS, *NEEDLE_TASKS, *_DOCUMENTS, *LEVAL_TASKS)
}
"""A task's class by the name of the task."""

DATA = ("squad", "hotpotqa", "haystack", "words", HAYSTACK, "fairytaleqa", "qmsum", "leval")
"""Names that data files are given by."""

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(task.name for task in RULER_TASKS),
    "needles": tuple(task.name for task in NEEDLE_TASKS),
    "leval": tuple(task.name for task in LEVAL_TASKS),
}
"""Names that stand for several tasks."""


def task_names(names: Sequence[str]) -> list[str]:
    """Names with groups spelt out, each once, in order; ValueError for one that is no task and no
    group."""
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown:
        raise ValueError(
            f"tasks {', '.join(unknown)} are unknown; expected some of "
            f"{', '.join([*GROUPS, *TASKS])}"
        )
    return list(dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,))))
