# SPDX-License-Identifier: Apache-2.0
"""
Rotary positions as a Triton kernel. PyTorch's own functions take five kernels per tensor, with copies of what they
rotate, in float32 in the vision tower.
"""

import torch
from torch.autograd.function import once_differentiable
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision, rotate_half

from .triton_support import are_launches_recorded, device_of, is_usable, launch, tl, triton


FEW_TOKENS = 64  # so few are rotated by PyTorch unless a step is recorded: its launches take the host less time


def rotate_patches(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rotates the vision tower's queries and keys by their positions, on a GPU in place if they take no gradient.

    Args:
        qkv (`torch.Tensor` of shape `(num_patches, 3, num_heads, head_dim)`): Queries, keys and values.
        cos, sin (`torch.Tensor` of shape `(num_patches, head_dim)`): Of the angles, whose halves are the same.

    Returns:
        `tuple` of three `torch.Tensor` of shape `(num_patches, num_heads, head_dim)`, in the dtype of `qkv`.
    """
    if is_usable(qkv.device) and qkv.is_contiguous():
        return _Rotate.apply(qkv, cos.contiguous(), sin.contiguous(), 2).unbind(1)
    query, key, value = qkv.unbind(1)
    return *apply_rotary_pos_emb_vision(query, key, cos, sin), value


def rotate_text(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rotates the text's queries and keys by their positions, perhaps in place if they take no gradient.

    Args:
        query, key (`torch.Tensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`):
            Each with its own number of heads.
        cos, sin (`torch.Tensor` of shape `(batch_size or 1, sequence_length, head_dim)`):
            Of the angles, whose halves are the same.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`.
    """
    is_few = query.shape[:2].numel() <= FEW_TOKENS and not are_launches_recorded()
    if is_few or not (is_usable(query.device) and query.is_contiguous() and key.is_contiguous()):
        # As `apply_rotary_pos_emb`, which the Hub's kernels replace for all models of the process, on any device.
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin
    cos, sin = (angles.expand(len(query), -1, -1).flatten(0, 1).contiguous() for angles in (cos, sin))
    query, key = (
        _Rotate.apply(states.flatten(0, 1)[:, None], cos, sin, 1).view(states.shape) for states in (query, key)
    )
    return query, key


class _Rotate(torch.autograd.Function):
    """Of `(num_tokens, num_kinds, num_heads, head_dim)`, contiguous, the first `num_rotated` kinds."""

    @staticmethod
    def forward(ctx, states, cos, sin, num_rotated):
        ctx.save_for_backward(cos, sin)
        ctx.num_rotated = num_rotated
        if ctx.needs_input_grad[0]:
            states = states.clone()
        else:
            ctx.mark_dirty(states)
        _launch(states, cos, sin, num_rotated, 1.0)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        cos, sin = ctx.saved_tensors
        _launch(grad, cos, sin, ctx.num_rotated, -1.0)
        return grad, None, None, None


def _launch(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int, direction: float) -> None:
    num_tokens, num_kinds, num_heads, head_dim = states.shape
    with device_of(states):
        launch(
            _rotate,
            (num_tokens, num_rotated),
            states,
            cos,
            sin,
            direction,
            NUM_KINDS=num_kinds,
            NUM_HEADS=num_heads,
            HALF=head_dim // 2,
            HEADS=triton.next_power_of_2(num_heads),
            WIDTH=triton.next_power_of_2(head_dim // 2),
        )


if triton is not None:

    @triton.jit
    def _rotate(
        states_ptr,
        cos_ptr,
        sin_ptr,
        direction,
        NUM_KINDS: tl.constexpr,
        NUM_HEADS: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        token, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
        heads, width = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        is_there = (heads < NUM_HEADS) & (width < HALF)
        angle = token * 2 * HALF + width
        cos = tl.load(cos_ptr + angle, mask=width < HALF, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=width < HALF, other=0.0).to(tl.float32) * direction
        first_ptr = states_ptr + ((token * NUM_KINDS + kind) * NUM_HEADS + heads) * 2 * HALF + width
        first = tl.load(first_ptr, mask=is_there, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + HALF, mask=is_there, other=0.0).to(tl.float32)
        tl.store(first_ptr, (first * cos - second * sin).to(states_ptr.dtype.element_ty), mask=is_there)
        tl.store(first_ptr + HALF, (second * cos + first * sin).to(states_ptr.dtype.element_ty), mask=is_there)
