import pytest
import torch

from locret.kernels.decode import (
    Plain,
    attend_sequences,
    decode_sequences,
    decode_sequences_reference,
    decode_shares,
)
from locret.kernels.dispatch import multiprocessors
from locret.kernels.rotate import store_units
from locret.kernels.splits import Shares, States, share_out
from tests.kernels.close import assert_near


def inputs(batch, group, lengths, tail, size, dtype, device, new=1):
    """A query, contexts of these lengths and tails whose spare room is poisoned."""
    heads, (capacity, filled) = len(lengths) // batch, tail
    query = torch.randn(batch, heads * group, new, size, device=device).to(dtype)
    keys, values = torch.randn(2, sum(lengths), size, device=device).to(dtype)
    tails = torch.randn(2, batch, heads, capacity, size, device=device).to(dtype)
    tails[:, :, :, filled:] = torch.nan
    length = torch.tensor([filled], dtype=torch.int32, device=device)
    return query, keys, values, share_out(lengths, 8, device, least=16), *tails, length


def compare(query, *plain):
    given = (query, Plain(*plain), query.shape[-1] ** -0.5)
    actual = decode_sequences(*given)
    expected = decode_sequences_reference(*given)
    assert not expected.isnan().any()
    assert_near(actual, expected)
    return actual


@pytest.mark.parametrize(
    ("batch", "group", "lengths", "tail", "size"),
    [
        (1, 3, [300, 7, 0], (40, 33), 64),
        (1, 4, [257] * 8, (5, 5), 128),
        (2, 1, [0, 130, 127, 1], (300, 171), 80),
        (1, 16, [64], (64, 1), 96),
        (1, 7, [200, 3], (9, 9), 256),
        (3, 2, [0] * 6, (150, 63), 16),
        (1, 2, [90, 11], (0, 0), 20),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(batch, group, lengths, tail, size, dtype, device):
    compare(*inputs(batch, group, lengths, tail, size, dtype, device))


@pytest.mark.parametrize(("group", "new", "filled"), [(1, 2, 150), (3, 5, 5), (4, 16, 300)])
def test_several_new_tokens_are_causal(group, new, filled, device):
    lengths = [70, 0, 33, 150]
    compare(*inputs(2, group, lengths, (321, filled), 64, torch.float32, device, new))


def test_strided_views(device):
    query, keys, values, shares, *_, length = inputs(
        2, 3, [9, 50, 0, 3], (150, 133), 64, torch.float32, device
    )
    query = torch.randn(2, 1, 6, 64, device=device).transpose(1, 2)
    tail_keys = torch.randn(2, 150, 2, 64, device=device).transpose(1, 2)
    tail_values = torch.randn(2, 2, 200, 128, device=device)[:, :, 20:170, 64:]
    compare(query, keys, values, shares, tail_keys, tail_values, length)
    wide = torch.randn(2, 62, 100, device=device)[:, :, 30:94]
    compare(query, *wide, shares, tail_keys, tail_values.mT.contiguous().mT, length)


def test_nothing_is_seen(device):
    out = compare(*inputs(1, 1, [0, 0], (64, 0), 32, torch.float32, device))
    assert not out.any()


def test_large_logits_do_not_overflow(device):
    query, keys, *rest = inputs(1, 2, [300, 20], (5, 3), 64, torch.float32, device)
    compare(200 * query, 50 * keys, *rest)


def test_any_tiles_serve(device):
    """Tiles need not be those of `share_out`."""
    query, keys, values, _, *tails = inputs(1, 2, [5, 0, 40], (9, 7), 32, torch.float32, device)
    tiles = torch.tensor([[0, 0, 1], [0, 1, 5], [2, 5, 44], [2, 44, 45]]).int().to(device)
    firsts = torch.tensor([0, 2, 2, 4]).int().to(device)
    compare(query, keys, values, Shares(tiles, firsts, (5, 0, 40)), *tails)


def test_states_come_after_those_of_other_tiles(device):
    """Two attentions over contexts and one over tails, merged."""
    query, keys, values, shares, *tails = inputs(
        2, 2, [30, 0, 100, 5], (40, 21), 32, torch.float32, device, new=3
    )
    _, other_keys, other_values, others, *_ = inputs(
        2, 2, [0, 0, 70, 300], (40, 21), 32, torch.float32, device
    )
    heads, count = 2, shares.count + others.count
    states = States.empty(query, heads, count, 2)
    before = States.empty(query, heads, others.count, 0)
    attend_sequences(query, Plain(other_keys, other_values, others, *tails), 0.2, before)
    states.values[: others.count] = before.values
    states.weights[: others.count] = before.weights
    attend_sequences(query, Plain(keys, values, shares, *tails), 0.2, states, others.count)
    out = torch.empty_like(query)
    states.merge(out, [others, shares])

    def both(first, second):
        pairs = zip(first.split(others.lengths), second.split(shares.lengths), strict=True)
        return torch.cat([units for pair in pairs for units in pair])

    lengths = [a + b for a, b in zip(others.lengths, shares.lengths, strict=True)]
    whole = share_out(lengths, 8, device)
    plain = Plain(both(other_keys, keys), both(other_values, values), whole, *tails)
    expected = decode_sequences_reference(query, plain, 0.2)
    assert_near(out, expected)


def test_decode_shares_leave_room_for_the_tails(device):
    shares = decode_shares([50000] * 4, device)
    assert shares.lengths == (50000,) * 4
    assert shares.count + 4 <= 2 * multiprocessors(device)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_tail(device):
    query, *rest = inputs(1, 4, [900, 0], (700, 600), 128, torch.bfloat16, device)
    plain = Plain(*rest)
    key, value = torch.randn(2, 1, 2, 1, 128, device=device).bfloat16().unbind()

    def step():
        store_units(plain.tail_keys, plain.tail_values, key, value, plain.tail_length)
        plain.tail_length.add_(1)
        return decode_sequences(query, plain, 0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for at in range(601, 640):
        query.normal_()
        key.normal_()
        value.normal_()
        graph.replay()
        assert plain.tail_length.item() == at + 1
        assert_near(out, decode_sequences_reference(query, plain, 0.1))
