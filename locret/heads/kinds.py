"""What a head computes of a token's features: an MLP, the paper's (section 3.1), or one matrix.

H KV heads, W input width, R width of a head.
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN


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
        self,
        input_width: int,
        width: int,
        num_kv_heads: int,
        activation: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_width, width, bias=bias)
        self.fc2 = nn.Linear(width, num_kv_heads, bias=bias)
        self.act = ACT2FN[activation]

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.fc1.weight.dtype)
        return self.fc2(self.act(self.fc1(features))).transpose(1, 2)

    def start_at(self, score: float) -> None:
        _fill(self.fc2.bias, score)


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
        _fill(self.fc.bias, score)


def _fill(bias: Tensor | None, score: float) -> None:
    if bias is not None:
        nn.init.constant_(bias, score)
