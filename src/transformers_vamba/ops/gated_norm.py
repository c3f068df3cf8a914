# SPDX-License-Identifier: Apache-2.0
"""The gated RMS norm of a Mamba-2 mixer as Triton kernels, forward and backward."""

import torch
from torch.autograd.function import once_differentiable

from .triton_support import device_of, is_usable, launch, tl, triton


MAX_GROUP_SIZE = 2**14  # channels, which a program holds
NUM_PROGRAMS = 512  # backward, at most: each sums up the gradient of the weight over its tokens


def can_normalize(states: torch.Tensor, group_size: int) -> bool:
    """Whether the kernels take these states."""
    is_float = states.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return is_float and group_size <= MAX_GROUP_SIZE and is_usable(states.device)


def gated_rms_norm(
    states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float
) -> torch.Tensor:
    """
    `weight * rms_norm(states * silu(gate))`, each group of channels by itself.

    Args:
        states, gate (`torch.Tensor` of shape `(num_tokens, num_channels)`): What is normed, and its gate.
        weight (`torch.Tensor` of shape `(num_channels,)`): The norm's.
        group_size (`int`): Channels per group.
        eps (`float`): Added to the mean of the squares.

    Returns:
        `torch.Tensor`: Of the shape and dtype of `states`.
    """
    with device_of(states):
        return _GatedRMSNorm.apply(states, gate, weight, group_size, eps)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, gate, weight, group_size, eps):
        states, gate = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (states, gate))
        num_tokens, num_channels = states.shape
        outputs = states.new_empty(num_tokens, num_channels)
        ctx.num_groups = num_channels // group_size
        ctx.constants = {
            "EPS": eps,
            "NUM_CHANNELS": num_channels,
            "GROUP_SIZE": group_size,
            "BLOCK": triton.next_power_of_2(group_size),
            "num_warps": 8 if group_size > 2048 else 4,
        }
        grid = (num_tokens, ctx.num_groups)
        launch(_norm, grid, states, states.stride(0), gate, gate.stride(0), weight, outputs, **ctx.constants)
        ctx.save_for_backward(states, gate, weight)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        states, gate, weight = ctx.saved_tensors
        grad = grad.contiguous()
        num_tokens, num_channels = states.shape
        num_programs = min(num_tokens, NUM_PROGRAMS)
        grad_states, grad_gate = states.new_empty(states.shape), gate.new_empty(gate.shape)
        parts = states.new_empty(num_programs, num_channels, dtype=torch.float32)
        launch(
            _grad_of_norm,
            (num_programs, ctx.num_groups),
            states,
            states.stride(0),
            gate,
            gate.stride(0),
            weight,
            grad,
            grad_states,
            grad_gate,
            parts,
            num_tokens,
            **ctx.constants,
        )
        return grad_states, grad_gate, parts.sum(0).to(weight.dtype), None, None


if triton is not None:

    @triton.jit
    def _norm(
        states_ptr,
        states_stride,
        gate_ptr,
        gate_stride,
        weight_ptr,
        outputs_ptr,
        EPS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        GROUP_SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK)
        is_channel = channels < GROUP_SIZE
        channels += tl.program_id(1) * GROUP_SIZE
        states = tl.load(states_ptr + token * states_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + token * gate_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        states *= gate * tl.sigmoid(gate)
        outputs = states * (1.0 / tl.sqrt(tl.sum(states * states, 0) / GROUP_SIZE + EPS)) * weight
        outputs_ptr += token * NUM_CHANNELS + channels
        tl.store(outputs_ptr, outputs.to(outputs_ptr.dtype.element_ty), mask=is_channel)

    @triton.jit(do_not_specialize=["num_tokens"])
    def _grad_of_norm(
        states_ptr,
        states_stride,
        gate_ptr,
        gate_stride,
        weight_ptr,
        grad_ptr,
        grad_states_ptr,
        grad_gate_ptr,
        parts_ptr,
        num_tokens,
        EPS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        GROUP_SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        channels = tl.arange(0, BLOCK)
        is_channel = channels < GROUP_SIZE
        channels += tl.program_id(1) * GROUP_SIZE
        weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        part = tl.zeros([BLOCK], tl.float32)
        for index in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
            token = tl.cast(index, tl.int64)
            states = tl.load(states_ptr + token * states_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + token * gate_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
            row = token * NUM_CHANNELS + channels
            grad = tl.load(grad_ptr + row, mask=is_channel, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            gated = states * gate * sigmoid
            scale = 1.0 / tl.sqrt(tl.sum(gated * gated, 0) / GROUP_SIZE + EPS)
            normed = gated * scale
            part += grad * normed
            grad *= weight
            grad = (grad - normed * (tl.sum(grad * normed, 0) / GROUP_SIZE)) * scale
            grad_states = grad * gate * sigmoid
            grad_gate = grad * states * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(grad_states_ptr + row, grad_states.to(grad_states_ptr.dtype.element_ty), mask=is_channel)
            tl.store(grad_gate_ptr + row, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=is_channel)
        tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * NUM_CHANNELS + channels, part, mask=is_channel)
