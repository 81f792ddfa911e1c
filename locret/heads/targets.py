"""What heads learn: causal importance labels, and the losses that bring predictions to them.

Pure functions. B batch, H KV heads, G query heads a KV head, A answer tokens, P prompt tokens,
S = P + A, D head size. A label says how much the answer looks at every prompt unit: it takes an
`AnswerView` and returns float32 [B, H, P], higher = keep. A loss takes predicted and true scores
[B, H, P] and returns a scalar. To add one, write the function and give it a name in `LABELS` or
`LOSSES`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

_BLOCK_ELEMENTS = 2**26  # of the logits that are in memory at a time


@dataclass(frozen=True)
class AnswerView:
    """One layer, as the answer sees it.

    Attributes:
        query: [B, H*G, A, D], the answer's, after RoPE.
        key, value: [B, H, S, D], of prompt and answer, keys after RoPE.
        scaling: the layer's softmax scale, usually 1 / sqrt(D).
        output_weight: [hidden size, H*G * D], of the layer's output projection; None if unknown.
        softcap, sinks: see `locret.model.attend.Weighting`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    output_weight: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Scaled logits, as the softmax gets them."""
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    @property
    def prompt_length(self) -> int:
        return self.key.shape[2] - self.query.shape[2]

    def grouped(self, rows: slice) -> Tensor:
        """Queries of some answer tokens [B, H, G * rows, D]: heads of a group share their keys."""
        batch, heads, _, size = self.key.shape
        return self.query[:, :, rows].reshape(batch, heads, -1, size)

    def blocks(self) -> Iterator[slice]:
        """Answer tokens, so many at a time that a block's logits fit `_BLOCK_ELEMENTS`."""
        rows = max(1, _BLOCK_ELEMENTS // (self.query[:, :, 0, 0].numel() * self.key.shape[2]))
        answer = self.query.shape[2]
        for start in range(0, answer, rows):
            yield slice(start, min(start + rows, answer))


def max_logit(view: AnswerView) -> Tensor:
    """The paper's label (section 3.2): the largest pre-softmax logit a unit gets from the answer.

    max over answer tokens a and query heads g of the group of  scaling * <q[g, a], k[unit]>.
    """
    keys = view.key[:, :, : view.prompt_length].transpose(2, 3)
    blocks = (torch.matmul(view.grouped(rows), keys).amax(dim=2) for rows in view.blocks())
    return view.capped(torch.stack([block.float() * view.scaling for block in blocks]).amax(dim=0))


def max_prob(view: AnswerView) -> Tensor:
    """The largest attention probability a unit gets from the answer.

    max over a and g of  softmax over all visible units of (scaling * <q[g, a], k>)[unit].
    """
    return _max_over_answer(view, weight=None)


def value_weighted(view: AnswerView) -> Tensor:
    """Attention probability times what the unit's value does to the layer's output.

    max over a and g of  prob[g, a, unit] * || W_O[g] v[unit] ||  (CriticalKV, arXiv 2502.03805;
    KVzap, arXiv 2601.07891).

    Raises:
        ValueError: the output projection is not known.
    """
    if view.output_weight is None:
        raise ValueError(
            "label 'value_weighted' needs the attention layers' output projection as one matrix: "
            "it is quantized, offloaded, wrapped by an adapter (merge it), or not named o_proj"
        )
    prompt, output = view.value[:, :, : view.prompt_length], view.output_weight
    if type(output) not in (Tensor, nn.Parameter):  # looks like a matrix, is stored in fewer bits
        output = output.dequantize()
    return _max_over_answer(view, weight=_output_norms(prompt, output))


def _max_over_answer(view: AnswerView, weight: Tensor | None) -> Tensor:
    """Largest probability, times `weight` [B, H, G, P], over answer tokens and query heads."""
    batch, heads, _, _ = view.key.shape
    prompt = view.prompt_length
    labels = torch.zeros(batch, heads, prompt, dtype=torch.float32, device=view.key.device)
    for rows in view.blocks():
        logits = torch.matmul(view.grouped(rows), view.key.transpose(2, 3)).float() * view.scaling
        logits = view.capped(logits)
        logits = logits.unflatten(2, (-1, rows.stop - rows.start))  # [B, H, G, rows, S]
        visible = torch.arange(rows.start, rows.stop, device=logits.device)[:, None] + prompt
        future = torch.arange(logits.shape[-1], device=logits.device) > visible
        logits = logits.masked_fill_(future, -torch.inf)
        if view.sinks is not None:
            sinks = view.sinks.float().reshape(heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        highest = logits.softmax(-1)[..., :prompt].amax(dim=3)
        if weight is not None:
            highest = highest * weight
        labels = torch.maximum(labels, highest.amax(dim=2))
    return labels


def _output_norms(value: Tensor, output_weight: Tensor) -> Tensor:
    """|| W_O[g] v || for values [B, H, P, D]: float32 [B, H, G, P]."""
    heads, size = value.shape[1], value.shape[3]
    by_head = output_weight.unflatten(1, (heads, -1, size)).float()  # [hidden, H, G, D]
    # || W v ||^2 = v' (W' W) v: a D x D matrix a head, whatever the hidden size
    gram = torch.einsum("ohgd,ohge->hgde", by_head, by_head)
    squared = torch.einsum("bhpd,hgde,bhpe->bhgp", value.float(), gram, value.float())
    return squared.clamp_min(0).sqrt()


Label = Callable[[AnswerView], Tensor]

LABELS: dict[str, Label] = {
    "max_logit": max_logit,
    "max_prob": max_prob,
    "value_weighted": value_weighted,
}
"""Label definitions by the name that configs and artifacts use."""


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
