"""RULER's tasks: what their samples hold, how long they are, and how they are scored."""

import dataclasses
import re
from collections import Counter

import pytest

from locret.evaluation.questions import Renderer
from locret.tasks import GROUPS, TASKS, TaskSettings, task_names
from locret.tasks.haystack import essay_words, sentences_of
from tests.evaluation.eval_data import DATA, write_data

RULER = GROUPS["ruler"]
LENGTH = 3000
NEEDLES = [name for name in RULER if "niah" in name]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    return TaskSettings(data_dir=folder, data=DATA, length=LENGTH)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer, chat=True)


def make(name, settings, renderer, count=4):
    task = TASKS[name](settings)
    return task, task.samples(count, renderer)


def test_there_are_thirteen():
    assert len(RULER) == 13
    assert task_names(["ruler", "ruler_vt"]) == list(RULER)
    with pytest.raises(ValueError, match="tasks nosuch are unknown; expected some of ruler, "):
        task_names(["nosuch"])


@pytest.mark.parametrize("name", RULER)
def test_samples_fit_the_length_and_hold_their_answers(name, settings, renderer):
    task, samples = make(name, settings, renderer)
    assert task.label == f"{name}@{LENGTH}"
    assert len({sample.id for sample in samples}) == len(samples) == 4
    for sample in samples:
        assert renderer.measure(sample) + task.max_new_tokens <= LENGTH
        assert sample.answers
        assert all(answer in sample.context for answer in sample.answers[:1])
        if "_qa_" not in name:
            assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.question for answer in sample.answers)
        right = " and ".join(sample.answers[:1] if "_qa_" in name else sample.answers).upper()
        assert task.score(sample, right) == dict.fromkeys(task.metrics, 1.0)
        assert task.score(sample, "no idea") == dict.fromkeys(task.metrics, 0.0)
        assert task.metrics[0] == "string_match"


@pytest.mark.parametrize("name", [n for n in RULER if "_qa_" not in n and n != "ruler_cwe"])
def test_the_length_is_filled(name, settings, renderer):
    task, samples = make(name, settings, renderer)
    for sample in samples:
        assert renderer.measure(sample) + task.max_new_tokens > 0.93 * LENGTH


@pytest.mark.parametrize("name", RULER)
def test_the_first_samples_do_not_depend_on_how_many_there_are(name, settings, renderer):
    assert make(name, settings, renderer, 2)[1] == make(name, settings, renderer, 4)[1][:2]
    other = dataclasses.replace(settings, seed=1)
    assert make(name, other, renderer, 2)[1] != make(name, settings, renderer, 2)[1]


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_are_worded_as_in_the_benchmark(name, settings, renderer):
    task, (sample, *_) = make(name, settings, renderer)
    given = task.needles
    single = given.values * given.queries == 1
    kind = given.value[:-1] if single else given.value
    start = f"A special magic {kind} is" if single else f"Some special magic {kind} are"
    assert sample.context.startswith(
        f"{start} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {kind} afterwards.\n"
    )
    asked = f"special magic {kind} for "
    question = f"What is the {asked}" if single else f"What are all the {asked}"
    assert sample.question.startswith("\n" + question)
    assert sample.question.endswith(" mentioned in the provided text?")
    assert sample.answer_prefix.endswith(" is" if single else " are")
    assert len(sample.answers) == given.values * given.queries
    needles = re.findall(
        rf"One of the special magic {given.value} for (\S+) is: (\S+)\.", sample.context
    )
    if given.haystack != "needle":
        assert len(needles) == given.keys * given.values
    query = sample.question.split(" for ")[1].split(" mentioned")[0]
    keys = [key for key, value in needles if value in sample.answers]
    assert all(key in query for key in keys)
    assert query.count(",") == (given.queries - 1 if given.queries > 1 else 0)


def test_a_chain_is_assigned_in_order(settings, renderer):
    _, samples = make("ruler_vt", settings, renderer)
    for sample in samples:
        value = re.search(r"assigned the value (\d{5})", sample.question)[1]
        body = sample.context.rpartition("Memorize and track")[2]
        first, *others = sample.answers
        assert f"VAR {first} = {value}" in body
        for before, after in zip(sample.answers, others, strict=False):
            assert body.index(f"VAR {after} = VAR {before}") > body.index(f"VAR {before} =")
        assert len(sample.answers) == 5 and "5 variables are assgined" in sample.answer_prefix
        # One worked example stands in front, with its own names and value.
        assert sample.context.count("Memorize and track") == 2
        assert not any(name in sample.context.partition("\nMemorize")[0] for name in sample.answers)


def test_common_words_are_the_most_common(settings, renderer):
    _, samples = make("ruler_cwe", settings, renderer)
    for sample in samples:
        listed = sample.context.rpartition("Memorize the ones that appear most often.\n")[2]
        counts = Counter(re.findall(r"\d+\. (\S+)", listed))
        assert {word for word, _ in counts.most_common(10)} == set(sample.answers)
        assert {counts[word] for word in sample.answers} == {6}


def test_frequent_words_are_the_most_frequent_but_for_the_dots(settings, renderer):
    _, samples = make("ruler_fwe", settings, renderer)
    for sample in samples:
        counts = Counter(sample.context.partition("coded words. ")[2].split())
        ranked = [word for word, _ in counts.most_common(4)]
        assert ranked[0] == "..." and tuple(ranked[1:]) == sample.answers


def test_a_question_stands_with_its_document_among_others(settings, renderer):
    _, samples = make("ruler_qa_1", settings, renderer)
    for sample in samples:
        documents = re.findall(r"Document (\d+):\n(\w+)", sample.context)
        assert [int(number) for number, _ in documents] == list(range(1, 11))
        asked = re.search(r"What is (\w+)\?", sample.question)[1]
        assert asked in {word for _, word in documents}
    task, _ = make("ruler_qa_1", settings, renderer)
    scores = task.score(samples[0], f"I say {samples[0].answers[0]}")
    assert scores == {
        "string_match": 1.0,
        "f1": 0.5,
        "exact_match": 0.0,
    }  # f1: 1 of 3 words, 1 of 1


def test_two_documents_of_a_pair_are_told_apart(settings, renderer):
    _, samples = make("ruler_qa_2", settings, renderer)
    assert re.findall(r"Document \d+:\n(\w+)\nIt is", samples[0].context)


def test_a_sample_without_room_is_refused(settings, renderer):
    short = dataclasses.replace(settings, length=100)
    for name in ("ruler_niah_single_1", "ruler_cwe", "ruler_qa_2"):
        with pytest.raises(ValueError, match=f"{name} does not fit 100 tokens"):
            make(name, short, renderer)


def test_samples_are_kept_and_found_again(settings, renderer, tmp_path, monkeypatch):
    kept = dataclasses.replace(settings, cache_dir=tmp_path)
    task, samples = make("ruler_vt", kept, renderer, 3)
    (file,) = (tmp_path / "samples").iterdir()
    monkeypatch.setattr(type(task), "draft", lambda *args: pytest.fail("made again"))
    assert make("ruler_vt", kept, renderer, 3)[1] == samples
    assert make("ruler_vt", kept, renderer, 2)[1] == samples[:2]
    monkeypatch.undo()
    assert len(make("ruler_vt", kept, renderer, 5)[1]) == 5  # more than are kept
    assert list((tmp_path / "samples").iterdir()) == [file]
    make("ruler_vt", kept, Renderer(renderer.tokenizer, False), 1)  # of another fingerprint
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_missing_data_is_named(settings, tmp_path):
    nowhere = TaskSettings(data_dir=tmp_path)
    with pytest.raises(ValueError, match="squad_dev_short.jsonl.gz is not a file; give its folder"):
        TASKS["ruler_qa_1"](nowhere).files()
    missing = dataclasses.replace(settings, data={"haystack": "none.txt"})
    with pytest.raises(ValueError, match="none.txt is not a file"):
        TASKS["ruler_niah_single_2"](missing).files()


def test_words_come_from_the_package(monkeypatch):
    pytest.importorskip("wonderwords")
    names = [path.name for path in TASKS["ruler_niah_single_1"](TaskSettings()).files()]
    assert names == ["adjectivelist.txt", "nounlist.txt"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wonderwords, which is not installed"):
        TASKS["ruler_cwe"](TaskSettings()).files()


def test_prose_repeats_where_it_is_short():
    words = ["It", "rains.", "Mr.", "Fox", "sleeps."]
    assert sentences_of(words, 5) == ["It rains.", "Mr. Fox sleeps."]
    assert sentences_of(words, 8) == ["It rains.", "Mr. Fox sleeps.", "It rains.", "Mr."]


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_a_haystack_without_words_is_refused(name, settings, tmp_path):
    (tmp_path / name).write_text("\n")
    with pytest.raises(ValueError, match=f"{name} holds no words; expected running text"):
        essay_words(dataclasses.replace(settings, data={"haystack": str(tmp_path / name)}))
