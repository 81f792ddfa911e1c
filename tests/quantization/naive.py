"""Plain twins: the formulas unit by unit, in lists."""

import torch


def affine(x, bits):
    """KIVI's formula for one group [n], in float32, with a float16 scale and minimum."""
    low, high, last = x.min(), x.max(), 2**bits - 1
    for _ in range(2):  # the scale of the range, then of the range as it comes back
        scale = ((high - low) / last).clamp(min=2.0 ** (bits - 24)).half().float()
        high = (low + scale * ((high - low) / scale).round().clamp(0, last)).half().float()
    codes = ((x - low) / scale).round().clamp(0, last)
    return low + scale * codes


def kivi_keys(x, bits, group):
    """Restored keys [S, D] of one head: groups of `group` tokens, a channel at a time."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], group):
        for channel in range(x.shape[1]):
            part = x[start : start + group, channel]
            out[start : start + group, channel] = affine(part, bits)
    return out


def kivi_values(x, bits, group):
    """Restored values [S, D] of one head: a token at a time, groups of `group` channels."""
    out = torch.empty_like(x)
    for token in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            out[token, start : start + group] = affine(x[token, start : start + group], bits)
    return out
