"""Model cards: what they say, what they withstand, and when they are written over."""

import re

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard

from locret import RetainingHeads
from locret.heads import files as artifact
from locret.heads.hub import Facts, escape, is_generated, model_card, repeat_command
from tests.tiny_models import tiny_heads, tiny_model

TRAINING = {
    "data": {
        "train": [
            {"class_path": "datamodules.sources.HubSource", "init_args": {"name": "owner/set"}},
            {
                "class_path": "datamodules.sources.SyntheticSource",
                "init_args": {"tasks": ["niah_single", "passkey"], "size": 100, "haystack": None},
            },
        ]
    }
}


@pytest.fixture(scope="module")
def heads():
    return tiny_heads(
        tiny_model("llama"),
        backbone="some/backbone",
        backbone_revision="abc123",
        metrics={"val/recall": 0.123456789, "steps": 7},
        defaults={"budget": 30, "chunk_size": 16, "stabilizers": 4, "local_tokens": 8},
    )


@pytest.fixture
def folder(heads, tmp_path):
    return heads.save_pretrained(tmp_path / "heads")


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def table_rows(card):
    """Names to values of all tables, read as markdown reads them."""
    rows = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("| ")]
    assert all(len(row) == 4 for row in rows)
    return {row[1].strip(): row[2].strip() for row in rows}


# ---- what it says ----


def test_front_matter_is_what_the_hub_reads(heads):
    card = model_card(heads.config.to_dict(), Facts(training=TRAINING))
    assert front_matter(card) == {
        "library_name": "locret",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["locret", "kv-cache", "kv-cache-compression", "long-context", "custom_generate"],
        "base_model": "some/backbone",
        "base_model_relation": "adapter",
        "datasets": ["owner/set"],
        "model-index": [
            {
                "name": "Retaining heads for some/backbone",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "val", "type": "val"},
                        "metrics": [{"type": "recall", "value": 0.123456789}],
                    }
                ],
            }
        ],
    }
    data = ModelCard(card).data
    assert (data.base_model, data.license) == ("some/backbone", "apache-2.0")
    assert "(https://huggingface.co/some/backbone)" in card


def test_the_license_is_the_records():
    assert front_matter(model_card({"license": "llama3.1"}))["license"] == "llama3.1"
    odd = front_matter(model_card({"license": "mine: [all\nof it]"}))
    assert odd["license"] == "mine: [all\nof it]"


def test_every_field_of_the_record_is_in_the_table(heads):
    record = heads.config.to_dict()
    rows = table_rows(model_card(record))
    assert rows["backbone_revision"] == "abc123"
    assert rows["default budget"] == "30"
    assert rows["val/recall"] == "0.1235"
    assert rows["steps"] == "7"
    shown = {*rows, "metrics", "defaults", "license"}
    assert [name for name, value in record.items() if value is not None and name not in shown] == []


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """A folder of this test for the code that transformers copies."""
    folder = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def test_the_shown_usage_runs(heads, folder, modules):
    card = model_card(heads.config.to_dict(), Facts(repo_id=str(folder)))
    usage, stock = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert sum(map(bool, usage.splitlines())) == 3
    names = {"model": tiny_model("llama"), "input_ids": torch.randint(3, 99, (1, 90))}
    exec(usage, names)  # noqa: S102 - the card is ours
    assert names["ids"].shape == (1, 90 + 64)
    assert names["engine"].config.reading.budget == 30
    expected = names.pop("ids")
    exec(stock, names)  # noqa: S102
    assert torch.equal(names["ids"], expected)


def test_the_usage_runs_without_a_recorded_budget(tmp_path):
    heads = tiny_heads(tiny_model("llama"))
    card = model_card(heads.config.to_dict(), Facts(repo_id=str(heads.save_pretrained(tmp_path))))
    usage, _ = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(usage, {"model": tiny_model("llama"), "input_ids": torch.randint(3, 99, (1, 9))})  # noqa: S102


def test_training_data_command_plot_and_figures(heads):
    facts = Facts(
        training=TRAINING,
        command="python -m trainers.fit --config x.yaml",
        plot="training.png",
        files=("needle.json", "a log.csv"),
    )
    card = model_card(heads.config.to_dict(), facts)
    assert "- HubSource: name owner/set\n" in card
    assert "- SyntheticSource: tasks niah_single, passkey; size 100\n" in card
    assert "\npython -m trainers.fit --config x.yaml   # as it was run\n" in card
    assert "\npython -m trainers.fit --config training.yaml   # " in card
    assert "](training.png)" in card
    assert "[needle.json](needle.json), [a log.csv](a%20log.csv)" in card
    assert "2410.01805" in card.split("## Citation")[1]


def test_heads_that_were_tuned_are_tuned_again():
    card = model_card({}, Facts(training={}, command="python -m trainers.tune --config x.yaml"))
    assert "\npython -m trainers.tune --config training.yaml   # the same again" in card


def test_sources_within_sources_are_listed():
    inner = TRAINING["data"]["train"]
    mix = {"class_path": "datamodules.mix.Mix", "init_args": {"sources": inner, "weights": [1, 2]}}
    card = model_card({}, Facts(training={"data": {"train": mix}}))
    assert "- Mix: weights 1, 2\n- HubSource: name owner/set\n- SyntheticSource: " in card
    assert front_matter(card)["datasets"] == ["owner/set"]


@pytest.mark.parametrize(
    "training", [{}, {"data": None}, {"data": [1]}, {"data": {"train": "x"}}, {"data": {}}]
)
def test_training_configs_that_say_nothing_of_data(training):
    card = model_card({}, Facts(training=training))
    assert "Data:" not in card
    assert repeat_command() in card
    assert "datasets" not in front_matter(card)


@pytest.mark.parametrize(
    ("backbone", "base"),
    [
        ("owner/Name-1.5_b", "owner/Name-1.5_b"),
        ("embedded:smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("embedded:other", None),
        ("/tmp/model", None),
        ("./runs/model", None),
        ("gpt2", None),
        ("a/b/c", None),
        ("owner/name\nlicense: mit", None),
        (None, None),
    ],
)
def test_only_a_hub_id_is_a_base_model(backbone, base):
    card = model_card({"backbone": backbone})
    assert front_matter(card).get("base_model") == base
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title.endswith(base or " ".join((backbone or "that is not recorded").split()))


# ---- what it withstands ----


@pytest.mark.parametrize("record", [{}, {"metrics": None, "defaults": None, "backbone": None}])
def test_a_record_that_lacks_fields_gives_a_sound_card(record):
    card = model_card(record)
    assert "None" not in card
    assert "a backbone that is not recorded" in card
    assert ModelCard(card).data.library_name == "locret"
    assert not re.search(r"\{\w*\}", card.split("## Citation")[0])
    for absent in ("## Metrics", "## Training", "base_model"):
        assert absent not in card


def test_values_cannot_break_out_of_their_cell():
    evil = "a|b\n| c | d |\n```<script>*x*[y](z)\\"
    card = model_card({"backbone": evil, "label": evil, "metrics": {evil: 1.0}, evil: evil})
    rows = table_rows(card)
    assert rows["label"] == escape(evil)
    assert rows[escape(evil)] == "1"
    assert re.search(r"(?<!\\)<script", card) is None
    assert card.count("\n```") == 4


def test_the_same_facts_give_the_same_card(heads):
    record = heads.config.to_dict()
    backwards = dict(reversed(record.items()))
    assert model_card(record, Facts(training=TRAINING)) == model_card(
        backwards, Facts(training=TRAINING)
    )


# ---- when it is written over ----


def test_only_an_unchanged_card_counts_as_generated(heads):
    card = model_card(heads.config.to_dict())
    assert is_generated(card)
    assert is_generated(model_card({}))
    for edited in (
        card.replace("Use", "Usage"),
        card.replace("license: apache-2.0", "license: mit"),
        card + "More.\n",
        "More.\n" + card,
        card.rpartition("<!--")[0],
        "",
        "# Mine\n",
    ):
        assert not is_generated(edited)


def test_saving_again_renews_a_generated_card(folder):
    tiny_heads(tiny_model("llama"), backbone="other/backbone").save_pretrained(folder)
    assert "base_model: other/backbone\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("how", ["written", "edited", "not text", "empty"])
def test_saving_again_keeps_a_card_that_is_somebodys(folder, how):
    card = folder / "README.md"
    contents = {
        "written": b"# Mine\n",
        "edited": card.read_bytes().replace(b"## Use", b"## How I use it"),
        "not text": b"\xff\xfe\x00",
        "empty": b"",
    }
    card.write_bytes(contents[how])
    heads = tiny_heads(tiny_model("llama"), seed=3, backbone="other/backbone")
    heads.save_pretrained(folder)
    artifact.write_card(folder)
    assert card.read_bytes() == contents[how]
    assert RetainingHeads.from_pretrained(folder).config.backbone == "other/backbone"


def test_a_card_with_other_line_ends_is_still_generated(folder):
    card = folder / "README.md"
    card.write_bytes(card.read_bytes().replace(b"\n", b"\r\n"))
    tiny_heads(tiny_model("llama"), backbone="other/backbone").save_pretrained(folder)
    assert "other/backbone" in card.read_text()


def test_write_card_takes_in_what_lies_beside(folder):
    command = "python -m trainers.fit --config smollm2.yaml --model.lr 1e-3"
    text = f"# lightning==2\n# command: {command}\n{yaml.safe_dump(TRAINING)}"
    (folder / "training.yaml").write_text(text)
    (folder / "training.png").write_bytes(b"\x89PNG")
    (folder / "recall.png").write_bytes(b"\x89PNG")
    (folder / "needle.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    artifact.write_card(folder, "me/heads")
    card = (folder / "README.md").read_text()
    assert is_generated(card)
    assert f"\n{command}   # as it was run\n" in card
    assert "- HubSource: name owner/set\n" in card
    assert "](training.png)" in card
    assert "Figures in files: [needle.json](needle.json), [recall.png](recall.png)\n" in card
    assert 'from_pretrained("me/heads")' in card
    assert "notes" not in card
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_quotas_are_told_by_their_spread(heads):
    quotas = {"16": [[3.0, 0.5], [0.25, 0.25]], "2": [[1.0, 1.0], [1.0, 1.0]]}
    rows = table_rows(model_card(heads.config.to_dict() | {"quotas": quotas}))
    assert "quotas" not in rows
    assert rows["quotas at 16x"] == (
        "from 0.25 to 3.00 of the mean; the tenth of the heads that keeps most has 75%"
    )
    assert rows["quotas at 2x"].startswith("from 1.00 to 1.00")
    assert not [name for name in table_rows(model_card(heads.config.to_dict())) if "quota" in name]
