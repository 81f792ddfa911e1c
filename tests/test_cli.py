import argparse
import json
import os

import pytest
import torch

import locret
from locret.__main__ import main as run_main
from locret.cli import main
from locret.commands import shared
from locret.commands.shared import Listed
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

TOO_SMALL = ["--budget", "4", "--stabilizers", "9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone, heads for it and for another one, and a prompt."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen3", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    defaults = {"budget": 48, "chunk_size": 32, "stabilizers": 8, "local_tokens": 20}
    tiny_heads(model, defaults=defaults).save_pretrained(folder / "heads")
    other = tiny_model("llama", num_attention_heads=4)
    tiny_heads(other).save_pretrained(folder / "other")
    (folder / "prompt.txt").write_text("One quiet otter. " * 40, encoding="utf-8")
    return folder


def run(folder, *args):
    given = ["--model", str(folder / "backbone"), "--device", "cpu"]
    return main([args[0], *given, *args[1:]])


def test_generate_streams_and_says_what_the_cache_took(folder, capsys):
    prompt, heads = str(folder / "prompt.txt"), str(folder / "heads")
    assert run(folder, "generate", "--heads", heads, "--prompt-file", prompt) == 0
    out = capsys.readouterr().out
    assert "[locret:" in out
    assert "MiB" in out


def test_generate_streams_the_answer_without_special_tokens(folder, capsys):
    args = ["--prompt-file", str(folder / "prompt.txt"), "--policy", "full"]
    assert run(folder, "generate", *args, "--json") == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert run(folder, "generate", *args) == 0
    assert capsys.readouterr().out.partition("\n[full:")[0].rstrip("\n") == answer.rstrip("\n")


def test_generate_json_obeys_the_recorded_settings(folder, capsys):
    args = ["--heads", str(folder / "heads"), "--prompt-file", str(folder / "prompt.txt")]
    assert run(folder, "generate", *args, "--json", "--max-new-tokens", "5") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["policy"] == "locret"
    assert result["new_tokens"] == 5
    assert result["cache"]["budget"] == 48
    assert result["cache"]["units"] == [48 + 20 + 4] * 2
    assert result["cache"]["seen_tokens"] == result["prompt_tokens"] + 4


@pytest.mark.parametrize(
    ("args", "units"),
    [
        (["--budget", "64"], 64),
        (["--budget", "0.125"], None),
        (["--budget", "16KiB"], None),
        (["--budget", "64", "--quantization", "kivi", "--bits", "4"], 64),
        (["--budget", "64", "--query-aware"], 64 - 19),
    ],
)
def test_generate_within_units_a_share_or_bytes(args, units, folder, capsys):
    given = ["--policy", "keydiff", "--prompt-file", str(folder / "prompt.txt"), "--json"]
    fixed = ["--chunk-size", "32", "--stabilizers", "4", "--local-tokens", "20"]
    given += [*fixed, "--max-new-tokens", "2", *args]
    assert run(folder, "generate", *given) == 0
    result = json.loads(capsys.readouterr().out)
    cache = result["cache"]
    held = [count - 21 for count in cache["units"]]
    if units is not None:
        assert held == [units] * 2
    elif "0.125" in args:
        assert held == [round((result["prompt_tokens"] - 20) / 8)] * 2
    else:
        assert 0 < max(held) < result["prompt_tokens"] - 20
    assert (cache["quantization"] is not None) == ("--bits" in args)


def test_generate_with_quotas_of_a_file(folder, tmp_path, capsys):
    (tmp_path / "quotas.json").write_text("[[7, 1], [1, 3]]")
    args = ["--policy", "keydiff", "--prompt-file", str(folder / "prompt.txt"), "--budget", "48"]
    args += ["--chunk-size", "32", "--stabilizers", "0", "--local-tokens", "1"]
    args += ["--max-new-tokens", "2", "--quotas"]
    assert run(folder, "generate", *args, str(tmp_path / "quotas.json"), "--json") == 0
    cache = json.loads(capsys.readouterr().out)["cache"]
    held = [cache["least_units"][0], cache["most_units"][0]]
    assert held == [16 + 2, 112 + 2]
    assert run(folder, "generate", *args, str(tmp_path / "quotas.json")) == 0
    assert "heads hold 50 units on average, 18 to 114; cache" in capsys.readouterr().out
    assert run(folder, "generate", *args, "none") == 0
    assert "heads hold" not in capsys.readouterr().out


def test_generate_refuses_what_are_no_quotas(folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, "generate", "--prompt-file", "-", "--quotas", "none.txt")
    assert "is 'none.txt', which is not such a file; expected" in capsys.readouterr().err


def test_generate_without_heads_or_budget_is_stock(folder, capsys):
    from locret.model.loading import load_model

    args = ["--prompt-file", str(folder / "prompt.txt"), "--json", "--max-new-tokens", "8", "--raw"]
    assert run(folder, "generate", *args, "--budget", "none") == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    loaded = load_model(str(folder / "backbone"), device="cpu")
    text = (folder / "prompt.txt").read_text()
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    stock = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert answer == loaded.tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)


def test_needle_prints_a_line_a_policy_and_keeps_the_answers(folder, tmp_path, capsys):
    out = tmp_path / "new" / "needle.json"
    args = ["--heads", str(folder / "heads"), "--tokens", "600", "--count", "2"]
    assert run(folder, "needle", *args, "--json-out", str(out)) == 0
    printed = capsys.readouterr().out
    assert [word for word in ("full", "streaming_llm", "locret") if word not in printed] == []
    assert str(folder / "heads") in printed
    assert "2 samples of niah_single in prompts of up to 6" in printed
    found = json.loads(out.read_text())
    assert sum(cell["count"] for cell in found["cells"]) == 6
    for setup in found["setups"]:
        full = setup["policy"] == "full"
        assert (setup["units"]["max"] > 500) == full
        assert full or setup["units"]["max"] <= 600 // 8
        assert setup["budget"] == (None if full else "8x")


def test_needle_grid_is_kept_drawn_and_gone_on_with(folder, tmp_path, capsys):
    out, plot = tmp_path / "new" / "grid.json", tmp_path / "maps" / "grid.png"
    args = ["--heads", str(folder / "heads"), "--grid", "--lengths", "300,0.5K", "--depths", "2"]
    args += ["--policies", "full,locret", "--max-new-tokens", "2", "--json-out", str(out)]
    assert run(folder, "needle", *args, "--plot", str(plot)) == 0
    printed = capsys.readouterr().out
    assert "512" in printed and str(plot) in printed
    found = json.loads(out.read_text())
    assert sum(cell["count"] for cell in found["cells"]) == 2 * 2 * 2
    assert found["manifest"]["config"]["heads"] == str(folder / "heads")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(folder, "needle", *args) == 0
    again = json.loads(out.read_text())
    assert (again["cells"], again["setups"]) == (found["cells"], found["setups"])


def test_convert_there_and_back_is_bit_identical(folder, tmp_path, capsys):
    released, back = tmp_path / "heads.bin", tmp_path / "back"
    assert main(["convert", str(folder / "heads"), str(released)]) == 0
    assert main(["convert", str(released), str(back)]) == 0
    assert f"wrote {back}" in capsys.readouterr().out
    before = locret.RetainingHeads.from_pretrained(folder / "heads").state_dict()
    after = locret.RetainingHeads.from_pretrained(back).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--prompt-file", "nosuch.txt"], "nosuch.txt"),
        (["generate", "--prompt-file", "{prompt}", "--policy", "locret"], "heads"),
        (["generate", "--prompt-file", "{prompt}", "--heads", "{other}"], "num_query_heads"),
        (["generate", "--prompt-file", "{prompt}", "--policy", "random", *TOO_SMALL], "lower"),
        (["generate", "--prompt-file", "{prompt}", "--bits", "4"], "--quantization"),
        (["generate", "--prompt-file", "{prompt}", "--budget", "8x"], "nothing scores units"),
        (["generate", "--prompt-file", "{prompt}", "--quantization", "kivi", "--bits", "3"], "3"),
        (["needle", "--policies", "best"], "best"),
        (["needle", "--policies", "locret"], "--heads"),
        (["needle", "--policies", "full", "--task", "nosuch"], "nosuch"),
        (["needle", "--policies", "full,best"], "best"),
        (["needle", "--policies", "full", "--grid"], "--json-out"),
        (["needle", "--policies", "full", "--plot", "a.png"], "--grid"),
        (["needle", "--policies", "full", "--json-out", "{folder}"], "give a file"),
        (["needle", "--policies", "full", "--device", "foo"], "'foo' is unknown"),
        (["needle", "--policies", "full", "--device", "cuda:99"], "torch sees"),
        (["grid", "--policies", "full,best", "--json-out", "o"], "['best'] are unknown"),
        (["grid", "--policies", "locret", "--json-out", "o"], "--heads"),
        (["grid", "--json-out", "o", "--policies", "knorm", "--bits", "16,3"], "bits is 3"),
        (["grid", "--policies", "full", "--json-out", "o", "--plot", "a.b"], "ends in one of"),
        (["grid", "--policies", "full", "--json-out", "{folder}"], "give a file"),
        (["generate", "--prompt-file", "{empty}"], "no text"),
        (["generate", "--prompt-file", "{prompt}", "--model", "/no/such"], "neither a folder"),
    ],
)
def test_a_mistake_gives_one_line_on_stderr(args, says, folder, capsys):
    names = {"prompt": folder / "prompt.txt", "other": folder / "other", "folder": folder}
    names["empty"] = folder / "empty.txt"
    names["empty"].write_text(" \n")
    assert run(folder, *(arg.format(**names) for arg in args)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"locret {args[0]}: ")
    assert says in error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--prompt-file", "{prompt}", "--budget", "abc"], "abc"),
        (["needle", "--grid", "--json-out", "o", "--lengths", "1K,a"], "'a' is not a number"),
        (["needle", "--policies", ","], "there are no policies"),
        (["needle", "--ratios", "0"], "argument --ratios: '0' is not a whole number of at least 2"),
        (["needle", "--ratios", "1"], "argument --ratios: '1' is not a whole number of at least 2"),
        (["needle", "--count", "0"], "argument --count: '0' is not a whole number of at least 1"),
        (["needle", "--depths", "0"], "argument --depths: '0' is not a whole number of at least 1"),
        (["needle", "--tokens", "x"], "argument --tokens: 'x' is not a number of tokens"),
        (
            ["needle", "--seed", "3"],
            "argument --seed: '3' is not a whole number of at least 1000000",
        ),
        (["grid", "--json-out", "o", "--count=-1"], "--count: '-1' is not a whole number"),
        (["grid", "--json-out", "o", "--bits", "0"], "--bits: '0' is not a whole number of at"),
        (["grid", "--policies", "full"], "the following arguments are required: --json-out"),
        (["grid", "--json-out", "o", "--bits", "16,4.5"], "'4.5' is not a whole number"),
    ],
)
def test_a_value_that_cannot_be_is_refused(args, says, folder, capsys):
    with pytest.raises(SystemExit):
        run(folder, *(arg.format(prompt=folder / "prompt.txt") for arg in args))
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("given", ["a,b", "a b", "a,b,", "a --names b"])
def test_lists_are_written_with_spaces_or_commas(given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", action=Listed, default=["c"])
    assert parser.parse_args(["--names", *given.split()]).names == ["a", "b"]
    assert parser.parse_args([]).names == ["c"]


def test_threads_of_commands_soon_sleep_while_they_wait(monkeypatch):
    monkeypatch.setattr("locret.cli.main", lambda: os.environ.get("GOMP_SPINCOUNT"))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run_main() == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert run_main() == "10000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert run_main() is None


def test_generate_with_weights_in_fewer_bits(folder, capsys, monkeypatch):
    pytest.importorskip("torchao", reason="package torchao is not installed")
    loaded = []
    load = shared.load_model
    monkeypatch.setattr(
        shared, "load_model", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    args = ["--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens", "3", "--json"]
    for weights in (["--weights", "int8"], []):
        assert run(folder, "generate", *args, *weights) == 0
        assert json.loads(capsys.readouterr().out)["new_tokens"] == 3
    stored, plain = (each.model.model.layers[0].mlp.up_proj.weight for each in loaded)
    assert type(stored) is not torch.nn.Parameter and type(plain) is torch.nn.Parameter
    assert [each.quantization for each in loaded] == ["int8", None]


def test_weights_in_fp8_are_refused_on_a_cpu_in_one_line(folder, capsys):
    args = ["--prompt-file", str(folder / "prompt.txt"), "--weights", "fp8"]
    assert run(folder, "generate", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the model goes to cpu, but weights in 'fp8' need a GPU of compute capability" in line
