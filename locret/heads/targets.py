"""What heads learn: causal importance labels, and the losses that bring predictions to them.

B batch, H KV heads, G query heads a KV head, A answer tokens, P prompt tokens, S = P + A, D head
size. A label says how much the answer looks at every prompt unit: it takes an `AnswerView` and
returns float32 [B, H, P], higher = keep. A loss takes predicted and true scores [B, H, P] and
returns a scalar. To add one, write the function and give it a name in `LABELS` or `LOSSES`.
Labels that weigh values raise a ValueError where the output projection is not known.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss

from locret.kernels import labels as kernels

_BLOCK_ELEMENTS = 2**26  # of the logits that are in memory at a time
_BLOCK_ELEMENTS_CPU = 2**21  # and that stay in a CPU's cache from one operation to the next
_FLOOR = 1e-5  # added to what a logarithm is taken of: less than this is all alike


@dataclass(frozen=True)
class AnswerView:
    """One layer, as the answer sees it.

    Attributes:
        query: [B, H*G, A, D], the answer's, after RoPE.
        key, value: [B, H, S, D], of prompt and answer, keys after RoPE.
        scaling: the layer's softmax scale, usually 1 / sqrt(D).
        output_weight: [hidden size, H*G * D], of the layer's output projection; None if unknown.
        softcap, sinks: see `locret.model.hooks.Weighting`.
        norms: float32 [B, A], of the answer tokens' hidden states as the layer's projections get
            them: after the norm in front of them, if there is one; None if unknown.
        log_sums: float32 [B, H*G, A], the log-sum-exp of each query's logits, natural, where
            attention has computed it; None if unknown.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    output_weight: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    norms: Tensor | None = None
    log_sums: Tensor | None = None

    def capped(self, logits: Tensor) -> Tensor:
        """Scaled logits, as the softmax gets them."""
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def multiplied(self) -> tuple[Tensor, Tensor]:
        """Query and key as products get them: in autocast's dtype, if that is on."""
        device = self.key.device.type
        if not torch.is_autocast_enabled(device):
            return self.query, self.key
        dtype = torch.get_autocast_dtype(device)
        return self.query.to(dtype), self.key.to(dtype)

    @property
    def prompt_length(self) -> int:
        return self.key.shape[2] - self.query.shape[2]

    def grouped(self, rows: slice) -> Tensor:
        """Queries of some answer tokens [B, H, G * rows, D]: heads of a group share their keys."""
        batch, heads, _, size = self.key.shape
        return self.query[:, :, rows].reshape(batch, heads, -1, size)

    def logits(self, rows: slice) -> Tensor:
        """Scaled logits of some answer tokens, as the softmax gets them: [B, H, G, rows, seen], of
        the units that the last of them sees."""
        grouped, seen = self.grouped(rows), self.prompt_length + rows.stop
        keys = self.key[:, :, :seen].transpose(2, 3).flatten(0, 1)
        # The product scales its own sums, which saves a pass over them.
        made = torch.baddbmm(
            keys.new_empty(()), grouped.flatten(0, 1), keys, beta=0, alpha=self.scaling
        )
        logits = made.view(*grouped.shape[:2], -1, rows.stop - rows.start, seen)
        if self.softcap is not None:
            logits = self.capped(logits.float())
        own = logits[..., self.prompt_length + rows.start :]  # the rest is past to all of them
        own.masked_fill_(own.new_ones(own.shape[-2:], dtype=torch.bool).triu_(1), -torch.inf)
        return logits

    def blocks(self) -> Iterator[slice]:
        """Answer tokens, so many at a time that a block's logits fit `_BLOCK_ELEMENTS`."""
        most = _BLOCK_ELEMENTS_CPU if self.key.device.type == "cpu" else _BLOCK_ELEMENTS
        rows = max(1, most // (self.query[:, :, 0, 0].numel() * self.key.shape[2]))
        answer = self.query.shape[2]
        for start in range(0, answer, rows):
            yield slice(start, min(start + rows, answer))


def max_logit(view: AnswerView) -> Tensor:
    """The paper's label (section 3.2): the largest pre-softmax logit a unit gets from the answer.

    max over answer tokens a and query heads g of the group of  scaling * <q[g, a], k[unit]>.
    """
    given = view.multiplied()
    if kernels.why_not(*given, view.scaling) is None:
        return view.capped(kernels.highest_logits(*given, view.scaling).amax(dim=2))
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
    """
    return _max_over_answer(view, weight=_value_norms(view, "value_weighted"))


def log_max_prob(view: AnswerView) -> Tensor:
    """log(max_prob + 1e-5): on one scale for all heads and layers."""
    return _log(max_prob(view))


def log_value_weighted(view: AnswerView) -> Tensor:
    """log(value_weighted + 1e-5)."""
    return _log(_max_over_answer(view, weight=_value_norms(view, "log_value_weighted")))


def log_value_share(view: AnswerView) -> Tensor:
    """What a unit adds to the layer's output beside the asking token's own hidden state.

    log(1e-5 + max over a and g of  prob[g, a, unit] * || W_O[g] v[unit] || / || h[a] ||), as KVzap
    (arXiv 2601.07891), with h as the layer's projections get it (`AnswerView.norms`).
    """
    assert view.norms is not None
    weight = _value_norms(view, "log_value_share")
    return _log(_max_over_answer(view, weight, of_asking=1 / view.norms.clamp_min(1e-6)))


def _log(label: Tensor) -> Tensor:
    return label.add_(_FLOOR).log_()


def _value_norms(view: AnswerView, label: str) -> Tensor:
    """|| W_O[g] v || of the prompt's units: float32 [B, H, G, P]."""
    if view.output_weight is None:
        raise ValueError(
            f"label {label!r} needs the attention layers' output projection as one matrix: "
            "it is quantized, offloaded, wrapped by an adapter (merge it), or not named o_proj"
        )
    prompt, output = view.value[:, :, : view.prompt_length], view.output_weight
    if type(output) not in (Tensor, nn.Parameter):  # looks like a matrix, is stored in fewer bits
        output = output.dequantize()
    return _output_norms(prompt, output)


def _max_over_answer(
    view: AnswerView, weight: Tensor | None, of_asking: Tensor | None = None
) -> Tensor:
    """Largest probability over answer tokens and query heads, times `weight` [B, H, G, P] and
    `of_asking` [B, A]; by fused kernels where they take the view."""
    given = view.multiplied()
    if kernels.why_not(*given, view.scaling) is not None:
        return _max_in_blocks(view, weight, of_asking)
    softcap, sinks, sums = view.softcap, view.sinks, view.log_sums
    highest = kernels.highest_shares(*given, view.scaling, softcap, sinks, of_asking, sums)
    return (highest if weight is None else highest.mul_(weight)).amax(dim=2)


def _max_in_blocks(view: AnswerView, weight: Tensor | None, of_asking: Tensor | None) -> Tensor:
    """`_max_over_answer` in plain PyTorch."""
    batch, heads, _, _ = view.key.shape
    prompt = view.prompt_length
    labels = torch.zeros(batch, heads, prompt, dtype=torch.float32, device=view.key.device)
    for rows in view.blocks():
        logits = view.logits(rows)
        if view.sinks is not None:
            sinks = view.sinks.float().reshape(heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        shares = logits.softmax(-1, dtype=torch.float32)[..., :prompt]
        if of_asking is not None:
            shares = shares.mul_(of_asking[:, None, None, rows, None])
        highest = shares.amax(dim=3)
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
    "log_max_prob": log_max_prob,
    "log_value_weighted": log_value_weighted,
    "log_value_share": log_value_share,
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


COMPRESSIONS = (2, 4, 8, 16, 32)
"""What `BoundaryLoss` looks at: one unit of so many is kept."""

_EVERY = 7  # so many labels are looked at once; odd, because what repeats often repeats evenly
_ROWS = 100  # that a threshold is the mean of, about


class BoundaryLoss(nn.Module):
    """Smooth-L1, and a term for the right side of the boundary between what is kept and what goes.

    For labels on one scale, such as logarithms: keeping the best of all units of all heads keeps
    those above a threshold t, whatever the head, and that is what decides each head's quota. The
    term is the mean over compressions r of the cross entropy between  label > t_r  and
    sigmoid(prediction - t_r). It stands for a pairwise term: a unit i above the boundary and a unit
    j below it, of the same head or of two, are in order if s_i - s_j > 0, and

        log(1 + exp(s_j - s_i))  <=  log(1 + exp(t - s_i)) + log(1 + exp(s_j - t)),

    so the pairwise logistic loss of every pair across the boundary is bounded by the terms of its
    two units, which cost no pairs.

    t_r is the quantile 1 - 1/r of the labels of a row, all layers together. A layer's loss is taken
    before later layers are read, so thresholds are of the rows before: their mean, and from some
    100 rows on the moving average. The first row has Smooth-L1 alone. Processes have thresholds of
    their own rows.

    Args:
        weight: of the term.

    Attributes:
        thresholds: float32 [compressions].
        rows: how many rows they are of: a scalar.
    """

    thresholds: Tensor
    rows: Tensor

    def __init__(self, weight: float = 0.2) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("thresholds", torch.zeros(len(COMPRESSIONS)))
        self.register_buffer("rows", torch.zeros(()))
        self._labels: list[Tensor] = []

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        if predictions.requires_grad:  # not in validation
            self._labels.append(targets.detach().flatten()[::_EVERY])
        thresholds = self.thresholds.to(predictions.device)[:, None, None, None]
        above = (targets > thresholds).float()
        boundary = binary_cross_entropy_with_logits(predictions - thresholds, above)
        known = self.rows.to(predictions.device).clamp(max=1)
        return regression(predictions, targets) + self.weight * known * boundary

    def end_row(self) -> None:
        """Take the thresholds of the row whose losses were taken since the last call."""
        if not self._labels:
            return
        device = self._labels[0].device
        labels = torch.cat([label.to(device) for label in self._labels]).sort().values
        self._labels = []
        last = len(labels) - 1
        at = torch.tensor([round(last * (1 - 1 / kept)) for kept in COMPRESSIONS])
        found = labels[at.to(device)]
        self.rows, before = self.rows.to(device) + 1, self.thresholds.to(device)
        self.thresholds = before + (found - before) / self.rows.clamp(max=_ROWS)


Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss | type[BoundaryLoss]] = {
    "smooth_l1": regression,
    "listwise": listwise,
    "smooth_l1_boundary": BoundaryLoss,
}
"""Losses by the name that configs use; a class is one with a state."""


def make_loss(name: str, boundary_weight: float = 0.2) -> Loss:
    """A loss by its name in `LOSSES`; the weight is that of `BoundaryLoss`."""
    found = by_name(LOSSES, name, "loss")
    return found(boundary_weight) if found is BoundaryLoss else found


def by_name(table: Mapping[str, Any], name: str, what: str) -> Any:
    """An entry of `LABELS` or `LOSSES`; ValueError if there is none of that name."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; expected one of {sorted(table)}")
    return table[name]
