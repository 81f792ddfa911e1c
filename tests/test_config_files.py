"""Configurations by name (`test_packaging.py`: where a wheel was installed)."""

from pathlib import Path

import pytest

from locret.evaluation import config as evaluation
from locret.system.files import CONFIGS, find_config


@pytest.mark.parametrize("name", ["qwen3", "qwen3.yaml"])
def test_ours_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / "qwen3.yaml"


@pytest.mark.parametrize("name", ["ruler_smollm2", "eval/ruler_smollm2", "eval/ruler_smollm2.yaml"])
def test_ours_of_an_evaluation_is_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluation.find_config(name) == CONFIGS / "eval" / "ruler_smollm2.yaml"


@pytest.mark.parametrize("name", ["phi3", "phi3.yaml", "eval/ruler_smollm2"])
def test_a_file_of_the_users_own_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path(name).with_suffix(".yaml")
    own.parent.mkdir(exist_ok=True)
    own.write_text("model: {}\n")
    assert find_config(name) == evaluation.find_config(name) == own


def test_a_folder_of_that_name_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("phi3").mkdir()
    assert find_config("phi3") == CONFIGS / "phi3.yaml"


def test_an_unknown_name_tells_those_there_are():
    with pytest.raises(ValueError, match=r"^config nosuch.yaml is no file.* configs: .*phi3\.yaml"):
        find_config("nosuch.yaml")
    with pytest.raises(ValueError, match="one of configs/eval: .*ruler_smollm2.yaml; give"):
        evaluation.find_config("nosuch")
