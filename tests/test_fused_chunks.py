"""Chunks that run fused give what the model's own forward does, bit by bit on a CPU."""

import peft
import pytest
import torch
from torch import nn

import locret
from locret.engine.answering import Answering
from locret.engine.reading import ChunkCounts
from locret.model.backbone import PRENORM
from locret.model.prenorm import why_not_fused
from locret.policies.compose import AdaptiveHeads
from tests.tiny_models import prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 17, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def read_by(engine, ids, mask=None):
    """All that a prompt leaves in a cache, and the logits of an answer."""
    cache = engine.prefill(ids, mask)
    counts = engine.last_chunks
    held = [(x.keys, x.values, *sum(x.source_positions, [])) for x in cache.layers]
    scores = [sum(layer.scores, []) for layer in cache.layers if cache.scored]
    answer = engine.generate(prompt(7, batch=len(ids)), cache=cache, **GREEDY, **LOGITS)
    return counts, [*sum(held, ()), *sum(scores, []), answer.sequences, *answer.logits]


@pytest.fixture
def both(monkeypatch):
    """What a model leaves of a prompt fused and by its own forward, asserted to be equal."""

    def read(model, policy="random", ids=None, mask=None, **settings):
        ids, given = prompt(60, batch=2) if ids is None else ids, []
        for reason in (why_not_fused, lambda *_: "it is compared"):
            monkeypatch.setattr("locret.engine.reading.why_not_fused", reason)
            given.append(read_by(locret.Engine(model, policy, **SMALL | settings), ids, mask))
        (fused, of_fused), (stock, of_stock) = given
        assert fused.fused == fused.read == stock.read and not stock.fused
        assert len(of_fused) == len(of_stock)
        assert all(map(torch.equal, of_fused, of_stock))
        return fused, of_fused

    return read


def with_norms(model):
    for norm in (m for m in model.modules() if hasattr(m, "variance_epsilon")):
        nn.init.normal_(norm.weight, mean=1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*PRENORM, "phi4-mini"])
def test_a_chunk_leaves_what_the_stock_forward_does(both, family, dtype):
    model = with_norms(tiny_model(family)).to(dtype)
    counts, _ = both(model, heads=tiny_heads(model).to(dtype), policy="locret")
    assert counts == ChunkCounts(4, 4)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("sirllm", {}),  # waits for the last hidden states
        ("kvzip", {}),  # reads again
        ("snapkv", {}),
        ("keydiff", {"decode_interval": 4}),
        (AdaptiveHeads("keydiff"), {}),
        ("keydiff", {"quotas": [[1, 3], [2, 1]]}),
        ("knorm", {"positions": "original", "quantization": "rotated"}),
        ("full", {"budget": None}),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x) if isinstance(x, dict) else type(x).__name__,
)
def test_policies_and_settings(both, policy, settings):
    model = tiny_model("qwen3", head_dim=64) if "quantization" in settings else tiny_model("llama")
    both(model, policy, **settings)


def test_padded_rows(both):
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :9] = mask[2, :31] = 0
    both(tiny_model("qwen2"), "sirllm", prompt(60, batch=3), mask)


class Wide(nn.Module):
    """A product in float32, of whatever it is given."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear.float()

    def forward(self, x):
        return self.linear(x.float())


@pytest.mark.parametrize("chunk_size", [1, 17])
def test_projections_of_other_dtypes(both, chunk_size):
    model = tiny_model("qwen3").bfloat16()
    first, last = (layer.mlp for layer in model.model.layers)
    first.up_proj, last.up_proj = Wide(first.up_proj), Wide(last.up_proj)
    first.down_proj.register_forward_pre_hook(lambda module, given: given[0].bfloat16())
    last.down_proj, model.lm_head = Wide(last.down_proj), Wide(model.lm_head)
    both(model, "sirllm", chunk_size=chunk_size)  # waits for the last hidden states


def test_adapters_are_called(both):
    targets = ["q_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = both(peft.get_peft_model(tiny_model("llama"), config))[1]
    assert not torch.equal(both(tiny_model("llama"))[1][0], adapted[0])


@pytest.mark.parametrize(("change", "fused"), [(nn.Module.train, 0), (torch.compile, 4)])
def test_models_in_other_states(change, fused):
    model = tiny_model("llama")
    expected = locret.Engine(model, "keydiff", **SMALL).generate(prompt(60), **GREEDY)
    engine = locret.Engine(change(model), "keydiff", **SMALL)
    assert torch.equal(engine.generate(prompt(60), **GREEDY), expected)
    assert engine.last_chunks == ChunkCounts(4, fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.prefill(prompt(60))
    assert engine.last_chunks == ChunkCounts(4, 0)


def test_hooks_that_come_and_go_are_seen_by_the_next_request():
    model, seen = tiny_model("llama"), []
    engine = locret.Engine(model, "random", **SMALL)
    for hooked in (False, True, False):
        if hooked:
            mlp = model.model.layers[0].mlp
            handle = mlp.register_forward_hook(lambda *_: seen.append(1))
        engine.prefill(prompt(60))
        assert engine.last_chunks == ChunkCounts(4, 0 if hooked else 4)
        if hooked:
            handle.remove()
    assert len(seen) == 4


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_questions_are_read_fused_in_front_of_fast_steps(family, monkeypatch):
    monkeypatch.setattr(Answering, "fast_steps", property(lambda self: True))
    model, answers = with_norms(tiny_model(family)), []
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL)
    for reason, fused in ((why_not_fused, 5), (lambda *_: "it is compared", 0)):
        monkeypatch.setattr("locret.engine.reading.why_not_fused", reason)
        answers.append(engine.generate(prompt(60, batch=2), **GREEDY, **LOGITS))
        assert engine.last_chunks == ChunkCounts(5, fused)
    assert all(map(torch.equal, answers[0].logits, answers[1].logits))
    monkeypatch.undo()
    asked = engine.generate(prompt(60), **GREEDY, **LOGITS, output_hidden_states=True)
    assert engine.last_chunks == ChunkCounts(4, 4)
    assert asked.hidden_states[0][0].shape[1] == SMALL["local_tokens"]


def test_an_mlp_takes_pieces_of_all_rows_together(both, monkeypatch):
    monkeypatch.setattr("locret.model.prenorm._CPU_TOKENS", 10)
    both(tiny_model("llama"))


def test_hooks_see_all_rows_where_an_mlp_takes_pieces(both, monkeypatch):
    monkeypatch.setattr("locret.model.prenorm._CPU_TOKENS", 10)
    model, rows = tiny_model("llama"), torch.randn(2, 1, 64)
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, args, output: output + rows)
    both(model)
