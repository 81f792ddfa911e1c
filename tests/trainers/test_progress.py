"""What a training says where its output goes to a file."""

import pickle
import time
from types import SimpleNamespace

from locret.commands import progress
from trainers.callbacks import PlainProgress


def told(capsys, **more):
    progress, facts = PlainProgress(), {"is_global_zero": True, "estimated_stepping_batches": 3}
    for step in (1, 2, 3):
        progress.on_train_batch_end(SimpleNamespace(global_step=step, **facts | more))
    return capsys.readouterr().err.splitlines()


def test_lines_are_few_and_the_last_step_is_told(capsys):
    first, last = told(capsys)
    assert first == "training: 1 of 3 steps"
    assert last.startswith("training: 3 of 3 steps, 0:0")


def test_one_process_speaks_and_an_endless_training_has_no_share(capsys):
    assert told(capsys, is_global_zero=False) == []
    assert told(capsys, estimated_stepping_batches=float("inf")) == []


def test_what_comes_before_the_first_step_is_heard_of_too(monkeypatch):
    now, lines, clock = [100.0], [], time.monotonic
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "LOOKS_EVERY", 0.001)
    monkeypatch.setattr(progress, "_print", lines.append)
    for end in ("teardown", "on_exception"):
        plain, trainer = PlainProgress(), SimpleNamespace(is_global_zero=True)
        plain.setup(trainer, None, "fit")
        now[0] += 7
        until = clock() + 60
        while not lines and clock() < until:
            time.sleep(0.01)
        assert lines == ["training: 0:07 so far"]
        getattr(plain, end)(trainer, None, "fit")
        now[0] += 7
        time.sleep(0.05)
        assert lines.pop() and not lines


def test_it_can_be_copied_into_other_processes():
    assert isinstance(pickle.loads(pickle.dumps(PlainProgress())), PlainProgress)
