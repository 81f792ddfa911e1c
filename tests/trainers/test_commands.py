"""`locret fit` and `locret adapt` are the trainings, and what a user sees of them."""

import subprocess
import sys

import pytest

from locret import cli
from locret.heads.heads import RetainingHeads
from tests.trainers.runs import tiny_run


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    listed = {line.split()[0] for line in cli.__doc__.splitlines()[2:]}
    assert {"fit", "adapt", "generate", "plan", "push"} <= listed
    for name in listed:
        assert f"\n{name} " in shown and f"\n    {name} " in shown, name


def test_fit_trains_heads(backbones, rows, tmp_path, capsys):
    assert cli.main(["fit", *tiny_run(backbones("llama"), rows, tmp_path)]) == 0
    heads = RetainingHeads.from_pretrained(tmp_path / "heads")
    assert heads.config.width == 16
    assert "next      python -m locret generate" in capsys.readouterr().out


def test_adapt_trains_an_adapter(backbones, rows, tmp_path):
    args = tiny_run(backbones("llama"), rows, tmp_path, config="smollm2_adapter.yaml")
    assert cli.main(["adapt", *args]) == 0
    assert (tmp_path / "heads" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", cli.TRAININGS)
def test_a_config_that_is_not_there_is_told_in_a_line(name, capsys):
    assert cli.main([name, "--config", "nosuch"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"locret {name}: config nosuch is no")
    )


@pytest.mark.parametrize("name", cli.TRAININGS)
def test_their_help_is_the_training_s(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: locret {name} ") and "--trainer.max_steps" in out


def test_the_command_line_imports_lightning_for_no_other_command():
    code = (
        "import sys\n"
        "from locret import cli\n"
        "assert not {'lightning', 'trainers', 'datamodules'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
