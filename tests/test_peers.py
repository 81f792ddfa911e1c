"""Heads of other methods, read from files of their formats that are made here."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import locret
from locret import RetainingHeads
from locret.cli import main
from locret.engine.budgets import Calibration
from locret.heads.targets import LABELS
from locret.model.backbone import Backbone
from locret.policies import LocretPolicy
from tests.tiny_models import prompt, tiny_model

LAYERS, HIDDEN, QUERY_HEADS, HEADS = 2, 64, 8, 2


@pytest.fixture(autouse=True)
def _labels(monkeypatch):
    monkeypatch.setitem(LABELS, "log_value_share", LABELS["value_weighted"])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


# ---- KVzap ---------------------------------------------------------------------------------------


def kvzap_modules(width):
    torch.manual_seed(0)
    if width is None:
        return nn.ModuleList(nn.Linear(HIDDEN, HEADS) for _ in range(LAYERS))
    return nn.ModuleList(
        nn.Sequential(nn.Linear(HIDDEN, width), nn.GELU(), nn.Linear(width, HEADS))
        for _ in range(LAYERS)
    )


def kvzap_folder(modules, width, folder):
    """What `PreTrainedModel.save_pretrained` leaves of KVzap's class."""
    folder.mkdir()
    record = {
        "architectures": ["KVzapModel"],
        "dtype": "float32",
        "hidden_dim": width,
        "input_dim": HIDDEN,
        "model_type": "kvzap",
        "n_modules": LAYERS,
        "output_dim": HEADS,
        "transformers_version": "4.57.1",
    }
    (folder / "config.json").write_text(json.dumps(record))
    tensors = {f"layers.{name}": tensor for name, tensor in modules.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=[None, 24], ids=["linear", "mlp"])
def width(request):
    return request.param


@pytest.fixture
def kvzap(width, tmp_path):
    modules = kvzap_modules(width)
    return modules, kvzap_folder(modules, width, tmp_path / "KVzap")


def attention_inputs(model, ids):
    """[B, T, hidden size] of every layer, as KVzap's hooks see them."""
    seen = []

    def look(module, args, kwargs, output):
        seen.append(kwargs["hidden_states"])

    hooks = [
        layer.self_attn.register_forward_hook(look, with_kwargs=True)
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def scores_of_a_prompt(model, heads, ids):
    """[B, H, T] of every layer, as the policy gives them."""

    class Recorded(LocretPolicy):
        def score(self, chunk):
            found.append(super().score(chunk))
            return found[-1]

    found = []
    Calibration(Backbone(model), Recorded(heads)).add(ids)
    return found


def test_kvzaps_scores_are_those_of_its_modules(model, kvzap):
    modules, folder = kvzap
    heads, ids = RetainingHeads.from_pretrained(folder), prompt(50)
    inputs = attention_inputs(model, ids)
    found = scores_of_a_prompt(model, heads, ids)
    assert len(found) == LAYERS
    for module, hidden, scores in zip(modules, inputs, found, strict=True):
        torch.testing.assert_close(scores, module(hidden).transpose(1, 2))


def test_kvzaps_record_says_whose_it_is(model, kvzap, width):
    config = RetainingHeads.from_pretrained(kvzap[1]).config
    assert (config.origin, config.tap, config.positions) == ("kvzap", "hidden", "original")
    assert (config.kind, config.width) == ("mlp" if width else "linear", width)
    assert (config.bias, config.label) == (True, "log_value_share")
    assert config.activation == "gelu" and Backbone(model).geometry.activation == "silu"
    assert config.differences(Backbone(model).geometry) == []
    other = Backbone(tiny_model("llama", hidden_size=48)).geometry
    assert "hidden_size: heads 64, backbone 48" in config.differences(other)


def test_peers_become_artifacts_of_ours(kvzap, tmp_path, capsys):
    folder = str(kvzap[1])
    assert main(["convert", folder, str(tmp_path / "ours")]) == 0
    ours, theirs = map(RetainingHeads.from_pretrained, (tmp_path / "ours", folder))
    assert ours.config == theirs.config
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "[KVzap](https://arxiv.org/abs/2601.07891) heads in locret's format" in card
    assert "license: other" in card
    assert main(["inspect", folder]) == 0
    assert "origin             kvzap" in capsys.readouterr().out


def test_a_hub_id_fetches_the_weights_of_kvzap_alone(kvzap, tmp_path, monkeypatch):
    hub, asked = tmp_path / "hub", []

    def download(repo_id, *, allow_patterns, **kwargs):
        asked.append(allow_patterns)
        hub.mkdir(exist_ok=True)
        for file in Path(kvzap[1]).iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, hub)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert RetainingHeads.from_pretrained("nvidia/KVzap").config.origin == "kvzap"
    assert "model.safetensors" not in asked[0] and "model.safetensors" in asked[1]
    (kvzap[1] / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="neither heads.safetensors nor a single .bin"):
        shutil.rmtree(hub)
        RetainingHeads.from_pretrained("some/model")
    assert len(asked) == 3


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: rewrite(f, lambda t: t.pop(min(t))), "missing layers.0.fc"),
        (lambda f: rewrite(f, lambda t: t.update(odd=torch.ones(1))), "extra odd"),
        (lambda f: (f / "config.json").write_text('{"model_type": "kvzap"}'), "lacks .'n_modules'"),
        (lambda f: (f / "model.safetensors").unlink(), "neither heads.safetensors nor"),
    ],
)
def test_files_of_kvzap_that_do_not_fit_are_refused(spoil, says, kvzap):
    spoil(kvzap[1])
    with pytest.raises(ValueError, match=says):
        RetainingHeads.from_pretrained(kvzap[1])


# ---- Fast KVzip ----------------------------------------------------------------------------------

WIDTH, SINKS, GROUP = 4, 3, QUERY_HEADS // HEADS


def gates(dtype=torch.float32):
    """Parameters of each layer as Fast KVzip names and shapes them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return [
        OrderedDict(
            {
                "k_base": draw(HEADS, 1, SINKS, WIDTH),
                "b": draw(HEADS, 1, GROUP).to(dtype),
                "q_proj.weight": draw(QUERY_HEADS * WIDTH, HIDDEN).to(dtype),
                "q_proj.bias": draw(QUERY_HEADS * WIDTH).to(dtype),
                "k_proj.weight": draw(HEADS * WIDTH, HIDDEN).to(dtype),
                "q_norm.weight": 1 + draw(WIDTH) / 4,
                "k_norm.weight": 1 + draw(WIDTH) / 4,
            }
        )
        for _ in range(LAYERS)
    ]


@pytest.fixture
def gate_file(tmp_path):
    torch.save({"module": gates(), "step": 7}, tmp_path / "q4_dim4_sink3.pt")
    return tmp_path / "q4_dim4_sink3.pt"


def gate_score(gate, token, head):
    """Of one token [hidden size] in one KV head: the mean over queries of the share of the unit's
    own key in a softmax over it and the learned keys."""

    def normed(x, name):
        return x / (x.square().mean() + 1e-6).sqrt() * gate[f"{name}_norm.weight"]

    queries = (gate["q_proj.weight"] @ token + gate["q_proj.bias"]).view(HEADS, GROUP, WIDTH)
    key = normed((gate["k_proj.weight"] @ token).view(HEADS, WIDTH)[head], "k")
    shares = []
    for g in range(GROUP):
        query = normed(queries[head, g], "q")
        own = query @ key / WIDTH**0.5 + gate["b"][head, 0, g]
        others = gate["k_base"][head, 0] @ query / WIDTH**0.5
        shares.append(torch.cat([own[None], others]).softmax(0)[0])
    return sum(shares) / GROUP


def test_gates_score_as_their_definition_says(model, gate_file):
    heads, ids = RetainingHeads.from_pretrained(gate_file), prompt(9)
    inputs = attention_inputs(model, ids)
    found = scores_of_a_prompt(model, heads, ids)
    for gate, hidden, scores in zip(gates(), inputs, found, strict=True):
        for head in range(HEADS):
            expected = [gate_score(gate, token, head) for token in hidden[0]]
            torch.testing.assert_close(scores[0, head], torch.stack(expected))


def test_gates_tell_their_shapes(model, gate_file, tmp_path):
    heads = RetainingHeads.from_pretrained(gate_file)
    config = heads.config
    assert (config.origin, config.kind, config.tap) == ("fast_kvzip", "gate", "hidden")
    assert (config.width, config.sinks, config.num_query_heads) == (WIDTH, SINKS, QUERY_HEADS)
    assert config.differences(Backbone(model).geometry) == []
    again = RetainingHeads.from_pretrained(heads.save_pretrained(tmp_path / "ours"))
    assert again.config == config
    assert "Fast KVzip" in (tmp_path / "ours" / "README.md").read_text()


def test_gates_of_mixed_precision_run_on_a_small_model(model, tmp_path):
    torch.save({"module": gates(torch.bfloat16)}, tmp_path / "gates.pt")
    heads = RetainingHeads.from_pretrained(tmp_path / "gates.pt")
    assert heads[0](torch.randn(1, 5, HIDDEN)).dtype == torch.bfloat16
    engine = locret.Engine(model, heads=heads, budget=12, chunk_size=16, stabilizers=4)
    assert engine.generate(prompt(60), max_new_tokens=3).shape == (1, 63)


def test_gates_on_the_hub_are_named_by_their_file(gate_file, monkeypatch):
    def download(repo_id, *, allow_patterns, **kwargs):
        assert (repo_id, allow_patterns) == ("owner/gates", ["q4_dim4_sink3.pt"])
        return str(gate_file.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    heads = RetainingHeads.from_pretrained(f"owner/gates/{gate_file.name}")
    assert heads.config.origin == "fast_kvzip"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g[1].pop("b"), "missing layers.1.b"),
        (lambda g: g[0].update(k_base=torch.ones(2, 3)), "gates have k_base .2, 3."),
        (lambda g: g[1].update(k_base=torch.ones(2, 1, 5, 4)), "layers.1.k_base is"),
        (lambda g: g[0].pop("q_proj.weight"), "lack the fc1 or fc2 matrix"),
    ],
)
def test_gates_that_do_not_fit_are_refused(change, says, tmp_path):
    layers = gates()
    change(layers)
    torch.save({"module": layers}, tmp_path / "gates.pt")
    with pytest.raises(ValueError, match=says):
        RetainingHeads.from_pretrained(tmp_path / "gates.pt")
