"""Several tasks and ratios in one evaluation."""

import dataclasses
import json

import pytest

from locret.evaluation import needle, needle_table
from locret.evaluation.needle import NeedleResult, NeedleSettings
from locret.model.loading import LoadedModel
from tests.tiny_models import tiny_heads, tiny_model

SETTINGS = NeedleSettings(
    tasks=("niah_single", "niah_multikey"),
    tokens=400,
    count=2,
    ratios=(4, 8),
    chunk_size=64,
    local_tokens=20,
    max_new_tokens=4,
)


@pytest.fixture(scope="module")
def loaded(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    return LoadedModel(model, tokenizer, "tiny", None)


@pytest.fixture(scope="module")
def heads(loaded):
    return tiny_heads(loaded.model)


@pytest.fixture(scope="module")
def results(loaded, heads):
    return list(needle.run_needles(loaded, ["full", "locret"], SETTINGS, heads))


HELD = {
    "units": 5, "bytes": 2**20, "prompt_tokens": 50, "seconds": 0.5, "needle_is_local": False,
    "context_tokens": 46, "context_units": 3, "context_bytes": 2**19, "rest_tokens": 2,
    "full_bytes": 2**22,
}  # fmt: skip


def result(policy="full", ratio=1, task="a", seed=0, found=True, **values):
    return NeedleResult(
        policy=policy,
        ratio=ratio,
        task=task,
        seed=seed,
        depth=0.5,
        found=found,
        answer="",
        expected=("x",),
        **HELD | values,
    )


def test_a_policy_that_keeps_all_runs_once():
    assert needle.runs(["full", "random"], (4, 8)) == [("full", 1), ("random", 4), ("random", 8)]
    assert needle.runs([], (4, 8)) == []


def test_samples_are_spread_evenly_in_every_task(tokenizer):
    samples = needle.make_samples(dataclasses.replace(SETTINGS, count=4), tokenizer)
    assert [sample.task for _, sample in samples] == ["niah_single"] * 4 + ["niah_multikey"] * 4
    assert [seed - SETTINGS.seed for seed, _ in samples] == [0, 1, 2, 3] * 2
    depths = [sample.depth for _, sample in samples]
    for i, depth in enumerate(depths):
        assert depth == pytest.approx((i % 4 + 0.5) / 4, abs=0.15)


def test_an_unknown_task_is_refused(tokenizer):
    with pytest.raises(ValueError, match="unknown task 'nosuch'"):
        needle.make_samples(dataclasses.replace(SETTINGS, tasks=("nosuch",)), tokenizer)


def test_the_answers_first_words_are_given_if_asked_for(tokenizer):
    _, sample = needle.make_samples(SETTINGS, tokenizer)[0]
    with_prefix, without = (
        tokenizer.decode(needle.needle_prompt(sample, tokenizer, given)[0])
        for given in (True, False)
    )
    assert with_prefix == without + sample.answer_prefix
    assert sample.answer_prefix
    assert without.endswith("<|assistant|>")
    assert not any(word in sample.answer_prefix for word in sample.expected)


def test_every_sample_is_asked_at_every_ratio(results):
    asked = [(r.policy, r.ratio, r.task, r.seed - SETTINGS.seed) for r in results]
    assert asked == [
        (policy, ratio, task, seed)
        for policy, ratio in (("full", 1), ("locret", 4), ("locret", 8))
        for task in SETTINGS.tasks
        for seed in (0, 1)
    ]


def test_units_are_the_budget_and_what_came_after_it(results):
    for one in results:
        if one.policy == "full":
            assert one.units == one.prompt_tokens + SETTINGS.max_new_tokens - 1
        else:
            after = SETTINGS.local_tokens + SETTINGS.max_new_tokens - 1
            assert one.units <= SETTINGS.tokens // one.ratio + after
    sizes = {ratio: max(r.bytes for r in results if r.ratio == ratio) for ratio in (1, 4, 8)}
    assert sizes[8] <= sizes[4] <= sizes[1]


def test_query_aware_heads_are_asked_too(loaded):
    aware = tiny_heads(loaded.model, query_tokens=8)
    settings = dataclasses.replace(SETTINGS, count=1, ratios=(8,))
    (first, _) = needle.run_needles(loaded, ["locret"], settings, aware)
    assert first.units <= 50 + 20 + 3
    assert first.prompt_tokens > 300


def test_locret_without_heads_is_refused(loaded):
    with pytest.raises(ValueError, match="needs trained heads"):
        next(needle.run_needles(loaded, ["locret"], SETTINGS))


def test_a_summary_tells_tasks_and_ratios_apart():
    rows = needle.summarize(
        [
            result(task="a", seed=0),
            result(task="a", seed=1, found=False),
            result(task="b", seed=0),
            result(task="b", seed=1),
            result("locret", 4, "a", 0, units=9, bytes=7),
            result("locret", 4, "a", 1),
            result("locret", 4, "b", 0, found=False),
            result("locret", 4, "b", 1, seconds=2.0),
            result("locret", 8, "a", 0, found=False),
            result("locret", 8, "b", 1),
        ]
    )
    assert [(row.policy, row.ratio) for row in rows] == [("full", 1), ("locret", 4), ("locret", 8)]
    full, four, eight = rows
    assert (full.found, full.of_full, full.count) == (3, 3, 4)
    assert (four.found, four.of_full, four.count) == (3, 2, 4)  # a/1 is beyond the full cache
    assert (eight.found, eight.of_full, eight.count) == (1, 1, 2)
    assert full.by_task == {"a": 0.5, "b": 1.0}
    assert four.by_task == {"a": 1.0, "b": 0.5}
    assert eight.by_task == {"a": 0.0, "b": 1.0}
    assert (four.units, four.bytes, four.seconds) == (9, 2**20, 3.5)


def test_the_context_and_the_rest_make_the_cache(results, loaded):
    pairs = 2 * 2 * 2 * 8 * 4  # keys and values of two layers with two heads of 8 numbers
    per_unit = pairs + 2 * 2 * (4 + 8)  # scores and positions
    for one in results:
        new = SETTINGS.max_new_tokens - 1
        assert one.context_tokens == one.prompt_tokens - SETTINGS.local_tokens
        assert one.rest_tokens == SETTINGS.local_tokens + new
        assert one.context_units + one.rest_tokens == one.units
        assert one.context_bytes == one.context_units * per_unit < one.bytes
        assert one.full_bytes == (one.prompt_tokens + new) * pairs
        if one.policy == "full":
            assert one.context_units == one.context_tokens
        else:
            assert one.context_units <= SETTINGS.tokens // one.ratio


def test_the_context_of_a_batch_is_that_of_its_rows(loaded, results):
    together = needle.run_needles(loaded, ["random"], SETTINGS, batch_size=4)
    for one in together:
        assert one.context_units <= SETTINGS.tokens // one.ratio
        assert one.context_tokens + SETTINGS.local_tokens == one.prompt_tokens
        assert 0 < one.context_bytes < one.bytes < one.full_bytes * 3


def table(*results, **settings):
    settings = dataclasses.replace(SETTINGS, **settings)
    return needle_table.as_table(settings, results).splitlines()


def test_the_table_has_a_row_a_policy_and_ratio():
    found = [result(), result("locret", 4, found=False, bytes=2**18, context_bytes=2**16)]
    head, *rows = table(*found, result("locret", 8, bytes=2**19))[:4]
    assert " ".join(head.split()) == (
        "policy asked real found of full context kept MiB rest MiB cache MiB seconds"
    )
    assert [row.split()[:9] for row in rows] == [
        ["full", "1x", "1.0x", "1/1", "1/1", "3/46", "0.5", "2", "0.5"],
        ["locret", "4x", "4.0x", "0/1", "0/1", "3/46", "0.1", "2", "0.2"],
        ["locret", "8x", "2.0x", "1/1", "1/1", "3/46", "0.5", "2", "0.0"],
    ]


def test_the_table_says_what_its_columns_are():
    lines = table(result(), result("locret", 8))
    legend = "\n".join(lines[4:])
    for term in ("asked", "real", "of full", "context kept", "rest"):
        assert f"\n{term}  " in f"\n{legend}"
    assert "of policy full / cache MiB of the row" in legend and "last 20" in legend
    assert max(map(len, lines)) <= 100


def test_without_the_full_cache_the_ratio_is_to_all_keys_and_values():
    head, alone, _, *legend = table(result("locret", 8))
    assert alone.split()[1:5] == ["8x", "4.0x", "1/1", "-"]
    assert "keys and values of all tokens / cache MiB" in "\n".join(legend)
    assert not any(line.startswith("of full") for line in legend)


def test_samples_that_no_policy_can_lose_are_marked():
    found = [
        result(policy, ratio, seed=seed, needle_is_local=seed == 1)
        for policy, ratio in (("full", 1), ("locret", 8))
        for seed in (0, 1)
    ]
    lines = table(*found)
    assert [line.split()[3] for line in lines[1:3]] == ["2/2*", "2/2*"]
    assert "* 1 of 2 samples has its needle" in "\n".join(lines)
    assert "says nothing about the policy" in " ".join(" ".join(lines).split())
    assert not any("*" in line for line in table(*found[::2]))
    assert needle.summarize(found)[1].local == 1


def test_everything_goes_to_json(results):
    written = json.loads(json.dumps(needle.as_json(SETTINGS, results)))
    assert written["settings"]["ratios"] == [4, 8]
    assert written["settings"]["tasks"] == list(SETTINGS.tasks)
    assert len(written["results"]) == len(results)
    assert [row["ratio"] for row in written["summary"]] == [1, 4, 8]
    assert set(written["summary"][0]["by_task"]) == set(SETTINGS.tasks)
