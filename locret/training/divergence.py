"""KL of two predictions of every token of an answer, and its gradients.

Only answers meet the vocabulary, a block of tokens at a time. Gradients are taken on the spot, so
that layers may be computed again for them while something is attached to the model: by the gradient
checkpointing of stock layers, which asks that a layer is in training mode (`recomputing`).
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from locret.model.backbone import Backbone
from locret.model.hooks import without_compiling
from locret.training.row_loss import WithGradients

MeanOver = Literal["tokens", "branches", "both"]
"""What counts alike in the mean of the divergence: every token, every answer, or half of each."""

_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_LOGITS = 2**27  # of a block of tokens that meets the vocabulary: 512 MiB


class Divergence(NamedTuple):
    """How much a student's predictions differ from a teacher's.

    Attributes:
        loss: scalar, KL(teacher || student) in nats, mean over the answers' tokens; its backward
            gives the parameters their gradients, once.
        agreement: scalar, for how many of these tokens both find the same one most likely, 0 to 1.
    """

    loss: Tensor
    agreement: Tensor


def check_mean(mean_over: str) -> None:
    """Refuse (ValueError) an unknown name."""
    if mean_over not in get_args(MeanOver):
        raise ValueError(f"mean_over is {mean_over!r}; expected one of {get_args(MeanOver)}")


def divergence(
    backbone: Backbone,
    teacher: Tensor,
    student: Tensor,
    counts: Sequence[int],
    mean_over: MeanOver,
    parameters: Sequence[nn.Parameter] = (),
) -> Divergence:
    """Compare what two readings predict.

    Args:
        backbone: whose output layer both share.
        teacher, student: the decoder's output [A, hidden size] of the tokens that predict answers.
        counts: tokens of each answer, A together.
        mean_over: what counts alike.
        parameters: of which the student's output is a function; none = no gradients.
    """
    weights = _weights(counts, mean_over).to(
        teacher.device, torch.promote_types(teacher.dtype, torch.float32)
    )
    learning = bool(parameters)
    lost, agreement, of_student = _by_blocks(backbone, teacher, student, weights, learning)
    taken = torch.autograd.grad(student, parameters, of_student) if learning else ()
    total = weights.sum().clamp(min=1)  # last, so that no dtype is too coarse for gradients
    loss = lost / total
    if learning:
        loss = WithGradients.apply(loss, *parameters, *(g / total for g in taken))
    return Divergence(loss, agreement / max(len(teacher), 1))


def _weights(counts: Sequence[int], mean_over: MeanOver) -> Tensor:
    """What the tokens of all answers count, [A]: 1 on average."""
    mean = sum(counts) / max(sum(map(bool, counts)), 1)
    by_branch = torch.tensor([mean / max(count, 1) for count in counts])
    share = {"tokens": 0.0, "branches": 1.0, "both": 0.5}[mean_over]
    return (share * by_branch + 1 - share).repeat_interleave(torch.tensor(counts))


def _by_blocks(
    backbone: Backbone, teacher: Tensor, student: Tensor, weights: Tensor, learning: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) by the weights, summed up over tokens; how many of their likeliest
    next tokens agree; and, while learning, the gradients of the former for `student`."""
    rows = max(1, _LOGITS // backbone.config.vocab_size)
    lost, agreement = weights.new_zeros(()), weights.new_zeros(())
    gradients = torch.empty_like(student)
    for start in range(0, len(teacher), rows):
        block = slice(start, start + rows)
        own = student[block].detach().requires_grad_(learning)
        with torch.no_grad():
            expected = backbone.logits(teacher[block]).log_softmax(dim=-1)
        found = backbone.logits(own).log_softmax(dim=-1)
        each = kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1)
        total = (each * weights[block]).sum()
        lost += total.detach()
        agreement += (found.argmax(dim=-1) == expected.argmax(dim=-1)).sum()
        if learning:
            (gradients[block],) = torch.autograd.grad(total, own)
    return lost, agreement, gradients


@contextlib.contextmanager
def recomputing(layers: Iterable[Any]) -> Iterator[None]:
    """Until the block ends, `layers` keep nothing but their input for the backward pass, which has
    to take place inside the block.

    Args:
        layers: stock decoder layers, in evaluation mode.
    """
    given: dict[str, Any] = {"gradient_checkpointing": True, "training": True}
    given["_gradient_checkpointing_func"] = _checkpoint
    with contextlib.ExitStack() as stack:
        for layer in map(without_compiling, layers):
            own = vars(layer)
            before = {name: own[name] for name in given if name in own}
            stack.callback(_put_back, own, given, before)
            own.update(given)
        yield


def _put_back(own: dict[str, Any], given: dict[str, Any], before: dict[str, Any]) -> None:
    for name in given:
        own.pop(name, None)
    own.update(before)
