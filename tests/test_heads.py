"""Retaining heads and their record."""

import dataclasses

import pytest
import torch

from locret.heads.heads import (
    LOG_SCORE,
    SCHEMA_VERSION,
    Geometry,
    HeadsConfig,
    RetainingHeads,
)
from locret.heads.kinds import LinearHead, MLPHead
from locret.heads.targets import LABELS
from locret.model.backbone import Backbone
from tests.tiny_models import FAMILIES, tiny_heads, tiny_model

GEOMETRY = Geometry(
    num_layers=3,
    num_query_heads=4,
    num_kv_heads=2,
    head_size=8,
    hidden_size=40,
    activation="silu",
)


def config(**record):
    return HeadsConfig.for_geometry(GEOMETRY, 6, **record)


def test_input_is_q_k_and_v_of_all_heads():
    assert GEOMETRY.feature_width("qkv") == (4 + 2 + 2) * 8
    assert config().input_width == GEOMETRY.feature_width("qkv")
    assert config().tap == "qkv"


def test_input_of_the_other_tap_is_the_layers_input():
    assert GEOMETRY.feature_width("hidden") == 40
    given = config(tap="hidden")
    assert (given.input_width, given.tap) == (40, "hidden")
    assert RetainingHeads(given)[0].fc1.weight.shape == (6, 40)
    assert given.differences(GEOMETRY) == []
    assert config().differences(dataclasses.replace(GEOMETRY, hidden_size=56)) == [
        "hidden_size: heads 40, backbone 56"
    ]
    for make in (config, GEOMETRY.feature_width):
        with pytest.raises(ValueError, match=r"tap 'q' is unknown; expected one of \['hidden'"):
            make(tap="q")


@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", torch.nn.functional.silu), ("gelu_pytorch_tanh", torch.nn.GELU("tanh"))],
)
def test_head_is_two_matrices_and_the_backbones_activation(activation, function):
    head = MLPHead(10, 6, 2, activation)
    assert [name for name, _ in head.named_parameters()] == ["fc1.weight", "fc2.weight"]
    qkv = torch.randn(2, 5, 10)
    scores = head(qkv)
    assert scores.shape == (2, 2, 5)
    for row in range(2):
        for token in range(5):
            expected = head.fc2.weight @ function(head.fc1.weight @ qkv[row, token])
            assert torch.allclose(scores[row, :, token], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_come_in_the_heads_dtype(dtype):
    for head in (MLPHead(10, 6, 2, "silu").to(dtype), LinearHead(10, 2).to(dtype)):
        for given in (torch.float32, torch.bfloat16, torch.float16):
            assert head(torch.randn(1, 3, 10).to(given)).dtype == dtype


def test_linear_heads_are_one_matrix():
    head = LinearHead(10, 2, bias=True)
    assert [name for name, _ in head.named_parameters()] == ["fc.weight", "fc.bias"]
    features = torch.randn(1, 5, 10)
    expected = features[0] @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head(features)[0], expected.T)


def test_biases_are_added_to_both_matrices():
    head = MLPHead(10, 6, 2, "silu", bias=True)
    token = torch.randn(1, 1, 10)
    inner = torch.nn.functional.silu(head.fc1.weight @ token[0, 0] + head.fc1.bias)
    torch.testing.assert_close(head(token)[0, :, 0], head.fc2.weight @ inner + head.fc2.bias)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_scores_of_heads_with_biases_start_where_logarithms_are(kind, monkeypatch):
    monkeypatch.setitem(LABELS, "log_max_prob", None)
    width = 6 if kind == "mlp" else None
    for bias, label in [(True, "log_max_prob"), (False, "log_max_prob"), (True, "max_prob")]:
        given = HeadsConfig.for_geometry(GEOMETRY, width, kind=kind, bias=bias, label=label)
        scores = RetainingHeads(given)[0](torch.randn(1, 50, 64))
        near = LOG_SCORE if bias and label == "log_max_prob" else 0
        assert abs(float(scores.mean()) - near) < 1


def test_heads_are_reached_by_layer():
    heads = RetainingHeads(config())
    assert len(heads.layers) == 3
    assert heads[2] is heads.layers[2]
    assert sorted(heads.state_dict()) == [
        f"layers.{i}.fc{j}.weight" for i in range(3) for j in (1, 2)
    ]


def test_record_goes_to_a_dict_and_back():
    full = config(
        backbone="a/b",
        backbone_revision="main",
        model_type="llama",
        adapter="c/d",
        tap="hidden",
        query_tokens=7,
        label="value_weighted",
        positions="original",
        longrope="by_length",
        trained_tokens=1000,
        defaults={"budget": 5},
        metrics={"recall": 1, "loss": 0.5},
    )
    assert HeadsConfig.from_dict(full.to_dict()) == full
    assert full.to_dict()["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "linear", "width": None},
        {"bias": True},
        {"kind": "linear", "width": None, "bias": True, "backbone_sha256": "ab12"},
    ],
    ids=str,
)
def test_later_fields_are_written_where_they_say_something(record):
    """So that older versions read what they can, and refuse the rest by the field's name."""
    given = dataclasses.replace(config(), **record)
    written = given.to_dict()
    assert HeadsConfig.from_dict(written) == given
    assert {name for name in written if name not in config().to_dict()} == record.keys() - {"width"}


def test_an_artifact_for_a_small_backbone_is_small():
    """Qwen2.5-Coder-1.5B: 28 layers, 12 query and 2 KV heads of 128, so that [Q, K, V] is 2048."""
    geometry = Geometry(28, 12, 2, 128, 1536, "silu")
    with torch.device("meta"):
        heads = RetainingHeads(HeadsConfig.for_geometry(geometry, 104, bias=True))
    assert heads.config.input_width == 2048
    assert sum(p.numel() for p in heads.parameters()) * 2 < 12 * 2**20 - 2**16  # 64 KiB: the names


def test_record_reads_back_without_its_optional_fields():
    required = {"num_layers": 2, "num_kv_heads": 2, "input_width": 8, "width": 3}
    given = HeadsConfig.from_dict(required | {"schema_version": SCHEMA_VERSION})
    assert given == HeadsConfig(**required)


def test_record_without_a_schema_version_is_refused():
    values = config().to_dict()
    del values["schema_version"]
    with pytest.raises(ValueError, match="schema_version None"):
        HeadsConfig.from_dict(values)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"tap": "qkv_before_rope"}, r"tap 'qkv_before_rope' is unknown.*\['hidden', 'qkv'\]"),
        ({"label": "mean"}, r"label 'mean' is unknown.*'max_logit', 'max_prob', 'value_wei"),
        ({"activation": "sigh"}, "activation 'sigh' is unknown; expected one of .*'silu'"),
        ({"positions": "packed"}, r"positions 'packed' is unknown.*\['compact', 'original'\]"),
        ({"longrope": "short"}, r"longrope 'short' is unknown.*\['by_length', 'long'\]"),
        ({"query_tokens": -1}, "query_tokens is -1, expected at least 0"),
        ({"query_tokens": True}, "query_tokens is True, expected"),
        ({"query_tokens": 1.5}, "query_tokens is 1.5, expected"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"width": None}, "width is None and sinks None with kind 'mlp'; expected a width"),
        ({"kind": "linear"}, "width is 6 and sinks None with kind 'linear'; expected a"),
        ({"kind": "deep"}, r"kind 'deep' is unknown.*\['gate', 'linear', 'mlp'\]"),
        ({"kind": "gate"}, "width is 6 and sinks None with kind 'gate'; .*sinks for gates alone"),
        (
            {"kind": "gate", "sinks": 2, "num_query_heads": 5},
            "num_query_heads is 5; a gate needs a multiple of 2",
        ),
        ({"origin": "mine"}, "origin 'mine' is unknown"),
        ({"bias": 1}, "bias is 1, expected"),
        ({"trained_tokens": 0}, "trained_tokens is 0, expected at least 1"),
        ({"label": None}, "label is None, expected"),
        ({"tap": ["qkv"]}, r"tap is \['qkv'\], expected"),
        ({"defaults": {"budget": "5"}}, "defaults is {'budget': '5'}, expected"),
    ],
    ids=str,
)
def test_a_record_of_what_cannot_be_is_refused_however_it_is_made(record, says):
    good = config()
    with pytest.raises(ValueError, match=f"heads config: {says}"):
        dataclasses.replace(good, **record)
    with pytest.raises(ValueError, match=f"heads config: {says}"):
        HeadsConfig.from_dict(good.to_dict() | record)


def test_a_record_names_everything_that_is_wrong_with_it():
    with pytest.raises(ValueError, match="width is 0.*query_tokens is -1.*label 'mean'"):
        dataclasses.replace(config(), width=0, query_tokens=-1, label="mean")


@pytest.mark.parametrize(
    "record",
    [
        {"query_tokens": 0},
        {"query_tokens": 64},
        {"label": "max_prob"},
        {"label": "value_weighted"},
        {"activation": "gelu_pytorch_tanh"},
        {"positions": "original"},
        {"longrope": "by_length"},
    ],
    ids=str,
)
def test_words_of_the_tables_are_taken(record):
    given = dataclasses.replace(config(), **record)
    assert HeadsConfig.from_dict(given.to_dict()) == given


def test_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().width = 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("num_query_heads", 8),
        ("num_kv_heads", 4),
        ("head_size", 16),
        ("hidden_size", 48),
        ("activation", "gelu"),
    ],
)
def test_every_difference_from_a_backbone_is_named(field, value):
    other = dataclasses.replace(GEOMETRY, **{field: value})
    differences = config().differences(other)
    ours = getattr(GEOMETRY, field)
    assert f"{field}: heads {ours!r}, backbone {value!r}" in differences
    assert config().differences(GEOMETRY) == []


def test_what_a_released_file_does_not_tell_is_not_held_against_it():
    silent = dataclasses.replace(config(), num_query_heads=None, head_size=None, hidden_size=None)
    assert silent.differences(GEOMETRY) == []
    wider = dataclasses.replace(GEOMETRY, head_size=16)
    assert silent.differences(wider) == ["input_width: heads 64, backbone 128"]


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_fit_every_supported_backbone(family):
    model = tiny_model(family)
    heads = tiny_heads(model)
    assert heads.config.differences(Backbone(model).geometry) == []
    assert heads.config.activation in (
        getattr(model.config, name, None) for name in ("hidden_act", "hidden_activation")
    )


def test_tensors_given_are_used_and_frozen():
    heads = RetainingHeads(config())
    copy = RetainingHeads.from_tensors(config(), heads.state_dict())
    assert not any(p.requires_grad for p in copy.parameters())
    for a, b in zip(heads.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tensors_that_do_not_fit_are_named_with_their_source():
    tensors = RetainingHeads(config()).state_dict()
    tensors["layers.0.fc1.weight"] = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"from here do not fit.*layers.0.fc1.weight is \(1, 2\)"):
        RetainingHeads.from_tensors(config(), tensors, source="here")
