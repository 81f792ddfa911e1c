import json

import pytest
import torch
from peft import PeftModel

import locret
from locret.models import load_model
from tests.trainers.runs import tiny_run
from trainers import adapt, fit


@pytest.fixture(scope="module")
def adapter(backbones, rows, tmp_path_factory):
    """A folder with an adapter trained for a few steps."""
    folder = tmp_path_factory.mktemp("adapter")
    args = tiny_run(backbones("llama"), rows, folder, steps=6, config="smollm2_adapter.yaml")
    return adapt.main([*args, "--model.lr=0.02", f"--output={folder / 'adapter'}"])


def logits(model):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_an_adapter_changes_the_model_and_merges_exactly(adapter, backbones):
    plain = load_model(str(backbones("llama")), dtype="float32", device="cpu").model
    before = logits(plain)
    unmerged = logits(PeftModel.from_pretrained(plain, adapter))
    merged = load_model(
        str(backbones("llama")), dtype="float32", device="cpu", adapter=str(adapter)
    )
    assert merged.adapter == str(adapter)
    assert not torch.allclose(before, unmerged, atol=1e-2)
    torch.testing.assert_close(logits(merged.model), unmerged, rtol=1e-4, atol=1e-4)


def test_training_an_adapter_lowers_the_loss(adapter):
    history = (adapter.parent / "logs" / "version_0" / "metrics.csv").read_text()
    assert history.count("\n") > 3
    assert (adapter / "training.yaml").is_file()
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2


def test_heads_train_on_an_adapted_backbone_and_record_it(adapter, backbones, rows, tmp_path):
    args = tiny_run(backbones("llama"), rows, tmp_path)
    heads = locret.RetainingHeads.from_pretrained(fit.main([*args, f"--model.adapter={adapter}"]))
    assert heads.config.adapter == str(adapter)
