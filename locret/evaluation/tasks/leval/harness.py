"""What the task files here need of `locret.evaluation.leval`, in the harness's terms."""

import dataclasses
import logging
from typing import Any

from locret.evaluation import leval


def dataset(leval_task: str, leval_data: str | None = None, **metadata: Any) -> dict[str, Any]:
    """The split `test` of a task: one row a question.

    Args:
        leval_task: the task's name, from its file.
        leval_data: where the rows are, from `--metadata '{"leval_data": "..."}'`.

    Raises:
        ValueError: no data given, or it is not as it should be (`leval.load_questions`).
    """
    import datasets

    if leval_data is None:
        raise ValueError(
            f'leval_{leval_task} needs data: give --metadata \'{{"leval_data": "PLACE"}}\', where '
            "PLACE is a file, a folder or a Hub repository (L4NLP/LEval)"
        )
    questions, left_out = leval.load_questions(leval_task, leval_data)
    if left_out:
        logging.getLogger(__name__).warning(
            "leval_%s: %d questions are for judges and left out", leval_task, left_out
        )
    rows = [dataclasses.asdict(q) | {"leval_task": leval_task} for q in questions]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores of one answer by name."""
    return leval.score(doc["leval_task"], results[0], doc["references"])
