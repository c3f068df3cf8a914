# SPDX-License-Identifier: Apache-2.0
"""
Parts of a recorded decoding step as Triton kernels: for a few tokens, only reading the weights should take time.
"""

import torch
from torch import nn

from .triton_support import are_launches_recorded, device_of, is_usable, launch, tl, triton


MAX_TOKENS = 16  # with more, products decide, and PyTorch's are better
BLOCK_OUTPUTS, BLOCK_INPUTS = 32, 128  # of the weights that a program takes at once: 2.9 of 3.35 TB/s on an H100


def can_fuse(hidden_states: torch.Tensor, *modules: nn.Module) -> bool:
    """
    Whether a step is recorded for few tokens, `(batch_size, sequence_length, hidden_size)`, and these modules only
    apply a weight: no bias, no adapter, no quantised weights, no hook.
    """
    if not are_launches_recorded() or torch.is_grad_enabled() or hidden_states.shape[:2].numel() > MAX_TOKENS:
        return False
    if hidden_states.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda"):
        return False
    return is_usable(hidden_states.device) and all(
        type(module) in (nn.Linear, nn.RMSNorm)
        and getattr(module, "bias", None) is None
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == hidden_states.dtype
        and module.weight.device == hidden_states.device
        and not (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
        for module in modules
    )


def gate_and_up(hidden_states: torch.Tensor, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
    """`silu(gate(x)) * up(x)` of `(batch_size, sequence_length, hidden_size)`, if [`can_fuse`] says so."""
    num_outputs, num_inputs = gate.weight.shape
    outputs = hidden_states.new_empty(*hidden_states.shape[:2], num_outputs)
    with device_of(hidden_states):
        launch(
            _gate_and_up,
            (triton.cdiv(num_outputs, BLOCK_OUTPUTS),),
            hidden_states.contiguous(),
            gate.weight,
            up.weight,
            outputs,
            hidden_states.shape[:2].numel(),
            num_outputs,
            num_inputs,
            MAX_TOKENS=MAX_TOKENS,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_INPUTS=BLOCK_INPUTS,
            num_stages=2,
        )
    return outputs


def mix_and_norm(
    residual: torch.Tensor,
    attn_output: torch.Tensor,
    cross_output: torch.Tensor,
    alpha: torch.Tensor,
    norm: nn.RMSNorm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `h = residual + alpha * attn_output + (1 - alpha) * cross_output` with `alpha` between 0 and 1, and `norm(h)`, if
    [`can_fuse`] says so.

    Args:
        residual, attn_output, cross_output (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            What is added.
        alpha (`torch.Tensor` of shape `(1,)`): The share of the self-attention, cut off at 0 and 1.
        norm (`nn.RMSNorm`): The norm.
    """
    hidden_states, normed = torch.empty_like(residual), torch.empty_like(residual)
    with device_of(residual):
        launch(
            _mix_and_norm,
            (residual.shape[:2].numel(),),
            residual.contiguous(),
            attn_output.contiguous(),
            cross_output.contiguous(),
            alpha,
            norm.weight,
            hidden_states,
            normed,
            residual.shape[-1],
            norm.eps,
            WIDTH=triton.next_power_of_2(residual.shape[-1]),
            num_warps=8,
        )
    return hidden_states, normed


if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens"])
    def _gate_and_up(
        x_ptr,
        gate_ptr,
        up_ptr,
        y_ptr,
        num_tokens,
        num_outputs,
        num_inputs,
        MAX_TOKENS: tl.constexpr,
        BLOCK_OUTPUTS: tl.constexpr,
        BLOCK_INPUTS: tl.constexpr,
    ):
        tokens = tl.arange(0, MAX_TOKENS)
        outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        is_token, is_output = (tokens < num_tokens)[:, None], (outputs < num_outputs)[:, None]
        row = outputs[:, None].to(tl.int64) * num_inputs
        gate = tl.zeros([MAX_TOKENS, BLOCK_OUTPUTS], tl.float32)
        up = tl.zeros([MAX_TOKENS, BLOCK_OUTPUTS], tl.float32)
        for first in range(0, num_inputs, BLOCK_INPUTS):
            inputs = first + tl.arange(0, BLOCK_INPUTS)
            is_input = (inputs < num_inputs)[None, :]
            x = tl.load(x_ptr + tokens[:, None] * num_inputs + inputs, mask=is_token & is_input, other=0.0)
            gate_weight = tl.load(gate_ptr + row + inputs, mask=is_output & is_input, other=0.0)
            up_weight = tl.load(up_ptr + row + inputs, mask=is_output & is_input, other=0.0)
            gate = tl.dot(x, tl.trans(gate_weight), gate)
            up = tl.dot(x, tl.trans(up_weight), up)
        y = gate * tl.sigmoid(gate) * up
        y_ptr += tokens[:, None] * num_outputs + outputs[None, :]
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=is_token & (outputs < num_outputs)[None, :])

    @triton.jit
    def _mix_and_norm(
        residual_ptr,
        attention_ptr,
        cross_ptr,
        alpha_ptr,
        weight_ptr,
        hidden_states_ptr,
        normed_ptr,
        hidden_size,
        eps,
        WIDTH: tl.constexpr,
    ):
        channels = tl.arange(0, WIDTH)
        is_channel = channels < hidden_size
        places = tl.program_id(0).to(tl.int64) * hidden_size + channels
        residual = tl.load(residual_ptr + places, mask=is_channel, other=0.0).to(tl.float32)
        attention = tl.load(attention_ptr + places, mask=is_channel, other=0.0).to(tl.float32)
        cross = tl.load(cross_ptr + places, mask=is_channel, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
        alpha = tl.minimum(tl.maximum(tl.load(alpha_ptr).to(tl.float32), 0.0), 1.0)
        hidden_states = residual + cross + alpha * (attention - cross)
        hidden_states = hidden_states.to(hidden_states_ptr.dtype.element_ty)
        tl.store(hidden_states_ptr + places, hidden_states, mask=is_channel)
        hidden_states = hidden_states.to(tl.float32)
        scale = tl.rsqrt(tl.sum(hidden_states * hidden_states, 0) / hidden_size + eps)
        normed = hidden_states * scale * weight
        tl.store(normed_ptr + places, normed.to(normed_ptr.dtype.element_ty), mask=is_channel)
