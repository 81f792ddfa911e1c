"""Tasks of evaluations by name. Every file here that defines a `Task` with a name adds it, and
nothing else need be edited."""

import importlib
import pkgutil
from collections.abc import Sequence

from locret.tasks.base import NAMED, Prompts, Sample, Task, TaskSettings

__all__ = ["DATA", "GROUPS", "TASKS", "Prompts", "Sample", "Task", "TaskSettings", "task_names"]

FIRST = ("ruler", "synthetic", "documents")
"""Files whose tasks are listed before those of the others, which follow by name."""

for _name in (*FIRST, *(file.name for file in pkgutil.iter_modules(__path__))):
    importlib.import_module(f"{__name__}.{_name}")

TASKS: dict[str, type[Task]] = {task.name: task for task in NAMED}
"""A task's class by the name of the task."""

DATA: tuple[str, ...] = tuple(dict.fromkeys(name for task in NAMED for name in task.data))
"""Names that data files are given by."""

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task.name for task in NAMED if task.group == group)
    for group in dict.fromkeys(task.group for task in NAMED if task.group)
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
