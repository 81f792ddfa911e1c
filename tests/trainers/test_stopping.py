"""Trainings that a signal stops, and those that make nothing: the status, and what they say."""

import os
import signal
import subprocess
import sys
import time

import pytest

import locret
from locret.system.interrupts import Stopped
from tests.evaluation.test_interrupted import nothing_left
from tests.signals import STATUS, handlers  # noqa: F401 - used by every test
from tests.trainers.killer import kill_at
from tests.trainers.runs import ROOT, callbacks, run_forked, source, tiny_run, weights
from trainers import adapt, fit
from trainers.callbacks import ExportHeads, StopBetweenSteps, signal_behind
from trainers.cli import build, status
from trainers.fit import HeadsModule, main


def last_line(capfd):
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize(
    ("step", "hook", "workers", "says"),
    [
        (0, "on_fit_start", 0, "step 0; nothing was saved yet"),
        (1, "on_train_batch_start", 0, "step 1; nothing was saved yet"),
        (3, "on_train_batch_start", 2, "step 3; go on with --ckpt_path last, from step 2"),
        (2, "on_validation_batch_start", 0, "step 2; go on with --ckpt_path last"),
    ],
)
def test_a_stopped_training_says_how_to_go_on(
    step, hook, workers, says, number, backbones, rows, tmp_path, capfd
):
    args = [
        *tiny_run(backbones("llama"), rows, tmp_path, steps=9),
        source(rows, "val"),
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
        f"--data.num_workers={workers}",
        callbacks(tmp_path, kill_at(step, hook, number)),
    ]
    assert status("trainers.fit", lambda: main(args)) == STATUS[number]
    assert last_line(capfd) == f"trainers.fit: stopped at {says}"
    assert not list((tmp_path / "heads").iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stopped_training_of_an_adapter_says_how_to_go_on(backbones, rows, tmp_path, capfd):
    args = tiny_run(backbones("llama"), rows, tmp_path, 5, "smollm2_adapter.yaml")
    args += [callbacks(tmp_path, kill_at(3, number=signal.SIGTERM))]
    assert status("trainers.adapt", lambda: adapt.main(args)) == 143
    assert (
        last_line(capfd)
        == "trainers.adapt: stopped at step 3; go on with --ckpt_path last, from step 2"
    )


def test_a_signal_before_there_is_a_trainer(capfd):
    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    assert status("trainers.fit", stopped) == 143
    says = "stopped before the first step; nothing was saved yet"
    assert last_line(capfd) == f"trainers.fit: {says}"


def test_a_training_that_went_on_from_a_file_goes_on_from_it_again(
    backbones, rows, tmp_path, capfd
):
    main(tiny_run(backbones("llama"), rows, tmp_path / "first"))
    (tmp_path / "first" / "ckpt" / "last.ckpt").rename(tmp_path / "mine.ckpt")
    args = tiny_run(backbones("llama"), rows, tmp_path / "second", steps=5)
    args += [callbacks(tmp_path / "second", kill_at(3, number=signal.SIGTERM))]
    mine = str(tmp_path / "mine.ckpt")
    assert status("trainers.fit", lambda: main([*args, f"--ckpt_path={mine}"])) == 143
    assert last_line(capfd).endswith(f"stopped at step 3; go on with --ckpt_path {mine}")


def test_checkpoints_of_an_earlier_training_do_not_count(backbones, rows, tmp_path, capfd):
    args = tiny_run(backbones("llama"), rows, tmp_path, steps=5)
    main(args)
    again = [*args, callbacks(tmp_path, kill_at(1, number=signal.SIGTERM))]
    assert status("trainers.fit", lambda: main(again)) == 143
    assert last_line(capfd).endswith("stopped at step 1; nothing was saved yet")


def test_a_signal_after_the_last_step_lets_the_training_end(backbones, rows, tmp_path):
    args = tiny_run(backbones("llama"), rows, tmp_path)
    args += [callbacks(tmp_path, kill_at(2, "on_train_end", signal.SIGTERM))]
    assert status("trainers.fit", lambda: main(args)) == 0
    assert weights(tmp_path / "heads")


def test_a_training_killed_after_its_last_step_still_writes_the_heads(backbones, rows, tmp_path):
    whole = main(tiny_run(backbones("llama"), rows, tmp_path / "whole"))
    args = tiny_run(backbones("llama"), rows, tmp_path / "killed")
    killer = callbacks(tmp_path / "killed", kill_at(2, "on_train_end"))
    assert run_forked(main, [*args, killer]) == -signal.SIGKILL
    assert not list((tmp_path / "killed" / "heads").iterdir())
    made = main([*args, "--ckpt_path=last"])
    assert weights(made) == weights(whole)
    assert {path.name for path in made.iterdir()} == {path.name for path in whole.iterdir()}
    assert locret.RetainingHeads.from_pretrained(made).config.trained_tokens > 100


def leaves(args):
    sys.exit(status("trainers.fit", lambda: main(args)))


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_stop_together_if_one_gets_a_signal(rank, backbones, rows, tmp_path, capfd):
    args = tiny_run(backbones("llama"), rows, tmp_path, steps=9)
    args += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    args += [callbacks(tmp_path, kill_at(3, number=signal.SIGTERM, rank=rank))]
    assert run_forked(leaves, args, processes=2) == 143
    told = [line for line in capfd.readouterr().err.splitlines() if "stopped" in line]
    assert told == ["trainers.fit: stopped at step 3; go on with --ckpt_path last, from step 2"]


def test_processes_that_lightning_started_are_ended(backbones, rows, tmp_path):
    args = tiny_run(backbones("llama"), rows, tmp_path, steps=1000)
    args += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    args += [callbacks(tmp_path, kill_at(3, number=signal.SIGTERM, rank=0))]
    command = [sys.executable, "-m", "trainers.fit", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    _, error = process.communicate()
    assert process.returncode == 143, error
    says = "trainers.fit: stopped at step 3; go on with --ckpt_path last, from step 2"
    assert error.splitlines()[-1] == says
    assert nothing_left(process.pid)


def test_an_error_while_a_signal_waits_comes_from_it(backbones, rows, tmp_path):
    """Of a group that is ended, the processes that load data are gone before the step is done."""
    trainer = build(HeadsModule, ExportHeads, tiny_run(backbones("llama"), rows, tmp_path)).trainer
    (stopping,) = (c for c in trainer.callbacks if isinstance(c, StopBetweenSteps))
    error = RuntimeError("DataLoader worker is killed by signal: Terminated.")
    assert signal_behind(error, trainer) is None
    stopping._note(signal.SIGTERM, None)
    assert signal_behind(error, trainer) == signal.SIGTERM


def test_a_second_signal_does_not_wait_for_the_step(monkeypatch):
    stopping = StopBetweenSteps()
    stopping._note(signal.SIGINT, None)
    stopping._note(signal.SIGINT, None)  # at once: the same one, sent to the group too
    monkeypatch.setattr("locret.system.interrupts.REPEAT_SECONDS", 0)
    with pytest.raises(Stopped):
        stopping._note(signal.SIGINT, None)


@pytest.mark.parametrize("module", [fit, adapt])
@pytest.mark.parametrize("nothing", ["max_steps=0", "limit_train_batches=0", "max_epochs=0"])
def test_a_training_without_steps_writes_nothing_and_fails(
    nothing, module, backbones, rows, tmp_path, capfd
):
    config = "smollm2.yaml" if module is fit else "smollm2_adapter.yaml"
    args = tiny_run(backbones("llama"), rows, tmp_path, config=config)
    assert status("trainers.x", lambda: module.main([*args, f"--trainer.{nothing}"])) == 2
    said = capfd.readouterr()
    assert "trainers.x: nothing was trained, and nothing is written" in said.err.splitlines()[-1]
    assert "made " not in said.out and "next " not in said.out
    assert not list((tmp_path / "heads").iterdir())


@pytest.mark.parametrize("module", [fit, adapt])
@pytest.mark.parametrize("count", ["true", "2"])
def test_a_check_writes_nothing_and_says_so(count, module, backbones, rows, tmp_path, capfd):
    config = "smollm2.yaml" if module is fit else "smollm2_adapter.yaml"
    args = tiny_run(backbones("llama"), rows, tmp_path, config=config)
    assert (
        status("trainers.x", lambda: module.main([*args, f"--trainer.fast_dev_run={count}"])) == 0
    )
    out = capfd.readouterr().out
    assert f"checked   steps run: {2 if count == '2' else 1}; " in out and "only checks" in out
    assert "made " not in out and "next " not in out
    assert not list((tmp_path / "heads").iterdir())
    assert not (tmp_path / "ckpt" / "last.ckpt").exists()  # which a real run would go on from
