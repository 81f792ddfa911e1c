"""Questions about documents: what is read first, what is asked, and how answers are scored."""

import dataclasses

import pytest

from locret.evaluation.questions import Renderer
from locret.tasks import TASKS, TaskSettings
from tests.evaluation.eval_data import DATA, write_data


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    return TaskSettings(data_dir=folder, data=dict.fromkeys(TASKS, DATA["fairytaleqa"]))


@pytest.mark.parametrize("name", ["fairytaleqa", "qmsum"])
def test_questions_go_round_the_documents(name, settings):
    task = TASKS[name](settings)
    samples = task.samples(8, None)
    assert [sample.id for sample in samples] == [
        *(f"story-{i}/0" for i in range(6)), "story-0/1", "story-1/1"
    ]  # fmt: skip
    assert samples[0].context == samples[6].context and samples[0].group == samples[6].group
    assert samples[0].answers == ("the otter", "it")
    assert task.score(samples[0], "The otter.") == {"rouge_l": 1.0, "f1": 1.0}
    assert task.score(samples[0], "an otter it was") == {
        "rouge_l": pytest.approx(0.4), "f1": pytest.approx(0.5)
    }  # fmt: skip


def test_a_meeting_is_read_before_anything_of_the_query(settings, tokenizer):
    task = TASKS["qmsum"](settings)
    sample, *_ = task.samples(1, None)
    assert sample.context.startswith("You are given a meeting transcript and a query")
    transcript = " ".join(["The amber otter sailed home at dusk. It sang a song."] * 3)
    assert sample.context.endswith(f"\n\nTranscript:\n{transcript}")
    assert sample.question.endswith("\n\nQuery: Who sailed home in 0?\nAnswer:")
    prompt = Renderer(tokenizer, chat=True).render(sample)
    read = tokenizer.decode(prompt.ids[: prompt.context_end])
    assert read.endswith("It sang a song.") and "Query:" not in read


def test_a_file_that_is_not_there_is_named(settings):
    with pytest.raises(ValueError, match=r"'qmsum': .*qmsum_windowed_val.jsonl.gz is not a file"):
        TASKS["qmsum"](dataclasses.replace(settings, data={})).files()
