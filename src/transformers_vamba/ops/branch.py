# SPDX-License-Identifier: Apache-2.0
"""
A branch of a residual stream, `x + linear(f(norm(x)))`, as a Triton kernel and a product. The kernel norms `x`, and
copies it with the bias of `linear` added. The product adds onto the copy: the sum is no pass over memory of its own.
"""

from typing import Any

import torch
from torch import nn

from .triton_support import device_of, is_usable, launch, real_device, tl, triton


MAX_CHANNELS = 2**14  # which a program holds


def takes_no_gradient(device: torch.device) -> bool:
    """Whether what is computed on this device is no part of a graph, and in the dtype of the weights."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(real_device(device).type)


def can_fuse_branch(states: torch.Tensor, branch: nn.Module, norm: nn.Module, linear: nn.Module) -> bool:
    """
    Whether no gradient is taken, nobody looks at what the module `branch` returns, and `norm` before it and `linear`
    at its end only apply their parameters: no adapter, no quantised weight, no hook.
    """
    return (
        takes_no_gradient(states.device)
        and is_usable(states.device)
        and states.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and states.shape[-1] <= MAX_CHANNELS
        and type(norm) in (nn.LayerNorm, nn.RMSNorm)
        and type(linear) is nn.Linear
        and all(is_plain(module, states) for module in (norm, linear))
        and not has_hooks(branch)
    )


def is_plain(module: Any, states: torch.Tensor) -> bool:
    """Whether a module has no hooks, and a weight like these states, not quantised."""
    return (
        type(module.weight) is nn.Parameter
        and module.weight.dtype == states.dtype
        and module.weight.device == states.device
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def open_branch(
    states: torch.Tensor, norm: nn.LayerNorm | nn.RMSNorm, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `norm(states)`, and what [`close_branch`] adds the product to, if [`can_fuse_branch`] says so.

    Args:
        states (`torch.Tensor` of shape `(..., num_channels)`): The residual stream.
        norm (`nn.LayerNorm` or `nn.RMSNorm`): What the branch begins with.
        linear (`nn.Linear`): What it ends with.
    """
    states = states.contiguous()
    normed, total = torch.empty_like(states), torch.empty_like(states)
    num_channels = states.shape[-1]
    with device_of(states):
        launch(
            _norm,
            (states.numel() // num_channels,),
            states,
            norm.weight,
            getattr(norm, "bias", None),
            linear.bias,
            normed,
            total,
            HAS_LINEAR_BIAS=linear.bias is not None,
            **norm_constants(norm, num_channels, states.dtype),
        )
    return normed, total


def norm_constants(norm: nn.Module | None, num_channels: int, dtype: torch.dtype) -> dict:
    """What is constant in a kernel with one program per token, which norms it."""
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))  # PyTorch's norms, the mixer's gated one
    return {
        "EPS": torch.finfo(dtype).eps if eps is None else eps,
        "IS_CENTRED": isinstance(norm, nn.LayerNorm),
        "HAS_BIAS": getattr(norm, "bias", None) is not None,
        "NUM_CHANNELS": num_channels,
        "BLOCK": triton.next_power_of_2(num_channels),
        "num_warps": 8 if num_channels > 2048 else 4,
    }


def close_branch(total: torch.Tensor, states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Adds the product of the states and the weight of `linear` to what [`open_branch`] gave, in place."""
    total.flatten(0, -2).addmm_(states.flatten(0, -2), linear.weight.t())
    return total


if triton is not None:

    @triton.jit
    def normalize(
        states,
        channels,
        weight_ptr,
        bias_ptr,
        EPS: tl.constexpr,
        IS_CENTRED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
    ):
        """A LayerNorm if centred, else an RMSNorm, of one token in float32."""
        is_channel = channels < NUM_CHANNELS
        if IS_CENTRED:
            states = tl.where(is_channel, states - tl.sum(states, 0) / NUM_CHANNELS, 0.0)
        states *= 1.0 / tl.sqrt(tl.sum(states * states, 0) / NUM_CHANNELS + EPS)
        states *= tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        if HAS_BIAS:
            states += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        return states

    @triton.jit
    def _norm(
        states_ptr,
        weight_ptr,
        bias_ptr,
        linear_bias_ptr,
        normed_ptr,
        total_ptr,
        EPS: tl.constexpr,
        IS_CENTRED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_LINEAR_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        channels = tl.arange(0, BLOCK)
        is_channel = channels < NUM_CHANNELS
        row = tl.program_id(0).to(tl.int64) * NUM_CHANNELS + channels
        states = tl.load(states_ptr + row, mask=is_channel, other=0.0).to(tl.float32)
        total = states
        if HAS_LINEAR_BIAS:
            total += tl.load(linear_bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        tl.store(total_ptr + row, total.to(total_ptr.dtype.element_ty), mask=is_channel)
        normed = normalize(states, channels, weight_ptr, bias_ptr, EPS, IS_CENTRED, HAS_BIAS, NUM_CHANNELS)
        tl.store(normed_ptr + row, normed.to(normed_ptr.dtype.element_ty), mask=is_channel)
