"""Questions about documents: FairytaleQA (Xu et al., 2022), QMSum (Zhong et al., 2021), and the 20
tasks of L-Eval (An et al., 2023, arXiv 2307.11088).

People asked the questions of the first two and answered them in their own words. Of L-Eval, seven
tasks are closed-ended, exams graded by exact match; thirteen are open-ended, scored by token F1 or
ROUGE. Their questions say how long the reference is (the paper's length instruction), because
overlap scores punish any other length.

L-Eval's data: JSON Lines, a file or a folder with one file a task, or a Hub repository that has
such files (L-Eval's own is `L4NLP/LEval`). Rows are its `{"input", "instructions", "outputs"}` or
`{"context", "qa": [{"question", "answers"}]}`.

Where this differs from the released scorer: the instructions are worded anew; an answer without any
option letter is wrong (there it counts as A, and an empty one as a quarter); questions meant for
judges (`evaluation` is `human` or `LLM`) are left out here too.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from locret.heads import hub
from locret.tasks import metrics
from locret.tasks.base import (
    Prompts,
    Sample,
    Task,
    are_texts,
    in_turns,
    read_contexts,
    read_rows,
)


class DocumentQATask(Task):
    """The rows of one file. The scores are ROUGE-L F1 and token F1, the best over the references.

    Attributes:
        before: stands in front of the document.
        asked: between the document and the question; the context ends where it begins.
        after: behind the question.
    """

    metrics = ("rouge_l", "f1")
    before: ClassVar[str] = ""
    asked: ClassVar[str] = "\n\n"
    after: ClassVar[str] = ""

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """Questions go round the documents."""
        samples = (
            Sample(
                id=f"{row['id']}/{turn}",
                context=self.before + row["context"].strip(),
                question=self.asked + asked["question"].strip() + self.after,
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


class FairytaleQATask(DocumentQATask):
    """Questions that experts asked about whole fairy tales: the validation stories."""

    name = "fairytaleqa"
    data = {"fairytaleqa": "fairytaleqa_val.jsonl.gz"}
    max_new_tokens = 32
    stop = ("\n",)


class QMSumTask(DocumentQATask):
    """Queries about meetings, on the stretch of the transcript that answers them: the validation
    meetings. Worded as in LongBench (Bai et al., 2023), which asks about whole meetings."""

    name = "qmsum"
    data = {"qmsum": "qmsum_windowed_val.jsonl.gz"}
    before = (
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n"
    )
    asked = (
        "\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: "
    )
    after = "\nAnswer:"
    max_new_tokens = 160  # 9 in 10 references have at most 100 words


# ---- L-Eval: how questions are put and scored ----------------------------------------------------

JUDGED = ("human", "LLM")
"""Values of `evaluation` in rows that people or language models are to judge."""


@dataclass(frozen=True)
class Kind:
    """How the questions of a task are put and scored.

    Attributes:
        instruction: stands before the document.
        ending: stands after the question; `{words}` is the reference's length.
        max_new_tokens: of an answer.
        metrics: names of the scores, the headline first.
        score: (answer, references) -> scores by name, 0 to 1.
    """

    instruction: str
    ending: str
    max_new_tokens: int
    metrics: tuple[str, ...]
    score: Callable[[str, Sequence[str]], dict[str, float]]


def _exam(
    instruction: str,
    ending: str,
    max_new_tokens: int,
    read_answer: Callable[[str], str],
    read_reference: Callable[[str], str],
    compare: Callable[[str, str], float],
) -> Kind:
    """Questions whose answers are right or wrong."""

    def score(answer: str, references: Sequence[str]) -> dict[str, float]:
        given = read_answer(answer)
        found = metrics.best(lambda wanted: compare(given, read_reference(wanted)), references)
        return {"exact_match": found}

    return Kind(instruction, ending, max_new_tokens, ("exact_match",), score)


OPTIONS_FOLLOW = (
    "Read the long document below. Questions about it with several options will follow; "
)
OPTIONS = _exam(
    OPTIONS_FOLLOW + "exactly one option is right.",
    "Reply with the letter of the right option alone.",
    32,
    metrics.option_letter,
    metrics.reference_options,
    metrics.options_score,
)
SEVERAL_OPTIONS = _exam(
    OPTIONS_FOLLOW + "one option or more are right.",
    "Reply with the letters of all right options alone, for example A or BD.",
    32,
    metrics.option_letters,
    metrics.reference_options,
    metrics.options_score,
)
NUMBER = _exam(
    "Below are problems with worked answers. Solve the last problem in the same manner, and end "
    'with "The answer is" and the number.',
    "",
    512,
    metrics.final_number,
    metrics.final_number,
    metrics.numbers_equal,
)
CODE = _exam(
    "Below is a code base of many functions with comments. At its end some of them are called; "
    "read the code with care to say what comes out.",
    'End with "the final output" and the output itself.',
    512,
    str,
    str,
    metrics.code_found,
)
JUDGEMENT = _exam(
    "Read the science fiction below. Statements about it will follow; judge them by the text, not "
    "by what you know of the world.",
    'Reply with "True" or "False" alone.',
    32,
    metrics.truth,
    metrics.truth,
    lambda given, wanted: float(given == wanted != ""),
)
TOPIC = Kind(
    "Below is the record of a conversation about many topics, one after the other. Each begins "
    "with the user naming the topic to discuss. You will be asked for the names.",
    "",
    64,
    ("exact_match",),
    lambda answer, references: {"exact_match": metrics.contains(answer, references)},
)
DOCUMENT = "Read the long document below. A request about it will follow."
LENGTH = "Use about {words} words."
F1 = Kind(
    DOCUMENT,
    LENGTH,
    512,
    ("f1",),
    lambda answer, references: {"f1": metrics.token_f1(answer, references)},
)
ROUGE = Kind(DOCUMENT, LENGTH, 512, metrics.ROUGE, metrics.rouge)

LEVAL: dict[str, Kind] = {
    "codeU": CODE,
    "coursera": SEVERAL_OPTIONS,
    "gsm100": NUMBER,
    "quality": OPTIONS,
    "sci_fi": JUDGEMENT,
    "topic_retrieval_longchat": TOPIC,
    "tpo": OPTIONS,
    **dict.fromkeys(("financial_qa", "legal_contract_qa", "multidoc_qa", "narrative_qa"), F1),
    **dict.fromkeys(("natural_question", "scientific_qa"), F1),
    **dict.fromkeys(("gov_report_summ", "meeting_summ", "news_summ", "paper_assistant"), ROUGE),
    **dict.fromkeys(("patent_summ", "review_summ", "tv_show_summ"), ROUGE),
}
"""The tasks by L-Eval's names, closed-ended ones first."""


def load_questions(task: str, data: str | Path) -> list[Sample]:
    """The questions of a task of `LEVAL`, but for those that judges are to score. Data: see the
    file's head; `find_data` tells which file is taken."""
    questions: list[Sample] = []
    for number, (place, row) in enumerate(read_rows(find_data(task, data))):
        asked = list(_asked(row, place))
        if row.get("evaluation") in JUDGED:
            continue
        document = row["context"] if _is_ours(row) else row["input"]
        for i, (question, answers) in enumerate(asked):
            sample = Sample(f"{number}-{i}", document.strip(), question, answers, group=str(number))
            questions += _worded(task, sample)
    if not questions:
        raise ValueError(
            f"{data} holds no questions for L-Eval {task} that are scored without judges; give "
            "another file"
        )
    return questions


def find_data(task: str, data: str | Path) -> Path:
    """The file with a task's rows: `data` itself, or `TASK.jsonl` or the like below it; ValueError
    if there is none."""
    place = Path(data)
    if place.is_file():
        return place
    names = [f"{prefix}{task}.jsonl{end}" for prefix in ("", "leval_") for end in ("", ".gz")]
    if not place.is_dir():
        if place.is_absolute() or str(data).count("/") != 1:
            raise ValueError(f"data {str(data)!r} for L-Eval {task} is no file, folder or Hub id")
        patterns = [f"*{name}" for name in names]
        place = hub.download(str(data), patterns=patterns, repo_type="dataset")
    found = sorted(path for name in names for path in place.rglob(name))
    if not found:
        raise ValueError(f"{data} holds no file for L-Eval {task}; expected {' or '.join(names)}")
    return found[0]


def _is_ours(row: dict[str, Any]) -> bool:
    return isinstance(row.get("context"), str) and isinstance(row.get("qa"), list)


def _asked(row: dict[str, Any], place: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Questions and references of a row in either form."""
    if _is_ours(row):
        given = (qa if isinstance(qa, dict) else {} for qa in row["qa"])
        pairs = [(qa.get("question"), qa.get("answers")) for qa in given]
    else:
        pairs = _their_pairs(row, place)
    for question, answers in pairs:
        if answers is None or not isinstance(question, str) or not are_texts(answers):
            raise ValueError(
                f"{place} has a question without text or without answers: {question!r}, "
                f"{answers!r}; expected a text and a list of texts"
            )
        yield question, tuple(answers)


def _their_pairs(row: dict[str, Any], place: str) -> list[tuple[Any, Any]]:
    if not isinstance(row.get("input"), str) or not {"instructions", "outputs"} <= row.keys():
        raise ValueError(
            f"{place} has fields {sorted(row)}; expected input, instructions and outputs, or "
            "context and qa"
        )
    asked, answered = row["instructions"], row["outputs"]
    if not isinstance(asked, list) or not isinstance(answered, list):
        raise ValueError(f"{place}: instructions and outputs are no lists; expected lists of texts")
    if len(asked) != len(answered):
        raise ValueError(
            f"{place} has {len(asked)} instructions and {len(answered)} outputs; expected as many "
            "of one as of the other"
        )
    return [(question, [answer]) for question, answer in zip(asked, answered, strict=True)]


def _worded(task: str, asked: Sample) -> Iterator[Sample]:
    """A document and question of the data as they are put; in science fiction there are two
    questions, by the story and, without it, by what is so.
    """
    kind = LEVAL[task]
    context = f"{kind.instruction}\n\n{asked.context}\n\n"
    ending = kind.ending.format(words=len(asked.answers[0].split()))
    text = _with_ending(asked.question, ending)
    if kind is not JUDGEMENT:
        yield replace(asked, context=context, question=text)
        return
    judged = (_judgements(wanted, task, asked.id) for wanted in asked.answers)
    by_text, facts = zip(*judged, strict=True)
    of_world = _with_ending(asked.question.replace(STORY_WORLD, REAL_WORLD), ending)
    yield replace(asked, id=f"{asked.id}-text", context=context, question=text, answers=by_text)
    yield Sample(f"{asked.id}-fact", "", of_world, facts)


STORY_WORLD = "based on the world described in the document"
REAL_WORLD = "going by what is known of the real world"


def _judgements(reference: str, task: str, name: str) -> tuple[str, str]:
    found = re.fullmatch(r"\s*(\w+)\W*\[fact:\s*(\w+)\W*\]\s*", reference, flags=re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"L-Eval {task}, question {name}: the answer is {reference!r}; expected the form "
            "'True [fact: False]'"
        )
    return found[1], found[2]


def _with_ending(question: str, ending: str) -> str:
    return f"{question.strip()}\n{ending}" if ending else question.strip()


class LEvalTask(Task):
    """One of L-Eval's tasks; its data is `leval_TASK.jsonl` or the like in the data folder, or
    what `data.leval` names: a file or folder."""

    group = "leval"
    data = {"leval": ""}
    of: ClassVar[str]

    def files(self) -> list[Path]:
        place = self.settings.data.get("leval") or self.settings.data_dir
        if place is None:
            raise ValueError(f"{self.name} needs data: give its folder with --data-dir")
        return [find_data(self.of, place)]

    def samples(self, limit: int | None, prompts: Prompts | None) -> list[Sample]:
        """Questions go round the documents."""
        return in_turns(load_questions(self.of, self.files()[0]))[:limit]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return LEVAL[self.of].score(answer.strip(), sample.answers)


for _of, _kind in LEVAL.items():
    _values = {"of": _of, "name": f"leval_{_of}", "__doc__": f"L-Eval's {_of}."}
    _answers = {"metrics": _kind.metrics, "max_new_tokens": _kind.max_new_tokens}
    type(f"LEval_{_of}", (LEvalTask,), _values | _answers)
