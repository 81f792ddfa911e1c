"""Heads tuned through soft gates: KL of answers that see all of a trunk and what is kept of it."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from locret.model.backbone import Backbone
from locret.model.backends import attend
from locret.training import gated
from locret.training.branches import FLOOR, BranchAttention, Trunks, stored, thresholds_for
from locret.training.gated import GatedLoss
from locret.training.segments import ways_of
from tests.test_branches import alone, branched, shifted
from tests.tiny_models import prompt, tiny_heads, tiny_model

FIRST = branched(23, [(4, 9), (2, 6)])
SECOND = branched(17, [(0, 12), (5, 1)], start=FIRST.end)
ROW = [FIRST, SECOND]
IDS = prompt(SECOND.end)
HALF = [2.0, 3.0]


def made(family="llama", dtype=torch.float32, model=None, attn="sdpa", **options):
    """A loss and its heads, in training."""
    kv_heads = options.pop("kv_heads", 2)
    if model is None:
        model = tiny_model(family, attn_implementation=attn, num_key_value_heads=kv_heads)
        model.requires_grad_(False)
    model = model.to(dtype)
    heads = tiny_heads(model, label="log_max_prob", bias=True, **options.pop("record", {}))
    torch.manual_seed(1)
    for parameter in heads.parameters():  # scores that differ by more than a temperature
        parameter.data = 4 * torch.randn_like(parameter.data).to(dtype) / parameter.shape[-1] ** 0.5
    heads.requires_grad_(True).train()
    options = {"regression_weight": 0.0} | options
    return GatedLoss(Backbone(model, "by_length"), heads, **options), heads


def gradients_of(loss, heads, compressions=HALF, temperature=0.5):
    heads.zero_grad()
    result = loss(IDS, ROW, compressions, temperature)
    result.loss.backward()
    return result, [p.grad.clone() for p in heads.parameters()]


def assert_close(ours, theirs, relative=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


# --- what branches see ---


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2-hybrid", "phi3", "gemma3_text", "gpt_oss"])
def test_open_gates_change_nothing(family, kv_heads):
    loss, heads = made(family, kv_heads=kv_heads)
    result, gradients = gradients_of(loss, heads, [1.0, 1.0])
    assert result.divergence.abs() < 1e-6
    assert result.agreement == 1
    assert result.opened == pytest.approx(1)
    assert all(g.abs().max() < 1e-6 for g in gradients)


def hidden_of_branches(loss, gates):
    """The decoder's output for all branches through the given gates."""
    ways, backbone = ways_of(ROW), loss.backbone
    trunks = Trunks(loss.distillation.recipe, ROW)
    loss._teach(IDS, trunks, ways)
    ids = torch.cat([IDS[:, way.stretch.start : way.stretch.end] for way in ways], dim=1)
    with torch.no_grad(), backbone.attached(BranchAttention(ways, trunks, gates, "sdpa")):
        return backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0], trunks


@pytest.mark.parametrize("family", ["llama", "qwen2-hybrid", "smollm3", "phi3", "gpt_oss"])
def test_branches_read_alone_are_those_of_a_whole_text(family):
    loss, _ = made(family)
    ours, _ = hidden_of_branches(loss, None)
    at = 0
    for segment in ROW:
        for (start, end), (ids, _) in zip(segment.branches, alone(IDS, segment), strict=True):
            with torch.no_grad():
                stock = loss.backbone.decoder(ids, use_cache=False).last_hidden_state[0]
            assert_close(ours[at : at + end - start], stock[start - end :])
            at += end - start


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_closed_gate_is_as_if_its_unit_were_not_there(kv_heads):
    """Of every head other units: compared with attention to what is left."""
    loss, _ = made(kv_heads=kv_heads)
    generator = torch.Generator().manual_seed(3)
    kept = [torch.rand(2, kv_heads, n, generator=generator) < 0.4 for n in (23, 17)]
    gates = [torch.where(keep, 0.0, FLOOR) for keep in kept]
    ours, trunks = hidden_of_branches(loss, gates)

    class Removed(BranchAttention):
        def __call__(self, call):
            query, key = (call.rotate_ranges(x, self.slots) for x in (call.query, call.key))
            outputs = []
            for way in self.ways:
                units = (x.split([23, 17], dim=2) for x in trunks.units[call.layer_idx])
                own = slice(way.stretch.start + way.shift, way.stretch.end + way.shift)
                keys, values = (x[way.segment] for x in units)
                heads = []
                for head in range(kv_heads):
                    group = query.shape[1] // kv_heads
                    keep = kept[way.segment][call.layer_idx, head]
                    of = slice(head, head + 1)
                    k = torch.cat([keys[:, of, keep], key[:, of, own]], dim=2)
                    v = torch.cat([values[:, of, keep], call.value[:, of, own]], dim=2)
                    q = query[:, head * group : (head + 1) * group, own]
                    heads.append(attend(q, k, v, call.scaling, "eager"))
                outputs.append(torch.cat(heads, dim=2))
            return torch.cat(outputs, dim=1)

    ways = ways_of(ROW)
    ids = torch.cat([IDS[:, way.stretch.start : way.stretch.end] for way in ways], dim=1)
    with torch.no_grad(), loss.backbone.attached(Removed(ways, trunks, None, "eager")):
        theirs = loss.backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    assert_close(ours, theirs)
    assert (hidden_of_branches(loss, None)[0] - theirs).abs().max() > 1e-3 * theirs.abs().max()


def test_the_divergence_is_that_of_the_two_predictions():
    loss, _ = made()
    result = loss(IDS, ROW, HALF, 0.5)
    ways = ways_of(ROW)
    trunks = Trunks(loss.distillation.recipe, ROW)
    loss._teach(IDS, trunks, ways)
    gates, _ = loss._gates(trunks, HALF, 0.5)
    hidden, _ = hidden_of_branches(loss, gates)
    total, count, at = 0.0, 0, 0
    for segment in ROW:
        for (start, end), (ids, asked) in zip(segment.branches, alone(IDS, segment), strict=True):
            with torch.no_grad():
                full = loss.backbone.model(ids, use_cache=False).logits[0].log_softmax(-1)
                own = loss.backbone.model.lm_head(hidden[at : at + end - start]).log_softmax(-1)
            trunk = ids.shape[1] - (end - start)
            for position in range(asked - 1, ids.shape[1] - 1):
                if position >= trunk:
                    p, q = full[position], own[position - trunk]
                    total, count = total + (p.exp() * (p - q)).sum(), count + 1
            at += end - start
    assert count == 9 + 6 + 11 + 1
    assert result.divergence > 1e-4
    assert torch.allclose(result.divergence, total / count, rtol=1e-3)


def test_every_answer_can_count_alike():
    by_token, _ = made()
    by_branch, _ = made(mean_over="branches")
    each = []
    for segment in ROW:
        for branch, answer in zip(segment.branches, segment.answers, strict=True):
            trunk = segment.branches[0][0]
            ids = torch.cat([IDS[:, segment.start : trunk], IDS[:, slice(*branch)]], dim=1)
            first = trunk - segment.start
            ways = [(answer[0] - branch[0], branch[1] - answer[0])]
            compression = HALF[ROW.index(segment)]
            each.append(by_token(ids, [branched(first, ways)], [compression], 0.5).divergence)
    ours = by_branch(IDS, ROW, HALF, 0.5).divergence
    assert torch.allclose(ours, torch.stack(each).mean(), rtol=1e-3)
    half = made(mean_over="both")[0](IDS, ROW, HALF, 0.5).divergence
    whole = by_token(IDS, ROW, HALF, 0.5).divergence
    assert torch.allclose(half, (ours + whole) / 2, rtol=1e-3)


# --- gradients ---


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("threshold", ["global", "quotas"])
def test_gradients_are_finite_differences(threshold, kv_heads, monkeypatch):
    """Thresholds stay where they are: they are constants between two steps."""
    quotas = {"2": [[2.0, *[1.0] * (kv_heads - 1)], [0.5] * kv_heads]}
    options = {"threshold": threshold, "record": {"quotas": quotas}, "kv_heads": kv_heads}
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_of_any_dtype)
    loss, heads = made(dtype=torch.float64, **options)
    found = []

    def once(*args):
        found.append(thresholds_for(*args))
        return found[-1]

    monkeypatch.setattr(gated, "thresholds_for", once)
    monkeypatch.setattr(gated, "log_gates", log_gates_at)
    _, gradients = gradients_of(loss, heads)
    kept = found[:]
    for index, parameter in enumerate(heads.parameters()):
        direction = gradients[index] / gradients[index].norm()
        values = []
        for step in (1e-5, -1e-5):
            left = iter(kept)
            monkeypatch.setattr(gated, "thresholds_for", lambda *_, left=left: next(left))
            parameter.data += step * direction
            values.append(loss(IDS, ROW, HALF, 0.5).loss.item())
            parameter.data -= step * direction
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(gradients[index].norm().item(), rel=1e-4)


def norm_of_any_dtype(norm, hidden):
    """The stock one computes in float32, whatever its input is."""
    return torch.nn.functional.rms_norm(
        hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon
    )


def log_gates_at(scores, thresholds, temperature):
    """Gates whose thresholds stay."""
    return torch.nn.functional.logsigmoid((scores - thresholds) / temperature).clamp(min=FLOOR)


@pytest.mark.parametrize("threshold", ["global", "quotas"])
def test_what_lifts_all_scores_alike_has_no_gradient(threshold):
    record = {"quotas": {"2": [[2.0, 1.0], [0.5, 0.5]]}}
    loss, heads = made(threshold=threshold, record=record)
    gradients_of(loss, heads)
    biases = torch.stack([layer.fc2.bias.grad for layer in heads.layers])
    weights = torch.cat([layer.fc2.weight.grad.flatten() for layer in heads.layers])
    assert weights.abs().max() > 1e-3
    if threshold == "global":
        assert biases.sum().abs() < 1e-3 * biases.abs().max()
    else:
        assert biases.abs().max() < 1e-3 * weights.abs().max()


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2-hybrid", "qwen3_moe", "phi3"])
def test_layers_may_be_computed_again(family, attn):
    model = tiny_model(family, attn_implementation=attn).requires_grad_(False)
    counts = {}
    layer = model.model.layers[0].mlp
    for recompute in (False, True):
        loss, heads = made(model=model, recompute=recompute)
        calls = []
        hook = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        counts[recompute] = gradients_of(loss, heads), len(calls)
        hook.remove()
    (plain, expected), before = counts[False]
    (again, gradients), after = counts[True]
    # A first layer that slides sees no gate, and needs no gradient.
    assert (before, after) == (2, 2 + (loss.backbone.layers[0].retained_idx is not None))
    assert torch.equal(plain.divergence, again.divergence)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_the_backbone_is_left_as_it_was():
    model = tiny_model("llama").requires_grad_(True)
    before = {name: {**vars(module)} for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    loss, heads = made(model=model, regression_weight=0.1)
    gradients_of(loss, heads)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys()
        assert all(now[key] is before[name][key] for key in now if not key.startswith("_")), name
        assert not module._forward_pre_hooks and not module._forward_hooks
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


def test_nothing_is_left_after_an_error(monkeypatch):
    loss, _ = made()
    monkeypatch.setattr(gated, "divergence", lambda *_: pytest.fail("as planned"))
    with pytest.raises(pytest.fail.Exception):
        loss(IDS, ROW, HALF, 0.5)
    layer = loss.backbone.decoder.layers[0]
    assert not layer.training and not layer.gradient_checkpointing
    assert not layer.self_attn._forward_pre_hooks


def test_in_evaluation_there_is_no_gradient():
    loss, heads = made(regression_weight=0.1)
    learning = loss(IDS, ROW, HALF, 0.5)
    heads.eval()
    with torch.inference_mode():
        result = loss(IDS, ROW, HALF, 0.5)
    assert not result.loss.requires_grad
    for name in ("loss", "divergence", "regression", "opened"):
        assert torch.allclose(getattr(result, name), getattr(learning, name).detach()), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_training_lowers_the_divergence(family):
    loss, heads = made(family, record={"width": 32})
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    found = []
    for _ in range(40):
        result, _ = gradients_of(loss, heads, temperature=0.5)
        optimizer.step()
        found.append(result.divergence.item())
    assert found[-1] < 0.8 * found[0]


def test_labels_keep_scores_where_they_were():
    """The loss is the divergence and a share of the regression that `Distillation` takes."""
    weight = 0.3
    both, heads = made(regression_weight=weight)
    result, ours = gradients_of(both, heads)
    divergence, _ = made()
    without, of_divergence = gradients_of(divergence, divergence.heads)
    heads.zero_grad()
    distilled = both.distillation(IDS, ROW)
    distilled.loss.backward()
    assert torch.allclose(result.regression, distilled.regression)
    expected = without.loss + weight * distilled.loss
    assert torch.allclose(result.loss, expected, rtol=1e-5)
    for mine, a, b in zip(ours, of_divergence, heads.parameters(), strict=True):
        assert_close(mine, a + weight * b.grad, 1e-4)


# --- few bits ---


@pytest.mark.parametrize("given", [{"name": "kivi", "bits": 2}, "rotated", "fp8", "kvquant"])
def test_branches_see_keys_and_values_in_few_bits(given):
    exact, heads = made()
    few, _ = made(quantization=given)
    result, gradients = gradients_of(few, few.heads, [1.0, 1.0])
    assert result.divergence > 1e-7  # all units stay, and differ
    result, gradients = gradients_of(few, few.heads)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
    assert result.divergence != gradients_of(exact, heads)[0].divergence


def test_texts_share_no_block_in_few_bits():
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 70 + 9, 8, generator=generator) for _ in range(2))
    loss, _ = made(quantization={"name": "kivi", "bits": 4})
    both = stored(loss.scheme, key, value, [70, 9])
    for start, length in ((0, 70), (70, 9)):
        each = (x[:, :, start : start + length] for x in (key, value))
        alone = stored(loss.scheme, *each, [length])
        for ours, theirs, exact in zip(both, alone, (key, value), strict=True):
            own = ours[:, :, start : start + length]
            assert torch.equal(own, theirs)
            assert 0 < (own - exact[:, :, start : start + length]).abs().max() < 0.5


def test_half_precision_stays_finite():
    loss, heads = made(dtype=torch.bfloat16)
    for temperature in (1.0, 1e-3):
        result, gradients = gradients_of(loss, heads, [8.0, 16.0], temperature)
        assert result.loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_mixed_precision_as_trainings_have_it():
    """A backbone in bfloat16, heads in float32 under autocast, which shares what it casts."""
    exact, heads = made(regression_weight=0.1)
    _, expected = gradients_of(exact, heads)
    loss, heads = made(model=copy.deepcopy(exact.backbone.model), regression_weight=0.1)
    loss.backbone.model.bfloat16()
    heads.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(IDS, ROW, HALF, 0.5)
    result.loss.backward()
    for parameter, theirs in zip(heads.parameters(), expected, strict=True):
        ours = parameter.grad
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2-hybrid", "qwen3", "phi3"])
def test_gradients_on_a_gpu_are_those_of_the_cpu(family):
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(family).requires_grad_(False).to(device)
        loss, heads = made(model=model, regression_weight=0.1)
        heads.to(device)
        result = loss(IDS.to(device), ROW, HALF, 0.5)
        result.loss.backward()
        found.append([result.divergence.cpu(), *(p.grad.cpu() for p in heads.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-2)


@pytest.mark.gpu
def test_half_precision_on_a_gpu_takes_fused_attention():
    """Heads of the size of real ones: with the gate's channels, 136."""
    model = tiny_model("qwen2", head_dim=128, hidden_size=1024).requires_grad_(False)
    results = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cuda")):
        loss, heads = made(model=model.to(device), dtype=dtype)
        heads.to(device)
        result = loss(IDS.to(device), ROW, HALF, 0.5)
        result.loss.backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in heads.parameters())
        results.append(result.divergence.item())
    assert results[1] == pytest.approx(results[0], rel=0.2)


# --- what is refused ---


def test_samples_without_branches_are_refused():
    loss, _ = made()
    row = [FIRST, shifted(branched(20, [(0, 9)])._replace(branches=()), FIRST.end)]
    with pytest.raises(ValueError, match="1 of 2 samples have no branches"):
        loss(IDS[:, : row[-1].end], row, HALF, 0.5)


@pytest.mark.parametrize("compressions", [[2.0], [2.0, 0.5], [2.0, float("nan")]])
def test_wrong_compressions_are_refused(compressions):
    with pytest.raises(ValueError, match="for 2 samples; expected a number of at least 1 for each"):
        made()[0](IDS, ROW, compressions, 0.5)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature is 0; expected a number above 0"):
        made()[0](IDS, ROW, HALF, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": "local"}, "threshold is 'local'; expected one of"),
        ({"threshold": "quotas"}, "heads have none in their record"),
        ({"mean_over": "heads"}, "mean_over is 'heads'"),
        ({"regression_weight": -1.0}, "regression_weight is -1.0; expected 0 or more"),
        ({"record": {"query_tokens": 3}}, "read 3 tokens of a question in front"),
        ({"family": "gemma2"}, "gemma2 caps its logits"),
        ({"quantization": "nosuch"}, "no quantization 'nosuch'"),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        made(**options)


def test_heads_that_learned_no_logarithm_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="these heads learned 'max_logit'"):
        GatedLoss(Backbone(model), tiny_heads(model))
