"""Grids of lengths and depths: what is asked, going on after a kill, tables and heat maps."""

import dataclasses
import json

import pytest
import torch

from locret.evaluation import grid, heatmap, needle
from locret.evaluation.grid import GridSettings
from locret.evaluation.needle import NeedleSettings
from locret.model.loading import LoadedModel
from tests.tiny_models import tiny_heads, tiny_model

SETTINGS = GridSettings(
    lengths=(300, 500),
    depths=3,
    needle=NeedleSettings(chunk_size=64, local_tokens=20, max_new_tokens=2),
)
POLICIES = ["full", "locret"]


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return LoadedModel(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, "tiny", None)


@pytest.fixture(scope="module")
def heads(loaded):
    return tiny_heads(loaded.model)


@pytest.fixture(scope="module")
def out(loaded, heads, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "new" / "grid.json"
    grid.run_grid(loaded, POLICIES, SETTINGS, out, heads, {"model": "tiny"})
    return out


def cell(policy="full", ratio=1, length=300, row=0, found=True, seed=0):
    return {"policy": policy, "ratio": ratio, "length": length, "row": row, "found": found,
            "task": "a", "seed": seed, "error": None}  # fmt: skip


def record(*cells, lengths=(300, 500), depths=2):
    return {"settings": {"lengths": list(lengths), "depths": depths}, "results": list(cells)}


def test_other_heads_of_the_same_name_are_told_apart(loaded, heads, tmp_path):
    name = str(heads.save_pretrained(tmp_path / "heads"))
    before = grid.manifest_of(loaded, name)
    assert before == grid.manifest_of(loaded, name)
    tiny_heads(loaded.model, width=8).save_pretrained(name)
    after = grid.manifest_of(loaded, name)
    assert after["heads"] == before["heads"] and after != before


def test_a_grid_goes_on_with_the_heads_it_was_begun_with_alone(loaded, heads, out, tmp_path):
    name = str(heads.save_pretrained(tmp_path / "heads"))
    now, path = grid.manifest_of(loaded, name), tmp_path / "grid.json"
    begun = json.loads(out.read_text()) | {"manifest": now}
    path.write_text(json.dumps(begun))
    again = grid.run_grid(loaded, POLICIES, SETTINGS, path, heads, now)
    assert again["results"] == begun["results"]
    other = now | {"sources": now["sources"] | {"heads": {"source": name, "sha256": "other"}}}
    with pytest.raises(ValueError, match="heads that have changed since, under the same name"):
        grid.run_grid(loaded, POLICIES, SETTINGS, path, heads, other)
    path.write_text(json.dumps(begun | {"manifest": without(now, "sources")}))
    with pytest.raises(ValueError, match="does not say which contents its adapter and heads had"):
        grid.run_grid(loaded, POLICIES, SETTINGS, path, heads, now)


def test_an_earlier_grid_without_heads_goes_on(loaded, tmp_path):
    path, now = tmp_path / "grid.json", grid.manifest_of(loaded, None)
    short = dataclasses.replace(SETTINGS, lengths=(300,))
    grid.run_grid(loaded, ["full"], short, path, manifest=without(now, "sources"))
    before = json.loads(path.read_text())["results"]
    assert grid.run_grid(loaded, ["full"], short, path, manifest=now)["results"] == before


def without(values, name):
    return {key: value for key, value in values.items() if key != name}


def test_every_cell_is_asked_under_every_policy(out):
    written = json.loads(out.read_text())
    assert written["kind"] == "needle_grid"
    assert written["manifest"] == {"model": "tiny"}
    asked = [(c["length"], c["policy"], c["ratio"], c["row"]) for c in written["results"]]
    assert asked == [
        (length, policy, ratio, row)
        for length in (300, 500)
        for policy, ratio in (("full", 1), ("locret", 8))
        for row in range(3)
    ]
    for c in written["results"]:
        assert abs(c["prompt_tokens"] - c["length"]) < 80
        assert c["row"] / 3 <= c["depth"] <= (c["row"] + 1) / 3
        if c["policy"] == "locret":
            assert c["units"] <= c["length"] // 8 + 20 + 1
    seeds = {(c["length"], c["seed"]) for c in written["results"]}
    assert {seed for length, seed in seeds if length == 300} == {
        seed for length, seed in seeds if length == 500
    }


def test_several_samples_a_cell_lie_within_its_row(tokenizer):
    settings = dataclasses.replace(SETTINGS, samples_per_cell=2)
    samples = needle.make_samples(settings.of_length(500), tokenizer)
    assert len(samples) == 6
    for place, (_, sample) in enumerate(samples):
        assert place // 2 / 3 <= sample.depth <= (place // 2 + 1) / 3


def test_a_killed_run_goes_on_and_ends_the_same(loaded, heads, out, tmp_path, monkeypatch):
    whole = json.loads(out.read_text())["results"]
    again, asked = tmp_path / "grid.json", []
    ask = needle.ask

    def killed_at_5(*args):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(args)
        return ask(*args)

    monkeypatch.setattr(needle, "ask", killed_at_5)
    run = (loaded, POLICIES, SETTINGS, again, heads, {"model": "tiny"})
    with pytest.raises(KeyboardInterrupt):
        grid.run_grid(*run)
    assert len(json.loads(again.read_text())["results"]) == 5
    monkeypatch.setattr(needle, "ask", lambda *args: asked.append(args) or ask(*args))
    steps = []
    grid.run_grid(*run, progress=lambda done, total: steps.append((done, total)))
    assert len(asked) == 12
    assert steps == [(done, 12) for done in range(5, 13)]
    without_time = [{k: v for k, v in c.items() if k != "seconds"} for c in whole]
    ended = json.loads(again.read_text())["results"]
    assert [{k: v for k, v in c.items() if k != "seconds"} for c in ended] == without_time
    assert list(tmp_path.iterdir()) == [again]


def test_batches_change_no_answer(loaded, heads, out, tmp_path):
    again = tmp_path / "grid.json"
    made = grid.run_grid(loaded, POLICIES, SETTINGS, again, heads, {"model": "tiny"}, None, 2)
    names = ("policy", "length", "row", "seed", "answer", "units", "prompt_tokens")
    whole = json.loads(out.read_text())["results"]
    assert [[c[n] for n in names] for c in made["results"]] == [
        [c[n] for n in names] for c in whole
    ]


def test_a_policy_can_be_added_to_what_is_there(loaded, out, tmp_path):
    copy = tmp_path / "grid.json"
    copy.write_bytes(out.read_bytes())
    made = grid.run_grid(loaded, ["random"], SETTINGS, copy, None, {"model": "tiny"})
    assert grid.runs_of(made["results"]) == [("full", 1), ("locret", 8), ("random", 8)]
    assert made["results"][:12] == json.loads(out.read_text())["results"]


def test_answers_of_other_settings_are_not_mixed(loaded, out, tmp_path):
    before = out.read_bytes()
    other = dataclasses.replace(SETTINGS, depths=4)
    with pytest.raises(ValueError, match="answers of other settings;"):
        grid.run_grid(loaded, ["full"], other, out, manifest={"model": "tiny"})
    with pytest.raises(ValueError, match="answers of other manifest;"):
        grid.run_grid(loaded, ["full"], SETTINGS, out, manifest={"model": "other"})
    assert out.read_bytes() == before
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '"text"'):
        bad.write_text(text)
        with pytest.raises(ValueError, match="bad.json is there but holds no needle grid"):
            grid.run_grid(loaded, ["full"], SETTINGS, bad)


def test_what_does_not_fit_is_told_and_the_rest_is_asked(loaded, tmp_path, monkeypatch):
    ask = needle.ask

    def full_does_not_fit(model, run, *args):
        if run[0] == "full" and args[-1].tokens == 500:
            raise torch.OutOfMemoryError("no")
        return ask(model, run, *args)

    monkeypatch.setattr(needle, "ask", full_does_not_fit)
    made = grid.run_grid(loaded, ["full", "random"], SETTINGS, tmp_path / "grid.json")
    failed = [c for c in made["results"] if c["error"]]
    assert [(c["policy"], c["length"], c["row"]) for c in failed] == [
        ("full", 500, row) for row in range(3)
    ]
    assert grid.shares(made["results"], "full", 1)[500, 0] is None
    assert grid.as_table(made).splitlines()[1].split()[-1] == "-"
    assert heatmap.draw(made, tmp_path / "map.png").stat().st_size > 1000


def test_shares_and_table_by_hand():
    made = record(
        cell(found=True), cell(found=False, seed=1), cell(row=1), cell(length=500),
        cell("locret", 8, found=False), cell("locret", 8, row=1, found=None),
    )  # fmt: skip
    assert grid.shares(made["results"], "full", 1) == {(300, 0): 0.5, (300, 1): 1.0, (500, 0): 1.0}
    assert grid.shares(made["results"], "locret", 8) == {(300, 0): 0.0, (300, 1): None}
    head, full, locret = grid.as_table(made).splitlines()[:3]
    assert head.split() == ["share", "found", "asked", "300", "500"]
    assert full.split() == ["full", "1x", "0.75", "1.00"]
    assert locret.split() == ["locret", "8x", "0.00", "-"]


def test_one_figure_holds_all_policies():
    cells = [cell(name, 8) for name in ("a", "b", "c", "d", "e")]
    made = heatmap.figure(record(*cells))
    shown = [axis for axis in made.axes if axis.get_visible() and axis.get_title()]
    assert [axis.get_title().split(",")[0] for axis in shown] == ["a", "b", "c", "d", "e"]
    values = shown[0].images[0].get_array()
    assert values.shape == (2, 2)
    assert values[0, 0] == 1
    assert values.mask.sum() == 3 or bool(torch.tensor(values.filled(float("nan"))).isnan().any())
    with pytest.raises(ValueError, match="no results"):
        heatmap.figure(record())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lengths": ()}, "ascending"),
        ({"lengths": (500, 300)}, "ascending"),
        ({"lengths": (300,), "depths": 0}, "depths is 0"),
        ({"lengths": (300,), "samples_per_cell": 0}, "samples_per_cell is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        GridSettings(**settings)
