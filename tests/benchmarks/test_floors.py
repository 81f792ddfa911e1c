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


def test_a_machine_is_measured():
    machine = floors.measure(CPU, torch.float32)
    assert machine.flops > 0 and machine.bandwidth > 0
