"""TOVA (arXiv 2401.06104): what the last query looks at, the same units in every head."""

from torch import Tensor
from torch.nn.functional import pad

from locret.policies.base import HIGHEST, LayerChunk, Policy, attention_weights


class TOVAPolicy(Policy):
    """score(k) = attention of the last query on k, averaged over all query heads of the layer
    (section 3.2). All units are ranked anew after every chunk; the last one is kept.

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
