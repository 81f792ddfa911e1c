"""KVzip: units are scored by a copy of the context, read behind it. The twin is a stock model that
reads [context | request | copy]."""

import itertools

import pytest
import torch

import locret
from datamodules.conversations import Conversation, exchange
from datamodules.encoder import BranchEncoder, Branching
from locret.engine.budgets import Calibration
from locret.evaluation.ask import Engines
from locret.evaluation.config import expand
from locret.model.backbone import Backbone
from locret.model.loading import LoadedModel
from locret.policies import POLICIES, Policy
from locret.policies.compose import AdaptiveHeads, SharedLayers
from locret.policies.kvzip import REPEAT, REPEAT_AFTER, KVzipPolicy, Wording
from tests.kept import kept_of
from tests.test_batches import assert_each_row_as_alone
from tests.tiny_models import FAMILIES, distinct_prompt, prompt, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

VOCAB = 512
WORDS = Wording(whole=(5, 4, 3), after=(7, 5), end=(9,))
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=[2, 8], ids=["GQA", "MHA"])
def model(request):
    return tiny_model("llama", num_key_value_heads=request.param, vocab_size=VOCAB)


def kvzip(piece=15, lead=2, **options):
    return KVzipPolicy(WORDS, piece, lead, **options)


def engine_of(model, policy, **settings):
    settings = {"budget": 11, "chunk_size": 7, "stabilizers": 3, "local_tokens": 5} | settings
    return locret.Engine(model, policy, longrope="by_length", **settings)


@torch.no_grad()
def reference(model, ids, piece=15, lead=2):
    """[layers][H, n]: log(p + 1e-5) of every unit, by the stock model's own softmax."""
    tokens, pieces = ids[0].tolist(), []
    for start in range(0, len(tokens), piece):
        copy, before = tokens[start : start + piece], tokens[max(start - lead, 0) : start]
        asked = [*WORDS.after, *before, *WORDS.end] if start else WORDS.whole
        whole = [*tokens, *asked, *copy]
        attn = model.config._attn_implementation
        model.set_attn_implementation("eager")
        weights = model(torch.tensor([whole]), output_attentions=True).attentions
        model.set_attn_implementation(attn)
        heads = model.config.num_key_value_heads
        looked = [w[0, :, -len(copy) :, : len(tokens)].amax(dim=1) for w in weights]
        pieces.append([w.view(heads, -1, len(tokens)).amax(dim=1) for w in looked])
    return [
        torch.stack(each).amax(dim=0).add(1e-5).log()
        for each, layer in zip(zip(*pieces, strict=True), Backbone(model).layers, strict=True)
        if layer.window is None
    ]


def best(scores, counts):
    """The positions of each head's highest scores."""
    return [
        [sorted(head.topk(count).indices.tolist()) for head, count in zip(layer, row, strict=True)]
        for layer, row in zip(scores, counts, strict=True)
    ]


def alike(scores, count):
    return [[count] * len(layer) for layer in scores]


def kept(cache, row=0):
    layers = zip(cache.layers, kept_of(cache), strict=True)
    return [rows[row] for layer, rows in layers if layer.window is None]


# ---- which units stay ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_the_copy_looks_at_stay(family):
    model, ids = tiny_model(family, vocab_size=VOCAB), distinct_prompt(40, VOCAB)
    scores = reference(model, ids)
    cache = engine_of(model, kvzip()).prefill(ids)
    assert kept(cache) == best(scores, alike(scores, 11))
    assert cache.seen == 40


@pytest.mark.parametrize("piece", [1, 13, 40, 100])
@pytest.mark.parametrize("lead", [0, 4])
@pytest.mark.parametrize("chunk_size", [7, None])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_pieces_leads_chunks_and_positions(model, piece, lead, chunk_size, positions):
    ids = distinct_prompt(40, VOCAB)
    scores = reference(model, ids, piece, lead)
    engine = engine_of(model, kvzip(piece, lead), chunk_size=chunk_size, positions=positions)
    assert kept(engine.prefill(ids)) == best(scores, alike(scores, 11))


def test_without_words_the_copy_follows_at_once():
    ((tokens, looking),) = KVzipPolicy().second_readings(torch.arange(9)[None])
    assert tokens.tolist() == [[*range(9)]] and looking == 9


def test_later_pieces_are_told_what_stands_before_and_the_opening_is_not_repeated():
    policy = KVzipPolicy(Wording((0, 1), (90,), (91,), (92,)), piece=3, lead=2)
    readings = [*policy.second_readings(torch.arange(9).expand(2, -1))]
    asked = [[90, 2, 3, 4], [91, 3, 4, 92, 5, 6, 7], [91, 6, 7, 92, 8]]
    assert [tokens.tolist() for tokens, _ in readings] == [[row, row] for row in asked]
    assert [looking for _, looking in readings] == [3, 3, 1]
    (other, _), *_ = policy.second_readings(torch.arange(1, 9)[None])
    assert other.tolist() == [[90, 1, 2, 3]]
    ((few, _),) = policy.second_readings(torch.arange(2)[None])
    assert few.tolist() == [[90, 0, 1]]


@pytest.mark.parametrize("budget", [1, 11, 25])
def test_the_highest_scores_of_all_heads_stay_if_asked_for(model, budget):
    ids = distinct_prompt(40, VOCAB)
    scores = torch.stack(reference(model, ids))
    sure = scores.scatter(2, scores.argmax(dim=2, keepdim=True), torch.inf)
    chosen = sure.flatten().topk(budget * scores[..., 0].numel()).indices
    counts = torch.zeros(scores[..., 0].numel(), dtype=torch.long)
    counts.index_add_(0, chosen // 40, torch.ones_like(chosen))
    counts = counts.view(scores.shape[:2]).tolist()
    engine = engine_of(model, kvzip(dynamic=True), budget=budget, stabilizers=0)
    cache = engine.prefill(ids)
    assert kept(cache) == best(scores, counts)
    assert sum(cache.report()["units"]) / 2 == budget
    assert budget == 1 or len(set(itertools.chain(*counts))) > 1


def test_quotas_say_how_many_each_head_keeps():
    model, ids = tiny_model("llama", vocab_size=VOCAB), distinct_prompt(40, VOCAB)
    engine = engine_of(model, kvzip(), quotas=[[3, 1], [2, 2]], budget=8)
    assert kept(engine.prefill(ids)) == best(reference(model, ids), [[12, 4], [8, 8]])


@pytest.mark.parametrize("compose", [AdaptiveHeads, SharedLayers])
def test_composed_over(model, compose):
    ids = distinct_prompt(40, VOCAB)
    found = kept(engine_of(model, compose(kvzip(), floor=1)).prefill(ids))
    assert found == kept(engine_of(model, kvzip()).prefill(ids))
    free = engine_of(model, compose(kvzip(), floor=0)).prefill(ids)
    assert sum(free.report()["units"]) / 2 <= 11


# ---- what is held --------------------------------------------------------------------------------


class Given(Policy):
    """Scores that are known before."""

    name = "given"

    def __init__(self, scores):
        self.scores = scores

    def score(self, chunk):
        return self.scores[chunk.layer_idx][None]


@pytest.mark.parametrize("family", ["llama", "exaone4", "gemma2", "gpt_oss", "phi3", "smollm3"])
@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("merging", [None, "similar"])
def test_nothing_is_left_of_the_second_reading(family, positions, merging):
    model, ids = tiny_model(family, vocab_size=VOCAB), distinct_prompt(45, VOCAB)
    settings = {"positions": positions, "merging": merging, "chunk_size": None}
    known = engine_of(model, Given(reference(model, ids[:, :40])), **settings)
    engine = engine_of(model, kvzip(), **settings)
    assert torch.equal(engine.generate(ids, **GREEDY), known.generate(ids, **GREEDY))
    caches = [each.prefill(ids[:, :40]) for each in (engine, known)]
    assert caches[0].report() == caches[1].report()
    assert torch.equal(caches[0].token_ids, caches[1].token_ids)
    question = prompt(6, seed=1)
    one, two = (
        each.generate(question, cache=cache, **GREEDY)
        for each, cache in zip((engine, known), caches, strict=True)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["kivi", "rotated"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_units_are_evicted_before_they_are_packed(model, name, positions):
    ids = distinct_prompt(120, VOCAB)
    settings = {"positions": positions, "budget": 50, "stabilizers": 0}
    plain = engine_of(model, kvzip(), **settings).prefill(ids)
    engine = engine_of(model, kvzip(dynamic=True), quantization=name, **settings)
    assert engine.generate(ids, **GREEDY).shape == (1, 128)
    packed = engine_of(model, kvzip(), quantization=name, **settings).prefill(ids)
    assert kept(packed) == kept(plain)
    known = engine_of(
        model, Given(reference(model, ids)), chunk_size=None, quantization=name, **settings
    )
    assert packed.report() == known.prefill(ids).report()


def test_a_context_that_fits_is_not_read_again(model, monkeypatch):
    monkeypatch.setattr(KVzipPolicy, "second_readings", lambda *_: pytest.fail("read again"))
    ids = prompt(40, vocab=VOCAB)
    for policy in (kvzip(), kvzip(dynamic=True)):
        engine = engine_of(model, policy, budget=40)
        assert engine.prefill(ids).report()["units"] == [40, 40]
        stock = model.generate(ids, **GREEDY)
        assert torch.equal(engine.generate(ids, **GREEDY), stock)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_are_as_alone(positions, dynamic):
    model = tiny_model("llama", vocab_size=8192)
    engine = engine_of(model, kvzip(dynamic=dynamic), positions=positions, budget="3x")
    assert_each_row_as_alone(engine, (60, 33, 33, 5, 1), vocab=8192)
    ids = torch.cat([distinct_prompt(40, VOCAB, seed) for seed in range(3)])
    together = engine.prefill(ids)
    for row in range(3):
        assert kept(together, row) == kept(engine.prefill(ids[row : row + 1]))


def test_a_question_in_sight_changes_nothing(model):
    ids = distinct_prompt(47, VOCAB)
    context, question = ids[:, :40], ids[:, 40:]
    engine = engine_of(model, kvzip(), query_aware=True)
    cache = engine.prefill(context, query_ids=question)
    assert kept(cache) == kept(engine_of(model, kvzip()).prefill(context))
    assert engine.generate(question, cache=cache, **GREEDY).shape == (1, 15)


def test_saved_contexts_are_asked_alike(model, tmp_path):
    engine = engine_of(model, kvzip())
    cache = engine.prefill(prompt(40, vocab=VOCAB))
    cache.save(tmp_path / "context")
    loaded = locret.RetainedCache.load(tmp_path / "context", model)
    question = prompt(4, seed=1, vocab=VOCAB)
    one, two = (engine.generate(question, cache=each, **GREEDY) for each in (cache, loaded))
    assert torch.equal(one, two)


# ---- words, quotas, refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_the_copy_is_asked_for_in_the_tokenizers_words(has_template, chat):
    tokenizer = tiny_tokenizer(has_template)
    before, end = "", "\n\n"
    if has_template and chat:
        before, end = "<|user|>", "<|end|><|assistant|>"
    words = (before, REPEAT + end, REPEAT_AFTER, end)
    assert [*map(tokenizer.decode, Wording.of(tokenizer, chat))] == [*words]


@pytest.mark.parametrize("has_template", [True, False])
def test_trainings_by_replay_ask_for_the_same_copies(has_template):
    """The policy is the oracle of what such trainings learn."""
    tokenizer, said = tiny_tokenizer(has_template), "".join(f"{i}, " for i in range(60))
    encoder = BranchEncoder(tokenizer, Branching(("replay",), copy_tokens=50))
    sample = encoder(Conversation(exchange(said, ""), context=said))
    policy = KVzipPolicy(Wording.of(tokenizer), piece=50)
    readings = [*policy.second_readings(sample.input_ids[None, : sample.prompt_length])]
    branches = zip(sample.branches, sample.answers, readings, strict=True)
    assert len(readings) > 2
    for (start, end), (begins, _), (tokens, looking) in branches:
        assert torch.equal(tokens[0], sample.input_ids[start:end])
        assert looking == end - begins


def test_rows_of_an_evaluation_know_the_words():
    tokenizer = tiny_tokenizer()
    loaded = LoadedModel(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, "tiny", None)
    given = {"policy": "kvzip", "budget": "4x", "policy_args": {"dynamic": True, "piece": 50}}
    full, setup = expand([given])
    settings = {"chunk_size": 16, "stabilizers": 3, "local_tokens": 5}
    engines = Engines(loaded, {}, None, settings)
    policy = engines.get(setup, 10).policy
    assert engines.used[setup.label]["rereads"]
    assert (policy.dynamic, policy.piece) == (True, 50)
    assert policy.wording == Wording.of(tokenizer)
    raw = Engines(loaded, {}, None, settings, chat=False).get(setup, 10).policy
    assert raw.wording == Wording.of(tokenizer, chat=False)
    assert POLICIES["keydiff"].words(tokenizer) == {}


@pytest.mark.parametrize("family", ["llama", "exaone4", "gpt_oss"])
def test_quotas_are_measured_by_rereading(family):
    model, ids = tiny_model(family, vocab_size=VOCAB), distinct_prompt(40, VOCAB)
    calibration = Calibration(Backbone(model), kvzip(), [4])
    calibration.add(ids)
    scores = torch.stack(reference(model, ids))
    chosen = scores.flatten().topk(scores.numel() // 4).indices // 40
    shares = chosen.bincount(minlength=scores[..., 0].numel()) / len(chosen)
    shares = (shares / shares.mean()).clamp(min=0.05)
    expected = (shares / shares.mean()).view(scores.shape[:2])
    assert torch.allclose(torch.tensor(calibration.quotas()["4"]), expected, atol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("decode_interval", 3), ("recall", {})])
def test_settings_that_cannot_work_are_refused(model, name, value):
    for policy in ("kvzip", AdaptiveHeads("kvzip")):
        with pytest.raises(ValueError, match=f"leave {name} out, or choose another policy"):
            engine_of(model, policy, **{name: value})


def test_outputs_of_evicted_chunks_are_refused(model):
    engine = engine_of(model, "kvzip")
    cache, counts = engine.new_cache(40)
    with pytest.raises(ValueError, match="'kvzip' scores a context by reading it again"):
        engine.reading_into(cache, counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"piece": 0}, "piece is 0"), ({"lead": -1}, "lead is -1"), ({"dynamic": 1}, "dynamic is 1")],
)
def test_parameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        KVzipPolicy(**options)
