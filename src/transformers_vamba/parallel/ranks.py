# SPDX-License-Identifier: Apache-2.0
"""
Several processes, each with samples of its own, that exchange parameters or gradients: every one of them has to run
the same parts of the model, whether its samples have images and videos or not, or the others wait for ever.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..inputs.media import Medium, count_patch_values


def is_distributed() -> bool:
    """Whether there is more than this process."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold parts of the parameters, which come together as the modules run: FSDP or ZeRO-3."""
    if not is_distributed():
        return False
    return is_partitioned(model) or any(
        isinstance(module, FSDPModule) or is_fsdp_managed_module(module) for module in model.modules()
    )


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 has the parameters, which DeepSpeed marks."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters to a module of the same kind. Under ZeRO-3 each process copies its own part."""
    for from_parameter, to_parameter in zip(source.parameters(), target.parameters(), strict=True):
        getattr(to_parameter, "ds_tensor", to_parameter).copy_(getattr(from_parameter, "ds_tensor", from_parameter))


def count_missing_runs(model: nn.Module, num_runs: int, device: torch.device) -> int:
    """
    If the processes share the parameters of the model, or of a part of it: how many more times than `num_runs` another
    process runs it. This process has to run it as often. Waits for all of them.
    """
    if not is_sharded(model):
        return 0
    most_runs = torch.tensor(num_runs, device=device)
    torch.distributed.all_reduce(most_runs, torch.distributed.ReduceOp.MAX)
    return int(most_runs) - num_runs


def zero_of_parameters(module: nn.Module) -> torch.Tensor | int:
    """Zero, with a gradient of zero for every whole parameter of the module that trains."""
    whole = (parameter for parameter in module.parameters() if parameter.requires_grad and parameter.numel())
    return sum(0 * parameter.sum() for parameter in whole if not isinstance(parameter, DTensor))


def forget_zero_gradients(outputs: torch.Tensor, visual: nn.Module, layers: Any) -> None:
    """
    After the backward pass that comes from `outputs`: takes gradients away that would be `None` in one process, and
    are zero since every process has to run the same. An optimizer would move by its momentum, and decay, what has one.
    Those of ZeRO-3 stay, for DeepSpeed adds them up later.

    Args:
        outputs (`torch.Tensor`): A result of the model.
        visual (`nn.Module`): The vision tower. If no process has had any image or video, its gradients are zero, and
            so are those of `alpha`, cross-attention and mixers.
        layers (`nn.ModuleList`): The decoder layers. Nobody reads the results of the last one's mixer.
    """

    device = outputs.device  # a hook that holds `outputs` would never be freed, nor what made it

    def forget():
        # Listed now: while they run, FSDP replaces its parts by other parameters.
        parts = [visual, *(part for layer in layers for part in (layer.cross_attn, layer.vision_mixer))]
        of_media = [layer.alpha for layer in layers] + [each for part in parts for each in part.parameters()]
        unread = list(layers[-1].vision_mixer.parameters())
        gradients = (parameter.grad for parameter in of_media if parameter.grad is not None)
        own_parts = (grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients)
        # In a plain loop: in most steps the first one ends it.
        is_read = any(bool(part.any()) for part in own_parts)
        meshes = (parameter.device_mesh for parameter in of_media if isinstance(parameter, DTensor))
        if (mesh := next(meshes, None)) is not None:  # each process sees its part
            is_read = torch.tensor(is_read, dtype=torch.int32, device=device)
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(is_read, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
        for parameter in unread if is_read else [*of_media, *unread]:
            parameter.grad = None

    def forget_last(gradient):
        # DDP and FSDP hand out the gradients in callbacks at the end of the backward pass: this comes after them.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(forget))

    if outputs.requires_grad and not is_partitioned(layers):
        outputs.register_hook(forget_last)


def smallest_medium(vision_config) -> Medium:
    """A video of one token, for a process that has none."""
    merge_size = vision_config.spatial_merge_size
    return Medium(torch.zeros(merge_size**2, count_patch_values(vision_config)), (1, merge_size, merge_size))
