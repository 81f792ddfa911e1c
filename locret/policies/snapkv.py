"""SnapKV (arXiv 2404.14469): what the last queries look at, pooled over neighbours; and PyramidKV
(arXiv 2406.02069): the same scores, and budgets that fall with depth."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from locret.policies.attention import attention_weights
from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole

Pooling = Literal["avg", "max"]


class SnapKVPolicy(Policy):
    """score(k) = attention that k receives from the last `window` queries, summed over them, pooled
    over `kernel` neighbouring units, averaged over the query heads of a group (sections 3 and 4).
    The window itself is kept, within the budget.

    After every chunk all units are ranked anew, by the window that is then the last; queries of
    earlier chunks belong to it where a chunk is shorter. Cost: the attention logits of `window`
    queries, and as many queries a layer to remember.

    Args:
        window: how many of the last queries look, and units stay; published 32, also 8, 16, 64.
        kernel: units pooled together, odd; published 5 or 7.
        pooling: "avg" (the released code's default) or "max".
    """

    name = "snapkv"

    def __init__(self, window: int = 32, kernel: int = 5, pooling: Pooling = "avg") -> None:
        check_whole("window", window, 1)
        check_whole("kernel", kernel, 1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; expected an odd number")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {pooling!r}; expected 'avg' or 'max'")
        self.window = window
        self.kernel = kernel
        self.pooling = pooling

    def rank(self, chunk: LayerChunk) -> Tensor:
        query = self._last_queries(chunk)
        keys, last = chunk.all_keys(), query.shape[2]
        before = keys.shape[2] - last
        weights = attention_weights(query, keys, before, chunk.scaling, chunk.filled())
        known = query.any(dim=-1).view(weights.shape[:4])  # zeros: not seen by this policy
        received = (weights[..., :before] * known[..., None]).sum(dim=3)
        scores = self._pooled(received).mean(dim=2)
        # The window is kept as `recent` units; a small budget does not protect all of them.
        return pad(scores, (0, last), value=HIGHEST)

    def recent(self, budget: int) -> int:
        return self.window

    def _last_queries(self, chunk: LayerChunk) -> Tensor:
        """[B, H*G, up to `window`, D], rotated at the last slots. Remembers them for later."""
        new = chunk.query[:, :, -self.window :]
        before = chunk.state.get("window_queries")
        earlier = min(self.window - new.shape[2], 0 if before is None else chunk.context_length)
        chunk.state["window_queries"] = self._remembered(before, chunk)
        if earlier <= 0 or before is None:
            return chunk.rotated_query[:, :, -self.window :]
        # What is held last are the very units of these queries: they were recent.
        rotated = chunk.rotate(before[:, :, -earlier:], -earlier)
        return torch.cat([rotated, chunk.rotated_query[:, :, -self.window :]], dim=2)

    def _remembered(self, before: Tensor | None, chunk: LayerChunk) -> Tensor:
        """The last `window` queries before RoPE, zeros in front where there were fewer."""
        new = chunk.query[:, :, : chunk.query.shape[2] - chunk.drop][:, :, -self.window :]
        missing = self.window - new.shape[2]
        if before is None:
            remembered = pad(new, (0, 0, missing, 0))
        else:
            remembered = torch.cat([before[:, :, self.window - missing :], new], dim=2)
        # A question takes its share of the window: so many more units in front may be evicted.
        remembered[:, :, : chunk.drop] = 0
        return remembered

    def _pooled(self, received: Tensor) -> Tensor:
        """[B, H, G, S] in, [B, H, G, S] out."""
        if not received.shape[-1]:
            return received
        flat, padding = received.flatten(1, 2), self.kernel // 2
        pool = avg_pool1d if self.pooling == "avg" else max_pool1d
        return pool(flat, self.kernel, stride=1, padding=padding).view_as(received)


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
