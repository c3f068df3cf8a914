# SPDX-License-Identifier: Apache-2.0
"""Where a module computes."""

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
