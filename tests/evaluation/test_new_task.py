"""A task is one file: nothing else names it."""

import subprocess
import sys

FILE = """
from locret.tasks.base import Sample, Task


class Mine(Task):
    name = "mine"
    group = "ours"
    data = {"mine": "mine.jsonl"}
    metrics = ("exact_match",)
    max_new_tokens = 8

    def samples(self, limit, prompts):
        return [Sample("0", "A fox came.", " Who?", ("a fox",))][:limit]

    def score(self, sample, answer):
        return {"exact_match": float(answer in sample.answers)}
"""

CODE = """
import importlib.util, sys
spec = importlib.util.find_spec("locret.tasks")
spec.submodule_search_locations.append(sys.argv[1])
tasks = sys.modules["locret.tasks"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tasks)
print(list(tasks.TASKS)[-1], tasks.GROUPS["ours"], tasks.DATA[-1], tasks.task_names(["ours"]))
try:
    tasks.TASKS["mine"](tasks.TaskSettings()).files()
except ValueError as error:
    print(error)
"""


def test_a_file_in_the_folder_adds_its_task(tmp_path):
    (tmp_path / "zoo.py").write_text(FILE)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "mine ('mine',) mine ['mine']"
    assert "--data.mine PATH" in second
