import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import locret
from locret.model.loading import load_model
from tests.tiny_models import tiny_heads
from tests.trainers.runs import logged, run_forked, source, tiny_run
from trainers import adapt, fit
from trainers.adapt import AdapterModule
from trainers.callbacks import ExportAdapter
from trainers.cli import build, status


@pytest.fixture(scope="module")
def adapter(backbones, rows, tmp_path_factory):
    """A folder with an adapter trained for a few steps."""
    folder = tmp_path_factory.mktemp("adapter")
    args = tiny_run(backbones("llama"), rows, folder, steps=6, config="smollm2_adapter.yaml")
    return adapt.main([*args, "--model.lr=0.02", f"--output={folder / 'adapter'}"])


def logits(model):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("trained", ["adapter", "evicted"])
def test_an_adapter_changes_the_model_and_merges_exactly(trained, backbones, request):
    adapter = request.getfixturevalue(trained)
    plain = load_model(str(backbones("llama")), dtype="float32", device="cpu").model
    before = logits(plain)
    unmerged = logits(PeftModel.from_pretrained(plain, adapter))
    merged = load_model(
        str(backbones("llama")), dtype="float32", device="cpu", adapter=str(adapter)
    )
    assert merged.adapter == str(adapter)
    assert not torch.allclose(before, unmerged, atol=1e-2)
    torch.testing.assert_close(logits(merged.model), unmerged, rtol=1e-4, atol=1e-4)


def test_training_an_adapter_lowers_the_loss(adapter):
    losses = logged(adapter.parent / "logs" / "version_0", "train/loss")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert (adapter / "training.yaml").is_file()
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2


def test_heads_train_on_an_adapted_backbone_and_record_it(adapter, backbones, rows, tmp_path):
    args = tiny_run(backbones("llama"), rows, tmp_path)
    heads = locret.RetainingHeads.from_pretrained(fit.main([*args, f"--model.adapter={adapter}"]))
    assert heads.config.adapter == str(adapter)


def test_figures_are_means_over_processes(backbones, rows, tmp_path):
    """Two processes tell what one does on average that accumulates their two batches."""
    settings = {
        "one": ["--trainer.accumulate_grad_batches=2"],
        "two": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    }
    losses = {}
    for processes, (name, more) in enumerate(settings.items(), start=1):
        folder = tmp_path / name
        args = tiny_run(backbones("llama"), rows, folder, config="smollm2_adapter.yaml")
        assert run_forked(adapt.main, [*args, *more], processes) == 0
        saved = torch.load(folder / "ckpt" / "last.ckpt", weights_only=False)
        losses[name] = torch.tensor(saved["callbacks"]["ExportAdapter"]["history"]["train/loss"])
    means = losses["one"].view(-1, 2).mean(dim=1)
    torch.testing.assert_close(losses["two"], means, rtol=1e-3, atol=1e-5)


def test_validation_drops_nothing_out_and_training_does(backbones, rows, tmp_path, monkeypatch):
    args = tiny_run(backbones("llama"), rows, tmp_path, config="smollm2_adapter.yaml")
    more = [
        "--model.dropout=0.5",
        "--trainer.val_check_interval=1",
    ]
    cli = build(AdapterModule, ExportAdapter, [*args, source(rows, "val"), *more])
    cli.trainer.limit_val_batches = 1  # on a command line some versions read 1.0: all of them
    seen = []

    def loss(module, batch):
        values = [original(module, batch)[0].item() for _ in range(2)]
        modes = {m.training for m in module.adapted.modules() if isinstance(m, torch.nn.Dropout)}
        seen.append((module.training, modes, values[0] == values[1]))
        return original(module, batch)

    original = AdapterModule._loss
    monkeypatch.setattr(AdapterModule, "_loss", loss)
    monkeypatch.setattr(torch.nn.init, "zeros_", torch.nn.init.ones_)  # an adapter that does much
    cli.trainer.fit(cli.model, cli.datamodule)
    validation, training = (False, {False}, True), (True, {True}, False)
    assert seen == [validation, *[training, validation] * 2]


def test_validation_of_two_processes_is_of_all_their_samples(backbones, rows, tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        args = tiny_run(backbones("llama"), rows, folder, 1, "smollm2_adapter.yaml")
        more = [f"--trainer.devices={processes}", "--model.lr=0", "--trainer.val_check_interval=1"]
        ddp = ["--trainer.strategy=ddp"] if processes > 1 else []
        assert run_forked(adapt.main, [*args, source(rows, "val"), *more, *ddp], processes) == 0
        found.append(logged(folder / "logs" / "version_0", "val/loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_unknown_modules_to_adapt_are_told_in_a_line(backbones, rows, tmp_path, capfd):
    args = tiny_run(backbones("llama"), rows, tmp_path, config="smollm2_adapter.yaml")
    args.append("--model.target_modules=[foo]")
    assert status("trainers.adapt", lambda: adapt.main(args)) == 2
    err = capfd.readouterr().err
    assert "trainers.adapt: Target modules" in err and "Traceback" not in err


# --- with heads ---

EVICTED = "smollm2_evicted_adapter.yaml"


@pytest.fixture(scope="module")
def heads(backbones, tmp_path_factory):
    """A function from fields of the record to a folder with heads."""

    def made(**record):
        model = load_model(str(backbones("llama")), dtype="float32", device="cpu").model
        record = {"label": "log_max_prob", "bias": True} | record
        return tiny_heads(model, **record).save_pretrained(tmp_path_factory.mktemp("heads"))

    return made


def evicted_run(backbones, rows, heads, folder, *more, steps=2, config=EVICTED):
    args = tiny_run(backbones("llama"), rows, folder, steps, config)
    return [*args, f"--model.heads={heads}", *more]


@pytest.fixture(scope="module")
def evicted(backbones, rows, heads, tmp_path_factory):
    """A folder with an adapter trained with heads."""
    folder = tmp_path_factory.mktemp("evicted")
    more = [
        "--model.lr=0.02",
        "--model.rank=8",
        "--data.batch_size=4",
        "--model.compressions=[8,8]",
    ]
    return adapt.main(evicted_run(backbones, rows, heads(), folder, *more, steps=12))


def test_training_with_heads_lowers_the_divergence(evicted):
    losses = logged(evicted.parent / "logs" / "version_0", "train/loss")
    assert len(losses) == 12 and sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert "train/agreement" in (evicted.parent / "logs/version_0/metrics.csv").read_text()


def test_an_adapter_says_with_which_heads_it_was_trained(evicted, adapter):
    record = json.loads((evicted / "eviction.json").read_text())
    assert record["compressions"] == [8, 8] and record["threshold"] == "global"
    assert record["heads"].keys() == {"source", "sha256"}
    assert not (adapter / "eviction.json").exists()


def test_heads_on_an_adapter_are_gone_on_from(adapter, backbones, rows, heads, tmp_path):
    """The teacher is the model with it; of a training that learns nothing it comes back."""
    args = evicted_run(backbones, rows, heads(adapter=str(adapter)), tmp_path, "--model.lr=0")
    output = adapt.main([*args, "--model.compressions=[1,1]"])
    assert all(loss < 1e-6 for loss in logged(tmp_path / "logs" / "version_0", "train/loss"))
    assert {path.name for path in output.iterdir() if path.is_dir()} == set()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_config_for_qwen_trains_and_validates(backbones, rows, heads, tmp_path):
    more = [source(rows, "val"), "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    config = "qwen25_coder_adapter.yaml"
    adapt.main(evicted_run(backbones, rows, heads(), tmp_path, *more, steps=1, config=config))
    assert logged(tmp_path / "logs" / "version_0", "val/loss")[-1] > 0


@pytest.mark.parametrize(
    ("more", "record", "says"),
    [
        (["--data.branches=null"], {}, "data.branches is null"),
        (["--model.dropout=0.1"], {}, "dropout is 0.1, and layers are computed again"),
        (["--model.compressions=[8,4]"], {}, "the smaller one first: [4.0, 8.0]"),
        ([], {"label": "max_logit"}, "these heads learned 'max_logit'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_in_a_line(
    more, record, says, backbones, rows, heads, tmp_path, capfd
):
    args = evicted_run(backbones, rows, heads(**record), tmp_path, *more)
    assert status("trainers.adapt", lambda: adapt.main(args)) == 2
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err
