"""Heads to the Hub and back, against a server on loopback that speaks its protocol."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.utils import _http

from locret import Engine, RetainingHeads
from locret.cli import main
from locret.heads import files as artifact
from locret.heads import hub
from tests.hub_server import READ_TOKEN, TOKEN, HubServer
from tests.tiny_models import tiny_heads, tiny_model

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = 10**6
PUBLISHED = [
    "README.md",
    "config.json",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "heads.safetensors",
    "log.csv",
    "needle.json",
    "training.png",
    "training.yaml",
]


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub for this process and those it starts: no token yet, an empty cache, no waiting."""
    with HubServer() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for module in (_http, huggingface_hub.file_download):  # they wait between their retries
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def heads():
    return tiny_heads(tiny_model("llama"), backbone="some/backbone", metrics={"recall": 0.5})


@pytest.fixture
def folder(heads, tmp_path):
    """What a training run leaves behind, and things that are nobody's business."""
    folder = heads.save_pretrained(tmp_path / "heads")
    (folder / "training.yaml").write_text("data: {train: []}\n")
    (folder / "training.png").write_bytes(b"\x89PNG and so on")
    (folder / "needle.json").write_text("{}")
    (folder / "log.csv").write_text("step,loss\n1,2\n")
    (folder / "notes.txt").write_text("mine")
    (folder / ".secret.json").write_text("mine")
    (folder / "plots.json").mkdir()
    return folder


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype


def refused(call, *words):
    """The call raises a ValueError of one line with these words."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def refused_by_cli(capsys, args, *words):
    assert main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"locret {args[0]}: ")
    assert [word for word in words if word not in last] == []
    return out


def nothing_committed(server):
    return all(found.messages == ["initial commit"] for found in server.repositories.values())


# ---- there and back ----


def run_fresh(*args):
    """Python in a process of its own, which finds the server by its environment alone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests(heads):
    return {
        name: [str(tensor.dtype), hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()]
        for name, tensor in heads.state_dict().items()
    }


READ = """
import hashlib, json, torch, locret
heads = locret.RetainingHeads.from_pretrained("me/heads")
print(json.dumps({
    name: [str(tensor.dtype), hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()]
    for name, tensor in heads.state_dict().items()
}))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pushed_heads_come_back_bit_identical_in_fresh_processes(
    server, token, heads, tmp_path, dtype
):
    tensors = {name: tensor.to(dtype) for name, tensor in heads.state_dict().items()}
    sent = RetainingHeads.from_tensors(heads.config, tensors)
    folder = sent.save_pretrained(tmp_path / "heads")
    if dtype == torch.float32:
        out = run_fresh("-m", "locret", "push", str(folder), "me/heads")
        assert out == f"pushed 5 files to {server.url}/me/heads\n"
    else:
        assert sent.push_to_hub("me/heads") == f"{server.url}/me/heads"
    assert server.requests["upload"] == server.requests["commit"] == 1
    assert json.loads(run_fresh("-c", READ)) == digests(sent)


def test_push_commits_once_what_belongs_to_the_artifact(server, token, folder, capsys):
    (folder / "big.csv").write_bytes(b"0" * (artifact.MAX_FIGURE_BYTES + 1))
    before = contents(folder)
    assert main(["push", str(folder), "me/heads"]) == 0
    assert f"{server.url}/me/heads" in capsys.readouterr().out
    repository = server.repositories["me/heads"]
    assert repository.messages == ["initial commit", "Upload heads"]
    assert not repository.private
    files = repository.files()
    assert sorted(files) == PUBLISHED
    assert all(files[name] == before[name] for name in PUBLISHED if name != "README.md")
    card = files["README.md"].decode()
    assert 'from_pretrained("me/heads")' in card
    assert "(training.png)" in card
    assert contents(folder) == before


def test_stock_generate_takes_what_was_pushed(server, token, heads, tmp_path, monkeypatch):
    """Code and heads come from the Hub, of one commit."""
    model, ids = tiny_model("llama"), torch.arange(2, 50)[None]
    heads.push_to_hub("me/heads")
    modules = transformers.dynamic_module_utils
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    given = {"budget": 8, "chunk_size": 16, "stabilizers": 2, "local_tokens": 4}
    pushed = {"custom_generate": "me/heads", "trust_remote_code": True, "max_new_tokens": 5}
    found = model.generate(ids, **pushed, **given)
    expected = Engine(model, heads=heads, **given).generate(ids, max_new_tokens=5)
    assert torch.equal(found, expected)
    repository = server.repositories["me/heads"]
    assert list((tmp_path / "modules").glob(f"*/me/heads/{repository.branches['main']}"))


def test_heads_of_an_earlier_version_are_pushed_with_code_for_generate(server, token, folder):
    shutil.rmtree(folder / "custom_generate")
    before = contents(folder)
    hub.upload("me/heads", artifact.publishable(folder, "me/heads")[0])
    assert sorted(server.repositories["me/heads"].files()) == PUBLISHED
    assert contents(folder) == before


def test_push_keeps_a_card_that_somebody_wrote(server, token, folder):
    (folder / "README.md").write_text("# Mine\n")
    hub.upload("me/heads", artifact.publishable(folder, "me/heads")[0])
    assert server.repositories["me/heads"].files()["README.md"] == b"# Mine\n"


def test_pushing_the_same_again_makes_no_commit(server, token, heads):
    for _ in range(2):
        heads.push_to_hub("me/heads")
    repository = server.repositories["me/heads"]
    assert repository.messages == ["initial commit", "Upload heads"]
    assert server.requests["upload"] == 1


def test_a_push_leaves_other_files_of_the_repository(server, token, heads):
    heads.push_to_hub("me/heads")
    server.repositories["me/heads"].commit("main", {"eval.txt": b"theirs"}, "by hand")
    tiny_heads(tiny_model("llama"), seed=3).push_to_hub("me/heads")
    assert server.repositories["me/heads"].files()["eval.txt"] == b"theirs"


def test_a_branch_is_made_and_main_stays(server, token, heads, folder, capsys):
    heads.push_to_hub("me/heads")
    other = tiny_heads(tiny_model("llama"), seed=3).save_pretrained(folder)
    assert main(["push", str(other), "me/heads", "--branch", "v2"]) == 0
    assert f"{server.url}/me/heads/tree/v2" in capsys.readouterr().out
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)
    assert_same_weights(
        RetainingHeads.from_pretrained("me/heads", revision="v2"),
        RetainingHeads.from_pretrained(other),
    )


def test_private_is_a_choice_and_is_kept(server, heads):
    heads.push_to_hub("me/heads", private=True, token=TOKEN)
    assert server.repositories["me/heads"].private
    refused(lambda: RetainingHeads.from_pretrained("me/heads"), "private", "token")
    assert_same_weights(RetainingHeads.from_pretrained("me/heads", token=READ_TOKEN), heads)


def test_private_heads_do_not_go_to_a_public_repository(server, token, heads):
    heads.push_to_hub("me/heads")
    other = tiny_heads(tiny_model("llama"), seed=3)
    refused(lambda: other.push_to_hub("me/heads", private=True), "exists already and is public")
    assert server.repositories["me/heads"].messages == ["initial commit", "Upload heads"]


def test_the_released_format_is_read_from_the_hub(server, token, heads, tmp_path):
    api = huggingface_hub.HfApi()
    api.create_repo("me/released")
    file = heads.save_released(tmp_path / "heads.bin")
    api.upload_file(repo_id="me/released", path_or_fileobj=file, path_in_repo="model.bin")
    assert_same_weights(RetainingHeads.from_pretrained("me/released"), heads)


# ---- what fails, and what it leaves ----


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("hf_wrong", "the token was not accepted (401)"), (READ_TOKEN, "may not do this (403)")],
)
def test_a_token_that_may_not_write(server, heads, folder, capsys, wrong, says):
    before = contents(folder)
    refused(lambda: heads.push_to_hub("me/heads", token=wrong), "push to me/heads failed", says)
    refused_by_cli(capsys, ["push", folder, "me/heads", "--token", wrong], says, "settings/tokens")
    assert server.repositories == {}
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["create", "preupload", "batch", "upload", "commit"])
def test_a_connection_that_keeps_dropping(server, token, heads, folder, capsys, kind):
    server.faults[kind] = ALWAYS
    before = contents(folder)
    says = f"the connection to {server.url} broke"
    refused(lambda: heads.push_to_hub("me/heads"), "push to me/heads failed", says, "safe to")
    refused_by_cli(capsys, ["push", folder, "me/heads"], says)
    assert nothing_committed(server)
    assert contents(folder) == before
    assert server.faults[kind] < ALWAYS - 1
    server.faults.clear()
    heads.push_to_hub("me/heads")
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


def test_a_connection_that_drops_once_in_the_upload(server, token, heads):
    server.faults["upload"] = 1
    heads.push_to_hub("me/heads")
    assert server.requests["upload"] == 2
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


def test_no_hub_at_all(server, token, heads):
    server.shutdown()
    server.server_close()
    refused(lambda: heads.push_to_hub("me/heads"), f"the connection to {server.url} broke")
    refused(lambda: RetainingHeads.from_pretrained("me/heads"), "the Hub did not give it", "broke")


def test_heads_that_would_not_load_again_are_not_pushed(server, token, heads, folder, capsys):
    broken = tiny_heads(tiny_model("llama"))
    broken[1].fc1.weight.data[0, 0] = torch.nan
    refused(lambda: broken.push_to_hub("me/heads"), "layers.1.fc1.weight", "not finite")
    broken.save_pretrained(folder)
    refused_by_cli(capsys, ["push", folder, "me/heads"], "layers.1.fc1.weight", "not finite")
    assert server.requests.total() == 0


@pytest.mark.parametrize(
    ("repo_id", "says"),
    [("heads", "expected OWNER/heads"), ("a/b/c", "no repository id"), ("me/..", "no repository")],
)
def test_a_name_that_is_no_repository_id(server, token, heads, folder, capsys, repo_id, says):
    refused(lambda: heads.push_to_hub(repo_id), says)
    refused_by_cli(capsys, ["push", folder, repo_id, "--dry-run"], says)
    assert server.requests.total() == 0


def test_a_folder_that_is_no_artifact(server, token, heads, tmp_path, capsys):
    refused_by_cli(capsys, ["push", tmp_path, "me/heads"], "no artifact folder", "convert")
    refused_by_cli(capsys, ["push", tmp_path / "no", "me/heads"], "no artifact folder")
    file = heads.save_released(tmp_path / "heads.bin")
    refused_by_cli(capsys, ["push", file, "me/heads"], "no artifact folder", "convert")
    assert server.requests.total() == 0


def test_a_training_record_that_is_broken_is_not_pushed(server, token, folder, capsys):
    (folder / "training.yaml").write_text("a: [1,\n")
    refused_by_cli(capsys, ["push", folder, "me/heads"], "training.yaml is not readable YAML")
    assert server.requests.total() == 0


def test_a_repository_that_is_not_there(server, token, capsys):
    says = ("'me/nothing' is no path here, and the Hub did not give it", "no such repository")
    refused(lambda: RetainingHeads.from_pretrained("me/nothing"), *says)
    refused_by_cli(capsys, ["inspect", "me/nothing"], *says)


def test_a_repository_without_heads(server, token, capsys):
    huggingface_hub.HfApi().create_repo("me/empty")
    refused(lambda: RetainingHeads.from_pretrained("me/empty"), "me/empty: neither heads.safet")
    server.repositories["me/empty"].commit("main", {"README.md": b"# Soon"}, "by hand")
    refused(lambda: RetainingHeads.from_pretrained("me/empty"), "me/empty: neither heads.safet")


def test_a_revision_that_is_not_there(server, token, heads, capsys):
    heads.push_to_hub("me/heads")
    refused(
        lambda: RetainingHeads.from_pretrained("me/heads", revision="v9"), "has no revision 'v9'"
    )
    refused_by_cli(capsys, ["inspect", "me/heads", "--revision", "v9"], "has no revision 'v9'")


def test_a_wrong_token_for_reading(server, token, heads):
    heads.push_to_hub("me/heads")
    refused(
        lambda: RetainingHeads.from_pretrained("me/heads", token="hf_wrong"), "was not accepted"
    )


def test_a_download_that_breaks_off_leaves_nothing_half_there(server, token, heads):
    heads.push_to_hub("me/heads")
    server.faults["resolve"] = ALWAYS
    refused(lambda: RetainingHeads.from_pretrained("me/heads"), "the Hub did not give it")
    server.faults.clear()
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


def test_a_download_that_breaks_off_once_goes_on(server, token, heads):
    heads.push_to_hub("me/heads")
    server.faults["resolve"] = 1
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


def test_heads_that_were_read_before_are_read_without_the_hub(server, token, heads):
    heads.push_to_hub("me/heads")
    RetainingHeads.from_pretrained("me/heads")
    server.shutdown()
    server.server_close()
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


# ---- a full disk ----


@contextlib.contextmanager
def full_disk():
    """A limit on the size of files stands for it: writes of more than 2 KB fail half-way.

    It holds for the whole process, so nothing but what is tested may write meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["heads", "heads.bin"])
def test_a_disk_that_is_full_while_saving(heads, tmp_path, capfd, target):
    source = tiny_heads(tiny_model("llama"), seed=4).save_pretrained(tmp_path / "source")
    (heads.save_released if target.endswith(".bin") else heads.save_pretrained)(tmp_path / target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk():
        assert main(["convert", str(source), str(tmp_path / target)]) == 2
        assert main(["convert", str(source), str(tmp_path / f"new-{target}")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("locret convert: could not write ") for line in lines)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", target])


def test_a_disk_that_is_full_before_a_push(server, token, heads):
    with full_disk(), pytest.raises(OSError, match="could not write"):
        heads.push_to_hub("me/heads")
    assert server.requests.total() == 0


def test_a_disk_that_is_full_while_downloading(server, token, heads, monkeypatch):
    heads.push_to_hub("me/heads")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        refused(lambda: RetainingHeads.from_pretrained("me/heads"), "No space left on device")
    assert_same_weights(RetainingHeads.from_pretrained("me/heads"), heads)


# ---- a dry run ----


def test_a_dry_run_shows_what_would_be_uploaded(server, token, folder, capsys):
    (folder / "big.csv").write_bytes(b"0" * (artifact.MAX_FIGURE_BYTES + 1))
    before = contents(folder)
    assert main(["push", str(folder), "me/heads", "--dry-run", "--private"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{server.url}/me/heads" in lines[0]
    assert "private" in lines[0]
    end = next(i for i, line in enumerate(lines) if line.startswith("the card"))
    shown = [line.split() for line in lines[1:end]]
    assert sorted(words[0] for words in shown if words[-1] == "B") == PUBLISHED
    weights = (folder / "heads.safetensors").stat().st_size
    assert ["heads.safetensors", f"{weights:,}", "B"] in shown
    stays = {words[0]: " ".join(words[1:]) for words in shown if words[-1] != "B"}
    assert sorted(stays) == [".secret.json", "big.csv", "notes.txt", "plots.json"]
    assert stays["big.csv"] == "stays: over 4 MiB"
    assert lines[end + 1 : end + 3] == ["  | ---", "  | base_model: some/backbone"]
    assert server.requests.total() == 0
    assert contents(folder) == before


@pytest.mark.parametrize("asked", [True, False])
def test_without_a_token_it_is_a_dry_run(server, folder, capsys, asked):
    args = ["push", str(folder), "me/heads", *(["--dry-run"] if asked else [])]
    assert main(args) == (0 if asked else 2)
    out, err = capsys.readouterr()
    assert "heads.safetensors" in out
    said = out if asked else err
    assert "no token was found" in said
    assert "https://huggingface.co/settings/tokens" in said
    assert len(err.splitlines()) == (0 if asked else 1)
    assert server.requests.total() == 0


def test_push_to_hub_without_a_token_says_how_to_get_one(server, heads):
    refused(lambda: heads.push_to_hub("me/heads"), "no token", "hf auth login", "HF_TOKEN")
    assert server.requests.total() == 0


# ---- inspect ----


@pytest.mark.parametrize("kind", ["folder", "id", "bin"])
def test_inspect_tells_all_of_the_record(server, token, heads, folder, tmp_path, capsys, kind):
    if kind == "id":
        heads.push_to_hub("me/heads")
    file = heads.save_released(tmp_path / "heads.bin")
    source = {"folder": str(folder), "id": "me/heads", "bin": str(file)}[kind]
    assert main(["inspect", source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = RetainingHeads.from_pretrained(source).config
    assert found["record"] == config.to_dict()
    tensors = heads.state_dict()
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == ["float32"]
    name = "heads.bin" if kind == "bin" else "heads.safetensors"
    assert found["files"][name] == ((file if kind == "bin" else folder / name).stat().st_size)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        for part in ("fc1", "fc2"):
            norm = tensors[f"layers.{layer['layer']}.{part}.weight"].norm().item()
            assert layer[part] == pytest.approx(norm)
    assert main(["inspect", source]) == 0
    shown = {
        line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line
    }
    assert [name for name in found["record"] if name not in shown] == []
    assert shown["backbone"] == [config.backbone or "-"]
    assert shown["width"] == ["16"]
    assert f"{found['parameters']:,}" in shown["parameters"]


def test_inspect_remarks_on_layers_that_look_unsound(tmp_path, capsys):
    heads = tiny_heads(tiny_model("llama", num_hidden_layers=5))
    heads[1].fc2.weight.data.zero_()
    heads[3].fc1.weight.data.mul_(100)
    assert main(["inspect", str(heads.save_pretrained(tmp_path))]) == 0
    rows = capsys.readouterr().out.splitlines()[-5:]
    assert rows[1].endswith("fc2 is zero")
    assert "fc1 is far from the median" in rows[3]
    assert [len(rows[i].split()) for i in (0, 2, 4)] == [3, 3, 3]


def test_inspect_of_what_is_no_artifact(server, tmp_path, capsys):
    refused_by_cli(capsys, ["inspect", tmp_path], "neither heads.safetensors")
    refused_by_cli(capsys, ["inspect", "a/b/c/d"], "neither an existing path nor a Hub repository")
