"""Our tasks in the terms of lm-evaluation-harness: its task files, and the functions they call.

The files are written into a folder that the harness is told of. RULER and the documents are called
`offline_...`, beside the harness's own versions of them, which need a network; the group
`offline_ruler` is the mean of RULER's tasks.

Where the context ends in a prompt of any task, its question begins (`context_end`).

Where data lies and how long prompts are comes from the harness's `--metadata`, a JSON object:
`data_dir`, `data` (paths by name), `leval_data`, `length`, `samples`, `cache_dir`; the tokenizer is
the model's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from locret.evaluation.ask import before_stop
from locret.evaluation.config import CACHE
from locret.evaluation.questions import Renderer
from locret.model.loading import load_tokenizer
from locret.tasks import GROUPS, TASKS, Sample, Task, TaskSettings
from locret.tasks.base import SizedTask


def harness_name(task: str) -> str:
    """What the harness calls one of our tasks, or a group of them."""
    return task if task.startswith("leval") else f"offline_{task}"


def write_task_files(folder: Path) -> Path:
    """Write a file for every task, and one for RULER as a group; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        (folder / f"{harness_name(name)}.yaml").write_text(_task(task), encoding="utf-8")
    (folder / "offline_ruler.yaml").write_text(_RULER, encoding="utf-8")
    return folder


def _task(task: type[Task]) -> str:
    tag = "tag: leval\n" if task.group == "leval" else ""
    scores = "".join(
        f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"
        for name in task.metrics
    )
    # These come with the answer's first words; the harness puts them behind the chat template.
    prefix = 'gen_prefix: "{{gen_prefix}}"\ntarget_delimiter: " "\n'
    return f"""\
task: {harness_name(task.name)}
{tag}dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function {__name__}.dataset
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answers[0]}}}}"
{prefix if issubclass(task, SizedTask) else ""}\
process_results: !function {__name__}.process_results
generation_kwargs:
  do_sample: false
  max_gen_toks: {task.max_new_tokens}
  until: []
metric_list:
{scores}\
metadata:
  version: {task.version}.0
  locret_task: {task.name}
"""


_RULER = yaml.safe_dump(
    {
        "group": harness_name("ruler"),
        "task": [harness_name(task) for task in GROUPS["ruler"]],
        "aggregate_metric_list": [{"metric": "string_match", "weight_by_size": False}],
        "metadata": {"version": 1.0},
    }
)


TOKENIZER_KEYS = ("tokenizer", "pretrained", "model")
"""Model arguments that name the tokenizer, as in the harness's own generated tasks."""


def dataset(
    locret_task: str,
    data_dir: str | None = None,
    data: dict[str, str] | None = None,
    length: int | None = None,
    samples: int | None = None,
    cache_dir: str = CACHE,
    leval_data: str | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """The split `test` of a task of `locret.tasks`: one row a sample. `leval_data` is where
    L-Eval's data is, if not in `data_dir`: a file, a folder or a Hub repository. A ValueError says
    what to give."""
    import datasets

    settings = TaskSettings(
        data_dir=Path(data_dir).expanduser() if data_dir else None,
        data=(data or {}) | ({} if leval_data is None else {"leval": leval_data}),
        length=length,
        cache_dir=Path(cache_dir).expanduser(),
    )
    task = TASKS[locret_task](settings)
    try:
        task.files()
    except ValueError as error:
        hint = 'here: --metadata \'{"data_dir": "FOLDER", "data": {"NAME": "PATH"}}\''
        if task.name.startswith("leval"):
            hint = 'here: --metadata \'{"leval_data": "PLACE"}\': a file, folder or Hub repository'
        raise ValueError(f"{error}; {hint}") from error
    if task.length is None:
        made = task.samples(samples, None)
    else:
        renderer = _renderer(locret_task, metadata)
        made = task.samples(samples, renderer)
    return {"test": datasets.Dataset.from_list([_document(locret_task, s) for s in made])}


def _renderer(task: str, metadata: dict[str, Any]) -> Renderer:
    names = (metadata.get(key) for key in TOKENIZER_KEYS)
    name = next((name for name in names if isinstance(name, str) and name), None)
    if name is None:
        raise ValueError(
            f"task {task} measures its prompts by the model's tokenizer: name it with "
            '--metadata \'{"tokenizer": "NAME"}\''
        )
    tokenizer = load_tokenizer(name)
    return Renderer(tokenizer, chat=bool(tokenizer.chat_template))


def _document(task: str, sample: Sample) -> dict[str, Any]:
    return {
        "locret_task": task,
        "id": sample.id,
        "context": sample.context,
        "question": sample.question,
        "gen_prefix": sample.answer_prefix.strip(),
        "answers": list(sample.answers),
    }


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The scores of one answer by name."""
    task = TASKS[doc["locret_task"]](TaskSettings())
    sample = Sample(doc["id"], doc["context"], doc["question"], tuple(doc["answers"]))
    return task.score(sample, before_stop(results[0], task.stop)[0])


def context_end(
    prompt: str, document: Mapping[str, Any], field: str, marker: str | None
) -> int | None:
    """The character at which the context of a prompt ends: where the text of the document's field
    ends, else where the marker, with which questions begin, stands last. None if neither stands in
    the prompt."""
    text = document.get(field)
    if isinstance(text, str) and text.strip():
        start = prompt.rfind(text.strip())
        if start >= 0:
            return start + len(text.strip())
    start = prompt.rfind(marker) if marker else -1
    return None if start < 0 else start


def tokens_after(tokenizer: Any, text: str, character: int) -> int:
    """Tokens of `text` that end after a character of it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(end > character for _, end in encoded["offset_mapping"])
