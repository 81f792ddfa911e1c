"""L-Eval's tasks: how rows become questions, and scores computed by hand."""

import gzip
import json

import huggingface_hub
import pytest

from locret.integrations import lm_eval_tasks as harness_tasks
from locret.integrations.lm_eval_tasks import write_task_files
from locret.tasks import documents


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def row(*pairs, **fields):
    """A row in L-Eval's own form."""
    questions, answers = zip(*pairs, strict=True)
    return {"input": "A long tale.", "instructions": questions, "outputs": answers} | fields


@pytest.mark.parametrize(
    ("task", "answer", "reference", "scores"),
    [
        ("quality", "(B) He fled", "(B) He fled because of the rain", {"exact_match": 1}),
        ("quality", "A", "(B) He fled", {"exact_match": 0}),
        ("quality", "I do not know", "(A) Yes", {"exact_match": 0}),
        ("tpo", " d", "D", {"exact_match": 0}),
        ("tpo", "the answer is D", "D", {"exact_match": 1}),
        ("coursera", "AC", "ABC", {"exact_match": 0.25}),
        ("coursera", "A, B and C", "ABC", {"exact_match": 0.25}),
        ("coursera", "CBA", "ABC", {"exact_match": 1}),
        ("coursera", "ABCD", "ABC", {"exact_match": 0}),
        ("gsm100", "16 - 7 = 9. 9 * 2 = 18.\nThe answer is $18.", "18", {"exact_match": 1}),
        ("gsm100", "The answer is 19", "18", {"exact_match": 0}),
        ("codeU", "so the final output is [6, 15].", "[6 15]", {"exact_match": 1}),
        ("codeU", "It gives [[1, 2], [3, 4]]", "[[1 2][3 4]]", {"exact_match": 1}),
        ("codeU", "5 is printed at first, but in the end there will be only 7", "5",
         {"exact_match": 0}),
        ("topic_retrieval_longchat", 'It was "The role of art".', "The role of art",
         {"exact_match": 1}),
        ("topic_retrieval_longchat", "Sports", "The role of art", {"exact_match": 0}),
        ("sci_fi", "This is true.", "True", {"exact_match": 1}),
        ("sci_fi", "maybe", "True", {"exact_match": 0}),
        # right, mail, can against you can replace by mail: 2 common words, 3 and 5 in all
        ("multidoc_qa", "right, mail can", "you can replace by mail", {"f1": 2 * 2 / 8}),
        ("narrative_qa", "the old house", "House", {"f1": 2 / 3}),
        # one of two pairs, and of three words in order
        ("news_summ", "rain fell there", "rain fell again",
         {"rougeL": 2 / 3, "rouge1": 2 / 3, "rouge2": 1 / 2}),
    ],
)  # fmt: skip
def test_scores_by_hand(task, answer, reference, scores):
    found = documents.LEVAL[task].score(answer.strip(), [reference])
    assert found == pytest.approx(scores)
    assert tuple(found) == documents.LEVAL[task].metrics


def test_there_are_twenty_tasks():
    assert len(documents.LEVAL) == 20
    closed = [name for name, kind in documents.LEVAL.items() if kind.metrics == ("exact_match",)]
    assert len(closed) == 7


def test_both_forms_of_rows_ask_the_same(tmp_path):
    own = write(tmp_path / "own.jsonl", row(("Who?", "A fox"), ("When?", "At dawn")))
    ours = {
        "context": "A long tale.",
        "qa": [
            {"question": "Who?", "answers": ["A fox"]},
            {"question": "When?", "answers": ["At dawn"]},
        ],
    }
    zipped = write(tmp_path / "ours.jsonl.gz", ours)
    questions = documents.load_questions("natural_question", own)
    assert questions == documents.load_questions("natural_question", zipped)
    assert [q.answers for q in questions] == [("A fox",), ("At dawn",)]
    assert len({q.id for q in questions}) == 2
    assert len({q.group for q in questions}) == 1


def test_the_question_stands_after_the_context(tmp_path):
    data = write(tmp_path / "a.jsonl", row(("Who came?", "The old red fox")))
    (asked,) = documents.load_questions("multidoc_qa", data)
    assert asked.context.endswith("A long tale.\n\n")
    assert "Who came?" not in asked.context
    assert asked.question == "Who came?\nUse about 4 words."
    (exam,) = documents.load_questions("tpo", data)
    assert "words" not in exam.question  # closed-ended: nothing about the reference is told


def test_science_fiction_is_asked_by_the_text_and_by_the_world(tmp_path):
    question = "Can one travel in time, based on the world described in the document."
    data = write(tmp_path / "a.jsonl", row((question, "True [fact: False]")))
    by_text, fact = documents.load_questions("sci_fi", data)
    assert (by_text.answers, fact.answers) == (("True",), ("False",))
    assert by_text.context and not fact.context
    assert "described in the document" in by_text.question
    assert "described in the document" not in fact.question
    bad = write(tmp_path / "b.jsonl", row((question, "True")))
    with pytest.raises(ValueError, match="expected the form"):
        documents.load_questions("sci_fi", bad)


def test_questions_for_judges_are_left_out(tmp_path):
    data = write(
        tmp_path / "a.jsonl",
        row(("Who?", "A fox"), evaluation="f1"),
        row(("Who?", "A fox"), ("When?", "At dawn"), evaluation="LLM"),
    )
    assert len(documents.load_questions("financial_qa", data)) == 1


def test_a_folder_is_searched_for_the_task(tmp_path):
    deep = tmp_path / "LEval" / "Closed"
    deep.mkdir(parents=True)
    write(deep / "tpo.jsonl", row(("Who?", "A")))
    write(tmp_path / "leval_quality.jsonl.gz", row(("Who?", "B")))
    assert documents.find_data("tpo", tmp_path) == deep / "tpo.jsonl"
    assert documents.load_questions("quality", tmp_path)[0].answers == ("B",)
    with pytest.raises(ValueError, match=r"no file for L-Eval gsm100; expected gsm100\.jsonl"):
        documents.find_data("gsm100", tmp_path)


def test_a_hub_repository_is_searched_too(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write(tmp_path / "tpo.jsonl", row(("Who?", "A")))
    assert documents.find_data("tpo", "L4NLP/LEval") == tmp_path / "tpo.jsonl"
    assert (asked["repo_id"], asked["repo_type"]) == ("L4NLP/LEval", "dataset")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "rows.jsonl:2 is not JSON"),
        ("[1]", "rows.jsonl:2 holds a list"),
        ('{"text": "a"}', "rows.jsonl:2 has fields"),
        ('{"context": "a", "qa": [{"question": "b", "answers": []}]}', "without answers"),
        ('{"context": "a", "qa": [{"question": null, "answers": ["c"]}]}', "without text"),
        ('{"input": "a", "instructions": ["b"], "outputs": []}', "1 instructions and 0 outputs"),
        ('{"input": "a", "instructions": "b", "outputs": "c"}', "no lists"),
        ('{"context": "a", "qa": [{"question": "b", "answers": "c"}]}', "list of texts"),
        ('{"context": "a", "qa": ["b"]}', "without text"),
    ],
)
def test_bad_rows_name_file_and_line(line, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(("Who?", "A"))) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says):
        documents.load_questions("tpo", path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file, folder or Hub id"):
        documents.load_questions("tpo", tmp_path / "nosuch.jsonl")
    empty = tmp_path / "tpo.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no questions"):
        documents.load_questions("tpo", empty)
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="broken.jsonl.gz cannot be read"):
        documents.load_questions("tpo", tmp_path / "broken.jsonl.gz")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The harness's own reading of the task files, on one question each."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("leval")
    for task in documents.LEVAL:
        answer = "True [fact: True]" if task == "sci_fi" else "A"
        write(folder / f"{task}.jsonl", row(("Who?", answer)))
    files = write_task_files(tmp_path_factory.mktemp("harness"))
    manager = TaskManager(
        include_path=str(files), include_defaults=False, metadata={"leval_data": str(folder)}
    )
    return manager.load([f"leval_{task}" for task in documents.LEVAL])["tasks"]


def test_the_harness_reads_every_task_file(tasks):
    assert set(tasks) == {f"leval_{task}" for task in documents.LEVAL}
    for name, task in tasks.items():
        kind = documents.LEVAL[name.removeprefix("leval_")]
        assert task.config.generation_kwargs["max_gen_toks"] == kind.max_new_tokens, name
        assert tuple(metric["metric"] for metric in task.config.metric_list) == kind.metrics
        doc = task.test_docs()[0]
        assert task.doc_to_text(doc) == doc["context"] + doc["question"]
        right = task.process_results(doc, [doc["answers"][0]])
        assert right == kind.score(doc["answers"][0], doc["answers"])
        assert set(right) == set(kind.metrics)


def test_the_harness_is_told_that_data_is_needed():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="leval_data"):
        harness_tasks.dataset("leval_tpo", version=1.0)
