"""Imports point one way, and importing locret does nothing but define names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [
    {"quantities", "system"},
    {"kernels"},
    {"quantization"},
    {"heads"},
    {"cache"},
    {"policies", "model"},
    {"engine"},
    {"training"},
    {"tasks", "serve"},
    {"evaluation"},
    {"integrations"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
]
"""Packages and files of locret, the lowest first. Each imports itself and what is in lower
layers."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path):
    """Dotted names of everything that a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def parts_of_locret(name):
    """`locret.policies.base` -> `policies`; None for what is not a part of locret."""
    parts = name.split(".")
    if parts[0] != "locret" or len(parts) == 1:
        return None
    part = parts[1]
    is_part = (ROOT / "locret" / part).is_dir() or (ROOT / "locret" / f"{part}.py").exists()
    return part if is_part else None


@pytest.mark.parametrize("path", modules_of("locret"), ids=lambda p: str(p.relative_to(ROOT)))
def test_locret_imports_downwards(path):
    inside = path.relative_to(ROOT / "locret").parts[0].removesuffix(".py")
    assert inside in RANK, f"{inside} is not in a layer yet; put it where it belongs"
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in {"lightning", "pytorch_lightning", "datamodules", "trainers"}, name
        if top == "locret":
            part = parts_of_locret(name) or "__init__"  # the public names are above all files
            assert part == inside or RANK[part] < RANK[inside], f"{inside} imports {name}"


LOWEST = {"training/segments": set(), "heads/targets": {"locret.kernels.labels"}}


@pytest.mark.parametrize("name", LOWEST)
def test_the_lowest_files_import_nothing_of_locret_but_a_kernel(name):
    imported = set(imports_of(ROOT / "locret" / f"{name}.py"))
    assert {i for i in imported if i.split(".")[0] == "locret"} == LOWEST[name]


def test_few_files_are_outside_a_package():
    flat = [path.name for path in (ROOT / "locret").glob("*.py")]
    assert len(flat) <= 5, flat


def test_every_package_says_what_it_is_for():
    for path in (ROOT / "locret").glob("**/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_two_files_of_locret_import_each_other():
    files = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules_of("locret")
    ]
    graph = {
        name: {other for other in files if any(f"{i}.".startswith(f"{other}.") for i in found)}
        for name, found in zip(files, map(list, map(imports_of, modules_of("locret"))), strict=True)
    }
    for name, imported in graph.items():
        for other in imported - {name}:
            assert name not in graph[other], f"{name} <-> {other}"


@pytest.mark.parametrize("path", modules_of("datamodules"), ids=lambda p: p.name)
def test_datamodules_do_not_know_trainers(path):
    assert not any(name.split(".")[0] == "trainers" for name in imports_of(path))


@pytest.mark.parametrize(
    "path", modules_of("locret") + modules_of("datamodules"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_imports_tests_or_benchmarks(path):
    assert not any(name.split(".")[0] in {"tests", "benchmarks"} for name in imports_of(path))


def test_only_backbone_knows_architectures():
    """No other file of the core tells architectures apart."""
    from locret.model.backbone import SUPPORTED

    for path in modules_of("locret"):
        if path.stem == "backbone":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & set(SUPPORTED), path


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_locret_is_light_and_changes_nothing():
    output = run(
        "import sys, torch, transformers\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "known = lambda: (sorted(AttentionInterface().keys()), "
        "sorted(AttentionMaskInterface().keys()))\n"
        "before, generator = known(), torch.get_rng_state()\n"
        "dtype, grad, hooks = torch.get_default_dtype(), torch.is_grad_enabled(), sys.excepthook\n"
        "import locret\n"
        "assert known() == before\n"
        "assert torch.equal(torch.get_rng_state(), generator)\n"
        "assert torch.get_default_dtype() == dtype and torch.is_grad_enabled() == grad\n"
        "assert sys.excepthook is hooks\n"
        "heavy = {'lightning', 'pytorch_lightning', 'datasets', 'matplotlib', 'pandas', 'peft', "
        "'lm_eval', 'datamodules', 'trainers', 'tqdm.auto.x'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('locret.')))\n"
    )
    heavy, ours = output.splitlines()
    assert heavy == "[]"
    assert not {"locret.training.distill", "locret.evaluation", "locret.cli"} & set(ours.split())


def test_the_tree_in_the_readme_names_every_folder():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("```text")[1].split("```")[0]
    folders = {path.name for path in (ROOT / "locret").iterdir() if (path / "__init__.py").exists()}
    folders |= {"trainers", "datamodules", "benchmarks", "configs", "checkpoints", "tests", "docs"}
    assert {line.split("/")[0].strip() for line in tree.splitlines() if "/" in line} == folders | {
        "locret"
    }


def test_public_names_are_there():
    import locret

    for name in locret.__all__:
        assert getattr(locret, name) is not None
