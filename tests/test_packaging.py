"""What a wheel holds: every file of the packages, and the configurations."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("locret", "datamodules", "trainers", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")


FIND = """
import locret, trainers, datamodules
from locret.evaluation.config import find_config
from trainers.cli import find_config as of_trainings
print(*(module.__file__ for module in (locret, trainers, datamodules)), sep="\\n")
print(of_trainings("phi3.yaml"), find_config("eval/ruler_smollm2.yaml"), sep="\\n")
"""


def test_every_package_is_listed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    holding = {path.parent for name in SOURCES[:3] for path in (ROOT / name).rglob("*.py")}
    ours = {".".join(folder.relative_to(ROOT).parts) for folder in holding}
    configs = {path.parent for path in (ROOT / "configs").rglob("*.yaml")}
    mapped = {".".join(["locret", *folder.relative_to(ROOT).parts]) for folder in configs}
    assert listed == ours | mapped, "list the package in pyproject.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because building leaves files behind."""
    pytest.importorskip("setuptools", "77")
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('built'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree, zipfile.ZipFile(tree / "built" / done.stdout.split()[-1])


def test_a_wheel_holds_every_file(wheel):
    tree, built = wheel
    wanted = {
        path.relative_to(tree).as_posix()
        for name in SOURCES
        for pattern in ("*.py", "*.yaml", "*.md")
        for path in (tree / name).rglob(pattern)
    }
    wanted = {f"locret/{name}" if name.startswith("configs/") else name for name in wanted}
    found = {name for name in built.namelist() if ".dist-info/" not in name}
    assert found == wanted
    assert {"locret/configs/phi3.yaml", "locret/configs/eval/ruler_smollm2.yaml"} <= found


def test_a_wheel_puts_nothing_but_its_packages_into_the_environment(wheel):
    tops = {name.split("/")[0] for name in wheel[1].namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*SOURCES} - {"configs"}


def test_names_of_configurations_work_where_a_wheel_is_installed(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    wheel[1].extractall(site)
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", FIND], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == 5 and all(line.startswith(str(site)) for line in found), found


def test_version_changelog_and_citation_agree():
    import yaml

    import locret

    changelog = (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = next(line for line in changelog.splitlines() if line.startswith("## "))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert heading.split()[1] == citation["version"] == locret.__version__
    assert citation["license"] == "Apache-2.0" and citation["authors"]


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_pages_at_the_root_point_to_those_of_docs(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    (target,) = re.findall(r"\]\((.+?)\)", text)
    assert (ROOT / target).is_file()


def test_the_wheel_s_check_is_part_of_every_change():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == ".ci/wheel"
    assert os.access(ROOT / ".ci" / "wheel", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "wheel")], check=True)
