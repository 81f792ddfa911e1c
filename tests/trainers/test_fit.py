import pickletools
import re
import signal
import zipfile

import pytest
import torch
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision

import locret
from locret.model.loading import load_model
from locret.system.files import CONFIGS
from tests.trainers.killer import kill_at
from tests.trainers.runs import (
    callbacks,
    logged,
    run_forked,
    run_in_process,
    source,
    tiny_run,
    weights,
)
from trainers.callbacks import ExportHeads
from trainers.cli import build, status
from trainers.fit import HeadsModule, main

FAMILY_OF_CONFIG = {  # configs of heads
    "llama31.yaml": "llama",
    "phi3.yaml": "phi3",
    "qwen25_coder.yaml": "qwen2",
    "qwen25_coder_evicted.yaml": "qwen2",
    "qwen25_coder_paper.yaml": "qwen2",
    "qwen3.yaml": "qwen3",
    "smollm2.yaml": "llama",
    "smollm2_long.yaml": "llama",
    "smollm2_answers.yaml": "llama",
    "smollm2_replay.yaml": "llama",
}


def test_every_config_has_a_family_here():
    shipped = {path.name for path in CONFIGS.glob("*.yaml")}
    tuned = {name for name in shipped if "_kl" in name or name.endswith("_code.yaml")}
    others = {name for name in shipped if "adapter" in name} | tuned
    assert shipped == {*FAMILY_OF_CONFIG, *others}  # see test_adapt and test_tune


@pytest.mark.parametrize("config", FAMILY_OF_CONFIG)
def test_a_config_fits_two_steps_on_a_tiny_model(config, backbones, rows, tmp_path):
    backbone = backbones(FAMILY_OF_CONFIG[config])
    shipped = yaml.safe_load((CONFIGS / config).read_text())
    args = [*tiny_run(backbone, rows, tmp_path, config=config), "--then=null"]
    if "adapter" in shipped["model"]:  # of another model
        args.append("--model.adapter=null")
    if "heads" in shipped["model"]:  # a second stage, of those of the first
        first = tiny_run(backbone, rows, tmp_path / "first", config="qwen25_coder.yaml")
        args.append(f"--model.heads={main([*first, '--then=null'])}")
    output = main(args)
    heads = locret.RetainingHeads.from_pretrained(output)
    model = load_model(str(backbone), dtype="float32", device="cpu").model
    locret.Engine(model, heads=heads)
    for name, value in heads.config.defaults.items():
        assert value == shipped["model"][name]
    assert heads.config.backbone == str(backbone)
    assert heads.config.trained_tokens > 100
    assert "train/top10_overlap" in heads.config.metrics


def test_later_stages_follow_in_the_same_command(backbones, rows, tmp_path, capsys):
    """And go on where they were interrupted, if the first stage was at its end."""
    second = yaml.safe_load((CONFIGS / "qwen25_coder_kl.yaml").read_text())
    second["trainer"] |= {"max_steps": 2, "precision": "32-true", "log_every_n_steps": 1}
    second["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "second")
    for callback in second["trainer"]["callbacks"]:
        callback["init_args"] |= {"dirpath": str(tmp_path / "second"), "every_n_train_steps": 1}
    jsonl = {"class_path": "datamodules.sources.JsonlSource", "init_args": {"path": str(rows)}}
    second["data"] |= {"train": [jsonl], "weights": None, "num_workers": 0, "batch_size": 1}
    second["model"] |= {"dtype": "float32", "quota_contexts": 0, "warmup_steps": 0}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    (tmp_path / "third.yaml").write_text(yaml.safe_dump(second).replace("/second", "/third"))
    args = tiny_run(backbones("qwen2"), rows, tmp_path, config="qwen25_coder.yaml")
    then = f"[{tmp_path / 'second.yaml'}, {tmp_path / 'third.yaml'}]"
    args += [f"--then={then}", "--model.quota_contexts=0"]
    output = main(args)
    assert output == tmp_path / "heads_tuned"
    made = [tmp_path / "heads", tmp_path / "heads_tuned_1", output]
    before = [weights(each) for each in made]
    assert before[0] != before[1] != before[2]
    told = capsys.readouterr().out
    assert told.count("are tuned by") == 2 and told.count("locret generate") == 1
    assert main([*args, "--ckpt_path=last"]) == output
    assert [weights(each) for each in made] == before
    # The second has steps to take, so that the third's checkpoint is an earlier training's.
    second["trainer"]["max_steps"] = 4
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    assert main([*args, "--ckpt_path=last"]) == output
    after = [weights(each) for each in made]
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]


@pytest.mark.parametrize(
    ("then", "more", "says"),
    [
        (None, [], "config nosuch.yaml is no file"),
        ({"data": {"branches": None}}, [], "data.branches is null"),
        ({"model": {"compressions": [32, 4]}}, [], "the smaller one first: [4.0, 32.0]"),
        ({"model": {"width": 8, "tap": "qkv"}}, [], "it says model.tap, model.width, which"),
        ({}, ["--model.label=max_logit"], "learned 'max_logit'"),
        ({}, ["--model.model=GEMMA"], "gemma2 caps its logits"),
        ({}, ["--model.query_tokens=4"], "these heads read 4 tokens of a question"),
        (
            {"model": {"threshold": "quotas"}},
            ["--model.quota_contexts=0"],
            "the heads have none in their record",
        ),
    ],
)
def test_a_later_stage_that_cannot_be_is_told_before_the_first(
    then, more, says, backbones, rows, tmp_path
):
    args = tiny_run(backbones("qwen2"), rows, tmp_path, config="qwen25_coder.yaml")
    args += [one.replace("GEMMA", str(backbones("gemma2"))) for one in more]
    name = "nosuch.yaml"
    if then is not None:
        second = yaml.safe_load((CONFIGS / "qwen25_coder_kl.yaml").read_text())
        for group, settings in then.items():
            second[group] |= settings
        name = tmp_path / "second.yaml"
        name.write_text(yaml.safe_dump(second))
    with pytest.raises(ValueError, match=re.escape(says)):
        main([*args, f"--then={name}"])
    assert not (tmp_path / "ckpt").exists() and not (tmp_path / "heads").exists()


def test_stages_do_not_share_a_folder_of_checkpoints(backbones, rows, tmp_path):
    args = tiny_run(backbones("qwen2"), rows, tmp_path, config="qwen25_coder.yaml")
    with pytest.raises(ValueError, match="the later stage, qwen25_coder_kl.yaml: its checkpoints"):
        main([*args, "--then=[qwen25_coder_kl.yaml, qwen25_coder_kl.yaml]"])


def test_the_resolved_config_lies_beside_the_heads_and_repeats_the_run(backbones, rows, tmp_path):
    first = main(tiny_run(backbones("llama"), rows, tmp_path))
    again = main([f"--config={first / 'training.yaml'}", f"--output={tmp_path / 'again'}"])
    assert weights(first) == weights(again)


def test_mixed_precision_as_shipped_with_clipping(backbones, rows, tmp_path):
    """Lightning refuses some optimizers here, at their first step."""
    args = tiny_run(backbones("llama"), rows, tmp_path, config="llama31.yaml")
    shipped = yaml.safe_load((CONFIGS / "llama31.yaml").read_text())["trainer"]
    assert shipped["precision"] == "bf16-mixed" and shipped["gradient_clip_val"] == 0.5
    mixed = ["--trainer.precision=bf16-mixed", "--model.dtype=bfloat16"]
    cli = build(HeadsModule, ExportHeads, [*args, *mixed])
    cli.trainer.fit(cli.model, cli.datamodule)
    on_gpu = MixedPrecision("bf16-mixed", "cuda")
    on_gpu.clip_gradients(cli.trainer.optimizers[0], 0.5, "value")


def test_a_checkpoint_names_no_class_of_ours(backbones, rows, tmp_path):
    """So that files may move, and a checkpoint of an older version can still be gone on from."""
    main(tiny_run(backbones("llama"), rows, tmp_path))
    with zipfile.ZipFile(tmp_path / "ckpt" / "last.ckpt") as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        pickled = file.read(name)
    classes = {told for op, told, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
    assert "collections OrderedDict" in classes  # a name and where it comes from
    assert not [c for c in classes if c.startswith(("trainers", "datamodules", "locret"))]


def test_training_changes_heads_and_nothing_else(backbones, rows, tmp_path):
    cli = build(HeadsModule, ExportHeads, tiny_run(backbones("qwen3"), rows, tmp_path, steps=4))
    cli.model.configure_model()
    backbone = cli.model.backbone_model
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    heads = [p.clone() for p in cli.model.heads.parameters()]
    cli.trainer.fit(cli.model, cli.datamodule)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    changed = zip(heads, cli.model.heads.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in changed)


def test_checkpoints_hold_heads_and_optimizer_only(backbones, rows, tmp_path):
    folder = main(tiny_run(backbones("llama"), rows, tmp_path, width=1024))
    state = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"heads", "longest_prompt"}
    heads = (folder / "heads.safetensors").stat().st_size
    assert (tmp_path / "ckpt" / "last.ckpt").stat().st_size < 4 * heads


def resumable(backbones, rows, folder, workers=0):
    """Nine steps in epochs of six, validation after every third, checkpoints after every other."""
    return [
        *tiny_run(backbones("llama"), rows, folder, steps=9),
        source(rows, "val"),
        "--data.batch_size=4",
        f"--data.num_workers={workers}",
        "--trainer.val_check_interval=3",
        "--trainer.limit_val_batches=2",
        "--trainer.num_sanity_val_steps=0",
    ]


@pytest.fixture(scope="module")
def whole(backbones, rows, tmp_path_factory):
    """Heads of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_forked(main, resumable(backbones, rows, folder)) == 0
    return weights(folder / "heads")


@pytest.mark.parametrize(
    ("step", "hook", "workers"),
    [
        (0, "on_train_batch_start", 0),  # before there is a checkpoint
        (1, "on_train_batch_start", 0),
        (5, "on_train_batch_start", 2),
        (6, "on_train_epoch_end", 0),
        (6, "on_train_batch_start", 2),  # the first of the second epoch
        (3, "on_validation_batch_start", 0),
        (6, "on_validation_batch_start", 2),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(step, hook, workers, whole, backbones, rows, tmp_path):
    args = resumable(backbones, rows, tmp_path, workers)
    killed = run_forked(main, [*args, callbacks(tmp_path, kill_at(step, hook))])
    assert killed == -signal.SIGKILL
    assert not list((tmp_path / "heads").iterdir())
    assert run_forked(main, [*args, "--ckpt_path=last"]) == 0
    assert weights(tmp_path / "heads") == whole
    assert logged(tmp_path / "logs" / "version_1", "train/loss")[0] > 0
    first = int(logged(tmp_path / "logs" / "version_1", "step")[0])
    assert first == step // 2 * 2  # no step before the last checkpoint is repeated


def test_a_quantized_backbone_read_in_chunks(backbones, rows, tmp_path):
    pytest.importorskip("torchao")
    exact = main(tiny_run(backbones("llama"), rows, tmp_path / "exact"))
    small = ["--model.quantization=int8", "--model.train_chunk_size=64"]
    args = [*tiny_run(backbones("llama"), rows, tmp_path / "small"), *small]
    ours, theirs = (
        locret.RetainingHeads.from_pretrained(folder).state_dict() for folder in (main(args), exact)
    )
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 1e-2
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_says_what_it_made(backbones, rows, tmp_path):
    done = run_in_process(tiny_run(backbones("llama"), rows, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"made      {tmp_path / 'heads'}" in done.stdout
    assert "python -m locret generate" in done.stdout


@pytest.mark.parametrize("output", ["", "file", "file/folder"])
def test_an_output_that_cannot_be_made_is_refused_before_the_first_step(
    output, backbones, rows, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(HeadsModule, "configure_model", lambda _: pytest.fail("it began"))
    args = tiny_run(backbones("llama"), rows, tmp_path)
    with pytest.raises(ValueError, match=r"^(no )?output .*folder|FOLDER"):
        main([*args, f"--output={output and tmp_path / output}"])


def test_a_run_without_an_output_is_refused(backbones, rows, tmp_path):
    given = yaml.safe_load((CONFIGS / "smollm2.yaml").read_text())
    del given["output"]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(given))
    args = tiny_run(backbones("llama"), rows, tmp_path, config=str(own))
    with pytest.raises(ValueError, match="no output is given: say --output FOLDER"):
        main([a for a in args if "--output" not in a])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config=nosuch"], "config nosuch is no file"),
        (["--ckpt_path=/nope"], "/nope"),
        (["--ckpt_path="], "ckpt_path is an empty path"),
        (["--model.model="], "the name of the model is an empty path"),
        (["--ckpt_path=pyproject.toml"], "pyproject.toml is damaged, or was never one"),
        (["--model.label=nothing"], "label 'nothing' is unknown"),
    ],
)
def test_the_command_tells_errors_of_the_user_in_a_line(
    more, says, backbones, rows, tmp_path, capfd
):
    args = tiny_run(backbones("llama"), rows, tmp_path)
    assert status("trainers.fit", lambda: main([*args, *more])) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("trainers.fit: ") and says in last


def test_a_checkpoint_of_other_settings_is_told_in_a_line(backbones, rows, tmp_path, capfd):
    backbone = backbones("llama")
    main(tiny_run(backbone, rows, tmp_path))
    wider = [*tiny_run(backbone, rows, tmp_path, width=32), "--ckpt_path=last"]
    assert status("trainers.fit", lambda: main(wider)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("trainers.fit: checkpoint last is of a training with other settings")
    assert "size mismatch" in last


def test_errors_of_programming_keep_their_traceback():
    with pytest.raises(TypeError):
        status("trainers.fit", lambda: len(5))


def test_the_command_ends_with_status_two(capsys):
    assert status("trainers.fit", lambda: main(["--config=nosuch"])) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("trainers.fit: config nosuch")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"stabilizers": 99999999}, "stabilizers is 99999999 but the budget is 16384"),
        ({"query_tokens": 14000}, "and the heads keep 14000 query tokens but the budget"),
        ({"budget": 0}, "budget is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"local_tokens": 0}, "local_tokens is 0"),
        ({"quota_contexts": -1}, "quota_contexts is -1; expected 0"),
    ],
)
def test_engine_settings_that_no_engine_takes_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        HeadsModule("no/such", **settings)
