import os
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import pytest
from transformers import PreTrainedTokenizerFast

from locret.tasks.haystack import load_haystack
from locret.tasks.synthetic import TASKS, SyntheticSample, make_sample, prompt_text

ROOT = Path(__file__).resolve().parents[2]


def n_tokens(tokenizer: PreTrainedTokenizerFast, sample: SyntheticSample) -> int:
    return len(tokenizer(prompt_text(sample), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("task", TASKS)
def test_expected_strings_stand_in_the_context_and_in_the_answer(task, tokenizer):
    for seed in range(20):
        sample = make_sample(task, 1500, tokenizer, seed)
        assert sample.task == task
        assert sample.expected and len(set(sample.expected)) == len(sample.expected)
        assert all(wanted in sample.context for wanted in sample.expected)
        assert sample.score(sample.answer) == 1
        assert not any(wanted in sample.question for wanted in sample.expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [777, 2048, 4096])
def test_length_is_close_to_the_bound_and_never_above(task, tokens, tokenizer):
    longest = max(len(i) for i in tokenizer(list(load_haystack()))["input_ids"])
    for seed in range(5):
        for depth in (None, 0.0, 0.3, 1.0):
            found = n_tokens(tokenizer, make_sample(task, tokens, tokenizer, seed, depth))
            assert tokens - longest - 2 <= found <= tokens


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_equal_for_equal_arguments_and_differ_by_seed(task, tokenizer):
    assert make_sample(task, 900, tokenizer, 3) == make_sample(task, 900, tokenizer, 3)
    assert make_sample(task, 900, tokenizer, 3) != make_sample(task, 900, tokenizer, 4)


def test_samples_are_equal_in_another_process_with_another_hash_seed(tokenizer):
    code = (
        "from tests.tiny_tokenizer import tiny_tokenizer\n"
        "from tests.evaluation.test_synthetic import checksums\n"
        "print(checksums(tiny_tokenizer()))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4711"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(checksums(tokenizer))


def checksums(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    samples = [make_sample(task, 900, tokenizer, 5) for task in TASKS]
    return [crc32(f"{prompt_text(sample)} {sample.answer}".encode()) for sample in samples]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_decides_where_the_needle_stands(task, depth, tokenizer):
    sample = make_sample(task, 4096, tokenizer, 1, depth)
    body = sample.context.partition("\n\n")[2]
    assert sample.depth == depth
    assert abs(body.index(sample.expected[0]) / len(body) - depth) < 0.15


def test_a_depth_keeps_keys_and_values(tokenizer):
    low, high = (make_sample("niah_single", 2000, tokenizer, 1, depth) for depth in (0.1, 0.9))
    assert low.expected == high.expected and low.question == high.question


def test_variables_are_assigned_in_the_order_of_the_chain(tokenizer):
    sample = make_sample("variable_tracking", 3000, tokenizer, 2)
    places = [sample.context.index(f"VAR {name} =") for name in sample.expected]
    assert places == sorted(places) and len(places) == 5


def test_multikey_holds_distractors_that_are_not_asked_for(tokenizer):
    sample = make_sample("niah_multikey", 2000, tokenizer, 2)
    assert sample.context.count("One of the special magic numbers for") == 4
    assert len(sample.expected) == 1


def test_next_sentence_quotes_its_haystack(tokenizer):
    sample = make_sample("next_sentence", 2000, tokenizer, 7)
    quoted = sample.question.partition("\n")[2]
    assert f"{quoted} {sample.answer}" in sample.context
    assert sample.context.count(quoted) == 1
    sentences = load_haystack()
    assert sentences[sentences.index(quoted) + 1] == sample.answer


def test_texts_start_at_different_places(tokenizer):
    starts = {make_sample("passkey", 600, tokenizer, s).context[160:220] for s in range(8)}
    assert len(starts) > 5


def test_a_prompt_longer_than_the_haystack_repeats_it(tokenizer, tmp_path):
    path = haystack_file(tmp_path, 10)
    for task in TASKS:
        sample = make_sample(task, 3000, tokenizer, 0, haystack=path)
        assert 2900 < n_tokens(tokenizer, sample) <= 3000
        assert sample.score(sample.context) == 1


def haystack_file(folder: Path, sentences: int) -> Path:
    path = folder / "prose.txt"
    text = [f"The keeper of lamp {chr(97 + i)} walked home\nslowly." for i in range(sentences)]
    path.write_text("\n\n".join(text), encoding="utf-8")
    return path


def test_haystack_is_clean_prose():
    sentences = load_haystack()
    assert len(sentences) > 1000 and len(set(sentences)) == len(sentences)
    assert not any("::=" in s or "\n" in s or "****" in s or ">>>" in s for s in sentences)


def test_costs_milliseconds(tokenizer):
    make_sample("passkey", 4096, tokenizer, 0)
    begun = time.perf_counter()
    for seed in range(10):
        make_sample("niah_multikey", 4096, tokenizer, seed)
    assert (time.perf_counter() - begun) / 10 < 0.1  # some 6 ms when nothing else runs


def test_unknown_task_names_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'needle'.*passkey.*next_sentence"):
        make_sample("needle", 1000, tokenizer, 0)


@pytest.mark.parametrize("task", TASKS)
def test_the_named_minimum_is_enough(task, tokenizer):
    with pytest.raises(ValueError, match=r"tokens is 10, too few .* at least \d+$") as error:
        make_sample(task, 10, tokenizer, 0)
    least = int(str(error.value).split()[-1])
    sample = make_sample(task, least, tokenizer, 0)
    assert n_tokens(tokenizer, sample) == least and sample.score(sample.context) == 1
    with pytest.raises(ValueError, match="too few"):
        make_sample(task, least - 1, tokenizer, 0)


def test_one_seed_asks_the_same_at_every_length(tokenizer):
    short, long = (make_sample("niah_multiquery", n, tokenizer, 0) for n in (1000, 3000))
    assert (short.question, short.answer) == (long.question, long.answer)


def test_bad_depth_and_bad_haystack_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="depth is 1.5"):
        make_sample("passkey", 1000, tokenizer, 0, depth=1.5)
    with pytest.raises(ValueError, match="is not a file"):
        make_sample("passkey", 1000, tokenizer, 0, haystack=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="holds 3 different sentences"):
        make_sample("passkey", 1000, tokenizer, 0, haystack=haystack_file(tmp_path, 3))
