"""The units of a layer: any history of appending, evicting, packing, freezing, going back and
choosing rows leaves what lists of units would hold, in as many bytes as the tensors take."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locret.cache.context import sequences_of
from locret.cache.files import lengths_of, named_tensors, take_tensors
from locret.cache.store import NAMES, NewTokens, Store
from locret.quantization import NO_SCHEME, make_scheme
from tests.store_twin import TwinStore

SIZE = 12
CPU = torch.device("cpu")
SMALL = {"group": 8, "residual": 3}
SCHEMES = {
    "none": NO_SCHEME,
    **{f"kivi {bits}": make_scheme("kivi", bits=bits, **SMALL) for bits in (8, 4, 2)},
    **{name: make_scheme(name, **SMALL) for name in ("kvquant", "fp8", "rotated")},
    "no residual": make_scheme("kivi", group=4, residual=0),
}
PACKING = [name for name in SCHEMES if name != "none"]


def rotate(keys):
    """Stands for a rotation: the same for every slot, so that twins need not know theirs."""
    return keys.roll(1, -1)


class Generator:
    """New units, with positions that go on from those before."""

    def __init__(self, seed, dtype=torch.float32):
        self.random, self.dtype, self.position = torch.Generator().manual_seed(seed), dtype, 0

    def normal(self, *shape):
        spread = torch.linspace(-6, 6, shape[-1]) if len(shape) == 4 else 0
        return torch.randn(*shape, generator=self.random) * 2 + spread

    def tokens(self, rows, heads, count):
        shape = (rows, heads, count)
        keys, values = (self.normal(*shape, SIZE).to(self.dtype) for _ in range(2))
        positions = torch.arange(self.position, self.position + count)
        self.position += count
        return NewTokens.of(keys, values, positions, torch.rand(shape, generator=self.random))

    def choose(self, lengths, most):
        """Numbers of units to keep of sequences of these lengths, at most so many of each."""
        return [
            torch.randperm(n, generator=self.random)[:kept].sort().values.tolist()
            for n, kept in zip(lengths, most, strict=True)
        ]


def as_lists(new):
    """`new` for the twin."""
    rows, heads, count = new.scores.shape
    at = [[(b, h) for h in range(heads)] for b in range(rows)]

    def units(b, h):
        held = [(new.keys[b, h, i], new.values[b, h, i]) for i in range(count)]
        exact = [
            {
                "source_positions": int(new.positions[b, h, i]),
                "scores": float(new.scores[b, h, i]),
                "weights": 1.0,
            }
            for i in range(count)
        ]
        return held, exact

    return [[units(*where) for where in row] for row in at]


def retain(store, numbers, new=None):
    heads = store.sequences.shape[1] if new is None else new.keys.shape[1]
    counts = [len(kept) for kept in numbers]
    by_row = tuple(tuple(counts[i : i + heads]) for i in range(0, len(counts), heads))
    index = torch.tensor(sum(numbers, []), dtype=torch.long)
    store.retain(index, sequences_of(by_row, CPU), new)


def assert_like(store, twin):
    """The store holds what the twin does, bit for bit, and its bytes are those of its tensors."""
    held = [s.held(twin.dtype) for s in twin.sequences]
    for name in store.names:
        of = sum(store.split(name), [])
        for x, units, s in zip(of, held, twin.sequences, strict=True):
            if name in ("keys", "values"):
                own = [unit[NAMES.index(name)] for unit in units]
                assert torch.equal(x, torch.stack(own) if own else x[:0])
            else:
                assert x.tolist() == [exact[name] for exact in s.exact]
    assert store.sequences.counts == twin.counts()
    assert store.tail.count == twin.tail
    assert_context_like(store, twin)
    assert_honest(store)


def assert_context_like(store, twin):
    context = store.context
    if context is None:
        assert all(len(s) == s.tail for s in twin.sequences)
        return
    assert context.sequences.counts == twin.counts(lambda s: len(s) - s.tail)
    assert context.packed.counts == twin.counts(lambda s: s.packed)
    assert context.plain.counts == twin.counts(lambda s: len(s) - s.tail - s.packed)
    blocks = [block for s in twin.sequences for block in s.packed_keys.blocks]
    if not blocks:
        assert not context.packed.total
        return
    keys = context.packed_keys
    assert keys.starts.diff().tolist() == [len(units) for _, units in blocks]
    for which, table in enumerate(keys.tables):
        assert torch.equal(table, torch.stack([entry[which] for entry, _ in blocks]))
    codes = [unit[0] for _, units in blocks for unit in units]
    for which, tensor in enumerate(keys.units):
        assert torch.equal(tensor, torch.stack([unit[which] for unit in codes]))
    values = [value for s in twin.sequences for value in s.packed_values]
    for which, tensor in enumerate(context.packed_values.units):
        assert torch.equal(tensor, torch.cat([value.units[which] for value in values]))


def assert_honest(store):
    """Bytes are those of tensors; a context's tensors have a row a unit, or fewer, and own their
    memory."""
    assert store.nbytes == sum(x.nbytes for x in store.tensors)
    exact = () if store.context is None else store.context.exact.values()
    rest = sum(x.nbytes for x in (*exact, *store.tail.tensors[2:]))
    assert store.kv_bytes == store.nbytes - rest
    context = store.context
    if context is None:
        return
    sequences, size = context.sequences, store.like.shape[-1]
    assert sequences.total == sum(sum(row) for row in sequences.counts)
    assert all(len(x) == sequences.total for x in context.exact.values())
    outliers = [p.outliers for p in (context.packed_keys, context.packed_values) if p is not None]
    sparse = [x.data_ptr() for o in outliers if o is not None for x in (o.channels, o.values)]
    for x in (*context.kv_tensors, *context.exact.values()):
        most = sequences.total * (size if x.data_ptr() in sparse else 1)
        assert len(x) <= most + 1, (x.shape, sequences.total)  # a block's start more than blocks
        assert x.untyped_storage().nbytes() == x.nbytes


class History:
    """A store and its twin, and what may be done to both."""

    def __init__(self, scheme, shape, dtype, weighs, seed):
        self.generator = Generator(seed, dtype)
        self.store, self.shape = Store(scheme, weighs), shape
        self.twin = TwinStore(scheme, SIZE, dtype, *shape)
        self.views = []

    @property
    def rows(self):
        return len(self.twin.rows)

    def act(self, draw):
        names = ["append", "retain", "retain_with_new"]
        if not self.store.is_empty:
            names += ["pack", "pack_tightly", "freeze", "view", "restore", "select_rows", "of_rows"]
            names += ["name", "drop_last", "make_room", "replace_scores", "clear"]
            names += ["drop_scores"]
        name = draw(st.sampled_from(names))
        if name == "retain" and self.store.is_empty:
            name = "append"
        getattr(self, name)(draw)
        if not self.store.is_empty:
            assert_like(self.store, self.twin)

    def append(self, draw):
        new = self.generator.tokens(self.rows, self.shape[1], draw(st.integers(0, 14)))
        self.store.append(new, room=draw(st.integers(0, 9)))
        self.twin.append(as_lists(new))

    def retain(self, draw, new=None):
        if new is not None:
            self.twin.append(as_lists(new))
        lengths = sum(self.twin.counts(), ())
        numbers = self.generator.choose(lengths, [draw(st.integers(0, 24)) for _ in lengths])
        retain(self.store, numbers, new)
        self.twin.retain(numbers)

    def retain_with_new(self, draw):
        self.retain(draw, self.generator.tokens(self.rows, self.shape[1], draw(st.integers(0, 14))))

    def pack(self, draw, tight=False):
        had_tail = self.store.tail.count
        self.store.pack(tight)
        self.twin.pack(tight)
        scheme = self.store.scheme
        if had_tail and scheme.packs:
            plain = [len(s) - s.packed for s in self.twin.sequences]
            assert max(plain) < scheme.residual + (1 if tight else scheme.group)

    def pack_tightly(self, draw):
        self.pack(draw, tight=True)

    def freeze(self, draw):
        self.store.freeze(rotate, rotate, draw(st.integers(0, 9)))
        self.twin.freeze(rotate)

    def view(self, draw):
        self.views.append((self.store.view(), copy.deepcopy(self.twin)))

    def restore(self, draw):
        if self.views:
            view, twin = draw(st.sampled_from(self.views))
            self.store.restore(view)
            self.twin = copy.deepcopy(twin)

    def select_rows(self, draw):
        rows = draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=3))
        self.store.select_rows(rows, torch.tensor(rows))
        self.twin.take(rows)

    def of_rows(self, draw):
        each, view = [], self.store.view()
        for row in range(self.rows):
            one = Store(self.store.scheme, self.store.weighs)
            one.restore(view)
            one.select_rows([row], torch.tensor([row]))
            each.append(one)
        self.store = Store.of_rows(each)
        self.twin.absorb_tail()

    def name(self, draw):
        named, lengths = named_tensors(self.store), lengths_of(self.store)
        self.store = Store(self.store.scheme, self.store.weighs)
        take_tensors(self.store, {name: x.clone() for name, x in named.items()}, lengths)

    def drop_last(self, draw):
        count = draw(st.integers(0, self.store.tail.count))
        self.store.drop_last(count)
        self.twin.drop_last(count)

    def make_room(self, draw):
        self.store.make_room(draw(st.integers(1, 20)), torch.tensor([7000]))
        self.twin.pack()
        tail = self.store.tail
        spare = [x[:, :, tail.count :] for x in tail.tensors]
        assert tail.capacity > tail.count
        assert (spare[2] == 7000 + torch.arange(spare[2].shape[2])).all()
        for name, x in zip(self.store.names[3:], spare[3:], strict=True):
            assert (x == (name == "weights")).all()

    def replace_scores(self, draw):
        store, context = self.store, self.store.context
        if not store.scored:
            return
        flat = None if context is None else -context.exact["scores"]
        store.replace_scores(flat, -store.tail[3] if store.tail.tensors else torch.empty(0))
        for s in self.twin.sequences:
            s.exact = [{**exact, "scores": -exact["scores"]} for exact in s.exact]

    def drop_scores(self, draw):
        self.store.drop_scores()
        assert "scores" not in named_tensors(self.store)

    def clear(self, draw):
        self.store.clear()
        assert self.store.is_empty and not self.store.tensors and self.store.nbytes == 0
        self.twin = TwinStore(self.twin.scheme, SIZE, self.twin.dtype, self.rows, self.shape[1])


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_history_leaves_what_lists_of_units_would_hold(scheme, data, seed):
    shape = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    history = History(SCHEMES[scheme], shape, dtype, data.draw(st.booleans()), seed)
    for _ in range(data.draw(st.integers(1, 10))):
        history.act(data.draw)
    for view, twin in history.views:  # what came after has not overwritten them
        history.store.restore(view)
        assert_like(history.store, twin)


# --- what follows from it, said once ---


def filled(scheme, dtype=torch.float32, kept=((20, 0, 31), (7, 1, 12)), tail=4, weighs=False):
    """A store of ragged sequences with a tail, and the generator for more."""
    generator, store = Generator(0, dtype), Store(SCHEMES[scheme], weighs)
    new = generator.tokens(2, 3, 40)
    numbers = generator.choose([40] * 6, sum(kept, ()))
    retain(store, numbers, new)
    if tail:
        store.append(generator.tokens(2, 3, tail))
    return store, generator


def snapshot(store):
    return [x.clone() for x in store.tensors]


def test_without_a_scheme_nothing_is_lost():
    generator, store = Generator(3), Store()
    new = [generator.tokens(2, 3, 30), generator.tokens(2, 3, 9)]
    whole = [torch.cat(x, dim=2) for x in zip(*new, strict=True)]
    numbers = generator.choose([30] * 6, [17, 0, 30, 2, 9, 1])
    retain(store, numbers, new[0])
    store.append(new[1])
    every = [[*kept, *range(30, 39)] for kept in numbers]
    for name, x in zip(("keys", "values", "scores", "source_positions"), whole, strict=True):
        for held, came, kept in zip(
            sum(store.split(name), []), x.flatten(0, 1), every, strict=True
        ):
            assert torch.equal(held, came[kept])


@pytest.mark.parametrize("scheme", PACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_units_and_all_scores_and_positions_are_exact(scheme, dtype):
    generator, store = Generator(1, dtype), Store(SCHEMES[scheme])
    new, residual = generator.tokens(2, 3, 40), SCHEMES[scheme].residual
    numbers = generator.choose([40] * 6, [20, 0, 31, 2, 1, 12])
    retain(store, numbers, new)
    parts = dict(zip(NAMES, (new.keys, new.values, new.positions, new.scores), strict=False))
    for name, came in parts.items():
        last = residual if name in ("keys", "values") else 40
        came = came.flatten(0, 1)
        for held, x, kept in zip(sum(store.split(name), []), came, numbers, strict=True):
            at = kept[max(len(kept) - last, 0) :]
            assert torch.equal(held[len(kept) - len(at) :], x[at])


@pytest.mark.parametrize("scheme", PACKING)
def test_units_keep_their_codes_while_their_block_keeps_its_entry(scheme):
    store, generator = filled(scheme, kept=((40, 33, 40), (39, 40, 24)), tail=0)
    context = store.context
    before = context.packed_keys, context.packed_values
    lengths, packed = context.sequences.flat, context.packed
    # One unit of each block goes, and as many new ones come that the packed ones stay packed.
    gone = {int(start) for start in before[0].starts[:-1]}
    numbers, same, first = [], [], 0
    for n, p in zip(lengths, packed.flat, strict=True):
        kept = [u for u in range(p) if first + u not in gone]
        same += [first + u for u in kept]
        numbers.append([*kept, *range(p, n + 20)])
        first += p
    retain(store, numbers, generator.tokens(2, 3, 20))
    keys, values = store.context.packed_keys, store.context.packed_values
    now = torch.cat(
        [
            torch.arange(start, start + len([u for u in kept if u < p]))
            for start, kept, p in zip(
                store.context.packed.bounds[:-1], numbers, packed.flat, strict=True
            )
        ]
    )
    for old, new in [*zip(before[1].units, values.units, strict=True)]:
        assert torch.equal(new[now], old[same])
    entries = keys.blocks_of(now), before[0].blocks_of(torch.tensor(same))
    stays = torch.ones(len(now), dtype=torch.bool)
    for old, new in zip(before[0].tables, keys.tables, strict=True):
        stays &= (old[entries[1]] == new[entries[0]]).flatten(1).all(1)
    assert stays.float().mean() > 0.5
    for old, new in zip(before[0].units, keys.units, strict=True):
        assert torch.equal(new[now][stays], old[same][stays])


BAD = [torch.nan, 1e6]


@pytest.mark.parametrize("scheme", PACKING)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_unit_that_cannot_be_packed_changes_nothing(scheme, bad, which):
    store, generator = filled(scheme)
    new = generator.tokens(2, 3, 30)
    getattr(new, which)[1, 2, 5, 3] = bad
    before = snapshot(store)
    with pytest.raises(ValueError, match="cannot quantize"):
        retain(store, [list(range(n, n + 34)) for n in store.context.sequences.flat], new)
    assert_unchanged(store, before)
    store.append(new)
    before = snapshot(store)
    for tight in (False, True):
        with pytest.raises(ValueError, match="cannot quantize"):
            store.pack(tight)
        assert_unchanged(store, before)


@pytest.mark.parametrize("scheme", PACKING)
@pytest.mark.parametrize("bad", BAD)
def test_a_rotation_that_cannot_be_packed_changes_nothing(scheme, bad):
    store, _ = filled(scheme)
    before = snapshot(store)

    def spoil(keys):
        keys = keys.clone()
        keys[0, 0] = bad
        return keys

    with pytest.raises(ValueError, match="cannot quantize"):
        store.freeze(spoil, rotate, room=3)
    assert_unchanged(store, before)


@pytest.mark.gpu
def test_a_first_eviction_holds_a_layer_but_twice():
    def tokens(count):
        keys, values = torch.ones(2, 1, 8, count, 128, device="cuda")
        return NewTokens.of(keys, values, torch.arange(count, device="cuda"), keys[..., 0])

    store, held, more = Store(), 4096, 2048
    store.append(tokens(held))
    new = tokens(more)
    kept = sequences_of(((held,) * 8,), torch.device("cuda"))
    index = torch.arange(more, more + held, device="cuda").repeat(8)
    before, one = torch.cuda.memory_allocated(), store.nbytes
    torch.cuda.reset_peak_memory_stats()
    store.retain(index, kept, new)
    assert torch.cuda.max_memory_allocated() - before < 1.2 * one
    assert store.sequences.counts == kept.counts


def assert_unchanged(store, before):
    for x, y in zip(store.tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("scheme", PACKING)
def test_bad_units_that_are_evicted_or_stay_plain_do_no_harm(scheme):
    generator, store = Generator(0), Store(SCHEMES[scheme])
    new = generator.tokens(1, 2, 20)
    new.keys[0, 0, 5] = 1e6
    retain(store, [[u for u in range(20) if u != 5], list(range(9))], new)
    more = generator.tokens(1, 2, 8)
    more.keys[0, 1, 5], more.values[0, 0, 7] = 1e6, torch.nan
    retain(store, [list(range(26)), [*range(14), *range(15, 17)]], more)
    assert store.context.packed.total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_never_leave_more_than_a_block_plain(scheme):
    store, generator = filled(scheme, tail=0)
    packs, most = SCHEMES[scheme].packs, SCHEMES[scheme].residual + SCHEMES[scheme].group
    for _ in range(40):
        store.append(generator.tokens(2, 3, 1), room=64)
        store.pack()
        context = store.context
        plain = context.plain.longest + store.tail.count
        assert not packs or plain < most
    assert store.sequences.flat == tuple(n + 40 for n in (20, 0, 31, 7, 1, 12))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cleared_store_is_empty(scheme):
    store, generator = filled(scheme)
    store.clear()
    assert store.is_empty and store.nbytes == store.kv_bytes == store.full_bytes == 0
    assert not store.tensors and not named_tensors(store) and not lengths_of(store)
    new = generator.tokens(1, 2, 5)
    store.append(new)
    assert torch.equal(store.rectangle("keys"), new.keys)


def test_full_bytes_are_those_of_a_token():
    store, _ = filled("kivi 4", torch.bfloat16)
    assert store.full_bytes == 2 * 2 * 3 * SIZE * 2


def test_values_can_be_replaced():
    store, _ = filled("none", tail=0, weighs=True)
    context = store.context
    values, weights = context.values * 2, torch.rand(context.sequences.total)
    store.replace_values(values, weights)
    assert torch.equal(store.context.all_values(), values)
    assert torch.equal(torch.cat(sum(store.split("weights"), [])), weights)


def test_moving_to_where_it_is_changes_nothing():
    store, _ = filled("rotated")
    before = {name: x.clone() for name, x in named_tensors(store).items()}
    store.move(CPU)
    after = named_tensors(store)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)


def test_sequences_come_one_after_the_other():
    store, _ = filled("none", tail=0)
    bounds = store.context.sequences.bounds
    for flat, (start, end) in zip(sum(store.split("keys"), []), pairwise(bounds), strict=True):
        assert torch.equal(flat, store.context.keys[start:end])
