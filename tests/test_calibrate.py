"""Quotas measured by scores: what is counted, and the command that does it."""

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import locret
from locret import RetainingHeads
from locret.cli import main
from locret.commands import heads as commands
from locret.engine.budgets import Calibration, why_not_calibrated
from locret.heads.quotas import quotas_of
from locret.heads.targets import LABELS
from locret.policies import POLICIES, Policy
from locret.policies.base import LocretPolicy
from locret.policies.compose import AdaptiveHeads, SharedLayers
from locret.policies.kvzip import Wording
from locret.system.interrupts import Stopped
from tests.tiny_models import prompt, tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

FAVOURED = (1, 0)
"""Layer and head whose scores spread furthest."""


def favouring(model, **record):
    """Heads of which one scores some of its units far above all others."""
    heads = tiny_heads(model, **record)
    layer, head = FAVOURED
    with torch.no_grad():
        heads[layer].fc2.weight[head] *= 20
    return heads


class Recording(Policy):
    """Keeps what it ranked, by layer."""

    name = "recording"

    def __init__(self, policy):
        self.policy = policy
        self.ranked = {}

    def rank(self, chunk):
        self.ranked[chunk.layer_idx] = self.policy.rank(chunk)
        return self.ranked[chunk.layer_idx]


# ---- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "exaone4", "gemma2", "gpt_oss", "smollm3", "phi3"])
@pytest.mark.parametrize("policy", ["keydiff", "snapkv", "locret"])
def test_scores_are_those_of_a_prompt_read_at_once(family, policy):
    model = tiny_model(family)
    made = LocretPolicy(tiny_heads(model)) if policy == "locret" else POLICIES[policy]()
    ours, engines = Recording(made), Recording(made)
    engine = locret.Engine(model, engines, budget=9, chunk_size=None, stabilizers=0)
    engine.prefill(prompt(60))
    Calibration(engine.backbone, ours).add(prompt(60))
    assert ours.ranked.keys() == engines.ranked.keys()
    for layer, scores in engines.ranked.items():
        torch.testing.assert_close(ours.ranked[layer], scores)


def test_quotas_are_the_mean_over_contexts():
    model = tiny_model("llama")
    policy = Recording(POLICIES["keydiff"]())
    engine = locret.Engine(model, policy)
    calibration, kept = Calibration(engine.backbone, policy, [4]), []
    for tokens in (40, 90):
        calibration.add(prompt(tokens))
        scores = torch.stack([policy.ranked[i][0] for i in range(2)])
        best = scores.flatten().topk(tokens).indices // tokens  # a quarter of 2 layers x 2 heads
        kept.append(best.bincount(minlength=4) / tokens)
    expected = sum(kept) / sum(kept).mean()
    expected = expected.clamp(min=0.05) / expected.clamp(min=0.05).mean()
    assert np.allclose(calibration.quotas()["4"], expected.view(2, 2), atol=1e-4)


def test_a_head_that_matters_gets_more():
    model = tiny_model("llama")
    engine = locret.Engine(model, heads=favouring(model))
    calibration = Calibration(engine.backbone, engine.policy)
    calibration.add(prompt(200))
    quotas = calibration.quotas()
    assert list(quotas) == ["2", "4", "8", "16", "32"]
    layer, head = FAVOURED
    for table in (quotas["8"], quotas["16"], quotas["32"]):
        assert max(q for row in table for q in row) == table[layer][head]
    assert quotas["32"][layer][head] > quotas["4"][layer][head] > quotas["2"][layer][head]


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    engine = locret.Engine(model, "keydiff")
    before = model(prompt(30)).logits
    Calibration(engine.backbone, engine.policy).add(prompt(30))
    assert torch.equal(model(prompt(30)).logits, before)


def test_scores_must_be_finite():
    class Endless(Policy):
        name = "endless"

        def score(self, chunk):
            return torch.full(chunk.key.shape[:3], torch.inf)

    engine = locret.Engine(tiny_model("llama"), Endless())
    calibration = Calibration(engine.backbone, engine.policy)
    with pytest.raises(ValueError, match="'endless' gave scores that are not finite .*layer 0"):
        calibration.add(prompt(30))
    assert engine.generate(prompt(5), max_new_tokens=2).shape == (1, 7)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("full", "it keeps every unit"),
        ("sirllm", "alike in all heads"),
        (SharedLayers("keydiff"), "alike in all heads"),
        (AdaptiveHeads("full"), "it keeps every unit"),
    ],
)
def test_policies_without_an_opinion_are_refused(policy, message):
    engine = locret.Engine(tiny_model("llama"), policy)
    with pytest.raises(ValueError, match=f"cannot be calibrated: .*{message}"):
        Calibration(engine.backbone, engine.policy)


def test_all_other_policies_can_be_calibrated():
    assert {name for name, policy in POLICIES.items() if why_not_calibrated(policy)} == {
        "full",
        "sirllm",
    }


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    favouring(model).save_pretrained(folder / "heads")
    (folder / "book.txt").write_text("One quiet otter. " * 900, encoding="utf-8")
    rows = [{"context": "A lone badger. " * 200}, {"text": "Four dark ferries. " * 12}]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    return folder


@pytest.fixture
def heads(workplace, tmp_path):
    loaded = RetainingHeads.from_pretrained(workplace / "heads")
    return loaded.save_pretrained(tmp_path / "heads")


def run(workplace, *args):
    given = ["--model", str(workplace / "backbone"), "--device", "cpu", *map(str, args)]
    return main(["calibrate", *given])


def test_quotas_go_into_the_heads_folder(workplace, heads, capsys):
    weights = (heads / "heads.safetensors").read_bytes()
    data = ["--data", "synthetic", "--tokens", 600, "--contexts", 3]
    assert run(workplace, "--heads", heads, *data) == 0
    out, told = capsys.readouterr()
    assert "quotas of locret, from 3 contexts of" in out and str(heads / "config.json") in out
    assert "heads that learned max_logit may score on another scale in each KV head" in out
    assert "scoring: 3 of 3 contexts" in told
    loaded = RetainingHeads.from_pretrained(heads)
    layer, head = FAVOURED
    assert list(loaded.config.quotas) == ["16", "2", "32", "4", "8"]
    assert loaded.config.quotas["8"][layer][head] > 1.2
    assert (heads / "heads.safetensors").read_bytes() == weights
    assert "quotas at 32x" in (heads / "README.md").read_text()
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    engine = locret.Engine(model, heads=loaded)
    assert engine.config.reading.quotas == quotas_of(loaded.config.quotas)
    assert main(["inspect", str(heads)]) == 0
    assert "of the mean; the tenth of the heads" in capsys.readouterr().out
    assert run(workplace, "--heads", heads, *data) == 0  # and again
    assert RetainingHeads.from_pretrained(heads).config == loaded.config
    assert run(workplace, "--heads", heads, *data, "--sharpness", 1.5) == 0
    sharper = RetainingHeads.from_pretrained(heads).config.quotas["2"]
    assert sharper[layer][head] > loaded.config.quotas["2"][layer][head]


def test_a_card_of_ones_own_stays(workplace, heads):
    (heads / "README.md").write_text("mine")
    data = ["--data", workplace / "book.txt", "--tokens", 300, "--contexts", 1]
    assert run(workplace, "--heads", heads, *data) == 0
    assert (heads / "README.md").read_text() == "mine"
    assert RetainingHeads.from_pretrained(heads).config.quotas


@pytest.mark.parametrize("data", ["book.txt", "rows.jsonl", "rows.jsonl.gz"])
def test_quotas_of_any_policy_go_into_a_file(data, workplace, tmp_path, capsys):
    out = tmp_path / "quotas.json"
    args = ["--policy", "keydiff", "--data", workplace / data, "--out", out]
    assert run(workplace, *args, "--tokens", 400, "--compressions", "2,1.5x") == 0
    told = capsys.readouterr().out
    assert f'Engine(model, "keydiff", quotas="{out}")' in told and "learned" not in told
    assert list(json.loads(out.read_text())) == ["1.5", "2"]
    assert out.read_text().count("\n") < 20
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    quotas = locret.Engine(model, "keydiff", quotas=out).config.reading.quotas
    assert quotas == quotas_of(json.loads(out.read_text()))


def test_nothing_is_written_if_a_signal_stops_it(workplace, heads, monkeypatch, capsys):
    record = (heads / "config.json").read_bytes()
    add = Calibration.add

    def stopped(self, ids):
        if self._fractions:
            raise Stopped(15)
        add(self, ids)

    monkeypatch.setattr(Calibration, "add", stopped)
    assert run(workplace, "--heads", heads, "--data", workplace / "book.txt") == 128 + 15
    assert "stopped; nothing was written, and the same command begins" in capsys.readouterr().err
    assert (heads / "config.json").read_bytes() == record


def test_what_is_wrong_with_the_data_is_told_before_weights_are_loaded(
    workplace, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(commands.shared, "load", lambda given: pytest.fail("loaded"))
    (tmp_path / "short.txt").write_text("One quiet otter.")
    args = ["--policy", "keydiff", "--out", tmp_path / "q.json", "--data", tmp_path / "short.txt"]
    assert run(workplace, *args) == 2
    assert "the longest of 1 texts has" in capsys.readouterr().err


def test_fewer_contexts_than_asked_for_are_told(workplace, tmp_path, capsys):
    args = ["--policy", "keydiff", "--out", tmp_path / "q.json", "--data", workplace / "rows.jsonl"]
    assert run(workplace, *args, "--tokens", 2000, "--contexts", 9) == 0
    out = capsys.readouterr().out
    assert "(the data has no more; 9 were asked for)" in out
    assert "generate --model" in out and "--quotas" in out


REFUSED = [
    (["--data", "synthetic"], "give --heads, or a --policy"),
    (["--policy", "locret", "--data", "synthetic"], "scores with heads; give --heads"),
    (["--policy", "full", "--data", "synthetic", "--out", "q.json"], "it keeps every unit"),
    (["--policy", "keydiff", "--data", "synthetic"], "give --out FILE.json"),
    (["--policy", "keydiff", "--data", "synthetic", "--out", "q.npy"], "expected a .json file"),
    (["--policy", "keydiff", "--data", "synthetic", "--out", "{}/heads"], "expected a .json file"),
    (["--policy", "keydiff", "--data", "none.txt", "--out", "q.json"], "is not a file; expected"),
    (
        ["--policy", "keydiff", "--data", "synthetic", "--out", "q.json", "--tokens", "4K"],
        "tokens is 4,096 and the model's window 2,048",
    ),
    (
        ["--policy", "keydiff", "--data", "synthetic", "--out", "q.json", "--tokens", "100"],
        "tokens is 100; expected at least",
    ),
    (
        ["--policy", "keydiff", "--data", "{}/short.txt", "--out", "q.json"],
        "the longest of 1 texts has",
    ),
    (["--policy", "keydiff", "--data", "{}/odd.jsonl", "--out", "q.json"], "has no text in"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_cannot_be_calibrated_is_refused(args, message, workplace, capsys, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "short.txt").write_text("One quiet otter.")
    (workplace / "odd.jsonl").write_text('{"words": "none"}\n')
    assert run(workplace, *[arg.format(workplace) for arg in args]) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "q.json").exists()


def test_heads_that_are_no_folder_need_a_file(workplace, tmp_path, capsys):
    heads = RetainingHeads.from_pretrained(workplace / "heads")
    released = heads.save_released(tmp_path / "heads.bin")
    assert run(workplace, "--heads", released, "--data", "synthetic") == 2
    assert "are not in an artifact folder here" in capsys.readouterr().err


def test_files_of_another_method_are_left_as_they_are(workplace, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LABELS, "log_value_share", None)
    theirs = {"model_type": "kvzap", "n_modules": 2, "input_dim": 64, "output_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    shapes = {"weight": (2, 64), "bias": (2,)}
    tensors = {f"layers.{i}.{n}": torch.ones(shape) for i in (0, 1) for n, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert run(workplace, "--heads", tmp_path, "--data", "synthetic") == 2
    assert "are not in an artifact folder here" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text()) == theirs
    out = ["--out", tmp_path / "quotas.json", "--tokens", 300, "--contexts", 1]
    assert run(workplace, "--heads", tmp_path, "--data", workplace / "book.txt", *out) == 0


def test_heads_that_read_the_question_are_refused(workplace, tmp_path, capsys):
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer()))
    heads = tiny_heads(model, query_tokens=3).save_pretrained(tmp_path / "heads")
    assert run(workplace, "--heads", heads, "--data", "synthetic") == 2
    assert "its heads read a question in front" in capsys.readouterr().err


# ---- contexts ------------------------------------------------------------------------------------


def contexts(data, count=60, tokens=300):
    return list(commands._contexts(list(map(str, data)), tiny_tokenizer(), tokens, count))


def test_documents_take_turns(workplace, tmp_path):
    (tmp_path / "short.txt").write_text("Tiny. " * 40)
    read = contexts([workplace / "book.txt", tmp_path / "short.txt", workplace / "rows.jsonl"])
    assert all(128 <= len(ids) <= 300 for ids in read)
    tokenizer = tiny_tokenizer()
    words = [tokenizer.decode(ids) for ids in read]
    starts = ["otter", "Tiny", "badger", "ferries", "otter", "badger", "otter", "badger"]
    assert all(word in text for word, text in zip(starts, words, strict=False))
    assert len(contexts([workplace / "book.txt"], count=2)) == 2


def test_contexts_begin_as_prompts_do(workplace):
    tokenizer = tiny_tokenizer()
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "One quiet otter."}], tokenize=False
    )
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    opening = list(Wording.of(tokenizer).opening)
    assert opening and ids[: len(opening)] == opening
    assert all(ids[: len(opening)] == opening for ids in contexts([workplace / "book.txt"]))
