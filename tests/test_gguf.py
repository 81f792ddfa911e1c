"""Backbones from GGUF files: found by a path, loaded as ordinary models, recorded by their hash."""

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import threading
import unittest.mock

import pytest
import torch

import locret
from locret.cli import main
from locret.evaluation.config import EvalConfig
from locret.evaluation.questions import prepare
from locret.model.loading import (
    file_revision,
    load_config,
    load_model,
    load_tokenizer,
    parsed_once,
    weights_sha256,
)
from tests.evaluation.eval_data import DATA, write_data
from tests.tiny_models import prompt, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tests.tiny_gguf import write_gguf  # noqa: E402

TEXT = "One quiet otter. " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("qwen2.5", vocab_size=len(tokenizer), max_position_embeddings=8192)


@pytest.fixture(scope="module")
def file(model, tokenizer, tmp_path_factory):
    """A folder with one file of that kind, and a prompt beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "prompt.txt").write_text(TEXT)
    return write_gguf(folder / "tiny.gguf", model, tokenizer)


def load(name, **given):
    return load_model(str(name), device="cpu", **{"dtype": "float32"} | given)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_a_file_is_parsed_once_and_the_package_stays_as_it_was(file, monkeypatch):
    import gguf

    reader = unittest.mock.Mock(wraps=gguf.GGUFReader)
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    load(file)
    assert reader.call_count == 1
    with pytest.raises(ValueError, match="unknown"):
        load(file, attn_implementation="unknown")
    assert gguf.GGUFReader is reader


def test_loads_in_threads_leave_the_package_as_it_was():
    import gguf

    stock, entered, both = gguf.GGUFReader, threading.Event(), threading.Barrier(2)

    def second():
        both.wait()
        with parsed_once():
            entered.set()

    thread = threading.Thread(target=second)
    with parsed_once():
        thread.start()
        both.wait()
        assert not entered.wait(0.05)  # what it put back would be ours
    thread.join()
    assert entered.is_set() and gguf.GGUFReader is stock


def test_a_file_that_changed_is_parsed_anew(file, model, tokenizer, tmp_path):
    path = tmp_path / "changing.gguf"
    path.write_bytes(file.read_bytes())
    before = load(path).model.lm_head.weight.clone()
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data += 1
    write_gguf(path, changed, tokenizer)
    torch.testing.assert_close(load(path).model.lm_head.weight, before + 1)


# --- what a name means ---


@pytest.mark.parametrize("by", ["file", "folder", "folder with a config", "relative"])
def test_a_file_or_its_folder_loads(by, file, model, tokenizer, tmp_path, monkeypatch):
    name = {"file": file, "relative": file.name}.get(by, file.parent)
    if by == "relative":
        monkeypatch.chdir(file.parent)
    if by == "folder with a config":  # as Hub repositories of such files have it
        name = shutil.copytree(file.parent, tmp_path / "copy")
        (name / "config.json").write_text("{}")
    loaded = load(name)
    ids = prompt(40)
    assert torch.equal(logits(loaded.model, ids), logits(model, ids))
    assert not loaded.model.training
    assert loaded.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    assert (loaded.name, loaded.adapter) == (str(name), None)
    assert loaded.revision == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_config(str(name)).num_hidden_layers == 2
    assert load_tokenizer(str(name)).chat_template == tokenizer.chat_template
    assert file_revision(str(name)) == loaded.revision


def test_no_bars_in_a_log(file, capfd):
    """tqdm writes one line of thousands of characters there."""
    load(file)
    assert "GGUF tensors" not in capfd.readouterr().err


def test_an_ordinary_checkpoint_beside_it_is_what_the_folder_means(file, tokenizer, tmp_path):
    other = tiny_model("llama", vocab_size=len(tokenizer))
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(file, tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.config.model_type == "llama"
    assert loaded.revision is None and file_revision(str(tmp_path)) is None


def test_several_files_in_a_folder_are_named(file, tmp_path):
    for name in ("q8.gguf", "q4.GGUF"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ValueError, match=r"several .gguf files, q4.GGUF, q8.gguf; name one"):
        load(tmp_path)
    assert load(tmp_path / "q4.GGUF").model.config.model_type == "qwen2"


@pytest.mark.parametrize("folder", [True, False])
def test_a_part_of_several_files_is_refused(folder, file, tmp_path):
    parts = [tmp_path / f"big-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        shutil.copy(file, part)
    with pytest.raises(ValueError, match="one part of 2.*llama-gguf-split --merge"):
        load(tmp_path if folder else parts[0])


@pytest.mark.parametrize("name", ["nosuch.gguf", "/no/such.gguf"])
@pytest.mark.parametrize("part", [load_model, load_config, load_tokenizer, file_revision])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name, part):
    with pytest.raises(ValueError, match="such.gguf' is not there"):
        part(name)


def test_a_file_of_another_kind_is_refused(file):
    with pytest.raises(ValueError, match=r"is a file; expected a folder, a .gguf file or a Hub id"):
        load(file.parent / "prompt.txt")


@pytest.mark.parametrize("size", [0, 10, 1000, -1000])
def test_what_is_no_such_file_or_was_cut_is_told_in_a_line(size, file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut.gguf could not be read as a GGUF") as error:
        load(cut)
    assert len(str(error.value).splitlines()) == 1


def test_a_text_with_that_ending_is_told_in_a_line(tmp_path):
    (tmp_path / "text.gguf").write_text(TEXT)
    for part in (load_model, load_config, load_tokenizer):
        with pytest.raises(ValueError, match="it is not a GGUF file"):
            part(str(tmp_path / "text.gguf"))


@pytest.mark.parametrize(
    ("left_out", "says"), [("blk.1.ffn_up", "lacks 1 of its"), ("blk.0.", "lacks 12 of its")]
)
def test_missing_weights_are_not_made_up(left_out, says, model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "less.gguf", model, tokenizer, left_out)
    with pytest.raises(ValueError, match=says):
        load(file)


def test_missing_packages_are_named(file, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a)
    )
    with pytest.raises(ValueError, match="packages that are missing: pip install gguf"):
        load(file)


def test_its_weights_are_not_quantized_again(file):
    with pytest.raises(ValueError, match="cannot be stored in 'int8'; load them as they are"):
        load(file, quantization="int8")


# --- an ordinary model ---


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_loads_in_any_dtype_as_other_checkpoints_do(dtype, adapted, file, model, tmp_path):
    given = {"dtype": dtype}
    if adapted:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])  # starts as one that does nothing
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "lora")
        given["adapter"] = str(tmp_path / "lora")
    model.save_pretrained(tmp_path / "plain")
    load_tokenizer(str(file)).save_pretrained(tmp_path / "plain")
    plain, loaded = load(tmp_path / "plain", dtype=dtype).model, load(file, **given).model
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    ids = prompt(200)  # rotated exactly: frequencies are no weights
    assert torch.equal(logits(loaded, ids), logits(plain, ids))
    assert loaded.config.dtype == loaded.dtype


def test_it_is_cast_saved_and_loaded_again(file, tmp_path):
    loaded = load(file)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    ids = prompt(40)
    assert torch.equal(logits(load(tmp_path).model, ids), logits(loaded.model, ids))
    assert loaded.model.half().dtype == torch.float16
    assert not hasattr(loaded.model.config, "quantization_config")


def test_an_engine_on_it_answers_as_stock(file):
    loaded = load(file, attn_implementation="eager")
    assert loaded.model.config._attn_implementation == "eager"
    ids, greedy = prompt(60), {"max_new_tokens": 6, "do_sample": False}
    engine = locret.Engine(loaded.model, "full", chunk_size=16, local_tokens=8)
    assert torch.equal(engine.generate(ids, **greedy), loaded.model.generate(ids, **greedy))


# --- everywhere a model is named ---


def test_generate(file, capsys):
    args = ["--prompt-file", str(file.parent / "prompt.txt"), "--policy", "keydiff", "--json"]
    fixed = ["--budget", "32", "--chunk-size", "32", "--stabilizers", "4", "--local-tokens", "8"]
    args = [*args, *fixed, "--max-new-tokens", "3", "--device", "cpu"]
    assert main(["generate", "--model", str(file), *args]) == 0
    assert json.loads(capsys.readouterr().out)["cache"]["budget"] == 32


def test_needle_and_its_grid_record_the_hash(file, tmp_path):
    args = ["needle", "--model", str(file.parent), "--device", "cpu", "--policies", "full"]
    args += ["--tokens", "300", "--count", "1", "--max-new-tokens", "2"]
    assert main(args) == 0
    grid = ["--grid", "--lengths", "300", "--depths", "1"]
    for extra in ([], grid):
        assert main([*args, *extra, "--json-out", str(tmp_path / "g.json")]) == 0
        manifest = json.loads((tmp_path / "g.json").read_text())["manifest"]
        assert manifest["sources"]["revision"] == file_revision(str(file))
        assert manifest["computed"][0]["model_revision"] == file_revision(str(file))


@pytest.mark.parametrize("by_folder", [False, True])
def test_calibrate(by_folder, file, tmp_path, capsys):
    out = tmp_path / "quotas.json"
    args = ["--policy", "keydiff", "--data", str(file.parent / "prompt.txt"), "--out", str(out)]
    args += ["--contexts", "1", "--tokens", "129", "--compressions", "2", "--device", "cpu"]
    assert main(["calibrate", "--model", str(file.parent if by_folder else file), *args]) == 0
    assert json.loads(out.read_text()).keys() == {"2"}


def test_grid(file, tmp_path):
    args = ["--policies", "keydiff", "--bits", "16", "--ratios", "4", "--tokens", "300"]
    args += ["--count", "1", "--max-new-tokens", "1", "--device", "cpu"]
    out = tmp_path / "g.json"
    assert main(["grid", "--model", str(file), *args, "--json-out", str(out)]) == 0
    revision = json.loads(out.read_text())["manifest"]["sources"]["revision"]
    assert revision == file_revision(str(file))


@pytest.mark.parametrize("by_folder", [False, True])
def test_plan(by_folder, file, capsys):
    args = ["--memory", "1GiB", "--context", "4K", "--json"]
    assert main(["plan", "--model", str(file.parent if by_folder else file), *args]) == 0
    assert json.loads(capsys.readouterr().out)["geometry"]["num_kv_heads"] == 2


def config_of(file, folder):
    write_data(folder / "data")
    return EvalConfig(
        model=str(file),
        tasks=("fairytaleqa",),
        setups=({"policy": "streaming_llm", "budget": 32},),
        output=str(folder / "out"),
        dtype="float32",
        device="cpu",
        data_dir=str(folder / "data"),
        data=DATA,
        limit=1,
        engine={"chunk_size": 64, "stabilizers": 4},
    )


def test_evaluate_records_the_hash_and_asks_a_changed_file_again(file, tmp_path):
    from locret.evaluation import evaluate

    file = shutil.copy(file, tmp_path / "mine.gguf")
    config = config_of(file, tmp_path)
    result = json.loads(evaluate.run(config).read_text())
    sources, (computed,) = (result["manifest"][name] for name in ("sources", "computed"))
    assert sources["revision"] == computed["model_revision"] == file_revision(str(file))
    before = {question.key for question in prepare(config).asked}

    other = tiny_model("qwen2.5", seed=1, vocab_size=len(tiny_tokenizer()))
    write_gguf(file, other, tiny_tokenizer())
    os.utime(file, ns=(1, 1))  # a file system may not tell two changes within its clock's step
    assert not before & {question.key for question in prepare(config).asked}


def test_lm_eval(file):
    pytest.importorskip("lm_eval")
    from locret.integrations.lm_eval import LocretLM

    model = LocretLM(str(file), policy="keydiff", budget=32, device="cpu", dtype="float32")
    info = model.get_model_info()
    assert info["model_revision"] == file_revision(str(file))
    assert model.tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


@pytest.fixture
def rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT[:60]}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    return rows


def test_an_adapter_is_trained_on_it(file, rows, tmp_path):
    pytest.importorskip("lightning")
    from tests.trainers.runs import tiny_run

    args = tiny_run(file.parent, rows, tmp_path, steps=1, config="smollm2_adapter.yaml")
    assert main(["adapt", *args]) == 0
    adapter = json.loads((tmp_path / "heads" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(file.parent)


def test_heads_trained_on_it_record_the_hash(file, rows, tmp_path):
    pytest.importorskip("lightning")
    from tests.trainers.runs import tiny_run
    from trainers import fit

    output = fit.main(tiny_run(file, rows, tmp_path, steps=1))
    record = locret.RetainingHeads.from_pretrained(output).config
    assert (record.backbone, record.backbone_revision) == (str(file), file_revision(str(file)))
    assert record.backbone_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record.model_type == "qwen2"
    assert f"| backbone_sha256 | {record.backbone_sha256} |" in (output / "README.md").read_text()


def test_weights_that_are_one_file_have_a_hash(file, model, tokenizer, tmp_path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights_sha256(str(file)) == weights_sha256(str(file.parent)) == digest
    model.save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert weights_sha256(str(tmp_path)) == digest
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model-2.safetensors")
    assert weights_sha256(str(tmp_path)) is None
    assert weights_sha256("owner/on-the-hub") is None


def test_an_empty_folder_is_told_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, and no .gguf file"):
        load_model(str(tmp_path))
