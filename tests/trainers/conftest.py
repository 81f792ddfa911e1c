import json

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """A function from family to a folder with a tiny random checkpoint and its tokenizer."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tokenizer = tiny_tokenizer()
            tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A JSONL file in LongAlpaca's schema."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (
        {"instruction": f"Page {i} says {i * 7919 % 1000}. " * 8 + "What?", "output": f"It is {i}."}
        for i in range(24)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _no_group_is_left():
    """A forked process would take a group that a failed training left for its own, and wait."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
