"""What caches kept before they were ragged: source positions and answers of every policy, recorded
in `golden/kept.json.gz`, to be kept alike.

    python -m tests.recorded FILE

records them anew.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import torch

import locret
from locret.policies import POLICIES, LocretPolicy
from locret.policies.attention import SnapKVPolicy
from locret.policies.compose import AdaptiveHeads, PyramidLayers, SharedLayers
from tests.kept import kept_of
from tests.tiny_models import distinct_prompt, tiny_heads, tiny_model

PATH = Path(__file__).parent / "golden" / "kept.json.gz"
VOCAB = 512
SMALL = {"budget": 24, "chunk_size": 17, "stabilizers": 3, "local_tokens": 5}
LENGTH, SHORTER, NEW = 90, 41, 6
SETTINGS: dict[str, dict[str, Any]] = {
    "compact": {},
    "original": {"positions": "original"},
    "at once": {"chunk_size": None},
    "query-aware": {"query_aware": True},
    "while answering": {"decode_interval": 2},
    "kivi": {"quantization": {"name": "kivi", "bits": 4, "group": 8, "residual": 4}},
    "merging": {"merging": "similar"},
    "layers": {"budget": [30, 12]},
    "share": {"budget": "4x"},
    "everything": {"budget": None},
}
COMPOSED = {
    "adaptive": lambda: AdaptiveHeads(SnapKVPolicy(3, 3)),
    "adaptive keydiff": lambda: AdaptiveHeads("keydiff"),
    "shared": lambda: SharedLayers("keydiff"),
    "adaptive shared": lambda: AdaptiveHeads(SharedLayers("knorm")),
    "pyramid": lambda: PyramidLayers("h2o", beta=4),
}


def policies(model: Any) -> dict[str, Any]:
    """Every policy by name."""
    others = {"locret", "full", "kvzip"}  # the last one is younger
    named: dict[str, Any] = {name: name for name in sorted(set(POLICIES) - others)}
    named |= {name: make() for name, make in COMPOSED.items()}
    return named | {"snapkv": SnapKVPolicy(3, 3), "locret": LocretPolicy(tiny_heads(model))}


def recorded() -> dict[str, Any]:
    """The cases as they were recorded."""
    cases: dict[str, Any] = json.loads(gzip.decompress(PATH.read_bytes()))
    return cases


def cases(kv_heads: int) -> Any:
    """Name, and what was kept and answered, of each case."""
    model = tiny_model("llama", num_key_value_heads=kv_heads, vocab_size=VOCAB)
    one = distinct_prompt(LENGTH, VOCAB)
    two = torch.zeros(2, LENGTH, dtype=torch.long)
    two[0] = one[0]
    two[1, LENGTH - SHORTER :] = distinct_prompt(SHORTER, VOCAB, seed=1)[0]
    for name, policy in policies(model).items():
        for setting, given in [*SETTINGS.items()][: None if kv_heads == 2 else 2]:
            engine = locret.Engine(model, policy, **SMALL | given)
            for ids in (one, two):
                yield f"{kv_heads} {name}, {setting}, {len(ids)}", _case(engine, ids, given)


def _case(engine: Any, ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
    mask = (ids > 0).long()
    query = {"query_ids": ids[:, -4:]} if given.get("query_aware") else {}
    cache = engine.prefill(ids[:, :-4], mask[:, :-4], **query)
    answers = engine.generate(ids, mask, max_new_tokens=NEW, do_sample=False)
    return {"kept": kept_of(cache), "answers": answers[:, ids.shape[1] :].tolist()}


def record(path: Path) -> None:
    """Write what is kept now."""
    found = {name: case for kv_heads in (2, 8) for name, case in cases(kv_heads)}
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in found.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{path}: {len(found)} cases")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
