"""Head quotas that a training leaves in the record of its heads."""

import json

import pytest
import torch

import locret
from datamodules.datamodule import ConversationDataModule
from locret.engine.budgets import Calibration
from locret.heads.targets import LABELS
from locret.model.backbone import Backbone
from locret.model.loading import load_model
from locret.policies import LocretPolicy
from tests.tiny_models import prompt
from tests.trainers.runs import run_forked, tiny_run
from trainers.fit import main

LOGARITHM = ["--model.label=log_max_prob", "--model.bias=true"]


@pytest.fixture(autouse=True)
def contexts(monkeypatch):
    """A data module that draws random contexts, and the counts it was asked for."""
    asked = []

    def drawn(self, count):
        asked.append(count)
        return (prompt(80 + i, seed=i, vocab=60)[0] for i in range(count))

    monkeypatch.setattr(ConversationDataModule, "contexts", drawn, raising=False)
    logarithm = LABELS.get("log_max_prob", lambda v: torch.log(LABELS["max_prob"](v) + 1e-5))
    monkeypatch.setitem(LABELS, "log_max_prob", logarithm)
    return asked


@pytest.mark.parametrize("more", [[], ["--model.kind=linear"]])
def test_quotas_are_those_of_the_exported_heads(more, contexts, backbones, rows, tmp_path, capfd):
    args = [*tiny_run(backbones("llama"), rows, tmp_path), *LOGARITHM, "--model.quota_contexts=3"]
    args.append("--model.quota_sharpness=1.5")
    heads = locret.RetainingHeads.from_pretrained(main([*args, *more]))
    assert contexts == [3]
    model = load_model(str(backbones("llama")), dtype="float32", device="cpu").model
    calibration = Calibration(Backbone(model), LocretPolicy(heads))
    for i in range(3):
        calibration.add(prompt(80 + i, seed=i, vocab=60))
    assert heads.config.quotas == calibration.quotas(1.5) != calibration.quotas()
    assert list(calibration.quotas()) == ["2", "4", "8", "16", "32"]
    assert "quotas at 8x" in (tmp_path / "heads" / "README.md").read_text()
    assert "training.yaml" in (tmp_path / "heads" / "README.md").read_text()
    assert "measuring head quotas: 3 of 3 contexts" in capfd.readouterr().err


@pytest.mark.parametrize("more", [[], [*LOGARITHM, "--model.quota_contexts=0"]])
def test_none_where_none_are_wanted_or_scores_are_no_logarithms(
    more, contexts, backbones, rows, tmp_path, recwarn
):
    output = main([*tiny_run(backbones("llama"), rows, tmp_path), *more])
    assert locret.RetainingHeads.from_pretrained(output).config.quotas is None
    assert contexts == []
    assert not [w for w in recwarn if "quotas" in str(w.message)]


def test_none_where_a_question_stands_in_front(contexts, backbones, rows, tmp_path):
    args = [*tiny_run(backbones("llama"), rows, tmp_path), *LOGARITHM, "--model.query_tokens=4"]
    with pytest.warns(UserWarning, match="no head quotas were measured: its heads read a question"):
        output = main(args)
    assert locret.RetainingHeads.from_pretrained(output).config.quotas is None


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_of_several_processes_one_measures_and_shards_do_not(strategy, backbones, rows, tmp_path):
    both = ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--model.quota_contexts=2"]
    args = [*tiny_run(backbones("llama"), rows, tmp_path), *LOGARITHM, *both]
    assert run_forked(main, args, processes=2) == 0
    record = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert ("quotas" in record) == (strategy == "ddp")


def test_heads_are_there_whatever_becomes_of_the_quotas(backbones, rows, tmp_path, monkeypatch):
    def fails(self, count):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ConversationDataModule, "contexts", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        main([*tiny_run(backbones("llama"), rows, tmp_path), *LOGARITHM])
    heads = locret.RetainingHeads.from_pretrained(tmp_path / "heads")
    assert heads.config.label == "log_max_prob" and heads.config.quotas is None
    assert (tmp_path / "heads" / "training.yaml").is_file()
