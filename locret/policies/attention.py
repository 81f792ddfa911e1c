"""Policies by the attention that units receive (H2O, TOVA, SnapKV, PyramidKV) or are expected to
(Expected Attention), and what they look at.

B batch, H KV heads, G query heads a KV head, S slots, T new tokens, W queries, D head size.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole

Pooling = Literal["avg", "max"]


def attention_weights(
    query: Tensor, keys: Tensor, first: int, scaling: float, filled: Tensor | None
) -> Tensor:
    """Softmax over the slots that each query sees; zeros for a query whose own slot is empty.

    Args:
        query: [B, H*G, W, D], rotated, at the slots first .. first + W - 1.
        keys: [B, H, S, D], rotated.
        filled: bool [B, H, S], slots that hold a unit; None = all.

    Returns:
        [B, H, G, W, S] float32.
    """
    batch, heads, slots, size = keys.shape
    grouped = query.reshape(batch, heads, -1, query.shape[2], size)
    logits = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)).float() * scaling
    slot = torch.arange(slots, device=keys.device)
    own = torch.arange(first, first + query.shape[2], device=keys.device)
    hidden = slot > own[:, None]
    if filled is None:
        return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    # A query without a unit of its own is padding: it sees nothing, and softmax makes NaN of that.
    seen = filled[:, :, None] & ~hidden & filled[:, :, first : first + query.shape[2], None]
    return logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


class H2OPolicy(Policy):
    """H2O (arXiv 2306.14048), heavy hitters: score(k) = attention mass that k received from all
    queries since it came (section 4); the last `recent_share` of the budget is kept whatever it
    scored.

    Cost: the attention logits of a chunk once more, `block` queries at a time. Query heads of a
    group: mean of their masses (the published code has no groups).

    Args:
        recent_share: of the budget; the published half.
        block: queries whose weights over all units are in memory at a time.
    """

    name = "h2o"

    def __init__(self, recent_share: float = 0.5, block: int = 128) -> None:
        check_between("recent_share", recent_share, 0, 1)
        check_whole("block", block, 1)
        self.recent_share = recent_share
        self.block = block

    def rank(self, chunk: LayerChunk) -> Tensor:
        keys, filled, before = chunk.all_keys(), chunk.filled(), chunk.context_length
        mass = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        for start in range(0, chunk.key.shape[2], self.block):  # so that no T x S matrix is kept
            query = chunk.rotated_query[:, :, start : start + self.block]
            weights = attention_weights(query, keys, before + start, chunk.scaling, filled)
            mass += weights.sum(dim=3).mean(dim=2)
        if chunk.context is None:
            return mass
        return mass + pad(chunk.context.scores, (0, chunk.key.shape[2]))

    def recent(self, budget: int) -> int:
        return int(self.recent_share * budget)


class TOVAPolicy(Policy):
    """TOVA (arXiv 2401.06104): score(k) = attention of the last query on k, averaged over all query
    heads of the layer (section 3.2). All units are ranked anew after every chunk; the last one is
    kept.

    Cost: the attention logits of one query.
    """

    name = "tova"

    def rank(self, chunk: LayerChunk) -> Tensor:
        keys = chunk.all_keys()
        before = keys.shape[2] - 1
        query = chunk.rotated_query[:, :, -1:]
        weights = attention_weights(query, keys, before, chunk.scaling, chunk.filled())
        scores = weights[..., 0, :before].mean(dim=(1, 2))
        return pad(scores, (0, 1), value=HIGHEST)[:, None].expand(keys.shape[:3])


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


class ExpectedAttentionPolicy(Policy):
    """Queries before RoPE are taken as normal, with the mean m and covariance C of those read so
    far; R is the rotation averaged over the next `future` slots. Then

        z(k) = k.Rm / sqrt(D) + k.(R C R^T)k / (2 D),   score(k) = (softmax(z)(k) + epsilon) ||v||

    with the softmax averaged over the query heads of a group (section 3). The first `sinks` tokens
    are always kept, and their queries and keys left out, as in the authors' code.

    Read in chunks, m and C are running ones and all units are ranked anew after every chunk. Cost:
    C takes D x D floats a query head and layer; a product of every key with it.

    Args:
        future: slots that the rotation is averaged over.
        sinks: first tokens kept.
        covariance: False leaves C out: cheaper, less exact.
        value_norm: False leaves ||v|| out.
        epsilon: as above.
    """

    name = "expected_attention"

    def __init__(
        self,
        future: int = 512,
        sinks: int = 4,
        covariance: bool = True,
        value_norm: bool = True,
        epsilon: float = 0.0,
    ) -> None:
        check_whole("future", future, 1)
        check_whole("sinks", sinks, 0)
        check_between("epsilon", epsilon, 0)
        self.future = future
        self.sinks = sinks
        self.covariance = covariance
        self.value_norm = value_norm
        self.epsilon = epsilon

    def rank(self, chunk: LayerChunk) -> Tensor:
        is_sink = self._sinks(chunk)
        read = chunk.key.shape[2]
        seen = self._taken_in(chunk, read)
        logits = self._logits(chunk, seen)
        chunk.state.update(self._taken_in(chunk, read - chunk.drop) if chunk.drop else seen)
        left_out = is_sink if chunk.empty is None else is_sink | ~chunk.filled()  # type: ignore
        logits = logits.masked_fill(left_out[:, :, None], -torch.inf)
        # Nothing but sinks and empty slots: softmax of nothing, and any finite score will do.
        scores = logits.softmax(dim=-1).nan_to_num(0.0).mean(dim=2)
        if self.value_norm:
            scores = (scores + self.epsilon) * chunk.all_values().float().norm(dim=-1)
        return scores.masked_fill(is_sink, HIGHEST)

    def _sinks(self, chunk: LayerChunk) -> Tensor:
        """Which units are sinks, bool [B, H, S + T]; held ones by the scores they were given."""
        new = chunk.among_first(self.sinks)
        if chunk.context is None:
            return new
        old = chunk.context.scores == HIGHEST
        return torch.cat([old, new], dim=2)

    def _taken_in(self, chunk: LayerChunk, new: int) -> dict[str, Tensor]:
        """Count, sum and sum of products of the queries so far and the first `new` ones."""
        query = chunk.query[:, :, :new].float()
        used = (chunk.own_positions >= self.sinks)[:, None, :new, None].expand(
            query.shape[0], 1, -1, 1
        )
        query = torch.where(used, query, 0.0)
        sums = {"queries": used.sum(dim=2).float(), "query_sum": query.sum(2)}
        if self.covariance:
            sums["query_products"] = query.transpose(2, 3) @ query
        before = chunk.state
        return {n: before[n] + value if n in before else value for n, value in sums.items()}

    def _logits(self, chunk: LayerChunk, state: dict[str, Tensor]) -> Tensor:
        """z of held and new units by what was taken in, [B, H, G, S + T] float32."""
        keys = chunk.all_keys().float()
        batch, heads, _, size = keys.shape
        turn = self._average_rotation(chunk)
        count = state["queries"].clamp(min=1)
        mean = state["query_sum"] / count
        turned = (mean @ turn).view(batch, heads, -1, size)
        logits = turned @ keys.transpose(2, 3) / size**0.5
        if not self.covariance:
            return logits
        covariance = (
            state["query_products"] / count[..., None] - mean[..., None] * mean[..., None, :]
        )
        turned = turn.transpose(1, 2)[:, None] @ covariance @ turn[:, None]
        turned = turned.view(batch, heads, -1, size, size)
        spread = torch.einsum("bhsi,bhgij,bhsj->bhgs", keys, turned, keys)
        return logits + spread / (2 * size)

    def _average_rotation(self, chunk: LayerChunk) -> Tensor:
        """The rotation averaged over the next slots, as x -> x @ R; [B, D, D] float32."""
        batch, _, new, size = chunk.key.shape
        basis = torch.eye(size, device=chunk.key.device, dtype=torch.float32)
        everywhere = basis[None, :, None].expand(batch, size, self.future, size)
        return chunk.rotate(everywhere, new).mean(dim=2)
