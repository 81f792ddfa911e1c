"""Expected Attention (arXiv 2510.00636): attention that future queries are expected to pay."""

import torch
from torch import Tensor

from locret.policies.base import HIGHEST, LayerChunk, Policy
from locret.quantities import check_between, check_whole


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
