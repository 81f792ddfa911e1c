"""CUDA graphs of a model's steps: how they are recorded, and which models have none."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from locret.model.backbone import Backbone

T = TypeVar("T")


def record(step: Callable[[], T], device: torch.device) -> tuple[Any, T]:
    """A graph of what `step` launches, which does not run yet, and what it returns: every replay
    writes there."""
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),  # which torch takes the current one for
        torch.cuda.graph(graph, stream=_recording_stream(device)),
    ):
        return graph, step()


@functools.cache
def _recording_stream(device: torch.device) -> Any:
    """What all graphs of a device are recorded on: torch has one for all devices, and cuBLAS keeps
    memory for each."""
    return torch.cuda.Stream(device)


def why_not_graphed(backbone: Backbone) -> str | None:
    """Why the model's steps cannot be recorded as a CUDA graph; None if they can."""
    model, config = backbone.model, backbone.config
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if len(set(map(str, getattr(model, "hf_device_map", {}).values()))) > 1:
        return "the model is spread over several devices"
    if not backbone.plain:
        return "the model has sliding windows, softcaps, sinks or more than one RoPE"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the model's weights are quantized"
    if any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts")):
        return "mixtures of experts choose their kernels on the host"
    return None
