"""Recall: evicted units wait in host memory, and the blocks that queries look for come back."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import locret
from locret import Recall, RetainedCache
from locret.cache.host_blocks import HostBlocks
from locret.cache.merging import Merging
from locret.cache.recall import block_relevance, mean_logits
from locret.evaluation.ask import Engines
from locret.evaluation.config import expand
from locret.model.backends import attend
from locret.model.hooks import cache_of
from locret.model.loading import LoadedModel
from locret.policies import POLICIES, Policy
from locret.policies.compose import AdaptiveHeads, SharedLayers
from locret.quantization import make_scheme
from tests.kept import kept
from tests.test_batches import assert_each_row_as_alone, padded
from tests.tiny_models import FAMILIES, MIXED, SLIDING, prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 16, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
FEW = {"block_size": 4, "blocks": 3, "representatives": 2}
ALL = {"block_size": 4, "blocks": 1000, "representatives": 2}


APART = pytest.mark.xfail(
    strict=True,
    reason="local tokens that are read in two pieces recall in two pieces (docs/policies.md)",
)


def recalling(model, policy="streaming_llm", recall=FEW, **changes):
    return locret.Engine(model, policy, recall=recall, **SMALL | changes)


def name_of(policy):
    return policy if isinstance(policy, str) else type(policy).__name__


def hosts(cache):
    return [layer.host for layer in cache.layers]


def evicted_positions(host):
    """Source positions of all that is on the host or waits, [B][H][any], sorted."""
    stored = host.view()
    heads = []
    for b in range(stored.counts.shape[0]):
        heads.append([])
        for h in range(stored.counts.shape[1]):
            rows = [row for row in stored.table[b, h].tolist() if row >= 0]
            found = stored.waiting[2][b, h, : stored.counts[b, h]].tolist()
            if rows:
                found += stored.pool.fetch(rows, torch.device("cpu"))[2].flatten().tolist()
            heads[-1].append(sorted(found))
    return heads


# --- a naive twin, one head and unit at a time ---


class Unit:
    def __init__(self, key, value, position):
        self.key, self.value, self.position = key, value, position
        self.score = -torch.inf


class NaiveHead:
    """One KV head: what the paper's formulas say, in loops."""

    def __init__(self, recall):
        self.recall, self.evicted = recall, []

    def look(self, queries, held, new):
        """queries [G, T, D]; held and new: lists of units."""
        for at, unit in [(-1, unit) for unit in held] + list(enumerate(new)):
            logits = [float(q @ unit.key) for group in queries for q in group[at + 1 :]]
            unit.score = sum(logits) / len(logits) if logits else -torch.inf

    def come_back(self, queries):
        size, count = self.recall.block_size, self.recall.blocks
        full = len(self.evicted) // size
        blocks = [self.evicted[i * size : (i + 1) * size] for i in range(full)]

        def relevance(block):
            best = sorted(block, key=lambda unit: -unit.score)[: self.recall.representatives]
            return sum(float(q @ unit.key) for group in queries for q in group for unit in best)

        best = sorted(range(full), key=lambda i: -relevance(blocks[i]))[:count]
        return [unit for i in sorted(best) for unit in blocks[i]] + self.evicted[full * size :]


@settings(max_examples=60)
@given(
    recall=st.builds(
        lambda size, blocks, share: Recall(size, blocks, max(1, size // share)),
        st.integers(1, 6),
        st.integers(1, 4),
        st.integers(1, 3),
    ),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    even=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(  # blocks of units that tie: each was evicted as the last token of its chunk
    recall=Recall(4, 1, 2), batch=2, heads=2, group=2, chunks=[2, 1, 1, 9, 2], even=False, seed=407
)
def test_blocks_are_those_of_the_naive_twin(recall, batch, heads, group, chunks, even, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    host, size = HostBlocks(recall), 4
    twins = [[NaiveHead(recall) for _ in range(heads)] for _ in range(batch)]
    held = [[[] for _ in range(heads)] for _ in range(batch)]
    empty = torch.zeros(batch, heads, dtype=torch.long)
    columns = [torch.zeros(batch, heads, 0, size) for _ in range(2)]
    columns.append(torch.zeros(batch, heads, 0, dtype=torch.long))
    seen = 0
    for tokens in chunks:
        query = normal(batch, heads * group, tokens, size)
        came = host.come_back(query)
        new = [normal(batch, heads, tokens, size) for _ in range(2)]
        new.append(torch.arange(seen, seen + tokens).expand(batch, heads, tokens))
        host.look(query, columns[0] if columns[0].shape[2] else None, new[0], None, at_once=False)
        both = [torch.cat(pair, dim=2) for pair in zip(columns, new, strict=True)]
        most = int(torch.randint(1, both[0].shape[2] + 1, (1,), generator=generator))
        kept = torch.zeros(batch, heads, most, dtype=torch.long)
        fillers = torch.zeros(batch, heads, dtype=torch.long)
        for b in range(batch):
            for h in range(heads):
                queries = query[b, h * group : (h + 1) * group]
                twin, mine = twins[b][h], held[b][h]
                if came is not None:
                    there = [True] * came.keys.shape[2] if came.valid is None else came.valid[b, h]
                    expected = twin.come_back(queries)
                    got = [i for i, is_unit in enumerate(there) if is_unit]
                    positions = came.positions[b, h].tolist()
                    assert [positions[i] for i in got] == [unit.position for unit in expected]
                    for i, unit in zip(got, expected, strict=True):
                        assert torch.equal(came.keys[b, h, i], unit.key)
                        assert torch.equal(came.values[b, h, i], unit.value)
                fresh = [Unit(new[0][b, h, t], new[1][b, h, t], seen + t) for t in range(tokens)]
                twin.look(queries, mine, fresh)
                units, hole = mine + fresh, int(empty[b, h])
                least = min(len(units), 1)
                count = min(most, len(units))
                if not even:
                    count = int(torch.randint(least, count + 1, (1,), generator=generator))
                stay = torch.randperm(len(units), generator=generator)[:count].sort().values
                kept[b, h, most - count :] = stay + hole
                fillers[b, h] = most - count
                gone = sorted(set(range(len(units))) - set(stay.tolist()))
                twin.evicted += [units[i] for i in gone]
                held[b][h] = [units[i] for i in stay.tolist()]
        plain = not fillers.any() and not empty.any()
        host.take(columns, new, kept, None if plain else fillers, None if plain else empty)
        columns = [
            x.gather(
                2, kept.view(*kept.shape, *[1] * (x.dim() - 3)).expand(*kept.shape, *x.shape[3:])
            )
            for x in both
        ]
        empty, seen = fillers, seen + tokens
    assert host.units == max(len(twin.evicted) for row in twins for twin in row)


def test_scores_are_the_mean_logits_of_later_queries():
    query, held, key = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8)
    scores = mean_logits(query, held, key)
    logits = query.unflatten(1, (3, 2)) @ torch.cat([held, key], 2)[:, :, None].transpose(-1, -2)
    later = torch.ones(5, 12).tril(6).bool()
    expected = logits.masked_fill(~later, torch.nan).nanmean(dim=(2, 3))
    assert (scores - expected)[..., :-1].abs().max() < 1e-5
    assert scores[..., -1].eq(-torch.inf).all()


def test_relevance_is_the_mean_logit_of_queries_and_representatives():
    query, representatives = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 4, 2, 8)
    logits = torch.einsum("bhgtd,bhnrd->bhngtr", query.unflatten(1, (3, 2)), representatives)
    relevance = block_relevance(query, representatives.mean(dim=3))
    assert (relevance - logits.flatten(3).mean(dim=-1)).abs().max() < 1e-5


# --- all that was evicted comes back: the full cache ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["streaming_llm", "random"])
def test_recall_of_everything_is_the_full_cache(family, policy):
    model = tiny_model(family)
    recall = {"positions": "original", "longrope": "by_length", "recall": ALL}
    engine = locret.Engine(model, policy, **SMALL | recall)
    stock = model.generate(
        prompt(90, batch=2), output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    ours = engine.generate(
        prompt(90, batch=2), output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(ours.sequences, stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        assert (mine - theirs).abs().max() < 5e-5


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize(
    "policy", ["sirllm", "h2o", "snapkv", AdaptiveHeads("keydiff"), "knorm"], ids=name_of
)
def test_so_it_is_for_other_policies_and_head_counts(policy, heads):
    model = tiny_model("llama", num_key_value_heads=heads)
    engine = recalling(model, policy, ALL, positions="original")
    stock = model.generate(prompt(90), **GREEDY)
    assert torch.equal(engine.generate(prompt(90), **GREEDY), stock)


def test_so_it_is_while_an_answer_evicts():
    model = tiny_model("llama")
    engine = recalling(model, "random", ALL, positions="original", decode_interval=3)
    many = GREEDY | {"max_new_tokens": 30}
    cache = engine.prefill(prompt(60))
    given = torch.cat([prompt(60), engine.generate(prompt(5, seed=1), cache=cache, **many)], dim=1)
    expected = model.generate(torch.cat([prompt(60), prompt(5, seed=1)], dim=1), **many)
    assert torch.equal(given, expected)
    assert max(cache.report()["units"]) < 23
    everything = [*range(cache.seen)]
    for i, host in enumerate(hosts(cache)):
        for h, gone in enumerate(evicted_positions(host)[0]):
            assert sorted(gone + kept(cache, i, h)) == everything


# --- what is where ---


@pytest.mark.parametrize(
    "policy",
    ["random", "sirllm", AdaptiveHeads("knorm"), AdaptiveHeads(SharedLayers("keydiff"))],
    ids=name_of,
)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_every_unit_is_held_or_on_the_host(policy, positions):
    engine = recalling(tiny_model("llama"), policy, positions=positions)
    cache = engine.prefill(prompt(100))
    for i, host in enumerate(hosts(cache)):
        for h, gone in enumerate(evicted_positions(host)[0]):
            assert sorted(gone + kept(cache, i, h)) == [*range(100)]


def test_device_bytes_are_bounded_but_for_one_key_a_block():
    engine = recalling(tiny_model("llama"))
    device, host = [], []
    for length in (99, 99 + 160, 99 + 320):  # as many units wait
        cache = cache_of(engine.generate(prompt(length), return_dict_in_generate=True, **GREEDY))
        report = cache.report()
        assert report["recall"]["recalled_units"] <= 3 * 4 + 3
        assert report["total_bytes"] == sum(report["bytes"]) == cache.nbytes
        device.append(cache.nbytes)
        host.append(report["recall"]["host_bytes"])
    keys = 2 * 2 * 8 * 4  # of a block: layers, heads, channels, bytes
    positions = 2 * 2 * 160 // 8  # a bit a token
    grown = 160 // 4 * keys + positions
    assert device[1] - device[0] == device[2] - device[1] == grown
    units = 160 * 2 * 2 * (2 * 8 * 4 + 4)
    assert host[1] - host[0] == host[2] - host[1] == units


def test_the_report_tells():
    cache = recalling(tiny_model("llama")).prefill(prompt(101))
    told = cache.report()["recall"]
    assert {name: told[name] for name in FEW} == FEW
    assert told["host_units"] == 101 - 20
    assert told["host_bytes"] == 80 * 2 * 2 * (2 * 8 * 4 + 4)
    assert told["recalled_units"] == 3 * 4 + 1
    assert cache.report()["units"] == [20, 20]


def test_what_did_not_change_is_not_fetched_again(monkeypatch):
    engine = recalling(tiny_model("llama"), recall=ALL)
    cache, fetched = engine.prefill(prompt(100)), []
    kind = type(cache.layers[0].host.view().pool)
    fetch = kind.fetch
    monkeypatch.setattr(
        kind, "fetch", lambda self, rows, to: fetched.append(rows) or fetch(self, rows, to)
    )
    engine.generate(prompt(3), cache=cache, max_new_tokens=20, do_sample=False)
    blocks = (100 - 20) // 4 * 2  # in all heads of a layer
    assert [len(rows) < blocks for rows in fetched] == [True, False]  # the last layer never looked
    assert sorted(fetched[1]) == [*range(blocks)]


def test_question_tokens_that_are_given_up_do_not_go_to_the_host():
    engine = recalling(tiny_model("llama"), "snapkv", query_aware=True)
    cache = engine.prefill(prompt(100), query_ids=prompt(6, seed=1))
    for i, host in enumerate(hosts(cache)):
        for h, gone in enumerate(evicted_positions(host)[0]):
            assert sorted(gone + kept(cache, i, h)) == [*range(100)]


@pytest.mark.parametrize("family", sorted(MIXED))
def test_sliding_layers_recall_nothing(family):
    cache = recalling(tiny_model(family)).prefill(prompt(90))
    assert cache.layers[0].host is None
    assert cache.layers[1].host is not None
    assert cache.report()["recall"]["host_units"] == 70


@pytest.mark.parametrize("family", SLIDING)
def test_a_model_of_windows_alone_has_nothing_to_recall(family):
    model = tiny_model(family)
    engine = recalling(model, longrope="by_length")
    assert torch.equal(engine.generate(prompt(70), **GREEDY), model.generate(prompt(70), **GREEDY))


def test_a_full_cache_recalls_nothing():
    cache = recalling(tiny_model("llama"), "full").prefill(prompt(90))
    told = cache.report()["recall"]
    assert (told["host_units"], told["host_bytes"], told["recalled_units"]) == (0, 0, 0)


# --- it changes the answer ---


def test_a_recalled_block_brings_the_needle_back():
    """The query's value stands at one evicted unit, which alone looks like the query."""
    torch.manual_seed(0)
    size, needle = 8, 21
    keys, values = torch.randn(1, 1, 64, size) / 4, torch.randn(1, 1, 64, size) / 100
    sought = torch.nn.functional.one_hot(torch.tensor(3), size).float()
    keys[..., 3] = 0
    keys[0, 0, needle], values[0, 0, needle] = 30 * sought, 1.0
    host = HostBlocks(Recall(block_size=8, blocks=1, representatives=1))
    query = sought.expand(1, 2, 64, size)
    host.look(query, None, keys, None, at_once=False)
    none = [keys[:, :, :0], values[:, :, :0], torch.empty(1, 1, 0, dtype=torch.long)]
    positions = torch.arange(64)[None, None]
    host.take(none, [keys, values, positions], positions[..., 48:], None, None)
    asked = query[:, :, :1]
    held, new = (x[:, :, 48:] for x in (keys, values))
    lost = attend(asked, held, new, 1.0, "eager")
    *found, empty = host.in_front(asked, held, new, None)
    assert found[0].shape[2] == 16 + 8
    assert empty is None
    answer = attend(asked, *found, 1.0, "eager")
    full = attend(asked, keys, values, 1.0, "eager")
    assert (lost - full).abs().min() > 0.9
    assert (answer - full).abs().max() < 1e-3


def test_recalled_units_count_in_compact_positions_too():
    """They stand at the oldest slot held: as far away as anything, and within the window."""
    model = tiny_model("llama")
    settings = {"positions": "compact", "chunk_size": 40, "local_tokens": 4}
    engine, without = (recalling(model, recall=r, **settings) for r in (ALL, None))
    ours, bare, full = (
        e.generate(
            prompt(64), output_logits=True, return_dict_in_generate=True, max_new_tokens=1
        ).logits[0]
        for e in (engine, without, locret.Engine(model, "full", **settings | {"budget": None}))
    )
    assert (ours - bare).abs().max() > 1e-3
    assert (ours - full).abs().mean() < (bare - full).abs().mean()


@pytest.mark.parametrize("family", ["llama", "phi3", "glm"])
def test_recalled_keys_are_rotated_whole_and_at_one_slot(family):
    """RoPE turns keys and may scale them (LongRoPE), so that only angles tell slots apart; at slot
    0 there is none."""
    model = tiny_model(family)
    first = [
        recalling(model, positions=positions).prefill(prompt(60)).layers[0]
        for positions in ("compact", "original")
    ]
    compact, original = (layer.host.view().pool.segments[0] for layer in first)
    assert torch.equal(compact.tensors[2], original.tensors[2])
    assert (compact.tensors[0].norm(dim=-1) - original.tensors[0].norm(dim=-1)).abs().max() < 1e-4
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(prompt(60)))
    attention = model.model.layers[0].self_attn
    keys = attention.qkv_proj(hidden)[..., 64:80] if family == "phi3" else attention.k_proj(hidden)
    keys = keys.unflatten(-1, (2, 8)).transpose(1, 2)[0]
    positions = compact.tensors[2].unflatten(0, (2, -1)).flatten(1)
    unrotated = keys.gather(1, positions[..., None].expand(*positions.shape, 8))
    recalled = compact.tensors[0].unflatten(0, (2, -1)).flatten(1, 2)
    scale = model.model.rotary_emb.attention_scaling
    assert (scale > 1) == (family == "phi3")
    assert (recalled - unrotated * scale).abs().max() < 1e-5


@pytest.mark.parametrize("policy", ["streaming_llm", "random"])
def test_off_changes_nothing(policy):
    model = tiny_model("llama")
    plain, off = locret.Engine(model, policy, **SMALL), recalling(model, policy, None)
    assert torch.equal(plain.generate(prompt(90), **GREEDY), off.generate(prompt(90), **GREEDY))
    cache = off.prefill(prompt(90))
    assert hosts(cache) == [None, None]
    assert cache.report()["recall"] is None


# --- a request's life ---


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("policy", ["random", AdaptiveHeads("knorm")], ids=name_of)
def test_snapshots_and_saved_contexts(policy, positions, tmp_path):
    model = tiny_model("llama")
    engine = recalling(model, policy, positions=positions)
    cache = engine.prefill(prompt(100, batch=2))
    cache.save(tmp_path / "context")
    before, questions = cache.snapshot(), [prompt(4, batch=2, seed=seed) for seed in (1, 2)]
    answers = []
    for question in questions:
        answers.append(engine.generate(question, cache=cache, **GREEDY))
        cache.restore(before)
    again = engine.generate(questions[0], cache=cache, **GREEDY)
    assert torch.equal(again, answers[0])
    loaded = RetainedCache.load(tmp_path / "context", model)
    assert loaded.recall == Recall(**FEW)
    assert [*map(evicted_positions, hosts(loaded))] == [*map(evicted_positions, hosts(cache))]
    assert torch.equal(engine.generate(questions[1], cache=loaded, **GREEDY), answers[1])


def test_snapshots_while_an_answer_evicts():
    engine = recalling(tiny_model("llama"), "random", decode_interval=3)
    cache = engine.prefill(prompt(60))
    before, longer = cache.snapshot(), GREEDY | {"max_new_tokens": 30}
    first = engine.generate(prompt(4), cache=cache, **longer)
    held = [*map(evicted_positions, hosts(cache))]
    cache.restore(before)
    other = engine.generate(prompt(4, seed=5), cache=cache, **longer)
    cache.restore(before)
    assert torch.equal(engine.generate(prompt(4), cache=cache, **longer), first)
    assert [*map(evicted_positions, hosts(cache))] == held
    assert not torch.equal(first, other)


@pytest.mark.parametrize("quotas", [[[9, 1], [1, 1]], None])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_makes_room_for_a_question_goes_to_the_host(quotas, rows, tmp_path):
    """The window holds the whole context, but not a question beside it."""
    model = tiny_model("llama", max_position_embeddings=64)
    policy = "knorm" if quotas else AdaptiveHeads("knorm")
    settings = {"budget": 56, "stabilizers": 0, "quotas": quotas, "decode_interval": 4}
    engine = recalling(model, policy, **settings)
    cache = engine.prefill(prompt(64, batch=rows))
    cache.save(tmp_path / "context")
    before, question = cache.snapshot(), prompt(40, batch=rows, seed=1)
    answer = engine.generate(question, cache=cache, **GREEDY)
    everything = [*range(cache.seen)]
    for i, layer in enumerate(cache.layers):
        assert layer.host.units > 20
        for row, heads in enumerate(evicted_positions(layer.host)):
            for h, gone in enumerate(heads):
                own = layer.source_positions[row][h].tolist()
                assert sorted(gone + own) == everything, (i, row, h)
    cache.restore(before)
    assert torch.equal(engine.generate(question, cache=cache, **GREEDY), answer)
    loaded = RetainedCache.load(tmp_path / "context", model)
    assert torch.equal(engine.generate(question, cache=loaded, **GREEDY), answer)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm"])
def test_what_makes_room_for_a_question_is_rotated_as_all_that_is_recalled(family):
    model = tiny_model(family, max_position_embeddings=64)
    settings = {"budget": 56, "stabilizers": 0, "quotas": [[9, 1], [1, 1]], "decode_interval": 4}
    engine = recalling(model, "knorm", **settings)
    cache = engine.prefill(prompt(64))
    engine.generate(prompt(40, seed=1), cache=cache, **GREEDY)
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(cache.token_ids))
    keys = attention.qkv_proj(hidden)[..., 64:80] if family == "phi3" else attention.k_proj(hidden)
    keys = keys.unflatten(-1, (2, 8)).transpose(1, 2)[0] * model.model.rotary_emb.attention_scaling
    stored = cache.layers[0].host.view()
    for head, places in enumerate(stored.table[0].tolist()):
        rows = [place for place in places if place >= 0]
        recalled, _, positions = stored.pool.fetch(rows, torch.device("cpu"))
        assert positions.min() < 64
        torch.testing.assert_close(recalled, keys[head][positions], atol=1e-5, rtol=0)


def test_units_that_no_query_looked_at_are_represented_by_the_first():
    host, keys = (
        HostBlocks(Recall(block_size=4, blocks=1, representatives=2)),
        torch.randn(1, 2, 9, 8),
    )
    units = [keys, torch.randn(1, 2, 9, 8), torch.arange(9).expand(1, 2, 9)]
    host.look_at_none(lambda keys: 2 * keys)
    host.take(units, [x[:, :, :0] for x in units], torch.tensor([[[0], [0]]]), None, None)
    means = 2 * keys[:, :, 1:].unflatten(2, (2, 4))[:, :, :, :2].mean(dim=3)
    torch.testing.assert_close(host.view().means, means)


def test_reset_forgets_the_host():
    cache = recalling(tiny_model("llama")).prefill(prompt(100))
    cache.reset()
    told = cache.report()["recall"]
    assert (told["host_units"], told["host_bytes"], cache.nbytes) == (0, 0, 0)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    "lengths",
    [
        (90, 33),
        (41, 60, 47, 5, 6),
        pytest.param((41, 60, 47, 5, 1, 6), marks=APART),
        (30, 2),
    ],
)
def test_padded_rows_are_answered_as_alone(lengths, positions):
    engine = recalling(tiny_model("llama"), "knorm", positions=positions)
    assert_each_row_as_alone(engine, lengths)


@pytest.mark.parametrize("lengths", [(33, 33), (90, 60, 60), (60, 90, 5)])
@pytest.mark.parametrize("core", ["tova", "keydiff"])
@pytest.mark.parametrize("shared", [AdaptiveHeads, SharedLayers])
def test_rows_that_keep_different_numbers_recall_at_their_own_slots(shared, core, lengths):
    engine = recalling(tiny_model("llama"), shared(core))
    assert_each_row_as_alone(engine, lengths)


def test_padded_rows_recall_everything_while_answers_evict():
    model = tiny_model("llama")
    engine = recalling(model, "random", ALL, positions="original", decode_interval=4)
    ids, mask = padded((70, 33))
    many = GREEDY | {"max_new_tokens": 20}
    given = engine.generate(ids, attention_mask=mask, **many)
    for row, length in enumerate((70, 33)):
        stock = model.generate(ids[row : row + 1, 70 - length :], **many)
        assert torch.equal(given[row, 70:], stock[0, length:])


@pytest.mark.parametrize("lengths", [(30, 3), (3, 30), (2, 4)])
def test_rows_without_a_context_see_no_padding_while_answers_evict(lengths):
    engine = recalling(tiny_model("llama"), "streaming_llm", ALL, decode_interval=1)
    assert_each_row_as_alone(engine, lengths, max_new_tokens=4)


def test_an_engine_without_recall_asks_of_a_cache_with_it_as_the_cache_needs():
    model = tiny_model("llama")
    ids, mask = padded((60, 40))
    cache = recalling(model, "knorm").prefill(ids, attention_mask=mask)
    questions, their_mask = padded((6, 3))
    other = locret.Engine(model, "knorm", **SMALL)
    with pytest.raises(ValueError, match="cannot be asked together"):
        other.generate(questions, attention_mask=their_mask, cache=cache, **GREEDY)


def test_questions_of_different_lengths_are_not_asked_together():
    engine = recalling(tiny_model("llama"), "h2o")
    cache = engine.prefill(prompt(40, batch=2))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="or recall, questions cannot be asked together"):
        engine.generate(prompt(3, batch=2), attention_mask=mask, cache=cache)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_rows_taken_out_of_a_batch_are_asked_as_alone(positions):
    model = tiny_model("llama", vocab_size=8192)
    engine = recalling(model, "h2o", positions=positions)
    contexts = (60, 33, 33, 14)
    ids, mask = padded(contexts, vocab=8192)
    cache = engine.prefill(ids, attention_mask=mask)
    question = prompt(4, vocab=8192)
    for row, context in enumerate(contexts):
        own = engine.generate(question, cache=cache.rows([row]), **GREEDY)
        alone = engine.prefill(ids[row : row + 1, -context:])
        assert torch.equal(own, engine.generate(question, cache=alone, **GREEDY))


def test_rows_that_are_read_together_have_their_blocks_once():
    engine = recalling(tiny_model("llama"), "h2o")
    contexts = (60, 33, 33, 14)
    ids, mask = padded(contexts)
    cache = engine.prefill(ids, attention_mask=mask)
    alone = [engine.prefill(ids[row : row + 1, -n:]) for row, n in enumerate(contexts)]
    told = [each.report()["recall"]["host_bytes"] for each in (cache, *alone)]
    assert told[0] == sum(told[1:])
    some = [host for host in hosts(cache) if host is not None]
    parted = [[HostBlocks(host.recall) for _ in contexts] for host in some]
    for host, rows in zip(some, parted, strict=True):
        for i, row in enumerate(rows):
            row.restore(host.view())
            row.select_batch(torch.tensor([i]), [i])
        joined = HostBlocks.stack(rows)
        assert joined.host_bytes == host.host_bytes
        assert evicted_positions(joined) == evicted_positions(host)


def test_beams_share_blocks_and_go_on_as_stock_does():
    model = tiny_model("llama")
    engine = recalling(model, "random", ALL, positions="original")
    beams = GREEDY | {"num_beams": 3}
    given = engine.generate(prompt(90, batch=2), **beams)
    assert torch.equal(given, model.generate(prompt(90, batch=2), **beams))


def test_rows_select_what_is_theirs():
    cache = recalling(tiny_model("llama"), "random").prefill(prompt(100, batch=2))
    before = [*map(evicted_positions, hosts(cache))]
    host_bytes = cache.report()["recall"]["host_bytes"]
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    after = [*map(evicted_positions, hosts(cache))]
    assert after == [[rows[1], rows[0], rows[1]] for rows in before]
    assert cache.report()["recall"]["host_bytes"] == host_bytes


class Spy(Policy):
    name = "spy"

    def __init__(self):
        self.held = []

    def score(self, chunk):
        self.held.append(chunk.context_length)
        return chunk.own_positions[:, None].float().expand(chunk.key.shape[:3])


def test_policies_do_not_see_what_is_recalled():
    policy = Spy()
    recalling(tiny_model("llama"), policy).prefill(prompt(100))
    assert max(policy.held) == 20


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"locret", "kvzip"}))
def test_every_policy_takes_it(policy):
    engine = recalling(tiny_model("llama"), policy)
    assert engine.generate(prompt(70), **GREEDY).shape == (1, 78)


def test_heads_take_it():
    model = tiny_model("llama")
    engine = recalling(model, "locret", heads=tiny_heads(model))
    assert engine.generate(prompt(70), **GREEDY).shape == (1, 78)


# --- refusals ---


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        ({"blocks": 0}, "blocks is 0; expected a whole number of at least 1"),
        ({"block_size": 2.0}, "block_size is 2.0"),
        ({"representatives": True}, "representatives is True"),
        ({"block_size": 2, "representatives": 3}, "representatives is 3 but a block has 2 units"),
        ({"size": 4}, "expected None, a Recall, or some of .*block_size"),
        (4, "recall is 4; expected None"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(recall, message):
    with pytest.raises(ValueError, match=message):
        recalling(tiny_model("llama"), recall=recall)


def test_what_does_not_go_together_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="'kivi' has only codes of them; leave one"):
        recalling(model, quantization="kivi")
    for refused in (
        lambda: recalling(model, merging="similar"),
        lambda: recalling(model, "full", merging="similar"),
        lambda: RetainedCache(2, merging=Merging(), recall=Recall()),
    ):
        with pytest.raises(ValueError, match="it would count twice; leave one of the two out"):
            refused()
    with pytest.raises(ValueError, match="has only codes of them"):
        RetainedCache(2, scheme=make_scheme("fp8"), recall=Recall())
    with pytest.raises(ValueError, match="graphs=True does not work here: recall chooses blocks"):
        recalling(model, graphs=True)


def test_defaults_are_the_papers():
    model = tiny_model("llama")
    assert recalling(model, recall={}).config.storage.recall == Recall(128, 16, 4)
    assert recalling(model, recall=Recall(8)).config.storage.recall == Recall(8)


def test_setups_of_an_evaluation_reach_it():
    (setup,) = expand([{"policy": "random", "budget": 20, "engine": {"recall": FEW}}])[1:]
    loaded = LoadedModel(tiny_model("llama"), None, "tiny", None)
    engines = Engines(loaded, {}, None, {"chunk_size": 16, "stabilizers": 3, "local_tokens": 5})
    engine = engines.get(setup, setup.engine_budget(None))
    assert engine.config.storage.recall == Recall(**FEW)
    assert engines.used[setup.label]["recall"] == FEW
    assert engines.get(setup, 20).prefill(prompt(60)).report()["recall"]["host_units"] == 40
