"""Heads tuned through gates, by the command that users run."""

import json
import signal

import pytest
import torch
import yaml

import locret
from datamodules.datamodule import ConversationDataModule
from locret.model.loading import load_model
from locret.system.files import CONFIGS
from tests.tiny_models import prompt, tiny_heads
from tests.trainers.killer import kill_at
from tests.trainers.runs import callbacks, logged, run_forked, source, tiny_run, weights
from trainers import tune
from trainers.callbacks import ExportTunedHeads
from trainers.cli import build, status
from trainers.tune import GatedModule

CONFIG = "qwen25_coder_kl.yaml"


@pytest.fixture(scope="module")
def heads(backbones, tmp_path_factory):
    """A folder with heads in bfloat16 to start from."""
    model = load_model(str(backbones("qwen2")), dtype="float32", device="cpu").model
    record = {
        "label": "log_max_prob",
        "bias": True,
        "trained_tokens": 77,
        "defaults": {"budget": 9},
    }
    made = tiny_heads(model, backbone=str(backbones("qwen2")), **record).bfloat16()
    return made.save_pretrained(tmp_path_factory.mktemp("heads"))


@pytest.fixture(autouse=True)
def contexts(monkeypatch):
    """A data module that draws random contexts for quotas."""

    def drawn(self, count):
        return (prompt(80 + i, seed=i, vocab=60)[0] for i in range(count))

    monkeypatch.setattr(ConversationDataModule, "contexts", drawn)


def arguments(backbones, heads, rows, folder, *more, steps=2):
    given = tiny_run(backbones("qwen2"), rows, folder, steps=steps, config=CONFIG)
    return [*given, f"--model.heads={heads}", "--model.quota_contexts=2", *more]


def test_the_config_tunes_heads_on_a_tiny_model(backbones, heads, rows, tmp_path, capsys):
    output = tune.main(arguments(backbones, heads, rows, tmp_path, "--data.batch_size=4"))
    before, after = map(locret.RetainingHeads.from_pretrained, (heads, output))
    for name, tensor in after.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        changed = not torch.equal(tensor, before.state_dict()[name])
        assert changed or name.endswith("bias")  # whose steps may be too small for its 16 bits
    assert after.config.defaults == {"budget": 9}
    assert after.config.trained_tokens > 77
    assert after.config.quotas.keys() == {"2", "4", "8", "16", "32"}
    assert {"train/divergence", "train/agreement"} <= after.config.metrics.keys()
    assert "trainers.tune" not in capsys.readouterr().err
    model = load_model(str(backbones("qwen2")), dtype="float32", device="cpu").model
    locret.Engine(model, heads=after)
    given = yaml.safe_load((output / "training.yaml").read_text())
    assert given["model"]["heads"] == str(heads)
    shipped = yaml.safe_load((CONFIGS / CONFIG).read_text())
    assert shipped["trainer"]["max_steps"] == 450 and shipped["data"]["batch_size"] == 4


def test_gates_grow_colder_and_every_sample_draws(backbones, heads, rows, tmp_path, monkeypatch):
    more = ["--data.batch_size=3", "--model.temperatures=[2.0,0.5]", "--model.compressions=[2,8]"]
    cli = build(
        GatedModule,
        ExportTunedHeads,
        arguments(backbones, heads, rows, tmp_path, *more, steps=3),
    )
    seen, made = [], GatedModule._loss

    def watched(module):
        def call(ids, segments, compressions, temperature):
            seen.append((compressions, temperature))
            return made(module)(ids, segments, compressions, temperature)

        return call

    monkeypatch.setattr(GatedModule, "_loss", watched)
    monkeypatch.setattr(ExportTunedHeads, "on_train_end", lambda *_: None)
    cli.trainer.fit(cli.model, cli.datamodule)
    compressions, temperatures = zip(*seen, strict=True)
    assert temperatures == pytest.approx((2.0, 1.0, 0.5))
    drawn = [one for each in compressions for one in each]
    assert len(set(drawn)) == 9 and 2 <= min(drawn) < 4 < max(drawn) <= 8


def test_the_backbone_stays_and_checkpoints_hold_heads_alone(backbones, heads, rows, tmp_path):
    cli = build(GatedModule, ExportTunedHeads, arguments(backbones, heads, rows, tmp_path))
    cli.model.configure_model()
    backbone = cli.model.backbone_model
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    cli.trainer.fit(cli.model, cli.datamodule)
    assert all(torch.equal(before[name], now) for name, now in backbone.state_dict().items())
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"heads", "longest_prompt"}


def test_a_training_that_goes_on_ends_where_a_whole_one_does(backbones, heads, rows, tmp_path):
    loss = ["--model.loss=smooth_l1_boundary", "--model.mean_over=branches"]
    whole = arguments(backbones, heads, rows, tmp_path / "whole", *loss, steps=4)
    assert run_forked(tune.main, whole) == 0
    args = arguments(backbones, heads, rows, tmp_path / "two", *loss, steps=4)
    killed = [*args, callbacks(tmp_path / "two", kill_at(3, "on_train_batch_start"))]
    assert run_forked(tune.main, killed) == -signal.SIGKILL
    assert run_forked(tune.main, [*args, "--ckpt_path=last"]) == 0
    assert weights(tmp_path / "two" / "heads") == weights(tmp_path / "whole" / "heads")


def test_a_checkpoint_of_other_heads_is_refused(backbones, heads, rows, tmp_path, capfd):
    assert run_forked(tune.main, arguments(backbones, heads, rows, tmp_path)) == 0
    others = locret.RetainingHeads.from_pretrained(heads)
    with torch.no_grad():
        next(others.parameters()).add_(1.0)
    other = others.save_pretrained(tmp_path / "others")
    args = arguments(backbones, other, rows, tmp_path, "--ckpt_path=last", steps=3)
    assert status("trainers.tune", lambda: tune.main(args)) == 2
    said = capfd.readouterr().err
    assert f"started from other heads than those in {other}" in said and "Traceback" not in said
    args = arguments(backbones, heads, rows, tmp_path, "--ckpt_path=last", steps=3)
    assert run_forked(tune.main, args) == 0


def test_two_processes_learn_what_one_does_that_accumulates(backbones, heads, rows, tmp_path):
    """The same compression for all, as each process draws its own."""
    same = ["--model.compressions=[4,4]", "--model.quota_contexts=0", "--model.save_dtype=float32"]
    settings = {
        "one": ["--trainer.accumulate_grad_batches=2"],
        "two": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    }
    found = []
    for processes, (name, more) in enumerate(settings.items(), start=1):
        args = arguments(backbones, heads, rows, tmp_path / name, *same, *more)
        assert run_forked(tune.main, args, processes) == 0
        found.append(locret.RetainingHeads.from_pretrained(tmp_path / name / "heads"))
    for name, ours in found[0].state_dict().items():
        torch.testing.assert_close(ours, found[1].state_dict()[name], rtol=1e-3, atol=1e-5)


def test_validation_and_few_bits(backbones, heads, rows, tmp_path):
    more = [
        source(rows, "val"),
        "--trainer.val_check_interval=1",
        "--trainer.limit_val_batches=2",
        '--model.quantization={"name": "kivi", "bits": 4}',
        "--model.temperatures=[0.3,0.3]",
    ]
    output = tune.main(arguments(backbones, heads, rows, tmp_path, *more))
    losses = logged(tmp_path / "logs" / "version_0", "val/divergence")
    assert len(losses) >= 2 and all(loss > 0 for loss in losses)
    assert "val/agreement" in json.loads((output / "config.json").read_text())["metrics"]


def test_mixed_precision_as_shipped(backbones, heads, rows, tmp_path):
    shipped = yaml.safe_load((CONFIGS / CONFIG).read_text())
    assert shipped["trainer"]["precision"] == "bf16-mixed"
    assert shipped["model"]["dtype"] == "bfloat16"
    mixed = ["--trainer.precision=bf16-mixed", "--model.dtype=bfloat16"]
    tune.main(arguments(backbones, heads, rows, tmp_path, *mixed))
    assert all(loss > 0 for loss in logged(tmp_path / "logs" / "version_0", "train/divergence"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model.compressions=[8,4]"], "at least 1, the smaller one first: [4.0, 8.0]"),
        (["--model.temperatures=[1,0]"], "temperatures is [1.0, 0.0]; expected numbers above 0"),
        (["--model.quota_contexts=-1"], "quota_contexts is -1"),
        (["--model.quota_sharpness=0"], "quota_sharpness is 0.0; expected a number above 0"),
        (["--model.threshold=quotas"], "the heads have none in their record"),
        (["--data.branches=null"], "data.branches is null"),
        (["--model.quantization=nosuch"], "no quantization 'nosuch'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_a_line(more, says, backbones, heads, rows, tmp_path, capfd):
    args = arguments(backbones, heads, rows, tmp_path, *more)
    assert status("trainers.tune", lambda: tune.main(args)) == 2
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err
