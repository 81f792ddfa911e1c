"""What users type, pipe and name: every mistake is one sentence, before a model is loaded."""

import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import locret
from locret.cli import main
from locret.commands import shared
from locret.commands.shared import read_text, replace_unprintable
from locret.evaluation.config import Setup
from locret.heads.heads import RetainingHeads
from locret.model.loading import find_device, load_config, load_model
from locret.quantities import ByteShare, Memory, parse_budget
from tests.tiny_models import prompt, tiny_config, tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone, and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=8192)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    (folder / "prompt.txt").write_text("One quiet otter. " * 40, encoding="utf-8")
    (folder / "latin1.txt").write_bytes(b"caf\xe9 x")
    return folder


def run(folder, *args):
    return main([args[0], "--model", str(folder / "backbone"), *args[1:]])


def pipe(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(shared, "load", lambda given: pytest.fail("loaded"))


# --- text ---


def test_input_that_is_not_utf8_is_refused_before_a_model_is_loaded(
    folder, nothing_is_loaded, monkeypatch, capsys
):
    said = []
    for name in (str(folder / "latin1.txt"), "-"):
        pipe(monkeypatch, b"caf\xe9 x")
        assert run(folder, "generate", "--prompt-file", name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        said.append(line.replace(name, "standard input") if name != "-" else line)
    assert said[0] == said[1]
    assert said[0].startswith("locret generate: standard input is not UTF-8 text: ")


def test_text_is_the_same_from_a_file_and_from_standard_input(tmp_path, monkeypatch):
    content = "caf\u00e9\r\n\U0001f9a6\rx\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    pipe(monkeypatch, content)
    assert read_text("-") == read_text(str(tmp_path / "a.txt")) == "caf\u00e9\n\U0001f9a6\nx\n"


def test_a_process_without_standard_input_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="there is no standard input to read; name a file"):
        read_text("-")


def test_an_answer_is_printed_where_the_terminal_lacks_its_characters(folder, monkeypatch):
    """A random model's bytes are seldom UTF-8, so that its answer has characters beyond ASCII."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    args = ["--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens", "64"]
    assert run(folder, "generate", "--device", "cpu", *args) == 0
    sys.stdout.flush()
    assert b"?" in shown.getvalue() and b"new ones" in shown.getvalue()


def test_unprintable_characters_are_replaced(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    replace_unprintable()
    print("an otter: \U0001f9a6", flush=True)
    assert shown.getvalue() == b"an otter: ?\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # not every output has an encoding
    replace_unprintable()
    monkeypatch.setattr(sys, "stdout", None)
    replace_unprintable()


# --- numbers ---

BUDGETS = (
    "expected units (6000), a share of the prompt (0.25 or 8x), the bytes of a share in 16 bits "
    "(8x bytes), memory (512MiB), none for no limit"
)
GENERATE = [
    *(
        ("--budget", text, f"{text!r} is not a budget; {BUDGETS}")
        for text in ("abc", "1.5", "0", "0.0", "1.0", "-5", "1x", "1e3", "50%", "²", "", "12K")
    ),
    *(
        ("--budget", text, f"{text!r} is not a budget; {BUDGETS}")
        for text in ("0x bytes", "x bytes", "1x bytes", "8 bytes", "8xbytes", "0.25 bytes")
    ),
    ("--budget", "0MiB", "'0MiB' is less than 1; expected an amount of memory"),
    ("--chunk-size", "abc", "'abc' is not a whole number of at least 1, none, auto or recorded"),
    ("--chunk-size", "0", "'0' is not a whole number of at least 1"),
    ("--stabilizers", "x", "'x' is not a whole number of at least 0 or auto"),
    ("--stabilizers", "-1", "'-1' is not a whole number of at least 0"),
    ("--stabilizers", "none", "'none' is not a whole number of at least 0"),
    ("--local-tokens", "0", "'0' is not a whole number of at least 1 or auto"),
    ("--local-tokens", "1.5", "'1.5' is not a whole number"),
    ("--max-new-tokens", "0", "'0' is not a whole number of at least 1"),
    ("--max-new-tokens", "-1", "'-1' is not a whole number of at least 1"),
    ("--max-new-tokens", "many", "'many' is not a whole number of at least 1"),
    ("--bits", "x", "'x' is not a whole number of at least 1"),
]


@pytest.mark.parametrize(("name", "text", "says"), GENERATE)
def test_a_number_that_cannot_be_is_one_sentence(name, text, says, folder, capsys):
    args = ["--prompt-file", str(folder / "prompt.txt"), f"{name}={text}"]
    with pytest.raises(SystemExit):
        run(folder, "generate", *args)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"locret generate: error: argument {name}: {says}")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("auto", "auto"),
        ("None", None),
        ("512", 512),
        ("0.25", 0.25),
        (".5", 0.5),
        ("8x", 0.125),
        ("512MiB", Memory(512 * 2**20)),
        ("1.5 kib", Memory(1536)),
        ("600 B", Memory(600)),
        ("8x bytes", ByteShare(0.125)),
    ],
)
def test_budgets_have_these_forms(text, budget):
    assert parse_budget(text) == budget


def test_settings_that_cannot_work_are_told_before_a_model_is_loaded(
    folder, nothing_is_loaded, capsys
):
    args = ["--prompt-file", str(folder / "prompt.txt"), "--policy", "random", "--budget", "20"]
    assert run(folder, "generate", *args, "--stabilizers", "21") == 2
    assert "stabilizers is 21 but the budget is 20" in capsys.readouterr().err


def test_bits_that_no_scheme_has_are_told(folder, nothing_is_loaded, capsys):
    args = ["--prompt-file", str(folder / "prompt.txt"), "--quantization", "kivi", "--bits", "7"]
    assert run(folder, "generate", *args) == 2
    assert capsys.readouterr().err == "locret generate: bits is 7; kivi takes 2, 4, 8\n"


CHUNKS = "expected a whole number of at least 1, None, 'auto' or 'recorded'"
PLAN = [
    ("--memory", "abc", "'abc' is not an amount of memory such as 24GiB"),
    ("--memory", "1.5", "'1.5' is not a whole number; expected an amount of memory"),
    ("--memory", "9" * 400, "is more than there is anywhere; expected an amount of memory"),
    ("--context", "xyz", "'xyz' is not a number of tokens such as 4096, 128K (131072) or 1M"),
    ("--context", "1.5", "'1.5' is not a whole number; expected a number of tokens"),
    ("--context", "9" * 30, "is more than there is anywhere; expected a number of tokens"),
    ("--chunk-size", "abc", "'abc' is not a whole number of at least 1, none, auto or recorded"),
    ("--new-tokens", "-1", "'-1' is not a whole number of at least 0"),
    ("--head-width", "wide", "'wide' is not a whole number of at least 0"),
]


@pytest.mark.parametrize(("name", "text", "says"), PLAN)
def test_a_plan_of_what_cannot_be_is_one_sentence(name, text, says, folder, capsys):
    given = {"--memory": "1GiB", "--context": "1K"} | {name: text}
    with pytest.raises(SystemExit):
        run(folder, "plan", *(f"{name}={value}" for name, value in given.items()))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"locret plan: error: argument {name}: ") and says in error


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"chunk_size": "64"}, f"chunk_size is '64'; {CHUNKS}; give a number, 64, not a text"),
        ({"chunk_size": "abc"}, f"chunk_size is 'abc'; {CHUNKS}"),
        ({"stabilizers": "x"}, "stabilizers is 'x'; expected a whole number of at least 0"),
        ({"stabilizers": 99}, "stabilizers is 99 but the budget is 32"),
        ({"local_tokens": 0}, "local_tokens is 0; expected a whole number of at least 1"),
        ({"positions": "here"}, "positions is 'here'; expected 'compact' or 'original'"),
        ({"decode_interval": 0}, "decode_interval is 0; expected a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_engine_settings_of_an_evaluation_are_checked_without_a_model(settings, says, own):
    setup = Setup("streaming_llm", 32, engine=settings if own else {})
    with pytest.raises(ValueError) as error:
        setup.check({} if own else settings)
    assert str(error.value).startswith(f"setup streaming_llm 32 query_agnostic: {says}")


def test_engine_settings_that_can_be_pass():
    words = {"chunk_size": "auto", "stabilizers": "auto", "positions": "auto"}
    for setup in (Setup("full"), Setup("streaming_llm", "8x"), Setup("streaming_llm", 0.25)):
        setup.check(words)
    Setup("full").check({"stabilizers": 99})


# --- where and in what a model computes ---


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("foo", "device 'foo' is unknown; expected cpu, cuda or cuda:N"),
        ("cuda:99", "device 'cuda:99' is not there: torch sees"),
        ("meta", "device 'meta' holds no values; expected"),
        ("hpu", "device 'hpu' cannot be used by this torch; expected"),
        ("vulkan", "device 'vulkan' cannot be used by this torch; expected"),
        *(
            (name, f"device {name!r} cannot be used by this torch; expected")
            for name, there in (
                ("mps", torch.backends.mps.is_available()),
                ("xpu", torch.xpu.is_available()),
            )
            if not there
        ),
    ],
)
def test_a_device_that_is_not_there_is_one_line(name, says, folder, capsys):
    with pytest.raises(ValueError, match=says):
        find_device(name)
    args = ["--prompt-file", str(folder / "prompt.txt"), "--device", name]
    assert run(folder, "generate", *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"locret generate: {says}")


@pytest.mark.parametrize("dtype", ["float8", "int8", "Tensor", "", None, torch.float32])
def test_a_dtype_that_models_are_not_loaded_in_is_refused(dtype, folder):
    with pytest.raises(ValueError, match="is unknown; expected one of auto, float32, bfloat16"):
        load_model(str(folder / "backbone"), dtype=dtype)


@pytest.mark.parametrize("policy", ["full", "keydiff", "locret"])
def test_a_model_without_weights_is_refused(policy):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    heads = tiny_heads(tiny_model("llama")) if policy == "locret" else None
    with pytest.raises(ValueError, match="made on the meta device.*load it with from_pretrained"):
        locret.Engine(model, policy, heads=heads, budget=20, stabilizers=3).prefill(prompt(60))


# --- paths ---

FILE = ["--prompt-file", "p"]
PATHS = [
    ["generate", "--model", "", *FILE],
    ["generate", "--model", "m", "--prompt-file", ""],
    *(["generate", "--model", "m", *FILE, name, ""] for name in ("--heads", "--adapter")),
    ["answer", "", "--model", "m"],
    ["answer", "p", "--model", "m", "--output", ""],
    ["plan", "--model", "", "--memory", "24GiB", "--context", "128K"],
    ["convert", "", "there"],
    ["convert", "here", ""],
    ["inspect", ""],
    ["push", "", "owner/name", "--dry-run"],
    ["calibrate", "--model", "m", "--data", "synthetic", "", "--policy", "keydiff"],
    ["calibrate", "--model", "m", "--data", "synthetic", "--policy", "keydiff", "--out", ""],
    ["report", "", "--out", "o"],
    ["report", "r.json", "--out", ""],
    ["reproduce", ""],
    *(["reproduce", "r.json", name, ""] for name in ("--output", "--data-dir")),
    *(["needle", "--model", "m", name, ""] for name in ("--json-out", "--plot", "--haystack")),
    ["grid", "--model", "m", "--json-out", ""],
    ["serve", ""],
    ["serve", "m", "--contexts", ""],
]


@pytest.mark.parametrize("args", PATHS, ids=" ".join)
def test_an_empty_path_is_told(args, tmp_path, monkeypatch, capsys):
    """It is not the working directory, into which a command would write, or which it would push."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(args)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"locret {args[0]}: error: argument ")
    assert error.endswith(": this is an empty path; give a name (is a shell variable unset?)")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "--model", "m", *FILE, "--quotas", ""],
        ["plan", "--model", "m", "--memory", "9GiB", "--context", "9", "--quotas="],
    ],
)
def test_an_empty_path_of_quotas_is_told(args, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert "argument --quotas: quotas is an empty path" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "heads", "adapter", "data_dir", "cache_dir"])
def test_an_empty_path_of_an_evaluation_is_told(name, capsys):
    assert main(["evaluate", "--config", "needle_smollm2.yaml", f"--{name}=", "--dry_run"]) == 2
    assert f"{name} is an empty path" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "fit", "adapt"])
def test_an_empty_path_of_a_config_is_told(command, capsys):
    assert main([command, "--config", ""]) == 2
    assert "config is an empty path" in capsys.readouterr().err


@pytest.mark.parametrize("load", [load_model, load_config, RetainingHeads.from_pretrained])
def test_an_empty_name_is_not_the_working_directory(load, folder, monkeypatch):
    monkeypatch.chdir(folder / "backbone")
    with pytest.raises(ValueError, match="is an empty path"):
        load("")


def test_heads_are_not_written_to_an_empty_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder of the heads is an empty path"):
        tiny_heads(tiny_model("llama")).save_pretrained("")
    assert not any(tmp_path.iterdir())
