import pytest
import torch

from locret.kernels.splits import merge_attention, merge_attention_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 1, 16), (6, 33, 80), (9, 70, 64)])
def test_merged_is_what_the_twin_gives(dtype, heads, tokens, size, device):
    first = torch.randn(2, heads, tokens, size, device=device).to(dtype)
    second = torch.randn(2, tokens, heads, size, device=device).to(dtype).transpose(1, 2)
    logsumexps = 5 * torch.randn(2, 2, heads, tokens, device=device)
    sets = (first, logsumexps[0], second, logsumexps[1].mT.contiguous().mT)
    merged = merge_attention(*sets)
    assert merged.shape == (2, tokens, heads, size)
    assert merged.is_contiguous()
    assert merged.dtype == dtype
    expected = merge_attention_reference(*sets)
    assert torch.allclose(merged.float(), expected.float(), rtol=2e-2, atol=1e-2)


def test_merged_is_attention_over_both_sets(device):
    query, key, value = torch.randn(3, 1, 2, 12, 16, device=device)

    def attention(keys, values):
        logits = query @ keys.mT
        return logits.softmax(-1) @ values, logits.logsumexp(-1)

    merged = merge_attention(
        *attention(key[:, :, :5], value[:, :, :5]), *attention(key[:, :, 5:], value[:, :, 5:])
    )
    whole, _ = attention(key, value)
    assert torch.allclose(merged, whole.transpose(1, 2), atol=1e-5)
