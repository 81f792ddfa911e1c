"""Questions that a model asks itself, by the command that users run."""

import json

import pytest
from transformers import AutoModelForCausalLM

from datamodules import quiz
from datamodules.encoder import BranchEncoder, Branching
from datamodules.sources import JsonlSource
from datamodules.texts import GeneratedTexts
from locret.model.loading import load_model
from tests.tiny_models import tiny_model

CHAT_TEMPLATE_OF = "<|user|>{}<|end|><|assistant|>"


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    made = tiny_model("llama", vocab_size=len(tokenizer))
    made.generation_config.repetition_penalty = 1.5  # greedy means greedy
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def any_question(monkeypatch):
    """What a random model says is none."""
    monkeypatch.setattr(quiz, "_is_question", bool)


def arguments(model, output, texts):
    source = {
        "class_path": "datamodules.texts.GeneratedTexts",
        "init_args": {"tokens": [60, 90], "size": 9, "kinds": ["prose", "json"]},
    }
    return [
        f"--model={model}",
        f"--source={json.dumps(source)}",
        f"--output={output}",
        f"--texts={texts}",
        "--questions=3",
        "--max_question_tokens=8",
        "--max_answer_tokens=6",
    ]


def greedy(model, tokenizer, prompt):
    text = CHAT_TEMPLATE_OF.format(prompt)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 6}
    loaded = AutoModelForCausalLM.from_pretrained(model)
    said = loaded.generate(ids, **settings, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_quiz_is_read_as_branches(any_question, model, tokenizer, tmp_path, capsys):
    output = tmp_path / "quiz.jsonl"
    quiz.main(arguments(model, output, 3))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    texts = GeneratedTexts((60, 90), 9, ["prose", "json"]).load(tokenizer)
    assert [row["context"] for row in rows] == [texts[i].context for i in range(3)]
    assert "asking: 3 of 3 texts" in capsys.readouterr().err
    for row in rows:
        for each in row["qa"]:
            prompt = f"{row['context']}\n\n{each['question']}"
            assert each["answers"] == [greedy(model, tokenizer, prompt)]
    encoder = BranchEncoder(tokenizer, Branching(("answer",)))
    found = JsonlSource(str(output)).load(tokenizer)
    assert len(found) == sum(len(row["qa"]) for row in rows)
    assert len(encoder(found[0]).branches) == len(rows[0]["qa"])


def test_a_quiz_goes_on_where_it_stopped(any_question, model, tmp_path):
    whole, two = tmp_path / "whole.jsonl", tmp_path / "two.jsonl"
    quiz.main(arguments(model, whole, 4))
    quiz.main(arguments(model, two, 2))
    with two.open("a") as file:
        file.write('{"number": 2, "con')
    quiz.main(arguments(model, two, 4))
    assert two.read_bytes() == whole.read_bytes()
    quiz.main(arguments(model, two, 4))
    assert two.read_bytes() == whole.read_bytes()


def test_only_questions_with_answers_are_kept(model, monkeypatch):
    said = iter([["Who? \nIndeed.", "A text.", "", "Who?", "Wh", "What?"], ["Me.", " "]])
    loaded = load_model(str(model), device="cpu")
    asked = quiz.Quiz(loaded, 6, 9, 9, 9, 0)
    monkeypatch.setattr(asked, "_said", lambda prompts, most: next(said))
    assert asked.about("This is a text.") == [{"question": "Who?", "answers": ["Me."]}]


def test_other_files_are_left_alone(model, tmp_path):
    output = tmp_path / "other.jsonl"
    output.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="has rows of something else"):
        quiz.main(arguments(model, output, 2))
    assert output.read_text() == '{"a": 1}\n'
