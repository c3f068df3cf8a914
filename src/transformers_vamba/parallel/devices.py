# SPDX-License-Identifier: Apache-2.0
"""Where a module computes, and how its inputs get there."""

import functools

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its parameters, or the one to which Accelerate brings them."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def copy_aside(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. From the host to a GPU it is copied while the GPU computes what came before."""
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.requires_grad:
        return tensor.to(device, non_blocking=True)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.to(device, non_blocking=True)
    current.wait_stream(stream)
    copied.record_stream(current)
    return copied


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
