"""Shapes are those of the models they are named after, and locret takes them."""

import pytest
import torch

from benchmarks import floors
from benchmarks.shapes import SHAPES, random_model

BILLIONS = {
    "llama-3.1-8b": 8.030,
    "llama-3.2-1b": 1.236,
    "phi-3-mini": 3.821,
    "qwen3-4b": 4.022,
    "smollm2": 0.1345,
}
KV_HEADS_AND_SIZE = {
    "llama-3.1-8b": (8, 128),
    "llama-3.2-1b": (8, 64),
    "phi-3-mini": (32, 96),
    "qwen3-4b": (8, 128),
    "smollm2": (3, 64),
}


@pytest.mark.parametrize("shape", sorted(BILLIONS))
def test_a_shape_has_the_parameters_and_heads_of_its_model(shape):
    model = random_model(shape, torch.device("meta"))
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert count == pytest.approx(BILLIONS[shape], rel=1e-3)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (config.num_key_value_heads, size) == KV_HEADS_AND_SIZE[shape]


def test_no_token_ends_a_random_model():
    for shape in SHAPES:
        assert random_model(shape, torch.device("meta")).generation_config.eos_token_id is None


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="'gpt-9' is unknown; expected one of .*llama"):
        random_model("gpt-9", torch.device("cpu"))


def test_the_decoders_matrices_are_stored_in_fewer_bits():
    pytest.importorskip("torchao", reason="package torchao is not installed")
    plain, stored = (
        random_model("tiny", torch.device("cpu"), weights=weights) for weights in (None, "int8")
    )
    for name, module in stored.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (type(module.weight) is torch.nn.Parameter) == (name == "lm_head")
    assert floors.cost_of(stored) == floors.cost_of(plain)  # of 16 bits, whatever is stored


def test_weights_in_fp8_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match="the model goes to cpu, but weights in 'fp8' need a GPU"):
        random_model("llama-3.1-8b", torch.device("cpu"), weights="fp8")
