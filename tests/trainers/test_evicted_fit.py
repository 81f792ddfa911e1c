"""Trainings of heads that read features of the model as it evicts, and that start from others."""

import signal

import pytest
import torch

import locret
from datamodules.datamodule import ConversationDataModule
from locret.model.loading import load_model
from tests.tiny_models import prompt, tiny_heads
from tests.trainers.killer import kill_at
from tests.trainers.runs import callbacks, logged, run_forked, source, tiny_run, weights
from trainers import fit
from trainers.callbacks import ExportHeads
from trainers.cli import build, status
from trainers.fit import main

CONFIG = "qwen25_coder_evicted.yaml"
QUOTAS = {"4": [[1.5, 0.5], [0.75, 1.25]]}


@pytest.fixture(scope="module")
def heads(backbones, tmp_path_factory):
    """A folder with heads in bfloat16 to start from."""
    model = load_model(str(backbones("qwen2")), dtype="float32", device="cpu").model
    record = {"label": "log_max_prob", "bias": True, "quotas": QUOTAS, "trained_tokens": 777}
    return tiny_heads(model, **record).bfloat16().save_pretrained(tmp_path_factory.mktemp("heads"))


@pytest.fixture(autouse=True)
def contexts(monkeypatch):
    """A data module that draws random contexts for quotas."""

    def drawn(self, count):
        return (prompt(80 + i, seed=i, vocab=60)[0] for i in range(count))

    monkeypatch.setattr(ConversationDataModule, "contexts", drawn)


def arguments(backbones, heads, rows, folder, *more, steps=2):
    """Contexts of these rows have about 200 tokens."""
    given = tiny_run(backbones("qwen2"), rows, folder, steps=steps, config=CONFIG)
    own = [f"--model.heads={heads}", "--model.evicted_chunk=[20,60]", "--model.quota_contexts=2"]
    return [*given, *own, *more]


def test_heads_go_on_from_others_and_get_quotas_anew(backbones, heads, rows, tmp_path):
    still = arguments(backbones, heads, rows, tmp_path, "--model.lr=0.0", "--model.warmup_steps=0")
    after = locret.RetainingHeads.from_pretrained(main(still))
    before = locret.RetainingHeads.from_pretrained(heads)
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert after.config.trained_tokens == 777
    assert after.config.quotas.keys() == {"2", "4", "8", "16", "32"}
    assert after.config.defaults["budget"] == 512  # what this training recommends


def test_every_batch_draws_and_validation_does_not(backbones, heads, rows, tmp_path, monkeypatch):
    seen, real = [], fit.evicted_features

    def watched(backbone, heads, ids, segments, *how):
        seen.append((heads.training, heads.config.quotas, *how))
        return real(backbone, heads, ids, segments, *how)

    monkeypatch.setattr(fit, "evicted_features", watched)
    monkeypatch.setattr(ExportHeads, "on_train_end", lambda *_: None)
    more = [
        source(rows, "val"),
        "--trainer.val_check_interval=1",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
        "--model.evicted_share=0.6",
        '--model.evicted_quantization={"name": "rotated", "bits": 3}',
    ]
    cli = build(
        fit.HeadsModule,
        ExportHeads,
        arguments(backbones, heads, rows, tmp_path, *more, steps=8),
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    trained = [how for training, _, *how in seen if training]
    assert 1 < len(trained) < 8
    assert all(2 <= r <= 16 and 20 <= size <= 60 for r, size, _ in trained)
    assert len({r for r, _, _ in trained}) == len(trained)
    middle = (pytest.approx(32**0.5), 35, {"name": "rotated", "bits": 3})
    assert [tuple(how) for training, _, *how in seen if not training] == [middle] * 8
    assert all(quotas == QUOTAS for _, quotas, *_ in seen)
    losses = tmp_path / "logs" / "version_0"
    assert len(logged(losses, "train/loss")) == len(logged(losses, "val/loss")) == 8


def test_a_training_that_goes_on_ends_where_a_whole_one_does(backbones, heads, rows, tmp_path):
    share = "--model.evicted_share=0.7"
    whole = arguments(backbones, heads, rows, tmp_path / "whole", share, steps=4)
    assert run_forked(main, whole) == 0
    args = arguments(backbones, heads, rows, tmp_path / "two", share, steps=4)
    killed = [*args, callbacks(tmp_path / "two", kill_at(3, "on_train_batch_start"))]
    assert run_forked(main, killed) == -signal.SIGKILL
    assert run_forked(main, [*args, "--ckpt_path=last"]) == 0
    assert weights(tmp_path / "two" / "heads") == weights(tmp_path / "whole" / "heads")


def test_two_processes_learn_what_one_does_that_accumulates(backbones, heads, rows, tmp_path):
    """The same reading for all, as each batch draws its own, and a loss without thresholds, which
    are each process's own."""
    same = ["--model.evicted_compressions=[4,4]", "--model.evicted_chunk=[30,30]"]
    same += ["--model.quota_contexts=0", "--model.save_dtype=float32", "--model.loss=smooth_l1"]
    settings = {
        "one": ["--trainer.accumulate_grad_batches=2"],
        "two": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    }
    found = []
    for processes, (name, more) in enumerate(settings.items(), start=1):
        args = arguments(backbones, heads, rows, tmp_path / name, *same, *more)
        assert run_forked(main, args, processes) == 0
        found.append(locret.RetainingHeads.from_pretrained(tmp_path / name / "heads"))
    assert found[0].config.quotas == QUOTAS  # those that the heads came with
    for name, ours in found[0].state_dict().items():
        torch.testing.assert_close(ours, found[1].state_dict()[name], rtol=1e-3, atol=1e-5)


def test_mixed_precision_as_shipped(backbones, heads, rows, tmp_path):
    mixed = ["--trainer.precision=bf16-mixed", "--model.dtype=bfloat16"]
    mixed += ["--model.save_dtype=float32", "--model.quota_contexts=0"]
    made = main(arguments(backbones, heads, rows, tmp_path, *mixed))
    before, after = map(locret.RetainingHeads.from_pretrained, (heads, made))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not any(torch.equal(old.float(), new) for old, new in pairs)
    assert all(loss > 0 for loss in logged(tmp_path / "logs" / "version_0", "train/loss"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.evicted_compressions=[8,4]"], "evicted compressions is [8.0, 4.0]; expected"),
        (["--model.query_tokens=4"], "query_tokens is 4 with features 'evicted'"),
        (["--model.evicted_quantization=nosuch"], "no quantization 'nosuch'"),
        (["--model.width=8"], "with the settings given: width: heads 16, model.width 8"),
        (["--model.tap=hidden"], "with the settings given: tap: heads 'qkv', model.tap 'hidden'"),
        (["--model.heads=nosuch"], "nosuch"),
        (["--trainer.strategy=sharded"], "a sharded backbone has features 'full' alone"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_a_line(more, says, backbones, heads, rows, tmp_path, capfd):
    args = arguments(backbones, heads, rows, tmp_path, *more)
    assert status("trainers.fit", lambda: main(args)) == 2
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err
