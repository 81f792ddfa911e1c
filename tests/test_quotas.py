"""Head quotas: what users may give, whole units of them, and what the engine's settings make of
them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import locret
from locret.cache.sizing import Sizing
from locret.engine.budgets import layer_budgets
from locret.engine.config import EngineConfig
from locret.engine.engine import Engine
from locret.heads.quotas import (
    FLOOR,
    GRID_FROM,
    Quotas,
    averaged,
    capped,
    in_words,
    is_on_grid,
    measured,
    on_grid,
    quotas_of,
    spread,
    unit_counts,
)
from locret.model.backbone import Backbone
from locret.policies import POLICIES
from locret.policies.base import Eviction
from locret.policies.plain import KNormPolicy
from locret.quantization import NO_SCHEME, make_scheme
from locret.quantization.blocks import costs_of
from tests.tiny_models import tiny_heads, tiny_model

TABLE = [[1.0, 3.0], [0.5, 1.5]]
MEAN_1 = ((2 / 3, 2.0), (1 / 3, 1.0))


def flat(table):
    return [number for layer in table for number in layer]


# ---- what users may give -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: TABLE,
        lambda: [[2, 6], [1, 3]],
        lambda: tuple(map(tuple, TABLE)),
        lambda: np.array(TABLE) * 1000,
        lambda: torch.tensor(TABLE, dtype=torch.bfloat16),
        lambda: {"8": TABLE},
        lambda: {8: np.array(TABLE)},
    ],
)
def test_forms_of_any_scale(make):
    quotas = quotas_of(make())
    assert quotas.shape == (2, 2)
    assert flat(quotas.at(5)) == pytest.approx(flat(MEAN_1))


def test_files(tmp_path):
    (tmp_path / "by_compression.json").write_text(json.dumps({"2": [[1, 1]], "8": [[1, 3]]}))
    (tmp_path / "one.json").write_text(json.dumps(TABLE))
    np.save(tmp_path / "one.npy", np.array(TABLE, dtype=np.float32))
    assert quotas_of(tmp_path / "by_compression.json").at(8) == ((0.5, 1.5),)
    assert quotas_of(str(tmp_path / "one.json")) == quotas_of(TABLE)
    assert quotas_of(tmp_path / "one.npy") == quotas_of(TABLE)


def test_none_is_equal_and_quotas_stay():
    quotas = quotas_of(TABLE)
    assert quotas_of(None) is None and quotas_of(quotas) is quotas
    assert hash(quotas) == hash(quotas_of(np.array(TABLE)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], r"quotas are \[\]; expected numbers \[layers, KV heads\]"),
        ([1.0, 2.0], r"quotas are \[1.0, 2.0\]; expected"),
        ([[1.0], [1.0, 2.0]], "expected numbers"),
        ([[]], "expected numbers"),
        ([[True, 1]], "expected numbers"),
        ([["1", 2]], "expected numbers"),
        (5, "quotas are 5; expected"),
        (np.ones(3), r"quotas are an array of shape \[3\]; expected"),
        (torch.ones(1, 2, 3), r"quotas are an array of shape \[1, 2, 3\]; expected"),
        ([[0.0, 0.0]], "quotas hold 0.0 to 0.0; expected finite numbers of at least 0, not all"),
        ([[-1.0, 2.0]], "quotas hold -1.0 to 2.0; expected finite"),
        ([[1.0, math.inf]], "expected finite"),
        ([[1.0, math.nan]], "expected finite"),
        ({}, "an empty mapping"),
        ({"0.5": TABLE}, "compression '0.5'; expected a number of at least 1"),
        ({"much": TABLE}, "compression 'much'; expected"),
        ({"inf": TABLE}, "compression 'inf'; expected"),
        ({None: TABLE}, "compression None; expected"),
        ({"2": TABLE, "8": [[1.0]]}, "tables of different shapes"),
        ({"2": TABLE, 2.0: TABLE}, "expected each once"),
        ({"2": [[-1.0]]}, "quotas at 2 hold -1.0"),
        ("automatic", "quotas is 'automatic', which is not such a file; expected numbers"),
        ("missing.json", "quotas is 'missing.json', which is not such a file; expected numbers"),
        (__file__, "which is not such a file"),
    ],
    ids=str,
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        quotas_of(wrong)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b"{"), ("a.npy", b"no"), ("a.json", b"\xff"), ("a.npy", b"")]
)
def test_damaged_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read.*expected numbers"):
        quotas_of(tmp_path / name)


def test_another_models_shape_is_refused():
    with pytest.raises(ValueError, match=r"for 2 layers of 2 KV heads; expected 3 layers .* of 2"):
        quotas_of(TABLE).check_shape(3, 2)


def test_between_compressions_it_is_their_logarithm_that_counts():
    quotas = quotas_of({"32": [[1, 0]], "2": [[1, 1]], "8": [[3, 1]]})
    assert quotas.at(2) == quotas.at(1) == ((1.0, 1.0),)
    assert quotas.at(8) == ((1.5, 0.5),)
    assert flat(quotas.at(4)) == pytest.approx([1.25, 0.75])
    assert flat(quotas.at(16)) == pytest.approx([1.75, 0.25])
    assert quotas.at(32) == quotas.at(1000) == ((2.0, 0.0),)


@given(
    st.lists(st.floats(1, 64), min_size=1, max_size=5, unique=True),
    st.floats(1, 100),
    st.randoms(use_true_random=False),
)
def test_quotas_between_tables_have_mean_1(compressions, asked, random):
    tables = {
        c: [[random.random() + 1e-3 for _ in range(3)] for _ in range(2)] for c in compressions
    }
    found = flat(quotas_of(tables).at(asked))
    assert math.fsum(found) / 6 == pytest.approx(1) and min(found) > 0


# ---- whole units ---------------------------------------------------------------------------------

SHARES = st.integers(1, 5).flatmap(
    lambda heads: st.lists(
        st.lists(st.floats(0, 1e3), min_size=heads, max_size=heads), min_size=1, max_size=6
    ).filter(lambda table: sum(flat(table)) > 1e-3)
)


@given(SHARES, st.integers(1, 3000), st.integers(1, 3000))
def test_counts_are_whole_within_bounds_and_sum_up(shares, budget, context):
    counts = unit_counts(shares, budget, context)
    average = min(budget, context)
    assert [len(layer) for layer in counts] == [len(layer) for layer in shares]
    assert all(isinstance(units, int) for units in flat(counts))
    assert sum(flat(counts)) == average * len(flat(shares))
    assert max(flat(counts)) <= context
    assert min(flat(counts)) >= max(1, average * FLOOR)
    assert counts == unit_counts(shares, budget, context)


@given(SHARES, st.integers(1, 3000), st.integers(1, 3000))
def test_a_larger_share_never_gets_less(shares, budget, context):
    pairs = sorted(zip(flat(shares), flat(unit_counts(shares, budget, context)), strict=True))
    highest = 0
    for _, units in pairs:  # of equal shares, rounding may favour one by a unit
        assert units >= highest - 1
        highest = max(highest, units)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 5000),
    st.floats(1e-3, 1e3),
)
def test_equal_shares_give_each_layer_its_budget(budgets, heads, context, scale):
    equal = [[scale] * heads for _ in budgets]
    expected = tuple((min(budget, context),) * heads for budget in budgets)
    assert unit_counts(equal, budgets, context) == expected
    assert unit_counts(quotas_of(equal).at(3), budgets[0], context) == (expected[0],) * len(budgets)


def test_what_one_head_cannot_take_goes_to_the_others_by_their_shares():
    assert unit_counts([[6, 2, 1, 1]], 100, 1000) == ((240, 80, 40, 40),)
    assert unit_counts([[6, 2, 1, 1]], 100, 200) == ((200, 100, 50, 50),)
    assert unit_counts([[1, 0]], 30, 40) == ((40, 20),)
    assert unit_counts([[1, 0]], 100, 1000) == ((195, 5),)


@pytest.mark.parametrize(
    ("budgets", "most", "expected"),
    [
        ([968, 656, 344, 32], 744, [744, 744, 468, 44]),
        ([968, 656, 344, 32], 968, [968, 656, 344, 32]),
        ([9, 1], 6, [6, 4]),
        ([5, 0], 3, [3, 2]),
        ([9, 5], 3, [3, 3]),  # there is no room for all
    ],
)
def test_what_one_layer_cannot_take_goes_to_the_others_in_proportion(budgets, most, expected):
    assert capped(budgets, most) == expected


def test_no_head_gets_less_than_the_floor():
    assert unit_counts([[1.0, 1e-9, 1.0]], 100, 1000) == ((148, 5, 147),)


def test_a_layers_share_is_its_budget_times_its_quotas():
    counts = unit_counts([[1, 1], [2, 2], [1, 5]], [300, 100, 100], 10_000)
    totals = [sum(layer) for layer in counts]
    parts = [300 * 2, 100 * 4, 100 * 6]
    assert sum(totals) == 2 * 500
    assert totals == pytest.approx([1000 * part / sum(parts) for part in parts], abs=1)
    assert counts[2][1] == pytest.approx(5 * counts[2][0], abs=5)


def test_largest_remainders_get_what_is_left_and_of_equal_ones_the_first():
    assert unit_counts([[1, 1, 1.5]], 10, 100) == ((9, 8, 13),)


# ---- from scores ---------------------------------------------------------------------------------


def test_the_best_units_of_the_whole_model_are_counted():
    scores = [torch.tensor([[9.0, 8, 7, 1], [0, 0.1, 0.2, 6]]), torch.tensor([[2.0, 3, 4, 5]] * 2)]
    half, quarter = measured(scores, [2, 4])
    assert half.tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert quarter.tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert averaged([half, half]) == [[1.5, 0.5], [1.0, 1.0]]
    assert averaged([half], sharpness=2) == [[2.0, 0.2222], [0.8889, 0.8889]]
    assert averaged([half], sharpness=1e9) == [[3.8554, 0.0482], [0.0482, 0.0482]]
    both = averaged([quarter, torch.tensor([[0.25, 0.75], [0, 0]])])
    assert both[0][0] == both[0][1] and both[1] == [round(0.05 / 1.025, 4)] * 2


@given(st.integers(0, 99), st.floats(1, 40))
def test_fractions_are_those_of_a_sort(seed, compression):
    scores = [
        torch.rand(3, 17, generator=torch.Generator().manual_seed(seed + i)) for i in range(4)
    ]
    (found,) = measured(scores, [compression])
    together = torch.stack(scores)
    count = max(1, round(together.numel() / compression))
    threshold = together.flatten().sort(descending=True).values[count - 1]
    assert torch.allclose(found, (together >= threshold).double().mean(dim=-1))


def test_spread():
    told = spread([[1.0] * 5, [1.0] * 4 + [11.0]])
    assert told == pytest.approx({"largest": 5.5, "smallest": 0.5, "top_tenth": 0.55})
    assert "from 0.50 to 5.50 of the mean" in in_words([[1.0] * 5, [1.0] * 4 + [11.0]])
    assert spread([[1.0, 1.0]])["top_tenth"] == 0.5


# ---- the engine's setting ------------------------------------------------------------------------


def config(policy="knorm", heads=None, **settings):
    return EngineConfig.of(policy, heads, stabilizers=0, **settings)


def test_auto_is_what_heads_record_where_they_score():
    heads = tiny_heads(tiny_model("llama"), quotas={"2": TABLE}).config
    recorded = quotas_of({"2": TABLE})
    assert config("locret", heads).reading.quotas == recorded
    assert config("keydiff", heads).reading.quotas is None
    assert config("keydiff", heads, quotas=TABLE).reading.quotas == quotas_of(TABLE)
    assert config("locret", heads, quotas=None).reading.quotas is None
    assert config("locret", heads, quotas=np.ones((2, 2))).reading.quotas == quotas_of([[1, 1]] * 2)
    assert config("locret").reading.quotas is None
    assert config("locret", heads).flat()["quotas"] == recorded


def test_an_engine_takes_quotas_of_its_model_alone():
    model = tiny_model("llama")
    engine = locret.Engine(model, "keydiff", quotas=torch.ones(2, 2))
    assert engine.config.reading.quotas == quotas_of([[1, 1], [1, 1]])
    engine = locret.Engine(model, heads=tiny_heads(model, quotas={"2": TABLE}))
    assert engine.config.reading.quotas == quotas_of({"2": TABLE})
    with pytest.raises(ValueError, match="quotas are for 1 layers of 2 KV heads; expected 2"):
        locret.Engine(model, "keydiff", quotas=[[1, 1]])


SIZING = Sizing(NO_SCHEME, 2, 2, 8)


@pytest.mark.parametrize(
    ("budget", "context", "expected"),
    [
        (100, 1000, ((67, 200), (33, 100))),
        ("10x", 1000, ((67, 200), (33, 100))),
        (100, 150, ((83, 150), (42, 125))),
        (100, 60, ((100, 100), (100, 100))),
        ([150, 50], 1000, ((86, 257), (14, 43))),
        (None, 1000, None),
    ],
)
def test_counts(budget, context, expected):
    policy = KNormPolicy()
    assert config(budget=budget, quotas=TABLE).counts(policy, SIZING, context) == expected


@pytest.mark.parametrize("budget", [100, 0.1, [150, 50], "20kB", "4x bytes"])
@pytest.mark.parametrize("policy", ["knorm", "pyramidkv"])
def test_equal_quotas_count_as_layers_do(budget, policy):
    settings, made = {"budget": budget}, POLICIES[policy]()
    reading = config(policy, **settings).reading
    budgets = layer_budgets(reading.budget, None, made, SIZING, 900)
    expected = tuple((units, units) for units in budgets)
    for quotas in (None, [[7, 7], [7, 7]], "auto"):
        found = config(policy, quotas=quotas, **settings)
        given = found.reading.budget, found.reading.quotas
        assert layer_budgets(*given, made, SIZING, 900) == budgets
        assert found.counts(made, SIZING, 900) == expected


def test_counts_follow_the_compression():
    quotas = {"2": [[1, 1], [1, 1]], "8": [[3, 1], [1, 1]]}
    counts = [
        config(budget=budget, quotas=quotas).counts(KNormPolicy(), SIZING, 960)
        for budget in ("2x", "4x", "8x", "30x")
    ]
    assert counts[0] == ((480, 480), (480, 480))
    assert counts[1] == ((360, 200), (200, 200))
    assert counts[2] == ((240, 80), (80, 80))
    assert counts[3] == ((64, 22), (21, 21))


@pytest.mark.parametrize(
    "scheme",
    [
        NO_SCHEME,
        make_scheme("kivi", bits=4, group=8),
        make_scheme("layerquant", quant_end_layers=1),
    ],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.parametrize("budget", ["30kB", "8x bytes", "3x bytes"])
@pytest.mark.parametrize("quotas", [None, [[1.0, 9.0], [0.1, 1.0]]])
def test_memory_holds_what_quotas_give(budget, quotas, scheme):
    sizing, context = Sizing(scheme, 2, 2, 64), 2000
    made = config(budget=budget, quotas=quotas, quantization=scheme)
    counts = made.counts(KNormPolicy(), sizing, context)
    taken = sizing.read_bytes(counts, context)
    full = context * 2 * 2 * 2 * 64 * 2
    allowed = {"30kB": 30_000, "8x bytes": full // 8, "3x bytes": full // 3}[budget]
    assert 0.85 * allowed < taken <= allowed


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_memory_is_used_where_no_block_is_thin(ratio):
    heads = Path(__file__).parent.parent / "checkpoints" / "qwen25-coder-heads" / "config.json"
    scheme, context = make_scheme("rotated"), 4096
    made = config(
        budget=f"{ratio}x bytes",
        quotas=json.loads(heads.read_text())["quotas"],
        quantization=scheme,
    )
    counts = made.counts(KNormPolicy(), Sizing(scheme, 28, 2, 128), context)
    packed = costs_of(scheme, 128).packed
    taken = sum(units * packed + context // 8 for row in counts for units in row)
    allowed = context * 28 * 2 * 2 * 128 * 2 // ratio
    assert 0.985 * allowed < taken <= allowed


def test_memory_for_no_unit_is_refused():
    with pytest.raises(ValueError, match=r"budget is 100 B; one unit in every KV head takes 144 B"):
        config(budget="100B", quotas=TABLE).counts(KNormPolicy(), SIZING, 900)


def test_quotas_are_values():
    assert isinstance(config(quotas=TABLE).reading.quotas, Quotas)
    assert config(quotas=TABLE) == config(quotas=np.array(TABLE))


@given(
    st.lists(st.lists(st.integers(1, 200_000), min_size=3, max_size=3), min_size=1, max_size=9),
    st.integers(0, 5_000),
)
def test_counts_on_a_grid_are_nearly_the_same(counts, more):
    given, most = tuple(map(tuple, counts)), max(map(max, counts)) + more
    found = on_grid(given, most)
    flat, exact = sum(found, ()), sum(given, ())
    assert sum(exact) - max(exact) / 16 - 1 <= sum(flat) <= sum(exact)
    for n, before in zip(flat, exact, strict=True):
        assert n <= most and abs(n - before) <= before / 16
        assert n == before if before < GRID_FROM else is_on_grid(n) or n == most


def test_stabilizers_are_a_share_of_what_each_head_keeps_in_all_layers():
    policy, counts = POLICIES["keydiff"](), ((10, 30), (100, 260))
    of_all = Eviction(counts, stabilizers=25, average=100)
    tails = [[tail for tail, _ in of_all.protected(layer, policy)] for layer in (0, 1)]
    assert tails == [[2, 7], [25, 65]]
    of_layers = Eviction(((10, 30), (100, 300)), stabilizers=10)  # layers budgeted by themselves
    tails = [[tail for tail, _ in of_layers.protected(layer, policy)] for layer in (0, 1)]
    assert tails == [[5, 15], [5, 15]]


def test_an_engine_with_quotas_reckons_stabilizers_from_the_mean_of_all_layers():
    model = tiny_model("llama")
    shape = Backbone(model).geometry
    table = [[1.0] * shape.num_kv_heads] * (shape.num_layers - 1) + [[5.0] * shape.num_kv_heads]
    engine = Engine(model, "keydiff", budget="4x", quotas=table, chunk_size=16)
    _, counts = engine.new_cache(400)
    eviction = engine.config.eviction(counts)
    assert eviction.average == 100
    share = eviction.stabilizers / 100
    for layer, heads in enumerate(counts):
        for (tail, _), kept in zip(eviction.protected(layer, engine.policy), heads, strict=True):
            assert abs(tail - share * kept) <= 1
