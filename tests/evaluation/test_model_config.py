"""Values in place of a model's own: a window that is stretched by YaRN, of any checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from locret.evaluation import evaluate
from locret.evaluation.ask import Ranks
from locret.evaluation.config import EvalConfig
from locret.evaluation.questions import changes_of, prepare
from tests.tiny_gguf import write_gguf
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

WINDOW = 600
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
STRETCHED = {"max_position_embeddings": 4 * WINDOW, "rope_parameters": YARN}


@pytest.fixture(scope="module", params=["folder", "gguf"])
def name(request, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), tiny_tokenizer()
    model = tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=WINDOW)
    if request.param == "gguf":
        pytest.importorskip("gguf")
        return str(write_gguf(folder / "tiny.gguf", model, tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(name, tmp_path):
    return EvalConfig(
        model=name,
        tasks="niah_single",
        lengths=2000,
        limit=2,
        setups=({"policy": "keydiff", "budget": "8x"},),
        output=str(tmp_path / "out"),
        dtype="float32",
        device="cpu",
        chat_template=False,
        engine={"chunk_size": 256},
        cache_dir=str(tmp_path / "cache"),
    )


def longest(config):
    """Of the prompts of each setup."""
    asked = prepare(config).asked
    return {q.setup.policy: len(q.prompt.ids) for q in asked}


def test_positions_count_against_the_window_and_compact_ones_do_not(config):
    compact = longest(config)
    assert compact["full"] + 32 <= WINDOW < 2000 <= compact["keydiff"]
    original = longest(replace(config, engine={"chunk_size": 256, "positions": "original"}))
    assert original["keydiff"] == compact["full"]
    stretched = longest(replace(config, engine={"positions": "original"}, model_config=STRETCHED))
    assert set(stretched.values()) == {compact["keydiff"]}


def test_the_model_takes_the_values_and_keeps_the_rest_of_its_own(config):
    prepared = prepare(replace(config, model_config=STRETCHED))
    model = evaluate.load_asker(prepared, Ranks()).model
    rope = model.config.rope_parameters
    assert rope == prepared.sources["model_config"]["rope_parameters"]
    assert rope.items() > YARN.items() and rope["rope_theta"] > 0
    assert model.config.max_position_embeddings == 4 * WINDOW
    assert model.model.rotary_emb.attention_scaling > 1


def test_answers_depend_on_the_values(config):
    plain, again = prepare(config), prepare(replace(config, model_config={}))
    assert [q.key for q in plain.asked] == [q.key for q in again.asked]
    assert "model_config" not in plain.sources
    stretched = prepare(replace(config, model_config=STRETCHED))
    assert not {q.key for q in plain.asked} & {q.key for q in stretched.asked}


def test_a_value_that_no_such_model_has_is_refused():
    model = SimpleNamespace(model_type="qwen2", rope_parameters=None)
    assert changes_of({"rope_parameters": YARN}, model) == {"rope_parameters": YARN}
    with pytest.raises(ValueError, match="model_config has rope_scalin, which a config of qwen2"):
        changes_of({"rope_scalin": YARN}, model)
