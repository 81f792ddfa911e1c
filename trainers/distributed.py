"""Several processes: heads stand whole in each, a frozen backbone whole or sharded.

A layer's gradients are known as soon as the backbone has read the layer, so their average is under
way while it reads the next ones. DDP would begin only when the whole row has been read, with
nothing left to compute meanwhile. Where several batches are accumulated, their sum is averaged
once, before the optimizer's step.

`--trainer.strategy sharded` is FSDP2: the backbone's parameters are sharded over the processes and
gathered layer by layer.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


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


class ShardedBackbone(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, over all processes, with ordinary checkpoints.

    What Lightning knows of, the heads, is whole in every process. ModelParallelStrategy refuses to
    resume a module without sharded parameters, so saving and resuming are those of plain
    data-parallel strategies: a checkpoint is one file, which any strategy goes on from.

    Args:
        **options: of ModelParallelStrategy, but for the two sizes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, **options | {"save_distributed_checkpoint": False})

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


StrategyRegistry.register(
    "sharded", ShardedBackbone, description="FSDP2 of the frozen backbone, heads replicated"
)


def shards_of(mesh: DeviceMesh) -> DeviceMesh:
    """The processes over which the backbone is sharded, of a strategy's mesh.

    Raises:
        ValueError: the mesh asks for tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"tensor_parallel_size is {mesh['tensor_parallel'].size()}, expected 1: the backbone "
            "is sharded, not split; use --trainer.strategy sharded"
        )
    return mesh["data_parallel"]


def shard_backbone(decoder: Any, mesh: DeviceMesh) -> None:
    """Shard a stock decoder's layers, and what is left of it, over a one-dimensional mesh."""
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh)
