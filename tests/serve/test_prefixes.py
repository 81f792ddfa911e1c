"""Shared beginnings are found by their tokens, and bounded by bytes."""

import torch

from locret.serve.contexts import Prefixes


def test_those_used_least_recently_make_room(twin, ids):
    tokens = [ids(30, seed=n) for n in range(4)]
    caches = [twin.prefill(torch.tensor([one])) for one in tokens]
    kept = Prefixes(most_bytes=2 * caches[0].nbytes)
    kept.put(tokens[0], caches[0])
    kept.put(tokens[1], caches[1])
    assert kept.get(tokens[0]) is caches[0] and kept.get(tokens[0][:-1]) is None
    kept.put(tokens[2], caches[2])
    assert [kept.get(one) for one in tokens] == [caches[0], None, caches[2], None]
    assert kept.nbytes == kept.most_bytes
    kept.clear()
    assert kept.nbytes == 0
    small = Prefixes(most_bytes=caches[0].nbytes - 1)
    small.put(tokens[0], caches[0])
    assert small.get(tokens[0]) is None and small.nbytes == 0
