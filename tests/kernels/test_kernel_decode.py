import pytest
import torch

from locret.kernels.decode import decode_attention, decode_attention_reference, store_units
from locret.kernels.splits import number_of_splits
from tests.kernels.close import assert_near


def storage(batch, heads, capacity, size, dtype, device, filled):
    """Keys and values whose spare room is poisoned."""
    shape = (2, batch, heads, capacity, size)
    both = torch.randn(shape, device=device).to(dtype)
    both[:, :, :, filled:] = torch.nan
    return both.unbind()


def compare(query, keys, values, length, first=None):
    length = torch.tensor([length], dtype=torch.int32, device=query.device)
    scaling = query.shape[-1] ** -0.5
    actual = decode_attention(query, keys, values, length, scaling, first)
    expected = decode_attention_reference(query, keys, values, length, scaling, first)
    assert not expected.isnan().any()
    assert_near(actual, expected)


@pytest.mark.parametrize(
    ("heads", "group", "size", "capacity", "length"),
    [
        (3, 3, 64, 300, 257),
        (8, 4, 128, 500, 481),
        (2, 1, 80, 130, 127),
        (1, 16, 96, 64, 64),
        (4, 7, 256, 200, 1),
        (2, 2, 16, 520, 63),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_equals_twin(heads, group, size, capacity, length, dtype, device):
    keys, values = storage(1, heads, capacity, size, dtype, device, length)
    query = torch.randn(1, heads * group, 1, size, device=device).to(dtype)
    compare(query, keys, values, length)


def test_rows_begin_at_their_own_slots(device):
    keys, values = storage(3, 2, 400, 32, torch.float32, device, 310)
    first = torch.tensor([[0, 5], [309, 120], [77, 310]], dtype=torch.int32, device=device)
    for row in range(3):
        for head in range(2):
            keys[row, head, : first[row, head]] = torch.nan
            values[row, head, : first[row, head]] = torch.nan
    compare(torch.randn(3, 6, 1, 32, device=device), keys, values, 310, first)


@pytest.mark.parametrize(("group", "new", "length"), [(1, 2, 150), (3, 5, 64), (4, 16, 300)])
def test_several_new_tokens_are_causal(group, new, length, device):
    keys, values = storage(2, 2, 321, 64, torch.float32, device, length)
    query = torch.randn(2, 2 * group, new, 64, device=device)
    compare(query, keys, values, length)
    compare(query, keys, values, length, torch.full((2, 2), 9, dtype=torch.int32, device=device))


def test_strided_views(device):
    keys = torch.randn(2, 150, 3, 64, device=device).transpose(1, 2)
    values = torch.randn(2, 3, 200, 128, device=device)[:, :, 20:170, 64:]
    query = torch.randn(2, 1, 9, 64, device=device).transpose(1, 2)
    compare(query, keys, values, 133)


def test_nothing_is_held(device):
    keys, values = storage(1, 2, 64, 32, torch.float32, device, 0)
    compare(torch.randn(1, 2, 1, 32, device=device), keys, values, 0)


def test_large_logits_do_not_overflow(device):
    keys, values = storage(1, 2, 300, 64, torch.float32, device, 300)
    compare(200 * torch.randn(1, 4, 1, 64, device=device), 50 * keys, values, 300)


def test_splits_fill_the_device_in_even_rounds():
    assert number_of_splits(8, 16384, 2 * 132) == 33
    assert number_of_splits(8, 100, 2 * 132) == 1
    assert number_of_splits(264, 16384, 2 * 132) == 1
    for heads in (1, 3, 30, 64, 200, 1000):
        splits = number_of_splits(heads, 131072, 2 * 132)
        rounds = -(-heads * splits // 264)
        assert heads * splits / (rounds * 264) > 0.93, (heads, splits)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_length(device):
    keys, values = storage(1, 2, 700, 128, torch.bfloat16, device, 600)
    length = torch.tensor([600], dtype=torch.int32, device=device)
    query = torch.randn(1, 8, 1, 128, device=device).bfloat16()
    key, value = torch.randn(2, 1, 2, 1, 128, device=device).bfloat16().unbind()

    def step():
        store_units(keys, values, key, value, length)
        length.add_(1)
        return decode_attention(query, keys, values, length, 0.1)

    expected_keys, expected_values = keys.clone(), values.clone()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for at in range(601, 640):
        query.normal_()
        key.normal_()
        value.normal_()
        if at == 601:
            expected_keys, expected_values = keys.clone(), values.clone()
        expected_keys[:, :, at], expected_values[:, :, at] = key[:, :, 0], value[:, :, 0]
        graph.replay()
        assert length.item() == at + 1
        assert_near(
            out, decode_attention_reference(query, expected_keys, expected_values, length, 0.1)
        )
