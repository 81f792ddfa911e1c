"""Stock `generate` told to use an artifact answers as the engine does."""

import copy
import functools
import shutil

import pytest
import torch
import transformers

import locret
from tests.tiny_models import tiny_heads, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = {"budget": 24, "chunk_size": 32, "stabilizers": 4, "local_tokens": 8}
IDS = torch.arange(1, 121)[None] % 60 + 2


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """A folder of this test for the code that transformers copies."""
    folder = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def model():
    return tiny_model("qwen3")


@pytest.fixture
def folder(model, tmp_path):
    return tiny_heads(model, defaults=SETTINGS).save_pretrained(tmp_path / "my-heads")


def by_engine(model, folder, ids=IDS, heads=None, **settings):
    heads = heads or locret.RetainingHeads.from_pretrained(folder)
    return locret.Engine(model, heads=heads, **settings).generate(ids, max_new_tokens=8)


def custom(model, folder, ids=IDS, **kwargs):
    return model.generate(
        ids, custom_generate=str(folder), trust_remote_code=True, max_new_tokens=8, **kwargs
    )


@pytest.mark.parametrize("settings", [{}, {"budget": "8x", "chunk_size": 16}])
def test_it_answers_as_the_engine(model, folder, settings):
    expected = by_engine(model, folder, **settings)
    assert torch.equal(custom(model, folder, **settings), expected)
    named = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(custom(model, folder, None, **named, **settings), expected)
    full = model.generate(IDS, max_new_tokens=8, do_sample=False)
    assert not torch.equal(full, expected)  # the budget shows


def test_arguments_of_generate_are_obeyed(model, folder):
    class Shown:
        tokens = 0

        def put(self, value):
            self.tokens += value.numel()

        def end(self):
            pass

    shown = Shown()
    output = custom(model, folder, streamer=shown, return_dict_in_generate=True)
    assert output.sequences.shape == (1, IDS.shape[1] + 8) and shown.tokens == IDS.shape[1] + 8
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    output = model.generate(
        IDS, generation_config=config, custom_generate=str(folder), trust_remote_code=True
    )
    assert output.shape[1] == IDS.shape[1] + 3


def test_as_transformers_serve_calls_it(model, folder):
    tokenizer = tiny_tokenizer()
    answer = custom(model, folder)[0, IDS.shape[1] :].tolist()
    texts = [tokenizer.decode([token]) for token in answer]
    end = next(i for i, text in enumerate(texts) if text.isascii() and text.strip())
    config = transformers.GenerationConfig(
        max_new_tokens=8, do_sample=False, stop_strings=[texts[end]]
    )
    output = model.generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        generation_config=config,
        tokenizer=tokenizer,
        custom_generate=str(folder),
        trust_remote_code=True,
    )
    assert output[0, IDS.shape[1] :].tolist() == answer[: end + 1]


def test_a_context_read_before_is_asked(model, folder):
    engine = locret.Engine(model, heads=locret.RetainingHeads.from_pretrained(folder))
    cache, question = engine.prefill(IDS), IDS[:, 3:9]
    untouched = cache.snapshot()
    expected = engine.generate(question, cache=cache, max_new_tokens=8)
    cache.restore(untouched)
    assert torch.equal(custom(model, folder, question, cache=cache), expected)
    with pytest.raises(ValueError, match="DynamicCache; leave it out"):
        custom(model, folder, cache=transformers.DynamicCache())


def test_nobody_s_code_runs_untrusted(model, folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(IDS, custom_generate=str(folder), trust_remote_code=False, max_new_tokens=2)


def test_a_folder_may_be_moved_and_two_of_a_name_are_told_apart(model, folder, tmp_path):
    expected = by_engine(model, folder)
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    shutil.move(folder, moved)
    assert torch.equal(custom(model, moved), expected)
    other = tiny_heads(model, seed=9, defaults=SETTINGS | {"budget": 12}).save_pretrained(folder)
    assert torch.equal(custom(model, other), by_engine(model, other))
    assert torch.equal(custom(model, moved), expected)


def test_heads_that_were_trained_anew_are_read_anew(model, folder):
    custom(model, folder)
    anew = tiny_heads(model, seed=9, defaults=SETTINGS | {"budget": 12})
    anew.save_pretrained(folder)
    assert torch.equal(custom(model, folder), by_engine(model, folder, heads=anew))


def test_bound_to_a_model_it_does_not_call_itself(model, folder):
    """As `from_pretrained` binds what lies in a model's own repository."""
    expected = by_engine(model, folder)
    function = model.load_custom_generate(str(folder), trust_remote_code=True)
    model.generate = functools.partial(function, model=model)
    bound = model.generate
    found = model.generate(IDS, heads=str(folder), max_new_tokens=8)
    assert torch.equal(found, expected) and model.generate is bound
    with pytest.raises(ValueError, match="no heads are named"):
        model.generate(IDS, max_new_tokens=8)
    assert model.generate is bound


def test_a_model_s_own_repository_may_hold_the_code(model, folder, tmp_path):
    """Then whoever loads the model and trusts its code gets ours as `generate`."""
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(folder / "custom_generate", tmp_path / "model" / "custom_generate")
    code = tmp_path / "model" / "custom_generate" / "generate.py"
    code.write_text(code.read_text().replace("HEADS = None", f"HEADS = {str(folder)!r}"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True
    )
    assert torch.equal(loaded.generate(IDS, max_new_tokens=8), by_engine(model, folder))
    untrusted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    full = untrusted.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(full, model.generate(IDS, max_new_tokens=8, do_sample=False))


def test_code_that_somebody_edited_is_kept(model, folder):
    code = folder / "custom_generate" / "generate.py"
    code.write_text(code.read_text().replace("HEADS = None", 'HEADS = "me/heads"'))
    edited = code.read_text()
    tiny_heads(model, seed=9).save_pretrained(folder)
    assert code.read_text() == edited


def test_heads_of_another_model_are_refused(folder):
    with pytest.raises(ValueError, match="another backbone"):
        custom(tiny_model("llama", num_attention_heads=4), folder)


def test_the_model_is_left_as_it_was(model, folder):
    before = copy.copy(vars(model))
    custom(model, folder)
    assert vars(model).keys() == before.keys()
