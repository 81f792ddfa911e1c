"""What a head reads of a token (`FEATURES`), and what it computes of that: an MLP, the paper's
(section 3.1), one matrix, or the gate of another method. To let heads read something else, write
the function and give it a name in `FEATURES`.

H KV heads, G query heads a KV head, D head size, W input width, R width of a head.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.activations import ACT2FN


class LayerTensors(Protocol):
    """What a layer has at hand: query [B, H*G, T, D], key and value [B, H, T, D], all before RoPE,
    and hidden [B, T, hidden size]."""

    @property
    def query(self) -> Tensor: ...
    @property
    def key(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...


def qkv(layer: LayerTensors) -> Tensor:
    """[Q, K, V] of all heads before RoPE, in this order: [B, T, (H*G + 2H) * D].

    The paper's; released heads need it.
    """
    flat = [x.transpose(1, 2).flatten(2) for x in (layer.query, layer.key, layer.value)]
    return torch.cat(flat, dim=-1)


def hidden(layer: LayerTensors) -> Tensor:
    """The attention layer's input, after its norm: [B, T, hidden size].

    Smaller, and known before the projections.
    """
    return layer.hidden


FEATURES: dict[str, Callable[[LayerTensors], Tensor]] = {"qkv": qkv, "hidden": hidden}
"""What a head reads of a token, by the name that configs and artifacts use."""


class RetainingHead(nn.Module):
    """The head of one layer. Called with features [B, T, W] of any float dtype, it gives scores
    [B, H, T] in its own; higher = keep.
    """

    def start_at(self, score: float) -> None:
        """Let scores start around this value, where the head has a bias to say so."""


class MLPHead(RetainingHead):
    """`fc2(act(fc1(features)))`.

    Args:
        input_width: W. width: R. num_kv_heads: H. activation: a transformers activation name.
        bias: give both matrices one; the paper's have none.
    """

    def __init__(
        self, input_width: int, width: int, num_kv_heads: int, activation: str, bias: bool = False
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_width, width, bias=bias)
        self.fc2 = nn.Linear(width, num_kv_heads, bias=bias)
        self.act = ACT2FN[activation]

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.fc1.weight.dtype)
        return self.fc2(self.act(self.fc1(features))).transpose(1, 2)

    def start_at(self, score: float) -> None:
        if self.fc2.bias is not None:
            nn.init.constant_(self.fc2.bias, score)


class LinearHead(RetainingHead):
    """`fc(features)`: a matrix [H, W].

    Args:
        input_width: W. num_kv_heads: H.
        bias: give it one.
    """

    def __init__(self, input_width: int, num_kv_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(input_width, num_kv_heads, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features.to(self.fc.weight.dtype)).transpose(1, 2)

    def start_at(self, score: float) -> None:
        if self.fc.bias is not None:
            nn.init.constant_(self.fc.bias, score)


class GateHead(RetainingHead):
    """Fast KVzip's gate (arXiv 2601.17668): how a small attention would weigh a unit's own key
    against learned keys that stand for the rest of the context.

    sigmoid(<q, k> / sqrt(R) + b - logsumexp of <q, learned key> / sqrt(R)), the mean over the G
    queries of the group; q and k are projections of the features, after RMS norms. Scores are in
    (0, 1). Parameters are named as in its files.

    Args:
        input_width: W. width: R. num_query_heads: H * G. num_kv_heads: H.
        sinks: learned keys a KV head.
    """

    def __init__(
        self, input_width: int, width: int, num_query_heads: int, num_kv_heads: int, sinks: int
    ) -> None:
        super().__init__()
        self.q_proj = nn.Linear(input_width, num_query_heads * width)
        self.k_proj = nn.Linear(input_width, num_kv_heads * width, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_base = nn.Parameter(torch.zeros(num_kv_heads, 1, sinks, width))
        self.b = nn.Parameter(torch.zeros(num_kv_heads, 1, num_query_heads // num_kv_heads))

    def forward(self, features: Tensor) -> Tensor:
        dtype = self.q_proj.weight.dtype
        features = features.to(dtype)
        heads, _, _, width = self.k_base.shape
        query = self._normed(self.q_norm, self.q_proj(features)).unflatten(2, (heads, -1))
        key = self._normed(self.k_norm, self.k_proj(features))  # [B, T, H, R]
        own = torch.einsum("bthgr,bthr->bthg", query, key) / width**0.5 + self.b[:, 0].float()
        sinks = torch.einsum("bthgr,hsr->bthgs", query, self.k_base[:, 0].float()) / width**0.5
        scores = torch.sigmoid(own - sinks.logsumexp(dim=-1)).mean(dim=-1)
        return scores.transpose(1, 2).to(dtype)

    def _normed(self, norm: nn.RMSNorm, projected: Tensor) -> Tensor:
        """[B, T, heads * R] -> [B, T, heads, R] float32."""
        by_head = projected.float().unflatten(2, (-1, norm.weight.shape[0]))
        return rms_norm(by_head, norm.normalized_shape, norm.weight.float(), norm.eps)
