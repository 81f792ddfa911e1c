"""Training losses of the retaining heads. Pure functions.

B batch, H KV heads, P prompt tokens. A loss takes predicted and true scores [B, H, P] and returns a
scalar; to add one, write the function and give it a name in `LOSSES`.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Smooth-L1 (beta 1), mean over all: the paper's (section 3.2)."""
    return smooth_l1_loss(predictions, targets)


def listwise(predictions: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy between the orders of a head's units (ListNet, Cao et al., ICML 2007).

    Both score lists become probabilities by a softmax over the units of a head; mean over heads.
    Only the order within a head counts, not the scale, so scores of different heads are not to be
    compared afterwards.
    """
    flat = predictions.flatten(0, 1)
    return cross_entropy(flat, targets.flatten(0, 1).softmax(dim=-1))


def smoothness(predictions: Tensor) -> Tensor:
    """Mean squared difference of the scores of neighbouring tokens, for scores [B, H, P]. Scalar.

    The paper's second term (section 3.2). A single token has no neighbour: zero.
    """
    if predictions.shape[-1] < 2:
        return predictions.new_zeros(())
    return predictions.diff(dim=-1).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": regression,
    "listwise": listwise,
}
"""Losses by the name that configs use."""
