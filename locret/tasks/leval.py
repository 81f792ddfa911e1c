"""L-Eval (An et al., 2023, arXiv 2307.11088): 20 tasks over long documents, and how each is scored.

Seven tasks are closed-ended, exams graded by exact match; thirteen are open-ended, scored by token
F1 or ROUGE. The questions of the latter say how long the reference is (the paper's length
instruction), because overlap scores punish any other length.

A question is asked in two parts, `context` and `question`: a query-agnostic policy compresses the
first before it sees the second.

Data: JSON Lines, a file or a folder with one file a task, or a Hub repository that has such files
(L-Eval's own is `L4NLP/LEval`). Rows are L-Eval's `{"input", "instructions", "outputs"}` or
`{"context", "qa": [{"question", "answers"}]}`.

Where this differs from the released scorer: the instructions are worded anew; an answer without any
option letter is wrong (there it counts as A, and an empty one as a quarter); questions meant for
judges (`evaluation` is `human` or `LLM`) are left out here too, but their number is told.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locret.heads import hub
from locret.tasks import metrics
from locret.tasks.jsonl import are_texts, read_rows

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


@dataclass(frozen=True)
class LEvalQuestion:
    """One question.

    Attributes:
        id: unique within the task.
        group: of the document; empty where none is given.
        context: instruction and document; empty for a question that is to be answered without.
        question: what follows it, to the end of the user's turn.
        references: right answers, as in the data.
    """

    id: str
    group: str
    context: str
    question: str
    references: tuple[str, ...]


def _exact(
    read_answer: Callable[[str], str],
    read_reference: Callable[[str], str],
    compare: Callable[[str, str], float],
) -> Callable[[str, Sequence[str]], dict[str, float]]:
    def score(answer: str, references: Sequence[str]) -> dict[str, float]:
        given = read_answer(answer)
        found = max(compare(given, read_reference(wanted)) for wanted in references)
        return {"exact_match": found}

    return score


def _reference_options(reference: str) -> str:
    """`(C) He could not` -> `C`."""
    first = reference.split()[0] if reference.split() else ""
    return re.sub("[^A-D]", "", first)


def _truth(text: str) -> str:
    """The first word that says true or false."""
    found = re.search("true|false", text.lower())
    return found[0] if found else ""


def _plain_code(text: str) -> str:
    """Program output without what people write differently: commas, quotes, `.0`, white space."""
    text = re.sub(r"[,'\\]", "", " ".join(text.split())).replace(".0", "")
    return re.sub(r"(?<=[\[\]]) (?=[\[\]])", "", text)


def _code_score(answer: str, references: Sequence[str]) -> dict[str, float]:
    return {"exact_match": max(_code_found(answer, wanted) for wanted in references)}


def _code_found(answer: str, reference: str) -> float:
    """Whether the output stands where an answer says its result: after "the final output", or last.

    As many words as the reference has, and three more, are looked at.
    """
    window = len(reference.split()) + 3
    text = re.sub(
        "will be|of the code|is|would be|the value of|the result of|printed",
        "",
        _plain_code(answer),
    )
    _, said, after = text.rpartition("the final output")
    words = after.split()[:window] if said else text.split()[-window:]
    return metrics.contains(" ".join(words), [_plain_code(reference)])


LETTER = "Reply with the letter of the right option alone."
OPTIONS = Kind(
    "Read the long document below. Questions about it with several options will follow; exactly "
    "one option is right.",
    LETTER,
    32,
    ("exact_match",),
    _exact(metrics.option_letter, _reference_options, metrics.options_score),
)
SEVERAL_OPTIONS = Kind(
    "Read the long document below. Questions about it with several options will follow; one option "
    "or more are right.",
    "Reply with the letters of all right options alone, for example A or BD.",
    32,
    ("exact_match",),
    _exact(metrics.option_letters, _reference_options, metrics.options_score),
)
NUMBER = Kind(
    "Below are problems with worked answers. Solve the last problem in the same manner, and end "
    'with "The answer is" and the number.',
    "",
    512,
    ("exact_match",),
    _exact(metrics.final_number, metrics.final_number, metrics.numbers_equal),
)
CODE = Kind(
    "Below is a code base of many functions with comments. At its end some of them are called; "
    "read the code with care to say what comes out.",
    'End with "the final output" and the output itself.',
    512,
    ("exact_match",),
    _code_score,
)
JUDGEMENT = Kind(
    "Read the science fiction below. Statements about it will follow; judge them by the text, not "
    "by what you know of the world.",
    'Reply with "True" or "False" alone.',
    32,
    ("exact_match",),
    _exact(_truth, _truth, lambda given, wanted: float(given == wanted != "")),
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

TASKS: dict[str, Kind] = {
    "codeU": CODE,
    "coursera": SEVERAL_OPTIONS,
    "gsm100": NUMBER,
    "quality": OPTIONS,
    "sci_fi": JUDGEMENT,
    "topic_retrieval_longchat": TOPIC,
    "tpo": OPTIONS,
    "financial_qa": F1,
    "legal_contract_qa": F1,
    "multidoc_qa": F1,
    "narrative_qa": F1,
    "natural_question": F1,
    "scientific_qa": F1,
    "gov_report_summ": ROUGE,
    "meeting_summ": ROUGE,
    "news_summ": ROUGE,
    "paper_assistant": ROUGE,
    "patent_summ": ROUGE,
    "review_summ": ROUGE,
    "tv_show_summ": ROUGE,
}
"""The tasks by L-Eval's names, closed-ended ones first."""


def check_task(task: str) -> Kind:
    """The kind of a task.

    Raises:
        ValueError: an unknown name; lists those there are.
    """
    if task not in TASKS:
        raise ValueError(f"L-Eval has no task {task!r}; expected one of {', '.join(TASKS)}")
    return TASKS[task]


def score(task: str, answer: str, references: Sequence[str]) -> dict[str, float]:
    """Scores of an answer, 0 to 1, the headline first.

    Raises:
        ValueError: an unknown task, no references, or a metric's package is missing.
    """
    kind = check_task(task)
    if not references:
        raise ValueError(f"L-Eval {task}: no reference was given for {answer!r}")
    return kind.score(answer.strip(), references)


def load_questions(task: str, data: str | Path) -> tuple[list[LEvalQuestion], int]:
    """The questions of a task, and how many were left out because judges are to score them.

    Args:
        task: of `TASKS`.
        data: see the file's head; `find_data` tells which file is taken.

    Raises:
        ValueError: an unknown task, no such data, or rows that are not as described.
    """
    check_task(task)
    questions: list[LEvalQuestion] = []
    left_out = 0
    for number, (place, row) in enumerate(read_rows(find_data(task, data))):
        asked = list(_asked(row, place))
        if row.get("evaluation") in JUDGED:
            left_out += len(asked)
            continue
        document = row["context"] if _is_ours(row) else row["input"]
        for i, (question, references) in enumerate(asked):
            asked_of = (str(number), f"{number}-{i}")
            questions += _questions(task, asked_of, document, question, references)
    if not questions:
        raise ValueError(f"{data} holds no questions for L-Eval {task}")
    return questions, left_out


def find_data(task: str, data: str | Path) -> Path:
    """The file with a task's rows: `data` itself, or `TASK.jsonl` or the like below it.

    Raises:
        ValueError: there is none.
    """
    check_task(task)
    place = Path(data)
    if place.is_file():
        return place
    names = [f"{prefix}{task}.jsonl{end}" for prefix in ("", "leval_") for end in ("", ".gz")]
    if not place.is_dir():
        if place.is_absolute() or str(data).count("/") != 1:
            raise ValueError(f"data {str(data)!r} for L-Eval {task} is no file, folder or Hub id")
        place = hub.download(
            str(data),
            patterns=[f"*{name}" for name in names],
            revision=None,
            token=None,
            repo_type="dataset",
        )
    found = sorted(path for name in names for path in place.rglob(name))
    if not found:
        raise ValueError(f"{data} holds no file for L-Eval {task}; expected {' or '.join(names)}")
    return found[0]


def _is_ours(row: dict[str, Any]) -> bool:
    return isinstance(row.get("context"), str) and isinstance(row.get("qa"), list)


def _asked(row: dict[str, Any], place: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Questions and references of a row in either form."""
    if _is_ours(row):
        pairs = [
            (qa.get("question"), qa.get("answers")) if isinstance(qa, dict) else (None, None)
            for qa in row["qa"]
        ]
    elif isinstance(row.get("input"), str) and {"instructions", "outputs"} <= row.keys():
        asked, answered = row["instructions"], row["outputs"]
        if not isinstance(asked, list) or not isinstance(answered, list):
            raise ValueError(
                f"{place}: instructions and outputs are no lists; expected lists of texts"
            )
        if len(asked) != len(answered):
            raise ValueError(
                f"{place} has {len(asked)} instructions and {len(answered)} outputs; expected as "
                "many of one as of the other"
            )
        pairs = [(question, [answer]) for question, answer in zip(asked, answered, strict=True)]
    else:
        raise ValueError(
            f"{place} has fields {sorted(row)}; expected input, instructions and outputs, or "
            "context and qa"
        )
    for question, answers in pairs:
        if answers is None or not isinstance(question, str) or not are_texts(answers):
            raise ValueError(
                f"{place} has a question without text or without answers: {question!r}, "
                f"{answers!r}; expected a text and a list of texts"
            )
        yield question, tuple(answers)


def _questions(
    task: str, names: tuple[str, str], document: str, question: str, references: tuple[str, ...]
) -> Iterator[LEvalQuestion]:
    """One question of the data: one to ask, or two in science fiction. `names`: group and id."""
    kind, (group, name) = TASKS[task], names
    context = f"{kind.instruction}\n\n{document.strip()}\n\n"
    if kind is not JUDGEMENT:
        words = len(references[0].split())
        text = _with_ending(question, kind.ending.format(words=words))
        yield LEvalQuestion(name, group, context, text, references)
        return
    # Two answers stand in each reference: by the text, and (without it) by what is so.
    by_text, facts = zip(*(_judgements(wanted, task, name) for wanted in references), strict=True)
    text = _with_ending(question, kind.ending)
    yield LEvalQuestion(f"{name}-text", group, context, text, by_text)
    of_world = _with_ending(question.replace(STORY_WORLD, REAL_WORLD), kind.ending)
    yield LEvalQuestion(f"{name}-fact", "", "", of_world, facts)


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
