"""The notebook of docs/ runs, on a tiny model; the outputs in it are those of one run."""

import json
import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.trainers.runs import source

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "tutorial.ipynb"
STAND_INS = {
    "embedded:smollm2": "backbone",
    "checkpoints/smollm2-adapter": "adapter",
    "checkpoints/smollm2-heads": "heads",
    'args += ["--model.width=64"': f'args += ["--model.model=backbone", {source("rows.jsonl")!r}',
    "max_steps=20": "max_steps=2",
    "[200:280]": "[200:230]",
}


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_tutorial_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    tiny_heads(model).save_pretrained(tmp_path / "heads")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "What is it?", "output": "It is."}\n' * 4)
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    for cell in notebook.cells:
        for name, other in STAND_INS.items():
            cell.source = cell.source.replace(name, other)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    where = {"metadata": {"path": tmp_path / "docs" / "notebooks"}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    printed = [o.text for cell in notebook.cells for o in cell.get("outputs", ()) if "text" in o]
    assert any("units are left in a KV head" in text for text in printed)
    assert any("heads.safetensors" in text for text in printed)


def test_the_outputs_are_those_of_one_run_and_name_no_machine():
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not any(str(Path.home()) in json.dumps(output) for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
