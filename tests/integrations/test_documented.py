"""The code that docs/transformers.md shows runs, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny_gguf import write_gguf
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_shown_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(str(tmp_path / "m"))
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2.5", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained("path/or/hub-id")
    tokenizer.save_pretrained("path/or/hub-id")
    write_gguf(Path("path/or/model.gguf"), model, tokenizer)
    settings = {"chunk_size": 64, "stabilizers": 2, "local_tokens": 4}
    for folder in ("runs/phi3/heads", "OWNER/NAME"):
        tiny_heads(model, defaults={"budget": 32, **settings}).save_pretrained(folder)
    names = {
        "book": "One quiet otter. " * 60,
        "model": model,
        "input_ids": torch.arange(3, 203)[None] % 90 + 3,
    }
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 - the page is ours
    assert len(BLOCKS) == 3
    assert names["ask"].model is names["loaded"].model
    assert names["ids"].shape == (1, 200 + 64)
