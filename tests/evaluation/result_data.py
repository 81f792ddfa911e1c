"""Results of needles by hand: what was found by which setup, through the code that counts it."""

import json
from typing import Any

from locret.evaluation import results
from locret.evaluation.config import Setup
from locret.evaluation.questions import Prompt, Question
from locret.evaluation.records import OUT_OF_MEMORY, Record
from locret.tasks import TASKS, Sample, TaskSettings

HELD: dict[str, Any] = {
    "new_tokens": 2, "prompt_tokens": 48, "compressed_tokens": 48, "budget": 3, "units": (3.0, 3),
    "bytes": 2**19, "full_bytes": 2**22, "bytes_after": 2**20, "seconds": 0.5,
}  # fmt: skip


def asked(
    setup: Setup,
    found: list[bool | None],
    task: str = "niah_single",
    length: int = 300,
    depths: int = 2,
    **held: Any,
) -> list[tuple[Question, Record]]:
    """A setup's answers to needles, evenly spread; None: one that did not fit into the memory."""
    made = TASKS[task](TaskSettings(length=length))
    answered = []
    for number, right in enumerate(found):
        depth = (number % depths + 0.5) / depths
        sample = Sample(str(number), "", "", ("17",), depth=depth)
        question = Question(setup, made, sample, Prompt("", (1, 2), 1, 1), None, "s")
        facts = HELD | held | {"answer": "It is 17." if right else "no", "end": "eos"}
        if right is None:
            facts |= {"end": OUT_OF_MEMORY, "answer": "", "new_tokens": 0, "units": (0.0, 0)}
            facts |= {name: 0 for name in facts if name.endswith("bytes")} | {"bytes_after": 0}
        record = Record(
            settings="s", prompt="p", setup=setup.label, task=made.label, sample=sample.id, cut=0,
            answer_cut=False, **facts,
        )  # fmt: skip
        answered.append((question, record))
    return answered


def result_of(
    *answered: list[tuple[Question, Record]], depths: int = 2, **manifest: Any
) -> dict[str, Any]:
    """The result of an evaluation of them."""
    config = {"model": "tiny", "adapter": None, "heads": "runs/heads", "depths": depths}
    made = {
        "kind": results.KIND,
        "format": results.FORMAT,
        "name": "needles",
        "manifest": {"config": config, "computed": [], **manifest},
        **results.figures(sum(answered, [])),
    }
    return json.loads(json.dumps(made))
