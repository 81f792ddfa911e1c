"""PyramidKV (arXiv 2406.02069): SnapKV's scores, and budgets that fall with depth."""

from locret.policies.snapkv import Pooling, SnapKVPolicy
from locret.quantities import check_between


class PyramidKVPolicy(SnapKVPolicy):
    """Scores as SnapKV; the first layer keeps most and the last one `1 / beta` of the average, a
    straight line between (section 3.3, equations 2 to 4), with the same total as without.

    Cost: SnapKV's.

    Args:
        window, kernel, pooling: SnapKV's; published window 8 (also 16, 32), kernel 5 or 7.
        beta: how steep; published 20.
    """

    name = "pyramidkv"

    def __init__(
        self, window: int = 8, kernel: int = 7, pooling: Pooling = "max", beta: float = 20
    ) -> None:
        super().__init__(window, kernel, pooling)
        check_between("beta", beta, 1)
        self.beta = beta

    def budgets(self, budget: int, num_layers: int, context: int) -> list[int]:
        return pyramid(budget, num_layers, context, self.beta, self.window)


def pyramid(
    budget: int, num_layers: int, context: int, beta: float = 20, window: int = 0
) -> list[int]:
    """Budgets on a falling line, `budget` on average.

    Args:
        budget: average of all layers.
        context: tokens to be read. No layer is given more than that while others lack: where the
            first would be, the line is made flatter.
        beta: the last layer gets 1 / beta of the average.
        window: units every layer gets besides; the line is drawn over what is left.
    """
    free = budget - window
    if free <= 0 or num_layers == 1 or budget >= context:
        return [budget] * num_layers
    most = min(2 * free - free / beta, context - window)
    step = 2 * (most - free) / (num_layers - 1)
    exact = [window + most - layer * step for layer in range(num_layers)]
    whole = [int(units) for units in exact]
    left = budget * num_layers - sum(whole)  # by rounding; it goes to the first layers with room
    for layer in [i for i in range(num_layers) if whole[i] < context][:left]:
        whole[layer] += 1
    return whole
