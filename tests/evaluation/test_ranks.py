import pytest
import torch

from locret.evaluation.ranks import Ranks


@pytest.mark.parametrize(
    ("cards", "ranks", "wanted", "device"),
    [
        (0, Ranks(), None, None),
        (0, Ranks(), "cuda:0", None),  # the harness asks for it by default
        (0, Ranks(1, 2), "cuda", None),
        (0, Ranks(), "cpu", "cpu"),
        (2, Ranks(), None, None),
        (2, Ranks(), "cuda:1", "cuda:1"),
        (2, Ranks(3, 4), None, "cuda:1"),
        (1, Ranks(3, 4), "cuda", "cuda:0"),
        (2, Ranks(1, 4), "cpu", "cpu"),
    ],
)
def test_processes_take_accelerators_in_turn(cards, ranks, wanted, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks.device(wanted) == device


def test_ranks_come_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == Ranks(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Ranks.of_environment() == Ranks(2, 3)
