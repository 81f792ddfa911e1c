"""Heads on disk and on the Hub: what is read, what is refused, and what a failed save leaves."""

import errno
import json
import os
import pickle
import random
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

import locret
from locret import RetainingHeads
from locret.heads import files as artifact
from tests.tiny_models import tiny_heads, tiny_model


@pytest.fixture(scope="module")
def heads():
    return tiny_heads(
        tiny_model("llama"),
        width=6,
        backbone="some/backbone",
        metrics={"recall": 0.5},
        defaults={"budget": 30},
    )


@pytest.fixture
def folder(heads, tmp_path):
    return heads.save_pretrained(tmp_path / "heads")


@pytest.fixture
def released(heads, tmp_path):
    return heads.save_released(tmp_path / "released.bin")


def refused(source, *words):
    with pytest.raises(ValueError) as caught:
        RetainingHeads.from_pretrained(source)
    for word in words:
        assert word in str(caught.value)


def assert_same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype


def rewrite_record(folder, **changes):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))


def rewrite_weights(folder, change):
    tensors = load_file(folder / "heads.safetensors")
    change(tensors)
    save_file(tensors, folder / "heads.safetensors")


def rewrite_released(path, change):
    state = torch.load(path)
    change(state)
    torch.save(state, path)


# --- round trips ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formats_carry_the_same_bits(heads, tmp_path, dtype):
    first = RetainingHeads.from_tensors(
        heads.config, {name: t.to(dtype) for name, t in heads.state_dict().items()}
    )
    ours = RetainingHeads.from_pretrained(first.save_pretrained(tmp_path / "a"))
    theirs = RetainingHeads.from_pretrained(ours.save_released(tmp_path / "b.bin"))
    again = RetainingHeads.from_pretrained(theirs.save_pretrained(tmp_path / "c"))
    for loaded in (ours, theirs, again):
        assert_same_weights(loaded, first)
        assert not any(p.requires_grad for p in loaded.parameters())
    weights = [(tmp_path / name / "heads.safetensors").read_bytes() for name in "ac"]
    assert weights[0] == weights[1]


def test_record_survives_our_format(heads, folder):
    assert RetainingHeads.from_pretrained(folder).config == heads.config
    assert RetainingHeads.from_pretrained(str(folder)).config == heads.config


def test_released_format_keeps_the_shapes(heads, released):
    config = RetainingHeads.from_pretrained(released).config
    for name in ("num_layers", "num_kv_heads", "input_width", "width", "activation"):
        assert getattr(config, name) == getattr(heads.config, name)
    assert config.num_query_heads is config.head_size is config.backbone is None


def test_released_heads_serve_their_backbone_only(released):
    heads = RetainingHeads.from_pretrained(released)
    small = {"budget": 9, "chunk_size": 5, "stabilizers": 1, "local_tokens": 2}
    locret.Engine(tiny_model("llama"), heads=heads, **small)
    with pytest.raises(ValueError, match="input_width: heads 96, backbone"):
        locret.Engine(tiny_model("llama", num_attention_heads=4), heads=heads, **small)


def test_released_names_are_found_in_a_dict_of_the_whole_model(heads, tmp_path):
    model = tiny_model("llama")
    state = model.state_dict() | {
        f"base.{name.replace('layers.', 'model.layers.').replace('.fc', '.self_attn.fc')}": tensor
        for name, tensor in heads.state_dict().items()
    }
    torch.save(state, tmp_path / "model.bin")
    assert_same_weights(RetainingHeads.from_pretrained(tmp_path / "model.bin"), heads)


def test_folder_with_a_single_bin_is_read(heads, tmp_path):
    heads.save_released(tmp_path / "only.bin")
    assert_same_weights(RetainingHeads.from_pretrained(tmp_path), heads)
    heads.save_released(tmp_path / "second.bin")
    refused(tmp_path, "single .bin", "only.bin", "second.bin")


def test_old_torch_format_is_read(heads, released):
    torch.save(torch.load(released), released, _use_new_zipfile_serialization=False)
    assert_same_weights(RetainingHeads.from_pretrained(released), heads)


def test_card_names_backbone_and_figures(folder):
    card = (folder / "README.md").read_text()
    assert "base_model: some/backbone\n" in card
    assert "| recall | 0.5 |" in card
    assert "budget=30" in card


# --- what is refused ---


def test_nothing_there(tmp_path):
    refused(tmp_path, "neither heads.safetensors nor a single .bin", "found []")


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 100, -1])
def test_truncated_safetensors(folder, part):
    weights = folder / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:part])
    refused(folder, "truncated or corrupted", "heads.safetensors")


@pytest.mark.parametrize("old_format", [False, True])
def test_truncated_bin(released, old_format):
    torch.save(torch.load(released), released, _use_new_zipfile_serialization=not old_format)
    whole = released.read_bytes()
    cuts = random.Random(0).sample(range(len(whole) - 1), 60)
    for cut in [0, 1, 2, len(whole) // 2, *cuts, len(whole) - 1]:
        released.write_bytes(whole[:cut])
        refused(released, "not a torch file of plain tensors")


@pytest.mark.parametrize("which", ["safetensors", "zip", "old"])
def test_damaged_files_load_or_raise_value_error(folder, released, which):
    if which == "old":
        torch.save(torch.load(released), released, _use_new_zipfile_serialization=False)
    file = folder / "heads.safetensors" if which == "safetensors" else released
    source = folder if which == "safetensors" else released
    whole, rng = file.read_bytes(), random.Random(1)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(min(len(whole), 1500))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            RetainingHeads.from_pretrained(source)
            outcomes.add("loaded")  # a digit of a weight: nothing could tell
        except ValueError:
            outcomes.add("refused")
    assert "refused" in outcomes


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_code_in_a_bin_never_runs(released, tmp_path, how):
    touched = tmp_path / "touched"
    state = torch.load(released) | {"model.layers.9.self_attn.fc1.weight": Touch(touched)}
    if how == "pickle":
        released.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, released, _use_new_zipfile_serialization=how == "torch")
    refused(released, "holds code, which is never run")
    assert not touched.exists()


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), "text", None])
def test_bin_that_is_no_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "expected a dict of tensors")


def test_bin_of_a_model_without_heads(tmp_path):
    torch.save({1: 2, "model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, tmp_path / "x.bin")
    refused(tmp_path / "x.bin", "no tensor named like model.layers.0.self_attn.fc1.weight")


@pytest.mark.parametrize("which", ["layers.0.self_attn.fc1", "layers.1.self_attn.fc2"])
def test_bin_with_a_head_missing(released, which):
    rewrite_released(released, lambda state: state.pop(f"model.{which}.weight"))
    refused(released, *([] if "0" in which else ["missing layers.1.fc2.weight"]))


def test_bin_with_a_layer_number_out_of_all_proportion(released):
    def change(state):
        state["model.layers.987654321.self_attn.fc1.weight"] = torch.ones(6, 96)

    rewrite_released(released, change)
    refused(released, "5 tensors for 987654322 layers")


def test_bin_with_heads_of_different_widths(released):
    def change(state):
        state["model.layers.1.self_attn.fc1.weight"] = torch.ones(6, 95)

    rewrite_released(released, change)
    refused(released, "layers.1.fc1.weight is (6, 95), expected (6, 96)")


def test_bin_with_vectors_for_matrices(released):
    def change(state):
        state["model.layers.0.self_attn.fc1.weight"] = torch.ones(6)

    rewrite_released(released, change)
    refused(released, "fc1 or fc2 matrix of layer 0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.fc1.weight"), "missing layers.1.fc1.weight"),
        (lambda t: t.update({"layers.2.fc1.weight": torch.ones(1)}), "extra layers.2.fc1.weight"),
        (
            lambda t: t.update({"layers.0.fc2.weight": torch.ones(2, 7)}),
            "layers.0.fc2.weight is (2, 7), expected (2, 6)",
        ),
        (lambda t: t["layers.0.fc1.weight"][3].fill_(torch.nan), "not finite"),
        (lambda t: t["layers.1.fc2.weight"][0].fill_(-torch.inf), "not finite"),
        (
            lambda t: t.update({"layers.0.fc2.weight": torch.ones(2, 6, dtype=torch.int8)}),
            "layers.0.fc2.weight is torch.int8, expected one of (torch.float32, ",
        ),
    ],
    ids=["missing", "extra", "shape", "nan", "inf", "integers"],
)
def test_weights_that_do_not_fit_the_record(folder, change, message):
    rewrite_weights(folder, change)
    refused(folder, "do not fit their config", message)


def test_every_problem_is_named_at_once(folder):
    def change(tensors):
        tensors["more"] = torch.ones(1)
        del tensors["layers.0.fc1.weight"], tensors["layers.0.fc2.weight"]

    rewrite_weights(folder, change)
    refused(folder, "missing layers.0.fc1.weight", "missing layers.0.fc2.weight", "extra more")


def test_record_missing(folder):
    (folder / "config.json").unlink()
    refused(folder, "has heads.safetensors but no config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"garbage", b'{"num_layers": 2'])
def test_record_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "not readable JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_record_that_is_no_object(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, "expected a JSON object")


@pytest.mark.parametrize("version", [2, 99, 0, None, "1"])
def test_record_of_another_schema(folder, version):
    rewrite_record(folder, schema_version=version)
    refused(folder, f"schema_version {version!r}; this locret reads 1", "upgrade locret")


def test_record_with_unknown_and_missing_fields(folder):
    record = json.loads((folder / "config.json").read_text())
    del record["width"]
    (folder / "config.json").write_text(json.dumps(record | {"depth": 3}))
    refused(folder, "missing fields ['width']", "unknown fields ['depth']")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "2"}, "num_layers is '2'"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 0}, "num_layers is 0, expected at least 1"),
        ({"width": -6}, "width is -6"),
        ({"num_kv_heads": 1.5}, "num_kv_heads is 1.5"),
        ({"input_width": None}, "input_width is None"),
        ({"head_size": "8"}, "head_size is '8'"),
        ({"activation": "sigh"}, "activation 'sigh' is unknown"),
        ({"activation": ["silu"]}, "activation is ['silu']"),
        ({"tap": "qkv_after_rope"}, "tap 'qkv_after_rope' is unknown"),
        ({"defaults": None}, "defaults is None"),
        ({"defaults": {"budget": "many"}}, "defaults is"),
        ({"metrics": [1]}, "metrics is [1]"),
        ({"num_layers": 10**12}, "4 tensors for 1000000000000 layers"),
        ({"num_layers": 3}, "missing layers.2.fc1.weight"),
        ({"width": 7}, "expected (7, 96)"),
    ],
    ids=str,
)
def test_record_with_values_that_cannot_be(folder, changes, message):
    rewrite_record(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64", "float64"])
def test_weights_of_unusual_dtypes_load_or_are_refused(folder, dtype):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(getattr(torch, dtype))

    rewrite_weights(folder, change)
    if dtype == "float64":
        assert RetainingHeads.from_pretrained(folder)[0].fc1.weight.dtype == torch.float64
    else:
        refused(folder, f"is torch.{dtype}, expected one of")


# --- the Hub ---


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub's download by a function of (repo_id, **kwargs)."""

    def install(download):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return install


def test_hub_repository_is_read(hub, heads, folder):
    asked = {}

    def download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(folder)

    hub(download)
    loaded = RetainingHeads.from_pretrained("some/heads", revision="v2", token="t")
    assert_same_weights(loaded, heads)
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("some/heads", "v2", "t")
    assert "heads.safetensors" in asked["allow_patterns"]


def hub_error(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("offline"),
        ConnectionError("no route"),
        OSError(errno.ENOSPC, "disk full"),
        TimeoutError("too slow"),
        hub_error(RepositoryNotFoundError),
        hub_error(HfHubHTTPError),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hub_failures_say_what_was_looked_for(hub, error):
    def download(repo_id, **kwargs):
        raise error

    hub(download)
    refused("some/heads", "'some/heads' is no path here, and the Hub did not give it")


def test_path_that_does_not_exist_and_is_no_hub_id_either(hub, tmp_path):
    refused(tmp_path / "missing" / "heads", "neither an existing path nor a Hub repository id")
    refused("a/b/c/d", "neither an existing path nor a Hub repository id")

    def download(repo_id, **kwargs):
        raise HFValidationError("bad id")

    hub(download)
    refused("b@d", "neither an existing path")


def test_hub_repository_without_heads(hub, tmp_path):
    hub(lambda repo_id, **kwargs: str(tmp_path))
    refused("some/heads", "some/heads: neither heads.safetensors nor a single .bin")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def other_heads():
    return tiny_heads(tiny_model("llama"), seed=5, width=6, backbone="other/backbone")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at_call(function, number):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            full_disk()
        return function(*args, **kwargs)

    return wrapped


FAILURES = {
    "weights": lambda m: m.setattr(artifact, "save_file", full_disk),
    "half the weights": lambda m: m.setattr(artifact, "save_file", half_written),
    "record": lambda m: m.setattr(artifact.json, "dumps", full_disk),
    "card": lambda m: m.setattr(artifact, "model_card", full_disk),
    "first rename": lambda m: m.setattr(artifact.os, "replace", fail_at_call(os.replace, 1)),
    "second rename": lambda m: m.setattr(artifact.os, "replace", fail_at_call(os.replace, 2)),
    "third rename": lambda m: m.setattr(artifact.os, "replace", fail_at_call(os.replace, 3)),
    "every rename": lambda m: m.setattr(artifact.os, "replace", full_disk),
    "interrupt": lambda m: m.setattr(artifact, "model_card", interrupted),
}


def half_written(tensors, path, metadata=None):
    path.write_bytes(b"half")
    full_disk()


def interrupted(record):
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_save_leaves_the_folder_as_it_was(folder, monkeypatch, failure):
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    FAILURES[failure](monkeypatch)
    with pytest.raises((OSError, KeyboardInterrupt)):
        other_heads().save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before


def fourth_rename(m):
    """Of `custom_generate/generate.py`, which is there already where heads are saved again."""
    m.setattr(artifact.os, "replace", fail_at_call(os.replace, 4))


@pytest.mark.parametrize("failure", [*FAILURES.values(), fourth_rename])
def test_failed_save_makes_no_folder(tmp_path, monkeypatch, failure):
    failure(monkeypatch)
    with pytest.raises((OSError, KeyboardInterrupt)):
        other_heads().save_pretrained(tmp_path / "new")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()


def test_failed_save_of_a_bin_leaves_the_one_before(released, monkeypatch):
    before = contents(released.parent)
    for failing in ("save", "replace"):
        owner = artifact.torch if failing == "save" else artifact.os
        monkeypatch.setattr(owner, failing, full_disk)
        with pytest.raises(OSError, match="No space"):
            other_heads().save_released(released)
        monkeypatch.undo()
        assert contents(released.parent) == before


def test_save_over_an_artifact_replaces_it_and_leaves_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    heads = other_heads()
    heads.save_pretrained(folder)
    assert_same_weights(RetainingHeads.from_pretrained(folder), heads)
    names = ["README.md", "config.json", "custom_generate", "heads.safetensors", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "notes.txt").read_text() == "mine"


def test_save_makes_the_folders_on_the_way(heads, tmp_path):
    assert_same_weights(
        RetainingHeads.from_pretrained(heads.save_pretrained(tmp_path / "a" / "b")), heads
    )


def test_target_that_is_a_file_is_refused_and_kept(heads, tmp_path):
    file = tmp_path / "heads"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        heads.save_pretrained(file)
    assert file.read_text() == "mine"


def test_target_whose_record_is_a_folder_keeps_everything(folder, heads):
    (folder / "heads.safetensors").unlink()
    (folder / "heads.safetensors").mkdir()
    record = (folder / "config.json").read_bytes()
    with pytest.raises(OSError):
        other_heads().save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == record


def test_weights_are_plain_safetensors(heads, folder):
    with safetensors.safe_open(folder / "heads.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(heads.state_dict())


# --- quotas ---

QUOTAS = {"2": [[1.2, 0.8], [1.0, 1.0]], "8": [[3.0, 0.5], [0.25, 0.25]]}


def test_quotas_survive(tmp_path):
    heads = tiny_heads(tiny_model("llama"), quotas=QUOTAS)
    folder = heads.save_pretrained(tmp_path)
    loaded = RetainingHeads.from_pretrained(folder)
    assert loaded.config == heads.config and loaded.config.quotas == QUOTAS
    assert "[3.0, 0.5]" in (folder / "config.json").read_text()
    assert (
        loaded.save_pretrained(tmp_path / "again").joinpath("config.json").read_bytes()
        == (folder / "config.json").read_bytes()
    )


def test_a_record_without_quotas_is_written_as_before_there_were_any(folder):
    assert "quotas" not in json.loads((folder / "config.json").read_text())
    assert RetainingHeads.from_pretrained(folder).config.quotas is None
    rewrite_record(folder, quotas=None)
    assert RetainingHeads.from_pretrained(folder).config.quotas is None


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"2": [[1.0, 1.0]]}, "quotas are for 1 layers of 2 KV heads; expected 2 layers"),
        ({"2": [[1.0], [1.0]]}, "quotas are for 2 layers of 1 KV heads; expected 2 layers"),
        ({"2": [[1.0, 1.0], [1.0, -1.0]]}, "expected finite numbers of at least 0"),
        ({"2": [[0, 0], [0, 0]]}, "not all of them 0"),
        ({"much": [[1.0, 1.0]] * 2}, "compression 'much'"),
        ({"2": "many"}, "expected lists of lists by compression"),
        ([[1.0, 1.0]] * 2, "quotas are a list, expected lists of lists by compression"),
        ({}, "an empty mapping"),
        ("quotas.json", "quotas are a str"),
    ],
    ids=str,
)
def test_quotas_that_do_not_fit_the_heads_are_refused(quotas, message, folder):
    rewrite_record(folder, quotas=quotas)
    refused(folder, message)


def test_a_record_is_written_anew_beside_its_weights(heads, folder):
    def file():  # which file, and when it was last written; not when it was last read
        found = (folder / "heads.safetensors").stat()
        return found.st_ino, found.st_mtime_ns

    before = file()
    artifact.save_record(folder, heads.config.to_dict() | {"quotas": QUOTAS})
    assert RetainingHeads.from_pretrained(folder).config.quotas == QUOTAS
    assert file() == before
