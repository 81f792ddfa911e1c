"""The cache: what it holds, what it reports, and that its four tensors move together."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import locret
from locret import RetainedCache
from locret.cache.context import sequences_of
from locret.cache.files import lengths_of, named_tensors, take_tensors
from locret.cache.layer import RetainedLayer
from locret.cache.store import NewTokens, Store
from locret.model.hooks import as_argument, cache_in
from locret.policies import Policy
from tests.kept import kept, stacked
from tests.tiny_models import FAMILIES, distinct_prompt, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}


def small_engine(model, policy="random", **changes):
    return locret.Engine(model, policy, **SMALL | changes)


def cache_tensors(cache):
    return [tensor for layer in cache.layers for tensor in layer.store.tensors]


# --- report ---


def test_report_of_an_empty_cache():
    report = RetainedCache(3, budget=10).report()
    assert report == {
        "seen_tokens": 0,
        "budget": 10,
        "positions": "compact",
        "quantization": None,
        "merging": None,
        "windows": [None, None, None],
        "units": [0, 0, 0],
        "most_units": [0, 0, 0],
        "least_units": [0, 0, 0],
        "recall": None,
        "bytes": [0, 0, 0],
        "total_bytes": 0,
        "kv_bytes": 0,
        "full_cache_bytes": 0,
        "ratio": 0.0,
    }


@pytest.mark.parametrize("decoded", [0, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reported_bytes_are_those_of_the_tensors(dtype, decoded):
    model = tiny_model("llama").to(dtype)
    engine = small_engine(model)
    cache = engine.prefill(prompt(100, batch=2))
    if decoded:
        engine.generate(prompt(1, batch=2), cache=cache, max_new_tokens=decoded, do_sample=False)
    report = cache.report()
    tensors = cache_tensors(cache)
    # Keys and values of two layers, positions of two rows in each, and all three of the tail;
    # scores are dropped.
    assert len(tensors) == (14 if decoded else 8)
    storages = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert report["total_bytes"] == sum(t.nbytes for t in tensors) == storages
    assert report["total_bytes"] == sum(report["bytes"]) == cache.nbytes
    seen = 100 + decoded
    assert report["seen_tokens"] == cache.get_seq_length() == cache.seen == seen
    assert report["units"] == [20 + decoded] * 2
    # keys and values of 2 layers, 2 rows, 2 heads of size 8
    assert report["full_cache_bytes"] == 2 * 2 * 2 * 2 * 8 * seen * dtype.itemsize
    assert report["ratio"] == report["total_bytes"] / report["full_cache_bytes"]


def unit_bytes(layers=2, heads=2, size=8, itemsize=4):
    """Bytes of one token: key, value, float32 score and int32 position, in every layer and head."""
    return layers * heads * (2 * size * itemsize + 4 + 4)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_prompt_of_fifty_budgets_stays_within_budget_and_chunk(positions):
    model = tiny_model("llama")
    budget, chunk = SMALL["budget"], SMALL["chunk_size"]
    held = []
    policy = WatchingPolicy()
    engine = small_engine(model, policy, positions=positions)

    def progress(done, total):
        held.append(policy.cache.report()["total_bytes"])

    engine.progress = progress
    with watched(engine, policy):
        cache = engine.prefill(prompt(50 * budget))
    assert len(held) == -(-50 * budget // chunk)
    assert max(held) <= (budget + chunk) * unit_bytes()
    assert held[-1] == budget * unit_bytes()
    assert cache.nbytes == held[-1] - 2 * 2 * 4 * budget  # the scores of all heads
    assert cache.report()["ratio"] < 0.03
    # Within a chunk too: no layer ever held more than budget + chunk, the others their budget.
    assert max(policy.held) <= budget
    assert policy.peak <= (2 * budget + chunk) * unit_bytes(layers=1)


class WatchingPolicy(Policy):
    """Keeps recent units, and looks at the cache whenever a layer is about to append."""

    name = "watching"
    cache = None

    def __init__(self):
        self.held, self.peak = [], 0

    def score(self, chunk):
        self.held.append(self.cache.layers[chunk.layer_idx].longest)
        self.peak = max(self.peak, self.cache.nbytes)
        new = torch.arange(chunk.start, chunk.start + chunk.key.shape[2])
        return new.float().expand(chunk.key.shape[:3])


class watched:  # noqa: N801 - reads as a context manager
    """Show the policy the cache that the engine's decoder is given."""

    def __init__(self, engine, policy):
        self.decoder, self.policy = engine.backbone.decoder, policy

    def __enter__(self):
        def look(module, args, kwargs):
            self.policy.cache = cache_in(kwargs)

        self.hook = self.decoder.register_forward_pre_hook(look, with_kwargs=True)

    def __exit__(self, *exception):
        self.hook.remove()


# --- what is held ---


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_source_positions_ascend_and_never_repeat(family, positions):
    model = tiny_model(family)
    engine = small_engine(model, positions=positions, decode_interval=8)
    cache = engine.prefill(prompt(90, batch=2))
    for layer in cache.layers:
        held = stacked(layer.source_positions)
        units = 20 if layer.window is None else layer.window - 1
        assert held.dtype == torch.long
        assert held.shape == stacked(layer.scores).shape == (2, 2, units)
        assert torch.equal(layer.lengths, torch.full((2, 2), units))
        assert layer.keys.shape == layer.values.shape == (2, 2, units, 8)
        assert (held.diff(dim=-1) > 0).all()
        assert held.min() >= 0
        assert held.max() < 90


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keys_values_scores_and_positions_move_together(positions):
    """In the first layer all four are functions of the token alone: recompute them."""
    model = tiny_model("llama", vocab_size=512)
    heads = tiny_heads(model)
    ids = distinct_prompt(90, 512)
    engine = small_engine(model, "locret", heads=heads, positions=positions, decode_interval=8)
    layer = engine.prefill(ids).layers[0]
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    hidden = norm(model.model.embed_tokens(ids))
    query, key, value = (
        getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, 8)).transpose(1, 2)
        for name in "qkv"
    )
    scores = heads[0](torch.cat([x.transpose(1, 2).flatten(2) for x in (query, key, value)], -1))
    if positions == "original":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = model.model.rotary_emb(hidden, torch.arange(90)[None])
        _, key = apply_rotary_pos_emb(query, key, cos, sin)
    held = stacked(layer.source_positions)
    wide = held[..., None].expand(-1, -1, -1, 8)
    assert (layer.keys - key.gather(2, wide)).abs().max() < 1e-5
    assert (layer.values - value.gather(2, wide)).abs().max() < 1e-5
    assert (stacked(layer.scores) - scores.gather(2, held)).abs().max() < 1e-5


def test_positions_after_the_prompt_go_on_from_what_was_seen():
    engine = small_engine(tiny_model("llama"))
    cache = engine.prefill(prompt(50))
    before = kept(cache, 1)
    engine.generate(prompt(3), cache=cache, max_new_tokens=4, do_sample=False)
    assert kept(cache, 1) == before + list(range(50, 56))


def test_decoding_does_not_grow_the_storage_at_every_token():
    engine = small_engine(tiny_model("llama"))
    cache = engine.prefill(prompt(50))
    sizes = set()
    for _ in range(30):
        engine.generate(prompt(1), cache=cache, max_new_tokens=2, do_sample=False)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1


# --- the transformers side ---


def filled_cache(batch=2):
    return small_engine(tiny_model("llama"), decode_interval=8).prefill(prompt(50, batch=batch))


def test_reset_makes_it_new():
    engine = small_engine(tiny_model("llama"))
    cache = engine.prefill(prompt(50))
    engine.generate(prompt(3), cache=cache, max_new_tokens=4, do_sample=False)
    cache.reset()
    assert cache.report() == RetainedCache(2, budget=20).report()
    assert cache.token_ids is None
    assert [layer.rotated for layer in cache.layers] == [False, False]
    with engine, torch.no_grad():
        for given in (cache, RetainedCache(2, budget=20)):
            given.prompt_lengths = (30,)
            decoder = engine.backbone.decoder
            with engine.reading_into(given, ((20, 20), (20, 20))):
                decoder(input_ids=prompt(30), use_cache=True, **as_argument(decoder, given))
            assert given.report()["units"] == [20, 20]


def test_cropping_is_refused():
    cache = filled_cache()
    for amount in (-3, -1, 5):
        with pytest.raises(ValueError, match="cannot be rolled back"):
            cache.crop(amount)
    cache.crop(0)
    assert cache.report()["units"] == [20, 20]


def test_seen_is_not_what_is_held():
    cache = filled_cache()
    for layer_idx in range(2):
        assert cache.get_seq_length(layer_idx) == 50
        assert cache.layers[layer_idx].longest == 20
    assert cache.is_initialized
    assert cache.layers[0].get_max_length() == -1


def own_units(layer):
    return stacked(layer.scores), stacked(layer.source_positions)


def test_rows_are_reordered_and_repeated_in_all_four_tensors():
    cache = filled_cache()
    before = [
        [view.clone() for view in (layer.keys, layer.values, *own_units(layer))]
        for layer in cache.layers
    ]
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    for layer, old in zip(cache.layers, before, strict=True):
        new = (layer.keys, layer.values, *own_units(layer))
        for ours, theirs in zip(new, old, strict=True):
            assert torch.equal(ours, theirs[[1, 1, 1]])


def test_rows_of_an_empty_cache_may_be_moved():
    cache = RetainedCache(2)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    assert cache.seen == 0


def test_update_without_an_engine_is_refused_and_stores_nothing():
    layer = RetainedLayer(rotated=False)
    key = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="no engine is attached"):
        layer.update(key, key)
    layer.expect_hand_over()
    assert layer.update(key, key) == (key, key)
    with pytest.raises(ValueError, match="no engine is attached"):
        layer.update(key, key)
    assert layer.is_empty
    assert layer.longest == layer.seen == 0


def test_positions_are_checked():
    with pytest.raises(ValueError, match="'compact' or 'original'"):
        RetainedCache(2, positions="packed")


def test_truth_value_does_not_depend_on_what_is_held():
    """Stock Phi-3 drops a true cache at the LongRoPE window."""
    assert not RetainedCache(2)
    assert not filled_cache()


# --- units, against lists ---


class ListUnits:
    """Rows of heads of (key, value, score, position) tuples."""

    def __init__(self):
        self.rows = None

    def append(self, fresh):
        if self.rows is None:
            self.rows = [[[] for _ in row] for row in fresh]
        self.rows = [
            [old + new for old, new in zip(a, b, strict=True)]
            for a, b in zip(self.rows, fresh, strict=True)
        ]

    def retain(self, chosen):
        self.rows = [
            [[units[i] for i in kept] for units, kept in zip(row, of_row, strict=True)]
            for row, of_row in zip(self.rows, chosen, strict=True)
        ]

    def select_rows(self, rows):
        self.rows = [self.rows[row] for row in rows]


def as_lists(store):
    keys, values = ([[x[:, 0] for x in row] for row in store.split(n)] for n in ("keys", "values"))
    columns = zip(keys, values, store.split("scores"), store.split("source_positions"), strict=True)
    return [
        [[*zip(*(x.tolist() for x in head), strict=True)] for head in zip(*row, strict=True)]
        for row in columns
    ]


def fresh_units(rows, heads, new, next_value, next_position):
    """Units that are told apart by their numbers, and the same as lists."""
    count = rows * heads * new
    numbers = torch.arange(next_value, next_value + count).reshape(rows, heads, new)
    keys = numbers.float()[..., None].expand(-1, -1, -1, 2)
    positions = torch.arange(next_position, next_position + new)
    lists = [
        [
            [(float(n), -float(n), n / 2, p) for n, p in zip(head, positions.tolist(), strict=True)]
            for head in row
        ]
        for row in numbers.tolist()
    ]
    return NewTokens.of(keys, -keys, positions, numbers / 2), lists


def some_of(lists, most, seed):
    """Which units of each sequence stay: of each another number, at most `most`."""
    rng = random.Random(seed)
    return [
        [sorted(rng.sample(range(len(x)), min(len(x), rng.randint(0, most)))) for x in row]
        for row in lists
    ]


def retain(store, chosen, new=None):
    """Hold the units `chosen` [B][H] of each sequence."""
    counts = tuple(tuple(map(len, row)) for row in chosen)
    index = torch.tensor([i for row in chosen for head in row for i in head], dtype=torch.long)
    store.retain(index, sequences_of(counts, index.device), new)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5), st.integers(0, 6)),
        st.tuples(st.just("retain"), st.integers(1, 8), st.integers(0, 1000)),
        st.tuples(st.just("retain_with_new"), st.integers(1, 8), st.integers(0, 1000)),
        st.tuples(st.just("select_rows"), st.lists(st.integers(0, 7), min_size=1, max_size=3)),
        st.tuples(st.just("freeze"), st.integers(0, 1000)),
        st.tuples(st.just("save")),
        st.tuples(st.just("restore")),
        st.tuples(st.just("clear")),
    ),
    max_size=12,
)


@settings(max_examples=150)
@given(steps=STEPS, batch=st.integers(1, 3), heads=st.integers(1, 3))
def test_units_behave_like_lists(steps, batch, heads):
    store, model, views = Store(), ListUnits(), []
    rows, next_position, next_value = batch, 0, 0
    for step, *arguments in steps:
        if step == "append":
            new, room = arguments
            fresh, lists = fresh_units(rows, heads, new, next_value, next_position)
            store.append(fresh, room)
            model.append(lists)
            next_position, next_value = next_position + new, next_value + rows * heads * new
        elif step == "clear":
            store.clear()
            model, rows, views = ListUnits(), batch, []
        elif store.is_empty:
            continue
        elif step == "retain":
            chosen = some_of(model.rows, *arguments)
            retain(store, chosen)
            model.retain(chosen)
        elif step == "retain_with_new":
            fresh, lists = fresh_units(rows, heads, 3, next_value, next_position)
            model.append(lists)
            chosen = some_of(model.rows, *arguments)
            retain(store, chosen, fresh)
            model.retain(chosen)
            next_position, next_value = next_position + 3, next_value + rows * heads * 3
        elif step == "select_rows":
            chosen = [row % rows for row in arguments[0]]
            store.select_rows(chosen, torch.tensor(chosen))
            model.select_rows(chosen)
            rows = len(chosen)
        elif step == "save":
            named, lengths, store = named_tensors(store), lengths_of(store), Store()
            take_tensors(store, named, lengths)
        elif step == "restore":
            # To what was seen last, if anything was; then this is seen.
            if views:
                view, lists = views.pop()
                store.restore(view)
                model.rows, rows = lists, len(lists)
            views.append((store.view(), model.rows))
        elif step == "freeze":
            key = float(arguments[0])
            store.freeze(
                lambda x, key=key: torch.full_like(x, key),
                lambda x, key=key: torch.full_like(x, key),
                room=arguments[0] % 3,
            )
            model.rows = [[[(key, *u[1:]) for u in units] for units in row] for row in model.rows]
        if model.rows is None:
            assert store.is_empty
            assert store.nbytes == 0
        else:
            assert as_lists(store) == model.rows
            lengths = [[len(units) for units in row] for row in model.rows]
            assert store.sequences.lengths.tolist() == lengths
            assert store.nbytes == sum(t.nbytes for t in store.tensors)
            if store.context is not None:
                held = sum(map(sum, lengths)) - rows * heads * store.tail.count
                own = [*store.context.kv_tensors, *store.context.exact.values()]
                assert [x.shape[0] for x in own] == [held] * 4


def test_rows_become_one_batch_as_lists_do():
    stores, lists = [], []
    for row in range(4):
        store, model = Store(), ListUnits()
        fresh, given = fresh_units(1, 2, 6, 100 * row, 0)
        store.append(fresh)
        model.append(given)
        if row % 2:
            chosen = some_of(model.rows, 5, row)
            retain(store, chosen)
            model.retain(chosen)
        if row > 1:
            fresh, given = fresh_units(1, 2, row, 100 * row + 50, 6)
            store.append(fresh)
            model.append(given)
        stores.append(store)
        lists += model.rows
    stores.append(Store())  # a row that has read nothing
    assert as_lists(Store.of_rows(stores)) == [*lists, [[], []]]


def test_spare_room_is_never_looked_at():
    store = Store()
    key = torch.ones(1, 2, 3, 4)
    store.append(NewTokens.of(key, key, torch.arange(3)), room=10)
    for tensor in store.tail.tensors:
        if tensor.is_floating_point():
            tensor[:, :, 3:] = torch.nan
    store.append(NewTokens.of(key, key, torch.arange(3, 6)))
    store.select_rows([0, 0], torch.tensor([0, 0]))
    for name in ("keys", "values", "scores"):
        assert not store.rectangle(name).isnan().any()
    retain(store, [[[0, 4], [0, 4]]] * 2)
    for name in ("keys", "values", "scores"):
        assert not store.rectangle(name).isnan().any()


def test_units_do_not_alias_what_they_were_given():
    store, key = Store(), torch.ones(1, 1, 2, 4)
    store.append(NewTokens.of(key, key.clone(), torch.arange(2)))
    key.zero_()
    assert store.rectangle("keys").eq(1).all()
