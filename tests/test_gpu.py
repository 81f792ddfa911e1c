"""What only a GPU can show: kernels, backends and graphs give the answers of the plain path."""

import pytest
import torch

import locret
from locret.cache.context import sequences_of
from locret.engine.answering import EAGER_STEPS
from locret.engine.engine import Engine
from locret.model import attend as attention
from locret.model import varlen
from locret.model.attend import Past, attend_past
from locret.model.backbone import PRENORM
from locret.model.backends import attend, available
from locret.model.hooks import PLAIN
from locret.model.prenorm import why_not_fused
from locret.policies import POLICIES
from locret.policies.compose import AdaptiveHeads, PyramidLayers, SharedLayers
from tests.test_steps import scheme_of
from tests.tiny_models import EAGER_ONLY, FAMILIES, distinct_prompt, prompt, tiny_heads, tiny_model

pytestmark = pytest.mark.gpu

SMALL = {"budget": 40, "chunk_size": 17, "stabilizers": 3, "local_tokens": 5}
GREEDY = {"max_new_tokens": 20, "do_sample": False}
GRAPHED = [name for name in FAMILIES if name not in EAGER_ONLY | {"mixtral", "qwen3_moe"}]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_cpu(family, positions):
    # No two tokens alike: of equal scores, and equal tokens have them, each device keeps its own.
    model = tiny_model(family, vocab_size=512)
    ids = torch.cat([distinct_prompt(100, 512, seed) for seed in (0, 1)])
    heads = tiny_heads(model)
    expected = Engine(model, heads=heads, positions=positions, **SMALL).generate(ids, **GREEDY)
    model = model.cuda()
    engine = Engine(model, heads=heads, positions=positions, **SMALL)
    assert engine.config.compute.graphs == (family in GRAPHED)
    given = engine.generate(ids.cuda(), **GREEDY)
    assert torch.equal(given.cpu(), expected)
    fused = model.config.model_type in PRENORM and engine.backbone.plain
    assert engine.last_steps.fused == 19 * fused
    assert engine.last_chunks.fused == engine.last_chunks.read * fused


@pytest.mark.parametrize("family", PRENORM)
def test_fused_chunks_leave_what_the_stock_forward_does(family, monkeypatch):
    model = tiny_model(family, intermediate_size=1024).to("cuda", torch.bfloat16)
    engine = Engine(model, "random", **SMALL | {"chunk_size": 700, "budget": 300})
    engine.prefill(prompt(2000, batch=2).cuda())  # compiles, and makes tables
    held, peaks = [], []
    for reason in (why_not_fused, lambda *_: "it is compared"):
        monkeypatch.setattr("locret.engine.reading.why_not_fused", reason)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache = engine.prefill(prompt(2000, batch=2).cuda())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert engine.last_chunks == (3, 3 * (reason is why_not_fused))
        held.append(torch.stack([torch.stack([x.keys, x.values]) for x in cache.layers]).float())
        del cache
    assert (held[0] - held[1]).norm() < 0.02 * held[1].norm()
    assert peaks[0] <= peaks[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("quantization", [None, "rotated", "fp8"])
def test_models_need_not_be_on_the_current_gpu(quantization):
    answers = {}
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        model, ids = tiny_model("llama").to(device), prompt(100).to(device)
        engine = Engine(model, "keydiff", quantization=quantization, **SMALL)
        for _ in range(2):
            given = engine.generate(ids, **GREEDY).cpu()
            assert torch.equal(given, answers.setdefault(0, given)), device
        assert engine.last_steps.replayed


@pytest.mark.parametrize("interval", [None, 4])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_units_are_recalled_as_on_the_cpu(positions, interval):
    model, ids = tiny_model("llama", vocab_size=512), distinct_prompt(300, 512)
    recall = {"block_size": 8, "blocks": 5, "representatives": 2}
    settings = SMALL | {"positions": positions, "recall": recall, "decode_interval": interval}
    expected = Engine(model, "keydiff", **settings).generate(ids, **GREEDY)
    model = model.cuda()
    engine = Engine(model, "keydiff", **settings)
    cache = engine.prefill(ids[:, :-5].cuda())
    assert all(layer.host.view().pool.segments[0].tensors[0].is_pinned() for layer in cache.layers)
    given = engine.generate(ids.cuda(), **GREEDY)
    assert torch.equal(given.cpu(), expected)


def alike(policy, rows=(300, 211, 90), given=GREEDY, **settings):
    """Assert that a GPU answers padded rows as a CPU does."""
    model = tiny_model("llama", vocab_size=512)
    ids = torch.cat([distinct_prompt(max(rows), 512, seed) for seed in range(len(rows))])
    mask = torch.stack([torch.arange(max(rows)) >= max(rows) - length for length in rows]).long()
    answers = []
    for device in ("cpu", "cuda"):
        engine = Engine(model.to(device), policy, **SMALL | settings)
        answers.append(engine.generate(ids.to(device), mask.to(device), **given).cpu())
    assert torch.equal(*answers)


@pytest.mark.parametrize("chunk_size", [17, None])
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"locret", "pyramidkv"}))  # it pools ties
def test_policies_keep_what_they_keep_on_the_cpu(name, chunk_size):
    alike(name, chunk_size=chunk_size)
    alike(name, chunk_size=chunk_size, query_aware=True)


@pytest.mark.parametrize("name", ["keydiff", "sirllm", "expected_attention", "snapkv"])
def test_answers_are_evicted_as_on_the_cpu(name):
    alike(name, decode_interval=4)


@pytest.mark.parametrize("merging", ["similar", "adjacent", {"fold": True}], ids=str)
@pytest.mark.parametrize("interval", [None, 4])
def test_values_are_merged_as_on_the_cpu(merging, interval):
    alike("keydiff", merging=merging, decode_interval=interval)


@pytest.mark.parametrize(
    "policy", [AdaptiveHeads("keydiff"), SharedLayers("keydiff"), PyramidLayers("keydiff")]
)
@pytest.mark.parametrize("interval", [None, 4])
def test_shared_budgets_are_shared_as_on_the_cpu(policy, interval):
    alike(policy, decode_interval=interval)


def test_stock_processors_leave_padding_out_as_on_the_cpu():
    alike("keydiff", given=GREEDY | {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2})


@pytest.mark.parametrize("family", GRAPHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_change_nothing(family, dtype):
    model = tiny_model(family).to("cuda", dtype)
    answers = []
    for graphs in (False, True):
        engine = Engine(model, "streaming_llm", graphs=graphs, **SMALL)
        answers.append(engine.generate(prompt(100, batch=3).cuda(), **GREEDY))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("name", "bits"),
    [*(("kivi", n) for n in (8, 4, 2)), ("kvquant", 8), ("kvquant", 4), ("fp8", 8), ("half", 8)],
)
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_graphs_over_packed_units(name, bits, positions):
    """Attended to as they are, or written out before: by kernels, or as a user's scheme decodes."""
    model = tiny_model("llama", head_dim=64)
    ids = prompt(100, batch=3)
    scheme = scheme_of(name, bits=bits, group=16)
    settings = SMALL | {"positions": positions, "quantization": scheme}

    def answers(device, **chosen):
        engine = Engine(model.to(device), "streaming_llm", **settings | chosen)
        output = engine.generate(
            ids.to(device), **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        if device == "cuda":
            assert engine.last_steps.fast == 19
            assert engine.last_steps.replayed == (19 - EAGER_STEPS) * chosen["graphs"]
        return output.sequences.cpu(), torch.stack(output.logits).cpu()

    on_cpu = answers("cpu")
    stepwise, graphed = answers("cuda", graphs=False), answers("cuda", graphs=True)
    assert torch.equal(stepwise[0], graphed[0])
    if bits == 8:  # with fewer, a value between two codes is another number on another device
        assert (on_cpu[1][:3] - graphed[1][:3]).norm() < 0.05 * on_cpu[1][:3].norm()


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_graphs_with_padded_rows_layer_budgets_and_turns(positions, kv_heads):
    model = tiny_model("llama", num_key_value_heads=kv_heads)
    ids = prompt(60, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :30], mask[2, :57] = 0, 0

    def answers(device):
        settings = SMALL | {"budget": [9, 30], "positions": positions}
        engine = Engine(model.to(device), "streaming_llm", **settings)
        cache = engine.prefill(ids.to(device), mask.to(device))
        question = prompt(4, batch=3, seed=5).to(device)
        given = [engine.generate(question, cache=cache, **GREEDY) for _ in range(2)]
        given.append(engine.generate(ids.to(device), mask.to(device), **GREEDY))
        return torch.cat([g.cpu().flatten() for g in given])

    assert torch.equal(answers("cpu"), answers("cuda"))


def test_contexts_are_untouched_by_graphed_answers():
    model = tiny_model("llama").cuda()
    engine = Engine(model, heads=tiny_heads(model), **SMALL)
    cache = engine.prefill(prompt(100).cuda())
    context, question = cache.snapshot(), prompt(4, seed=3).cuda()
    first = engine.generate(question, cache=cache, **GREEDY)
    cache.restore(context)
    engine.generate(prompt(9, seed=4).cuda(), cache=cache, max_new_tokens=600, do_sample=False)
    cache.restore(context)
    assert torch.equal(engine.generate(question, cache=cache, **GREEDY), first)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("new", "held"), [(128, 0), (128, 1000), (257, 515), (1, 77), (1024, 4096)]
)
def test_backends_agree(new, held, group, size):
    torch.manual_seed(0)
    heads = 2
    query = torch.randn(2, heads * group, new, size, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, heads, held + new, size, device="cuda", dtype=torch.bfloat16)
    exact = attend(query.float(), key.float(), value.float(), size**-0.5, "eager")
    past, fresh = (key[:, :, :held], value[:, :, :held]), (key[:, :, held:], value[:, :, held:])
    for backend in ("eager", "sdpa", "cudnn", "flash_attn"):
        if available(backend, query.device, query.dtype, size) is not None:
            continue
        whole = attend(query, key, value, size**-0.5, backend)
        parts = attend_past(query, [Past(*past)], fresh, size**-0.5, backend)
        for output in (whole, parts):
            assert output.is_contiguous()
            assert (output.float() - exact).abs().max() < 4e-2, backend


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("most", [0, 2**38])
@pytest.mark.parametrize("new", [1, 20, 128, 257])
def test_backends_agree_over_sequences_of_different_lengths(monkeypatch, most, new, group, size):
    monkeypatch.setattr(attention, "_MOST_WORK", most)
    torch.manual_seed(0)
    counts = ((700, 3), (0, 129))
    sequences = sequences_of(counts, torch.device("cuda", 0))
    query = torch.randn(2, 2 * group, new, size, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, new, size, device="cuda", dtype=torch.bfloat16)
    flat = torch.randn(2, sequences.total, size, device="cuda", dtype=torch.bfloat16)
    whole = Past(flat[0].float(), flat[1].float(), sequences)
    both = (key.float(), value.float())
    exact = attend_past(query.float(), [whole], both, size**-0.5, "eager")
    for backend in ("sdpa", "cudnn"):
        if available(backend, query.device, query.dtype, size) is None:
            past = Past(*flat, sequences)
            output = attend_past(query, [past], (key, value), size**-0.5, backend)
            assert (output.float() - exact).abs().max() < 4e-2, backend


QUOTAS = [[5.0, 0.4], [0.2, 2.4]]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", ["keydiff", "snapkv", "random"])
@pytest.mark.parametrize("interval", [None, 4])
def test_heads_keep_their_quotas_as_on_the_cpu(name, positions, interval):
    alike(name, quotas=QUOTAS, positions=positions, decode_interval=interval)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    "scheme",
    [
        *({"name": "rotated", "key_bits": k, "value_bits": v} for k, v in ((3, 3), (4, 2), (8, 8))),
        *({"name": name, "bits": 8} for name in ("kvquant", "fp8")),
    ],
    ids=str,
)
def test_graphs_over_packed_units_with_quotas(scheme, positions):
    model = tiny_model("llama", head_dim=64)
    ids = prompt(300, batch=3)
    scheme = scheme | {"residual": 3}
    settings = SMALL | {"positions": positions, "quantization": scheme, "budget": 100}

    def answers(device, **chosen):
        engine = Engine(model.to(device), "streaming_llm", quotas=QUOTAS, **settings | chosen)
        output = engine.generate(
            ids.to(device), **GREEDY, return_dict_in_generate=True, output_logits=True
        )
        if chosen.get("graphs"):
            assert engine.last_steps.replayed
        return output.sequences.cpu(), torch.stack(output.logits).cpu()

    on_cpu = answers("cpu")
    stepwise, graphed = answers("cuda", graphs=False), answers("cuda", graphs=True)
    assert torch.equal(stepwise[0], graphed[0])
    if 8 in scheme.values():
        assert (on_cpu[1][:3] - graphed[1][:3]).norm() < 0.05 * on_cpu[1][:3].norm()


def test_memory_comes_back():
    model = tiny_model("llama").cuda()
    engine = Engine(model, heads=tiny_heads(model), **SMALL)
    levels = []
    for length in (50, 300, 100, 50, 300, 100, 50):
        engine.generate(prompt(length).cuda(), **GREEDY)
        levels.append(torch.cuda.memory_allocated())
    # From the fourth on nothing is new: a tensor of a graph may take one block of 512 bytes more.
    assert levels[-1] <= levels[3]
    assert locret.RetainedCache(2).nbytes == 0


@pytest.mark.parametrize("size", [64, 136, 256])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("elements", [2**28, 5000])
def test_texts_in_one_call_are_as_one_after_the_other(size, heads, elements, monkeypatch):
    monkeypatch.setattr(varlen, "_ELEMENTS", elements)
    torch.manual_seed(size)
    trunk = [torch.randn(1, heads, 33, size, device="cuda", requires_grad=True) for _ in range(2)]
    tokens = [1, 50, 7, 12]
    own = [torch.randn(1, heads, 70, size, device="cuda", requires_grad=True) for _ in range(2)]
    query = torch.randn(1, 8, 70, size, device="cuda", requires_grad=True)
    leaves = [query, *trunk, *own]

    def attended(dtype):
        q, *rest = (x.to(dtype) for x in leaves)
        pieces = [x.split(tokens, dim=2) for x in rest[2:]]
        texts = [
            varlen.Text(
                n, *((() if i == 1 else (t,)) + (p[i],) for t, p in zip(rest, pieces, strict=False))
            )
            for i, n in enumerate(tokens)
        ]
        assert varlen.takes_varlen(q, "sdpa", PLAIN) == (dtype != torch.float32)
        output, sums = varlen.attend_texts(q, texts, 0.3, "sdpa")
        assert sums is None or sums.shape == q.shape[:3]
        weights = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape)
        return output, torch.autograd.grad((output * weights).sum(), leaves)

    (ours, gradients), (theirs, expected) = attended(torch.bfloat16), attended(torch.float32)
    for a, b in zip([ours, *gradients], [theirs, *expected], strict=True):
        assert (a.float() - b).norm() <= 1e-2 * b.norm()
