"""Contexts as things: asked many times, saved, loaded in another process."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

import locret
from locret.cache.store import Tail
from tests.tiny_models import prompt, tiny_heads, tiny_model

SMALL = {"budget": 20, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def engine(model):
    return locret.Engine(model, heads=tiny_heads(model), **SMALL)


@pytest.mark.parametrize("settings", [{}, {"positions": "original"}, {"decode_interval": 4}])
def test_every_question_sees_the_untouched_context(model, settings):
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL | settings)
    cache = engine.prefill(prompt(60))
    context, bytes_before = cache.snapshot(), cache.nbytes
    for seed in (1, 2, 1, 3):
        question = prompt(4, seed=seed)
        given = engine.generate(question, cache=cache, **GREEDY)
        fresh = engine.generate(question, cache=engine.prefill(prompt(60)), **GREEDY)
        assert torch.equal(given, fresh)
        cache.restore(context)
        assert cache.seen == 60
        assert cache.nbytes == bytes_before
        assert cache.report()["units"] == [20, 20]


def test_snapshot_in_the_middle_of_a_chat(engine):
    cache = engine.prefill(prompt(60))
    engine.generate(prompt(4, seed=1), cache=cache, **GREEDY)
    here = cache.snapshot()
    first = engine.generate(prompt(4, seed=2), cache=cache, **GREEDY)
    cache.restore(here)
    assert torch.equal(engine.generate(prompt(4, seed=2), cache=cache, **GREEDY), first)
    cache.restore(here)
    engine.generate(prompt(4, seed=3), cache=cache, **GREEDY | {"max_new_tokens": 300})
    cache.restore(here)
    assert torch.equal(engine.generate(prompt(4, seed=2), cache=cache, **GREEDY), first)


def test_snapshot_of_another_cache_is_refused(engine):
    snapshot = engine.prefill(prompt(30)).snapshot()
    with pytest.raises(ValueError, match="cache of 2 layers; this one has 3"):
        locret.RetainedCache(3).restore(snapshot)


def test_snapshot_of_other_settings_is_refused(model, engine):
    other = locret.Engine(model, heads=tiny_heads(model), **SMALL, positions="original")
    cache = engine.prefill(prompt(60))
    alone = asked(engine, cache.fork())
    with pytest.raises(ValueError, match="'positions': 'original'.*this one has.*'compact'"):
        cache.restore(other.prefill(prompt(60)).snapshot())
    assert torch.equal(asked(engine, cache), alone)


def test_forks_are_asked_apart_and_together(engine):
    """Neither leaves a trace in the context they come from."""
    cache, longer = engine.prefill(prompt(60)), engine.prefill(prompt(75, seed=1))
    alone = [asked(engine, one.fork()) for one in (cache, longer, cache)]
    together = asked(engine, engine.together([cache, longer, cache]), rows=3)
    assert torch.equal(together, torch.cat(alone))
    tokens = prompt(4, seed=5)
    read_on = engine.together([cache, longer], [tokens[:, :3], prompt(9)])
    last = engine.generate(torch.cat([tokens[:, 3:], prompt(1, seed=2)]), cache=read_on, **GREEDY)
    assert torch.equal(last[:1, 1:], alone[0][:, 4:])
    assert (cache.seen, cache.report()["units"]) == (60, [20, 20])
    assert torch.equal(asked(engine, cache), alone[0])


def test_what_cannot_stand_together_is_refused(engine):
    with pytest.raises(ValueError, match="got 0"):
        engine.together([])
    with pytest.raises(ValueError, match=r"got 2, with \[1, 3\] rows"):
        engine.together([engine.prefill(prompt(40)), engine.prefill(prompt(40, batch=3))])
    with pytest.raises(ValueError, match="input_ids has shape"):
        engine.together([engine.prefill(prompt(40))], [prompt(3)[0]])


DIFFERENT = [
    ({"positions": "original"}, "positions: 'compact', 'original'"),
    ({"quantization": {"name": "kivi", "bits": 8}}, r"quantization: None, {.*'kivi'.*}"),
    ({"merging": "similar"}, r"merging: None, {'into': 'similar'.*}"),
    ({"recall": {"block_size": 4}}, r"recall: None, {'block_size': 4.*}"),
]


@pytest.mark.parametrize("questions", [(), (prompt(2), prompt(3))])
@pytest.mark.parametrize(("settings", "says"), DIFFERENT)
def test_contexts_of_other_settings_do_not_stand_together(model, engine, settings, says, questions):
    other = locret.Engine(model, heads=tiny_heads(model), **SMALL | settings)
    caches = [engine.prefill(prompt(60)), other.prefill(prompt(60, seed=1))]
    alone = [asked(engine, caches[0].fork()), asked(other, caches[1].fork())]
    for reads in (engine, other):
        with pytest.raises(ValueError, match=f"the caches differ in {says}; ask them apart"):
            reads.together(caches, questions)
    assert torch.equal(asked(engine, caches[0]), alone[0])  # nothing is lost
    assert torch.equal(asked(other, caches[1]), alone[1])


def test_bits_are_settings_too(model):
    engines = [
        locret.Engine(model, "keydiff", quantization={"name": "kivi", "bits": bits}, **SMALL)
        for bits in (8, 4)
    ]
    with pytest.raises(ValueError, match="differ in quantization: .*'bits': 8.*'bits': 4"):
        engines[0].together([engine.prefill(prompt(60)) for engine in engines])


def test_contexts_of_other_models_do_not_stand_together(engine):
    other = tiny_model("llama", seed=1)
    foreign = locret.Engine(other, heads=tiny_heads(other), **SMALL).prefill(prompt(60))
    for caches in ([engine.prefill(prompt(60)), foreign], [foreign]):
        with pytest.raises(ValueError, match="the cache is a context of another model"):
            engine.together(caches)
    deep = tiny_model("llama", num_hidden_layers=3)
    deeper = locret.Engine(deep, "keydiff", **SMALL).prefill(prompt(60))
    with pytest.raises(ValueError, match="of 3 layers; expected one of engine.prefill"):
        engine.together([engine.prefill(prompt(60)), deeper])


def test_contexts_rotated_by_another_rule_do_not_stand_together():
    model = tiny_model("phi3")
    rules = ("long", "by_length")
    engines = [locret.Engine(model, "keydiff", longrope=rule, **SMALL) for rule in rules]
    caches = [engine.prefill(prompt(60)) for engine in engines]
    with pytest.raises(ValueError, match="longrope='by_length' and this engine has 'long'"):
        engines[0].together(caches)


def test_what_is_no_context_does_not_stand_with_one(engine):
    beams = engine.prefill(prompt(60))
    beams.token_ids = None
    for other, says in (
        (None, "cache is a NoneType"),
        (DynamicCache(), "cache is a DynamicCache"),
        (locret.RetainedCache(2), "the cache has read nothing yet"),
        (beams, "knows the ids of 0"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.together([engine.prefill(prompt(60)), other])


def test_contexts_that_keep_other_numbers_of_units_stand_together(model):
    """By whatever policy, in whatever chunks: what is held is held alike."""
    changes = ({}, {"budget": 33}, {"budget": None}, {"budget": [20, 30]}, {"chunk_size": 30})
    engines = [
        *(locret.Engine(model, heads=tiny_heads(model), **SMALL | change) for change in changes),
        *(locret.Engine(model, name, **SMALL) for name in ("snapkv", "h2o", "streaming_llm")),
    ]
    caches = [engine.prefill(prompt(50 + i, seed=i)) for i, engine in enumerate(engines)]
    asked(engines[1], caches[1])
    for reader in engines[0], engines[-1]:
        alone = [asked(reader, cache.fork()) for cache in caches]
        batch = reader.together(caches)
        assert torch.equal(asked(reader, batch, rows=len(caches)), torch.cat(alone))
        tokens = prompt(4, seed=5)
        read_on = reader.together(caches, [tokens[:, :3]] * len(caches))
        last = reader.generate(tokens[:, 3:].repeat(len(caches), 1), cache=read_on, **GREEDY)
        assert torch.equal(last[:, 1:], torch.cat(alone)[:, 4:])


@pytest.mark.parametrize("evicts", [False, True])
def test_questions_in_front_may_differ_where_answers_do_not_evict(model, evicts):
    heads = tiny_heads(model, query_tokens=5)
    interval = {"decode_interval": 4} if evicts else {}
    engine = locret.Engine(model, heads=heads, **SMALL | interval)
    queries = [prompt(n, seed=n) for n in (5, 3)]
    caches = [engine.prefill(prompt(60, seed=i), query_ids=q) for i, q in enumerate(queries)]
    if evicts:
        with pytest.raises(ValueError, match="differ in tokens of the question in front: 5, 3"):
            engine.together(caches)
    else:
        alone = [asked(engine, cache.fork()) for cache in caches]
        assert torch.equal(asked(engine, engine.together(caches), rows=2), torch.cat(alone))


def test_a_context_without_a_budget_does_not_stand_where_answers_evict(model):
    settings = SMALL | {"decode_interval": 4}
    engine = locret.Engine(model, "keydiff", **settings)
    whole = locret.Engine(model, "keydiff", **settings | {"budget": None})
    caches = [engine.prefill(prompt(60)), whole.prefill(prompt(60))]
    with pytest.raises(ValueError, match="differ in whether a budget holds: True, False"):
        engine.together(caches)


@pytest.mark.parametrize("order", [1, -1])
def test_contexts_with_and_without_scores_stand_together_where_none_is_evicted(model, order):
    engines = [locret.Engine(model, "keydiff", **SMALL | e) for e in ({}, {"decode_interval": 4})]
    caches = [engine.prefill(prompt(60)) for engine in engines][::order]
    batch = engines[0].together(caches)
    alone = [asked(engines[0], cache.fork()) for cache in caches]
    assert torch.equal(asked(engines[0], batch, rows=2), torch.cat(alone))
    with pytest.raises(ValueError, match="decode_interval: this cache"):
        asked(engines[1], engines[1].together(caches), rows=2)


def test_answers_before_are_remembered_together(engine):
    """Some were asked before, and the last token of their answer is not in the cache yet."""
    caches, last = [engine.prefill(prompt(n)) for n in (40, 40, 60, 40)], prompt(2, seed=9)
    for i in (1, 2):
        engine.generate(prompt(3, seed=i), cache=caches[i], **GREEDY)
    questions = [prompt(n, seed=n) for n in (5, 5, 5, 6)]
    for given in ((), questions):
        each = [torch.cat([question, last], dim=1) for question in given] or [last] * 4
        alone = [
            engine.generate(whole, cache=cache.fork(), **GREEDY)[0, whole.shape[1] :]
            for whole, cache in zip(each, caches, strict=True)
        ]
        batch = engine.together(caches, given)
        asked_at_once = engine.generate(last.repeat(4, 1), cache=batch, **GREEDY)
        assert torch.equal(asked_at_once[:, 2:], torch.stack(alone))


def test_what_evicts_while_answering_stands_together_where_nothing_is_read(model):
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL, decode_interval=4)
    caches = [engine.prefill(prompt(60, seed=i)) for i in range(2)]
    for cache in caches:
        engine.generate(prompt(3), cache=cache, **GREEDY)
    alone = [asked(engine, cache.fork()) for cache in caches]
    assert torch.equal(asked(engine, engine.together(caches), rows=2), torch.cat(alone))
    caches[1] = engine.prefill(prompt(60))
    with pytest.raises(ValueError, match="1 questions for 2 caches"):
        engine.together(caches, [prompt(2)])
    for given in ((), (prompt(2), prompt(2))):
        with pytest.raises(ValueError, match="decode_interval: contexts cannot read"):
            engine.together(caches, given)


def test_contexts_of_offloaded_models_stand_together():
    """Whose weights, and so the device that the model tells, are nowhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    model, answers = tiny_model("llama"), []
    engine = locret.Engine(model, "keydiff", **SMALL)
    for offload in (lambda _: None, accelerate.cpu_offload):
        offload(model)
        caches = [engine.prefill(prompt(n)) for n in (60, 40)]
        asked(engine, caches[0])
        batch = engine.together(caches)
        ids, mask = prompt(5, batch=2), torch.tensor([[1] * 5, [0] * 2 + [1] * 3])
        answers.append(engine.generate(ids, mask, cache=batch, **GREEDY))
    assert torch.equal(*answers)


def asked(engine, cache, rows=1):
    return engine.generate(prompt(4, seed=5).repeat(rows, 1), cache=cache, **GREEDY)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("turns", [0, 1])
def test_saved_and_loaded(model, tmp_path, positions, turns):
    engine = locret.Engine(model, heads=tiny_heads(model), positions=positions, **SMALL)
    cache = engine.prefill(prompt(60))
    for _ in range(turns):
        engine.generate(prompt(3), cache=cache, **GREEDY)
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    assert loaded.report()["units"] == cache.report()["units"]
    assert torch.equal(asked(engine, loaded), asked(engine, cache))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["context"]


def test_saved_batch_of_different_lengths(engine, model, tmp_path):
    ids = torch.cat([torch.zeros(1, 20, dtype=torch.long), prompt(13)], dim=1)
    ids = torch.cat([ids, prompt(33, seed=1)])
    cache = engine.prefill(ids, attention_mask=(ids > 0).long())
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    question = prompt(4, batch=2)
    expected = engine.generate(question, cache=cache, **GREEDY)
    assert torch.equal(engine.generate(question, cache=loaded, **GREEDY), expected)


IN_ANOTHER_PROCESS = """
import sys, torch, locret
from tests.tiny_models import prompt, tiny_heads, tiny_model
model = tiny_model("llama")
engine = locret.Engine(model, heads=tiny_heads(model), budget=20)
cache = locret.RetainedCache.load(sys.argv[1], model)
given = engine.generate(prompt(4, seed=5), cache=cache, max_new_tokens=8, do_sample=False)
print(given.tolist())
"""


def test_loaded_in_another_process(engine, tmp_path):
    cache = engine.prefill(prompt(60))
    cache.save(tmp_path / "context")
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "context")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == asked(engine, cache).tolist()


def test_saving_again_replaces_and_other_things_are_left_alone(engine, tmp_path):
    cache = engine.prefill(prompt(60))
    cache.save(tmp_path / "context")
    cache.save(tmp_path / "context")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="is not a saved context; choose another path"):
        cache.save(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["context", "other"]


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="holds no context"):
        locret.RetainedCache(2).save(tmp_path / "context")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"family": "qwen3"}, "model_type 'llama' there, 'qwen3' here"),
        ({"family": "llama", "seed": 1}, "weights '"),
        ({"family": "llama", "num_hidden_layers": 3}, "layers 2 there, 3 here"),
    ],
)
def test_contexts_of_another_model_are_refused(engine, tmp_path, other, difference):
    engine.prefill(prompt(30)).save(tmp_path / "context")
    with pytest.raises(ValueError, match=f"context of another model.*{difference}"):
        locret.RetainedCache.load(tmp_path / "context", tiny_model(**other))


@pytest.mark.parametrize("name", ["units.safetensors", "context.json"])
@pytest.mark.parametrize("kept", [0, 10, 200, -1])
def test_cut_files_are_refused_by_name(engine, model, tmp_path, name, kept):
    engine.prefill(prompt(30)).save(tmp_path / "context")
    file = tmp_path / "context" / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        locret.RetainedCache.load(tmp_path / "context", model)


def test_missing_files_are_refused_by_name(engine, model, tmp_path):
    with pytest.raises(ValueError, match="is not a saved context: it has no context.json"):
        locret.RetainedCache.load(tmp_path, model)
    engine.prefill(prompt(30)).save(tmp_path / "context")
    (tmp_path / "context" / "units.safetensors").unlink()
    with pytest.raises(ValueError, match="units.safetensors is damaged"):
        locret.RetainedCache.load(tmp_path / "context", model)


def test_a_context_belongs_to_the_adapter_and_dtype_it_was_read_with(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed, dtype=torch.float32):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny_model("llama").to(dtype), config).eval()

    one = adapted(1)
    locret.Engine(one, "knorm", budget=16, stabilizers=0, local_tokens=4).prefill(prompt(60)).save(
        tmp_path / "context"
    )
    assert locret.RetainedCache.load(tmp_path / "context", adapted(1)).seen == 60
    for other in (adapted(2), tiny_model("llama"), adapted(1, torch.bfloat16)):
        with pytest.raises(ValueError, match="context of another model"):
            locret.RetainedCache.load(tmp_path / "context", other)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_context_is_asked_through_the_model_that_read_it(engine, seed):
    cache = engine.prefill(prompt(60))
    read = cache.seen
    for other in (tiny_model("qwen3", seed=seed), tiny_model("llama", seed=1)):
        with pytest.raises(ValueError, match="the cache is a context of another model"):
            locret.Engine(other, "full").generate(prompt(4), cache=cache, **GREEDY)
    assert cache.seen == read


def test_a_context_is_asked_by_the_longrope_rule_it_was_read_by(tmp_path):
    phi3 = tiny_model("phi3")
    long, by_length = (locret.Engine(phi3, "full", longrope=r) for r in ("long", "by_length"))
    cache = long.prefill(prompt(30))
    cache.save(tmp_path / "context")
    for each in (cache, locret.RetainedCache.load(tmp_path / "context", phi3)):
        with pytest.raises(ValueError, match="read with longrope='long' and this engine"):
            by_length.generate(prompt(4), cache=each, **GREEDY)
        assert long.generate(prompt(4), cache=each, **GREEDY).shape == (1, 12)


def damaged(path, change):
    record = json.loads((path / "context.json").read_text())
    change(record)
    (path / "context.json").write_text(json.dumps(record))


def test_records_that_lack_something_are_refused_by_name(engine, model, tmp_path):
    path = tmp_path / "context"
    engine.prefill(prompt(30)).save(path)
    whole = (path / "context.json").read_text()
    for name in json.loads(whole).keys() - {"crc32"}:
        damaged(path, lambda record, name=name: record.pop(name))
        with pytest.raises(ValueError, match="context.json is damaged"):
            locret.RetainedCache.load(path, model)
        (path / "context.json").write_text(whole)
    assert locret.RetainedCache.load(path, model).seen == 30


def test_contexts_of_earlier_versions_are_refused_with_the_version(engine, model, tmp_path):
    path = tmp_path / "context"
    engine.prefill(prompt(30)).save(path)
    damaged(path, lambda record: record.update(schema=2))
    with pytest.raises(ValueError, match="context.json has schema 2; this version reads 3"):
        locret.RetainedCache.load(path, model)


def test_units_of_another_context_are_refused(engine, model, tmp_path):
    for length in (40, 30):
        engine.prefill(prompt(length)).save(tmp_path / str(length))
    file = "units.safetensors"
    (tmp_path / "40" / file).write_bytes((tmp_path / "30" / file).read_bytes())
    with pytest.raises(ValueError, match="does not go with context.json: token_ids of 1 tensors"):
        locret.RetainedCache.load(tmp_path / "40", model)
    damaged(tmp_path / "30", lambda record: record["tensors"].update({"1.keys": [1, 2, 3, 4]}))
    with pytest.raises(ValueError, match="does not go with context.json: 1.keys"):
        locret.RetainedCache.load(tmp_path / "30", model)


def places(file):
    """Where the bytes of every tensor begin and end in a safetensors file."""
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header.pop("__metadata__", None)
    return {n: tuple(start + at for at in x["data_offsets"]) for n, x in header.items()}


def flip(file, at, bit=0):
    whole = bytearray(file.read_bytes())
    whole[at] ^= 1 << bit
    file.write_bytes(whole)


STORED = [
    {},
    {"quantization": {"name": "kivi", "bits": 4}},
    {"recall": {"block_size": 4}},
    {"decode_interval": 4},
]


@pytest.mark.parametrize("settings", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_byte_is_refused_in_every_tensor(tmp_path, settings, dtype):
    model = tiny_model("llama").to(dtype)
    engine = locret.Engine(model, "keydiff", **SMALL | settings)
    engine.prefill(prompt(150)).save(tmp_path / "context")
    file = tmp_path / "context" / "units.safetensors"
    filled = {name: place for name, place in places(file).items() if place[0] < place[1]}
    assert {"token_ids", "0.keys", "1.values"} <= filled.keys()
    for name, (first, end) in filled.items():
        for at in {first, (first + end) // 2, end - 1}:
            flip(file, at)
            with pytest.raises(ValueError) as caught:
                locret.RetainedCache.load(tmp_path / "context", model)
            said = str(caught.value)
            assert said.startswith(f"{file} is damaged: {name} has the checksum ")
            assert said.endswith("read the prompt again and save its context anew")
            flip(file, at)
    assert locret.RetainedCache.load(tmp_path / "context", model).seen == 150


def test_a_changed_byte_of_the_header_is_refused(engine, model, tmp_path):
    engine.prefill(prompt(60)).save(tmp_path / "context")
    file = tmp_path / "context" / "units.safetensors"
    for at in range(min(first for first, _ in places(file).values())):
        flip(file, at, at % 7)
        with pytest.raises(ValueError, match=file.name):
            locret.RetainedCache.load(tmp_path / "context", model)
        flip(file, at, at % 7)
    assert locret.RetainedCache.load(tmp_path / "context", model).seen == 60


def test_the_type_of_a_tensor_is_part_of_its_checksum(engine, model, tmp_path):
    engine.prefill(prompt(60)).save(tmp_path / "context")
    file = tmp_path / "context" / "units.safetensors"
    whole = file.read_bytes()
    assert b'"F32"' in whole
    file.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ValueError, match="is damaged: .* has the checksum"):
        locret.RetainedCache.load(tmp_path / "context", model)


def test_units_of_another_context_of_equal_shape_are_refused(engine, model, tmp_path):
    for seed in (0, 1):
        engine.prefill(prompt(40, seed=seed)).save(tmp_path / str(seed))
    file = "units.safetensors"
    (tmp_path / "0" / file).write_bytes((tmp_path / "1" / file).read_bytes())
    with pytest.raises(ValueError, match=f"{file} is damaged: .* has the checksum"):
        locret.RetainedCache.load(tmp_path / "0", model)


def test_contexts_without_checksums_still_load(engine, model, tmp_path):
    cache = engine.prefill(prompt(60))
    cache.save(tmp_path / "context")
    damaged(tmp_path / "context", lambda record: record.pop("crc32"))
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    assert torch.equal(asked(engine, loaded), asked(engine, cache))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "12", None, [1]])
def test_a_wrong_checksum_is_refused(engine, model, tmp_path, wrong):
    engine.prefill(prompt(60)).save(tmp_path / "context")
    damaged(tmp_path / "context", lambda record: record["crc32"].update({"1.keys": wrong}))
    with pytest.raises(ValueError, match="is damaged: 1.keys has the checksum .* says .*anew"):
        locret.RetainedCache.load(tmp_path / "context", model)


@pytest.mark.parametrize("checksums", [None, 5, [], {}, {"0.keys": 1}])
def test_checksums_of_some_tensors_only_are_refused(engine, model, tmp_path, checksums):
    engine.prefill(prompt(60)).save(tmp_path / "context")
    damaged(tmp_path / "context", lambda record: record.update(crc32=checksums))
    with pytest.raises(ValueError, match="context.json is damaged .crc32 does not have a number"):
        locret.RetainedCache.load(tmp_path / "context", model)


@pytest.mark.parametrize("given", [[[1, 2, 3]], prompt(5).float(), prompt(5).bool()])
def test_what_is_no_token_ids_is_refused(engine, given):
    for ask in (engine.prefill, engine.generate):
        with pytest.raises(ValueError, match="expected a tensor|expected token ids"):
            ask(given)


def test_storage_of_a_whole_context_is_made_once(monkeypatch):
    engine = locret.Engine(tiny_model("llama"), "full", chunk_size=16)
    made, append = [], Tail.append

    def counting(tail, new, room=0):
        before = tail.tensors
        append(tail, new, room)
        made.append(tail.tensors is not before)

    monkeypatch.setattr(Tail, "append", counting)
    cache = engine.prefill(prompt(600))
    assert len(made) > 2 * len(cache.layers) and sum(made) == len(cache.layers)
