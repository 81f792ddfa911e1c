"""The tail of a layer: grows in place, goes back to what it was, and counts its bytes."""

import pytest
import torch

from locret.cache.store import Tail


def units(generator, count, rows=2):
    """Keys [B, H, T, D] and positions [B, H, T]."""
    keys = torch.randn(rows, 3, count, 4, generator=generator)
    return keys, torch.randint(100, (rows, 3, count), generator=generator)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_units_are_appended_in_place_where_there_is_room(generator):
    tail, all_units = Tail(), []
    assert tail.count == tail.capacity == tail.nbytes == 0 and not list(tail)
    for count, room, capacity in [(3, 5, 8), (4, 0, 8), (1, 7, 8), (2, 1, 11), (1, 0, 11)]:
        new = units(generator, count)
        where = [tensor.data_ptr() for tensor in tail.tensors]
        grows = tail.count + count > tail.capacity
        tail.append(new, room)
        all_units.append(new)
        assert tail.capacity == capacity
        assert ([tensor.data_ptr() for tensor in tail.tensors] == where) != grows
        for which, tensor in enumerate(tail):
            whole = torch.cat([new[which] for new in all_units], 2)
            assert torch.equal(tensor, whole) and torch.equal(tail[which], whole)
    assert tail.nbytes == 2 * 3 * 11 * (4 * 4 + 8)


@pytest.mark.parametrize("what", ["append", "replace", "select_batch", "move"])
def test_what_was_held_can_be_restored(generator, what):
    tail, first = Tail(), units(generator, 6)
    tail.append(first, room=9)
    view = tail.view()
    acts = {
        "append": lambda: tail.append(units(generator, 3)),
        "replace": lambda: tail.replace(0, torch.zeros(2, 3, 6, 4)),
        "select_batch": lambda: tail.select_batch(torch.tensor([1, 1])),
        "move": lambda: tail.move(torch.device("cpu")),
    }
    acts[what]()
    tail.append(units(generator, 2))
    after, restored = [tensor.clone() for tensor in tail], tail.view()
    tail.restore(view)
    assert all(map(torch.equal, tail, first)) and tail.capacity == 6
    tail.append(units(generator, 1))  # not to where the other view's units are
    tail.restore(restored)
    assert all(map(torch.equal, tail, after))


def test_storage_can_be_replaced_and_grown(generator):
    tail, keys = Tail(units(generator, 6)), units(generator, 6)[0]
    where = tail.tensors[1].data_ptr()
    tail.replace(0, keys)
    assert tail.tensors[0] is keys and tail.tensors[1].data_ptr() == where
    grown = Tail()
    grown.append([*tail], room=4)
    assert grown.capacity == 10 and tail.capacity == 6
    grown.append(units(generator, 4))
    assert grown.capacity == 10 and all(map(torch.equal, tail, (x[:, :, :6] for x in grown)))
    more = torch.zeros(2, 3, 10, 4)
    grown.replace(0, more)
    assert torch.equal(grown[0], more)


def test_rows_can_be_chosen_and_repeated(generator):
    both = units(generator, 5, rows=3)
    tail, rows = Tail(both), torch.tensor([2, 0, 2, 1])
    tail.select_batch(rows)
    assert all(torch.equal(tensor, x[rows]) for tensor, x in zip(tail, both, strict=True))


def test_inference_tensors_are_not_written_to_outside(generator):
    with torch.inference_mode():
        tail = Tail()
        tail.append(units(generator, 3), room=5)
        assert tail.capacity == 8
    assert tail.capacity == 3
    tail.append(units(generator, 1))
    assert tail.count == 4
