"""Floors, checked by counting."""

import pytest
import torch

from benchmarks import floors
from benchmarks.shapes import random_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("length", "budget", "chunk"), [(1, 4, 3), (7, 100, 3), (64, 10, 7), (63, 10, 10), (20, 1, 1)]
)
def test_attended_pairs_are_those_of_the_chunked_reading(length, budget, chunk):
    pairs = held = new = 0
    for token in range(length):
        if token % chunk == 0:
            held, new = min(held + new, budget), 0
        new += 1
        pairs += held + new
    assert floors.attended_pairs(length, budget, chunk) == pairs


def test_without_a_budget_every_token_attends_to_all_before_it():
    assert floors.attended_pairs(100) == floors.attended_pairs(100, 100, 7) == 5050


def test_costs_are_those_of_llama_31():
    cost = floors.cost_of(random_model("llama-3.1-8b", torch.device("meta")))
    assert cost.matrix_weights == pytest.approx(6.98e9, rel=1e-3)
    assert cost.attention_width == 4096 * 32
    assert cost.unit_bytes == 131072  # 2 * 32 layers * 8 heads * 128 * 2 bytes
    assert cost.read_bytes == 2 * (8030261248 - 128256 * 4096)
    machine = floors.Machine(flops=787e12, bandwidth=3e12)
    pairs = floors.attended_pairs(131072, 16384, 1024)
    assert cost.prefill_seconds(machine, 131072, pairs) == pytest.approx(3.7, abs=0.1)
    assert cost.step_seconds(machine, 16384) == pytest.approx(5.7e-3, abs=1e-4)
    assert cost.prefill_seconds(machine, 131072, pairs, 8) == pytest.approx(8 * 3.7, abs=0.8)


def test_tied_embeddings_are_read_once():
    cost = floors.cost_of(random_model("smollm2", torch.device("meta")))
    assert cost.read_bytes == 2 * 134515008


def test_a_token_passes_the_experts_that_it_is_sent_to():
    cost = floors.cost_of(random_model("qwen3-30b-a3b", torch.device("meta")))
    of_expert, layers = 3 * 2048 * 768, 48
    attention = 2048 * 128 * (32 + 4 + 4 + 32)
    assert cost.matrix_weights == layers * (attention + 8 * of_expert)  # its router is none
    assert cost.read_bytes == pytest.approx(2 * (cost.matrix_weights + 151936 * 2048), rel=5e-3)


def test_layers_with_a_window_attend_to_it():
    cost = floors.cost_of(random_model("gemma-3-4b", torch.device("meta")))
    assert cost.windows == (1024,) * 29
    assert cost.attention_width == 5 * 8 * 256 and cost.window_width == 8 * 256
    assert cost.unit_bytes == 5 * cost.window_unit_bytes == 5 * 2 * 4 * 256 * 2
    machine = floors.Machine(flops=1.0, bandwidth=1.0)
    held = 4096 * cost.unit_bytes + 29 * 1024 * cost.window_unit_bytes
    assert cost.step_seconds(machine, 4096) == cost.read_bytes + held
    pairs = 1024 * 1025 // 2 + 1024 * 1024  # token t of 2,048 sees the last min(t, 1024)
    alone = floors.Cost(0, 0, 0, 0, cost.windows, cost.window_width, cost.window_unit_bytes)
    assert alone.prefill_seconds(machine, 2048, 0) == 29 * 4 * 8 * 256 * pairs


def test_a_machine_is_measured():
    machine = floors.measure(CPU, torch.float32)
    assert machine.flops > 0 and machine.bandwidth > 0
