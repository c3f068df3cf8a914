# SPDX-License-Identifier: Apache-2.0
"""
What the vision tower does element by element, as Triton kernels. PyTorch's own functions make copies in float32 of
what they rotate, and read and write the hidden states of the MLP three times.
"""

import torch
from torch.autograd.function import once_differentiable
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from .triton_support import device_of, is_usable, tl, triton


BLOCK = 1024


def quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 * x)`, of any shape and floating dtype."""
    if not is_usable(hidden_states.device):
        return hidden_states * torch.sigmoid(1.702 * hidden_states)
    with device_of(hidden_states):
        return _QuickGelu.apply(hidden_states.contiguous())


def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rotates queries and keys by their positions, on a GPU in place if they take no gradient.

    Args:
        qkv (`torch.Tensor` of shape `(num_patches, 3, num_heads, head_dim)`): Queries, keys and values.
        cos, sin (`torch.Tensor` of shape `(num_patches, head_dim)`): Of the angles, whose halves are the same.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_patches, num_heads, head_dim)`, in the dtype of `qkv`.
    """
    if is_usable(qkv.device) and qkv.is_contiguous():
        with device_of(qkv):
            return _Rotate.apply(qkv, cos.float().contiguous(), sin.float().contiguous()).unbind(1)
    query, key, value = qkv.unbind(1)
    return *apply_rotary_pos_emb_vision(query, key, cos, sin), value


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states):
        ctx.save_for_backward(hidden_states)
        outputs = torch.empty_like(hidden_states)
        grid = (triton.cdiv(outputs.numel(), BLOCK),)
        _quick_gelu[grid](hidden_states, outputs, outputs, outputs.numel(), BACKWARD=False, BLOCK=BLOCK)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (hidden_states,) = ctx.saved_tensors
        grad, outputs = grad.contiguous(), torch.empty_like(hidden_states)
        grid = (triton.cdiv(outputs.numel(), BLOCK),)
        _quick_gelu[grid](hidden_states, grad, outputs, outputs.numel(), BACKWARD=True, BLOCK=BLOCK)
        return outputs


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        if ctx.needs_input_grad[0]:
            qkv = qkv.clone()
        else:
            ctx.mark_dirty(qkv)
        _launch_rotate(qkv, cos, sin, 1.0)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        cos, sin = ctx.saved_tensors
        _launch_rotate(grad, cos, sin, -1.0)
        return grad, None, None


def _launch_rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> None:
    num_patches, _, num_heads, head_dim = qkv.shape
    _rotate[(num_patches, 2)](
        qkv,
        cos,
        sin,
        direction,
        NUM_HEADS=num_heads,
        HALF=head_dim // 2,
        HEADS=triton.next_power_of_2(num_heads),
        WIDTH=triton.next_power_of_2(head_dim // 2),
    )


if triton is not None:

    @triton.jit
    def _quick_gelu(x_ptr, grad_ptr, y_ptr, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < size, other=0.0).to(tl.float32)
        gate = 1 / (1 + tl.exp(-1.702 * x))
        y = x * gate
        if BACKWARD:
            grad = tl.load(grad_ptr + places, mask=places < size, other=0.0).to(tl.float32)
            y = grad * (gate + 1.702 * y * (1 - gate))
        tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=places < size)

    @triton.jit
    def _rotate(
        qkv_ptr,
        cos_ptr,
        sin_ptr,
        direction,
        NUM_HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        patch, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
        heads, width = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        is_there = (heads < NUM_HEADS) & (width < HALF)
        angle = patch * 2 * HALF + width
        cos = tl.load(cos_ptr + angle, mask=width < HALF, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=width < HALF, other=0.0) * direction
        first_ptr = qkv_ptr + ((patch * 3 + kind) * NUM_HEADS + heads) * 2 * HALF + width
        first = tl.load(first_ptr, mask=is_there, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + HALF, mask=is_there, other=0.0).to(tl.float32)
        tl.store(first_ptr, (first * cos - second * sin).to(qkv_ptr.dtype.element_ty), mask=is_there)
        tl.store(first_ptr + HALF, (second * cos + first * sin).to(qkv_ptr.dtype.element_ty), mask=is_there)
