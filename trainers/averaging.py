"""Gradients averaged over processes while the backbone still reads.

A layer's gradients are known as soon as the backbone has read the layer, so their average is under
way while it reads the next ones. DDP would begin only when the whole row has been read, with
nothing left to compute meanwhile. Where several batches are accumulated, their sum is averaged
once, before the optimizer's step.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook


def takes_over(strategy: Strategy) -> bool:
    """Whether we average the gradients: after this call the strategy does not.

    So for ModelParallelStrategy, which never does, and for DDP, unless it was given a way of its
    own (`ddp_comm_hook`).
    """
    if isinstance(strategy, ModelParallelStrategy):
        return True
    if isinstance(strategy, DDPStrategy) and strategy._ddp_comm_hook is None:
        assert strategy.model is not None
        strategy.model.register_comm_hook(None, noop_hook)
        return True
    return False


def start_average(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Begin to replace each tensor by its mean over all processes.

    Returns:
        To be called before the tensors are used again. On a GPU it lets the stream wait, not the
        host.
    """
    works = [_all_reduce(tensor) for tensor in tensors]

    def finish() -> None:
        for tensor, (work, divisor) in zip(tensors, works, strict=True):
            work.wait()
            if divisor > 1:
                tensor /= divisor

    return finish


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    start_average(tensors)()


def make_equal(parameters: Iterable[nn.Parameter]) -> None:
    """Give all processes the first one's parameters."""
    for parameter in parameters:
        distributed.broadcast(parameter.data, src=0)


def _all_reduce(tensor: Tensor) -> tuple[Any, int]:
    """The collective in flight, and what its result is to be divided by."""
    means = distributed.get_backend() == "nccl"  # gloo knows no mean
    op = distributed.ReduceOp.AVG if means else distributed.ReduceOp.SUM
    work = distributed.all_reduce(tensor, op=op, async_op=True)
    return work, 1 if means else distributed.get_world_size()
