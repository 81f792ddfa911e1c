"""The pipeline "locret" answers as the engine does, and is called as kvpress's is."""

import subprocess
import sys

import pytest
import torch
from transformers import pipeline

import locret
import locret.integrations.pipeline  # noqa: F401 - makes the task known
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

BOOK = "One quiet otter sleeps. " * 30
QUESTIONS = ["Who sleeps?", "How does the otter sleep, and why?", ""]
SETTINGS = {"budget": 24, "chunk_size": 32, "stabilizers": 4, "local_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone, and heads for it."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    tiny_heads(model, defaults=SETTINGS).save_pretrained(folder / "heads")
    tiny_heads(model, query_tokens=4, defaults=SETTINGS).save_pretrained(folder / "aware")
    return folder


def made(folder, heads="heads", **settings):
    if heads is not None:
        settings["heads"] = str(folder / heads)
    return pipeline("locret", model=str(folder / "backbone"), device="cpu", **settings)


def by_hand(pipe, context, question, query=False):
    """What `engine.generate` answers after a context read by itself."""
    text = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{context}\0"}], tokenize=False, add_generation_prompt=True
    )
    before, after = text.split("\0")
    ids, asked = (
        torch.tensor([pipe.tokenizer(t, add_special_tokens=False)["input_ids"]])
        for t in (before, question + after)
    )
    cache = pipe.engine.prefill(ids, query_ids=asked if query else None)
    output = pipe.engine.generate(asked, cache=cache, max_new_tokens=6, do_sample=False)
    return pipe.tokenizer.decode(output[0, asked.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{}, {"budget": "8x"}, {"policy": "keydiff", "budget": 16}])
def test_answers_are_those_of_the_engine(folder, settings):
    pipe = made(folder, None if "policy" in settings else "heads", **settings)
    found = pipe(BOOK, questions=QUESTIONS, max_new_tokens=6)
    assert found == {"answers": [by_hand(pipe, BOOK, question) for question in QUESTIONS]}
    assert any(found["answers"])
    for question, answer in zip(QUESTIONS, found["answers"], strict=True):
        assert pipe(BOOK, question=question, max_new_tokens=6) == {"answer": answer}


@pytest.mark.parametrize(("heads", "settings"), [("aware", {}), ("heads", {"query_aware": True})])
def test_query_aware_engines_read_the_context_for_each_question(folder, heads, settings):
    pipe = made(folder, heads, **settings)
    found = pipe(BOOK, questions=QUESTIONS[:2], max_new_tokens=6)["answers"]
    assert found == [by_hand(pipe, BOOK, question, query=True) for question in QUESTIONS[:2]]


def test_a_context_is_read_once(folder, monkeypatch):
    pipe = made(folder)
    read = []
    prefill = pipe.engine.prefill
    monkeypatch.setattr(
        pipe.engine,
        "prefill",
        lambda ids, *a, **k: read.append(ids.shape[1]) or prefill(ids, *a, **k),
    )
    pipe(BOOK, questions=QUESTIONS, max_new_tokens=2)
    assert len(read) == 1


def test_several_contexts_a_prefix_and_arguments_of_generate(folder):
    pipe = made(folder)
    found = pipe([BOOK, BOOK[:90]], question="Who?", answer_prefix="The", max_new_tokens=4)
    assert found[1] == pipe(BOOK[:90], question="Who?", answer_prefix="The", max_new_tokens=4)
    torch.manual_seed(0)
    sampled = {
        pipe(BOOK, do_sample=True, temperature=9.0, max_new_tokens=4)["answer"] for _ in "123"
    }
    assert len(sampled) > 1


def test_a_context_is_cut_where_a_limit_is_given_only(folder, caplog):
    pipe = made(folder)
    kept = pipe.preprocess(BOOK, ["?"], "", None, False)["context_ids"]
    with caplog.at_level("WARNING"):
        cut = pipe.preprocess(BOOK, ["?"], "", 40, False)["context_ids"]
    assert kept.shape[1] > 40 and torch.equal(cut, kept[:, :40])
    assert f"has {kept.shape[1]} tokens and is cut to max_context_length, 40" in caplog.text


def test_without_a_chat_template(folder):
    pipe = made(folder)
    pipe.tokenizer.chat_template = None
    inputs = pipe.preprocess(BOOK, ["Who?"], "It", None, False)
    assert pipe.tokenizer.decode(inputs["context_ids"][0]).endswith(BOOK)
    assert pipe.tokenizer.decode(inputs["question_ids"][0][0]) == "Who?\nIt"
    assert set(pipe(BOOK, question="Who?", max_new_tokens=2)) == {"answer"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"question": "Who?", "questions": ["Why?"]}, "give one of them"),
        ({"questions": "Who?"}, "give a list"),
    ],
)
def test_refusals(folder, given, says):
    with pytest.raises(ValueError, match=says):
        made(folder)(BOOK, **given)


def test_no_heads_are_refused_by_the_engine(folder):
    with pytest.raises(ValueError, match="needs trained heads"):
        made(folder, None)


def test_only_importing_the_pipeline_makes_the_task_known():
    code = (
        "import locret\n"
        "from transformers.pipelines import PIPELINE_REGISTRY as known\n"
        "locret.Engine\n"
        "assert 'locret' not in known.get_supported_tasks()\n"
        "import locret.integrations.pipeline\n"
        "assert 'locret' in known.get_supported_tasks()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
