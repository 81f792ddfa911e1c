"""Training losses of the retaining heads (paper section 3.2). Pure functions.

B batch, H KV heads, P prompt tokens.
"""

from torch import Tensor
from torch.nn.functional import smooth_l1_loss


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth-L1 (beta 1) between predicted and true scores [B, H, P]; mean over all. Scalar."""
    return smooth_l1_loss(predictions, targets)


def smoothness(predictions: Tensor) -> Tensor:
    """Mean squared difference of the scores of neighbouring tokens, for scores [B, H, P]. Scalar.

    A single token has no neighbour: zero.
    """
    if predictions.shape[-1] < 2:
        return predictions.new_zeros(())
    return predictions.diff(dim=-1).square().mean()
