"""Attention to what every new token sees, of sequences of any lengths: as the plain form has it."""

import pytest
import torch

from locret.cache.sequences import sequences_of
from locret.model.attend import attend_past
from locret.model.past import Past, are_few

RAGGED = ((4, 0, 9), (3, 70, 1))
EQUAL = ((5, 5, 5), (5, 5, 5))
HEADS, SIZE = 3, 8


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("counts", [RAGGED, EQUAL, None])
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(("tokens", "group"), [(1, 1), (1, 4), (5, 2), (16, 2), (17, 2), (130, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_queries_see_the_same(counts, tail, tokens, group, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, pasts = 2, []
    if counts is not None:
        sequences = sequences_of(counts, torch.device("cpu"))
        flat = [normal(generator, sequences.total, SIZE, dtype=dtype) for _ in range(2)]
        pasts.append(Past(*flat, sequences))
    shape = rows, HEADS, tail, SIZE
    pasts.append(Past(*(normal(generator, *shape, dtype=dtype) for _ in range(2))))
    query = normal(generator, rows, HEADS * group, tokens, SIZE, dtype=dtype)
    new = tuple(normal(generator, rows, HEADS, tokens, SIZE, dtype=dtype) for _ in range(2))
    few = dtype == torch.float32 and tokens * group <= 32
    assert are_few(query, pasts, new) == few
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.06}
    fast, plain = (attend_past(query, pasts, new, 0.4, how) for how in ("sdpa", "eager"))
    torch.testing.assert_close(fast, plain, rtol=0, **tolerance)


@pytest.mark.parametrize("counts", [RAGGED, EQUAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sees_its_own_unit_in_the_tail(counts, dtype):
    generator = torch.Generator().manual_seed(1)
    sequences = sequences_of(counts, torch.device("cpu"))
    flat = [normal(generator, sequences.total, SIZE, dtype=dtype) for _ in range(2)]
    tail = [normal(generator, 2, HEADS, 4, SIZE, dtype=dtype) for _ in range(2)]
    query = normal(generator, 2, HEADS * 2, 1, SIZE, dtype=dtype)
    pasts = [Past(*flat, sequences), Past(*tail)]
    together = attend_past(query, pasts, None, 0.4, "sdpa")
    before = [pasts[0], Past(*(x[:, :, :3] for x in tail))]
    apart = attend_past(query, before, tuple(x[:, :, 3:] for x in tail), 0.4, "eager")
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(together, apart, rtol=0, atol=tolerance)


def test_a_sequence_looks_the_same_whatever_others_stand_beside_it():
    """Fused attention plans by shapes and strides: what is alike is planned once."""
    looks = set()
    for lengths in ((5, 7), (30, 7)):
        sequences = sequences_of((lengths,), torch.device("cpu"))
        past = Past(torch.randn(sum(lengths), 8), torch.randn(sum(lengths), 8), sequences)
        looks |= {(x.shape, x.stride()) for x in past.of(0, 1)}
    assert len(looks) == 1
