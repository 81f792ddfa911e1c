"""Our tasks as task files of lm-evaluation-harness, written into a folder that it is told of.

RULER and the documents are called `offline_...`, beside the harness's own versions of them, which
need a network; the group `offline_ruler` is the mean of RULER's tasks.
"""

from collections.abc import Sequence
from pathlib import Path

from locret.tasks import GROUPS, TASKS, Task

CALLED = "locret.integrations.lm_eval.documents"


def harness_name(task: str) -> str:
    """What the harness calls one of our tasks, or a group of them."""
    return task if task.startswith("leval") else f"offline_{task}"


def write_task_files(folder: Path) -> Path:
    """Write a file for every task, and one for RULER as a group; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        (folder / f"{harness_name(name)}.yaml").write_text(_task(task), encoding="utf-8")
    (folder / "offline_ruler.yaml").write_text(_group("ruler", "string_match"), encoding="utf-8")
    return folder


def _task(task: type[Task]) -> str:
    tag = "tag: leval\n" if task.name in GROUPS["leval"] else ""
    # Needles come with the answer's first words; the harness puts them behind the chat template.
    prefix = 'gen_prefix: "{{gen_prefix}}"\ntarget_delimiter: " "\n'
    return f"""\
task: {harness_name(task.name)}
{tag}dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function {CALLED}.dataset
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answers[0]}}}}"
{prefix if task.name in (*GROUPS["ruler"], *GROUPS["needles"]) else ""}\
process_results: !function {CALLED}.process_results
generation_kwargs:
  do_sample: false
  max_gen_toks: {task.max_new_tokens}
  until: []
metric_list:
{_metrics(task.metrics)}\
metadata:
  version: {task.version}.0
  locret_task: {task.name}
"""


def _metrics(names: Sequence[str]) -> str:
    return "".join(
        f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n" for name in names
    )


def _group(name: str, metric: str) -> str:
    tasks = "".join(f"  - {harness_name(task)}\n" for task in GROUPS[name])
    return f"""\
group: {harness_name(name)}
task:
{tasks}\
aggregate_metric_list:
  - metric: {metric}
    weight_by_size: false
metadata:
  version: 1.0
"""
