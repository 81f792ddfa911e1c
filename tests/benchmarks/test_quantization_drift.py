"""How far quantized keys drift: measured on a layer's store, over evictions that go on."""

import pytest

from benchmarks.quantization_drift import SETTINGS, Setting, measure


@pytest.mark.parametrize("ranks", ["random", "fixed"])
@pytest.mark.parametrize("residual", [0, 16])
def test_keys_drift_less_than_if_all_were_packed_anew(ranks, residual):
    figures = measure(Setting(512, 128, residual, ranks), head_size=16, evictions=20)
    assert 1 <= figures["error_over_once"] < figures["again_over_once"]
    assert 0 < figures["error"] < 0.5  # of a channel's spread, at 4 bits
    assert 1 <= figures["blocks_over_full_blocks"] < 4
    assert 0.25 < figures["bytes_over_16_bit"] < 0.5


def test_one_eviction_packs_once():
    figures = measure(Setting(64, 64, 0, "random"), head_size=8, evictions=1)
    assert figures["error_over_once"] == figures["again_over_once"] == 1
    assert figures["blocks_over_full_blocks"] == 1


def test_every_setting_reaches_its_budget():
    assert all(setting.budget % setting.chunk == 0 for setting in SETTINGS)
