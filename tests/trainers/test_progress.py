"""What a training says where its output goes to a file."""

from types import SimpleNamespace

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
