"""FSDP2 for a frozen backbone with replicated heads (Lightning's ModelParallelStrategy).

The backbone's parameters are sharded over the ranks and gathered layer by layer; the heads are
small, stand whole on every rank, and their gradients are averaged before each optimizer step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard_backbone(decoder: Any, mesh: DeviceMesh) -> None:
    """Shard a stock decoder's layers, and what is left of it, over a one-dimensional mesh."""
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh)


def average_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Replace each gradient by its mean over the mesh's ranks, in one collective."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=mesh.get_group())
    flat /= mesh.size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
