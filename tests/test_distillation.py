"""The loss of retaining heads, against one autograd graph over stock features."""

import copy

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from locret.heads.targets import LABELS
from locret.model.backbone import Backbone
from locret.training.distill import Distillation
from locret.training.segments import Segment
from tests.stock_logits import stock_prompt_labels
from tests.tiny_models import FAMILIES, prompt, tiny_heads, tiny_model

LENGTH, PROMPT = 40, 29
ALPHA = 0.5  # far above the paper's, so that smoothness shows in every comparison


def trainable(model, seed=0):
    return tiny_heads(model, seed).requires_grad_(True).train()


def distill(model, heads, ids=None, prompt_length=PROMPT, **settings):
    settings = {"alpha": ALPHA, "keep_scores": True} | settings
    ids = prompt(LENGTH) if ids is None else ids
    row = [Segment.single(prompt_length, ids.shape[1])]
    return Distillation(Backbone(model, "by_length"), heads, **settings)(ids, row)


def features(model, ids, prompt_length):
    """[Q, K, V] of the prompt before RoPE in every layer that has heads, from hooks on a stock
    forward."""
    taken, hooks = {}, []

    def record(layer_idx, name):
        def hook(module, args, output):
            if output.shape[1] != ids.shape[1]:  # norms come before or after heads move forward
                output = output.transpose(1, 2)
            taken.setdefault(layer_idx, {})[name] = output[:, :prompt_length].flatten(2)

        return hook

    windows = Backbone(model).windows
    for layer_idx, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if windows[layer_idx] is not None:
            continue
        for name in ("q", "k", "v", "qkv"):
            for suffix in ("proj", "norm", "layernorm"):  # a norm overwrites its projection
                module = getattr(attention, f"{name}_{suffix}", None)
                if module is not None:
                    hooks.append(module.register_forward_hook(record(layer_idx, name)))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(list(found.values()), dim=-1) for _, found in sorted(taken.items())]


def one_graph_loss(model, heads, ids, prompt_length):
    windows = Backbone(model).windows
    labels = stock_prompt_labels(model, ids, prompt_length)
    labels = labels[[window is None for window in windows]]
    inputs = features(model, ids, prompt_length)
    regression, smoothness = [], []
    for head, qkv, label in zip(heads.layers, inputs, labels, strict=True):
        scores = head(qkv)
        regression.append(smooth_l1_loss(scores, label[None]))
        smoothness.append((scores[..., 1:] - scores[..., :-1]).square().mean())
    regression, smoothness = torch.stack(regression).mean(), torch.stack(smoothness).sum()
    return regression + ALPHA * smoothness, regression, smoothness


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_one_graph(family, kv_heads, attn):
    model = tiny_model(family, attn_implementation=attn, num_key_value_heads=kv_heads)
    heads, twin = trainable(model), trainable(model)
    given = distill(model, heads)
    loss, regression, smoothness = one_graph_loss(model, twin, prompt(LENGTH), PROMPT)
    for ours, naive in (
        (given.loss, loss),
        (given.regression, regression),
        (given.smoothness, smoothness),
    ):
        assert torch.allclose(ours, naive, rtol=1e-4)
    given.loss.backward()
    loss.backward()
    for (name, ours), naive in zip(heads.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None, name
        assert (ours.grad - naive.grad).abs().max() < 1e-4 * naive.grad.abs().max(), name


def test_gradients_scale_and_add_up_as_any_loss_does():
    model = tiny_model("llama")
    once, scaled = trainable(model), trainable(model)
    distill(model, once).loss.backward()
    for _ in range(2):
        (distill(model, scaled).loss * 3).backward()
    for a, b in zip(once.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(6 * a.grad, b.grad, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient():
    model = tiny_model("llama")
    heads, free = trainable(model), trainable(model)
    heads[0].requires_grad_(False)
    heads[1].fc2.requires_grad_(False)
    distill(model, heads).loss.backward()
    distill(model, free).loss.backward()
    assert heads[0].fc1.weight.grad is heads[0].fc2.weight.grad is None
    assert heads[1].fc2.weight.grad is None
    assert torch.equal(heads[1].fc1.weight.grad, free[1].fc1.weight.grad)


def test_evaluation_mode_gives_the_same_loss_without_gradients():
    model, heads = tiny_model("llama"), None
    heads = trainable(model)
    expected = distill(model, heads)
    given = distill(model, heads.eval())
    assert not given.loss.requires_grad
    assert torch.equal(given.loss, expected.loss.detach())


@pytest.mark.parametrize("training", [False, True])
def test_backbone_is_left_as_it_was(training):
    model = tiny_model("llama").train(training)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    distill(model, trainable(model)).loss.backward()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training == training
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_nothing_is_left_attached_after_an_exception():
    model = tiny_model("llama")
    heads = trainable(model)
    heads[1].forward = None
    with pytest.raises(TypeError):
        distill(model, heads)
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_places_of_the_model_still_see_plain_causal_attention(family):
    """Reading for labels computes the very hidden states of the stock model."""
    model = tiny_model(family)
    states = []
    hook = model.model.norm.register_forward_hook(lambda m, args, out: states.append(out))
    distill(model, trainable(model))
    with torch.no_grad():
        model(prompt(LENGTH), use_cache=False)
    hook.remove()
    assert (states[0] - states[1]).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_runs_on_the_backend_of_the_model(backend, monkeypatch):
    from locret.model import varlen

    used = []

    def spying(*args, **kwargs):
        used.append(args[4])
        return real(*args, **kwargs)

    real = varlen.attend
    monkeypatch.setattr(varlen, "attend", spying)
    model = tiny_model("llama", attn_implementation=backend)
    distill(model, trainable(model))
    assert used == [backend] * 2


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_label_gets_the_norms_of_the_hidden_states_that_ask(family, chunk_size, monkeypatch):
    norms, hidden = [], []

    def spying(view):
        norms.append(view.norms)
        return LABELS["max_prob"](view)

    monkeypatch.setitem(LABELS, "spying", spying)
    model = tiny_model(family)
    heads = tiny_heads(model, label="spying")
    distill(model, heads, chunk_size=chunk_size)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
        )
    model(prompt(LENGTH), use_cache=False)
    for ours, states in zip(norms, hidden, strict=True):
        assert torch.allclose(ours, states[:, PROMPT:].norm(dim=-1), rtol=1e-4)


def test_batch_rows_are_averaged():
    model, heads = tiny_model("llama"), None
    heads = trainable(model)
    ids = prompt(LENGTH, batch=2)
    together = distill(model, heads, ids)
    alone = [distill(model, heads, ids[row : row + 1]) for row in range(2)]
    for name in ("regression", "smoothness"):
        mean = sum(getattr(one, name) for one in alone) / 2
        assert torch.allclose(getattr(together, name), mean, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbone_trains_float32_heads(dtype):
    model = tiny_model("llama")
    heads, twin = trainable(model), trainable(model)
    exact = distill(model, twin)
    given = distill(model.to(dtype), heads)
    assert torch.allclose(given.loss, exact.loss, rtol=5e-2)
    given.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in heads.parameters())
    assert all(target.dtype == torch.float32 for target in given.targets)


def test_scores_are_kept_only_on_request():
    model = tiny_model("llama")
    given = distill(model, trainable(model))
    assert [t.shape for t in given.targets] == [(1, 2, PROMPT)] * 2
    assert [p.shape for p in given.predictions] == [(1, 2, PROMPT)] * 2
    assert not any(t.requires_grad for t in given.targets + given.predictions)
    without = distill(model, trainable(model), keep_scores=False)
    assert without.targets == without.predictions == []


@pytest.mark.parametrize("prompt_length", [1, LENGTH - 1])
def test_shortest_prompt_and_shortest_answer(prompt_length):
    model = tiny_model("llama")
    given = distill(model, trainable(model), prompt_length=prompt_length)
    given.loss.backward()
    assert torch.isfinite(given.loss)
    assert given.targets[0].shape == (1, 2, prompt_length)


@pytest.mark.parametrize("prompt_length", [-1, 0, LENGTH, LENGTH + 5])
def test_prompt_or_answer_missing_is_refused(prompt_length):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=rf"prompt_length is {prompt_length} of {LENGTH} tokens"):
        distill(model, trainable(model), prompt_length=prompt_length)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mean"}, r"loss 'mean' is unknown; expected one of \['listwise', 'smooth_l1', '"),
        ({"prompt_keys": "raw"}, "expected 'rotated' or 'unrotated'"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        distill(model, trainable(model), **settings)


def test_heads_of_another_backbone_are_refused():
    heads = tiny_heads(tiny_model("llama", num_key_value_heads=4))
    with pytest.raises(ValueError, match="do not fit the backbone: num_kv_heads: heads 4"):
        distill(tiny_model("llama"), heads)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_read_rows_as_the_models_own_forward_does(family, dtype):
    model = tiny_model(family).to(dtype)
    heads, ids = trainable(model), prompt(LENGTH)
    losses, gradients = {}, {}
    for stock in (False, True):
        backbone = Backbone(model, "by_length")
        distillation = Distillation(backbone, heads, alpha=ALPHA)
        # A hook of somebody's, which has to be called.
        hook = model.model.norm.register_forward_hook(lambda *_: None) if stock else None
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            loss = distillation(ids, [Segment.single(PROMPT, LENGTH)]).loss
        loss.backward()
        if hook is not None:
            hook.remove()
        assert (distillation.why_not_fused is not None) == stock
        losses[stock] = loss.detach()
        gradients[stock] = torch.cat([p.grad.flatten() for p in heads.parameters()])
        heads.zero_grad()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.01}
    torch.testing.assert_close(losses[False], losses[True], **near)
    difference = (gradients[False] - gradients[True]).norm() / gradients[True].norm()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05)


def test_rows_read_in_chunks_and_other_dtypes_of_autocast_are_the_models_own_to_read():
    model = tiny_model("llama")
    row = [Segment.single(PROMPT, LENGTH)]
    chunked = Distillation(Backbone(model), trainable(model), chunk_size=16)
    chunked(prompt(LENGTH), row)
    assert "chunks" in chunked.why_not_fused
    mixed = Distillation(Backbone(model), trainable(model))
    with torch.autocast("cpu", torch.bfloat16):
        mixed(prompt(LENGTH), row)
    assert "autocast" in mixed.why_not_fused
