"""FSDP2 for a frozen backbone with replicated heads: `--trainer.strategy sharded`.

The backbone's parameters are sharded over the processes and gathered layer by layer; the heads are
small and stand whole in every process (`trainers.averaging`).
"""

from typing import Any

from lightning.pytorch.strategies import (
    ModelParallelStrategy,
    ParallelStrategy,
    StrategyRegistry,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


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
