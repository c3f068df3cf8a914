# SPDX-License-Identifier: Apache-2.0
"""The convolution of `ops.convolution` as Triton kernels, forward and backward."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .chunks import chunk_table
from .triton_support import is_usable, launch, tl, triton


# Tokens and channels per program.
FORWARD_BLOCK, BACKWARD_BLOCK = (32, 128), (64, 64)


def can_convolve(inputs: torch.Tensor) -> bool:
    """Whether the kernels take these inputs."""
    return inputs.dtype != torch.float64 and is_usable(inputs.device)


class Convolution(torch.autograd.Function):
    """See [`ops.convolution.convolve`], which is `in_torch`."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, lengths, history, in_torch: Callable):
        inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()
        weight = weight.contiguous()
        history = inputs.new_zeros(weight.shape[1] - 1, inputs.shape[1]) if history is None else history.contiguous()
        num_tokens, num_channels = inputs.shape
        outputs = inputs.new_empty(num_tokens, num_channels)
        chunks, grid, constants = _sizes(inputs, weight, bias, lengths, FORWARD_BLOCK)
        launch(_convolve, grid, inputs, inputs.stride(0), weight, bias, history, outputs, chunks, **constants)
        ctx.lengths, ctx.in_torch = lengths, in_torch
        ctx.save_for_backward(inputs, weight, bias, history)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs, weight, bias, history = ctx.saved_tensors
        grad = grad.contiguous()
        num_channels, num_taps = weight.shape
        grad_inputs = inputs.new_empty(inputs.shape)
        chunks, grid, constants = _sizes(inputs, weight, bias, ctx.lengths, BACKWARD_BLOCK)
        parts = inputs.new_empty(len(chunks), num_taps + 1, num_channels, dtype=torch.float32)
        launch(
            _grad_of_convolution,
            grid,
            inputs,
            inputs.stride(0),
            weight,
            bias,
            history,
            grad,
            grad_inputs,
            parts,
            chunks,
            **constants,
        )
        sums = parts.sum(0)
        grad_bias = None if bias is None else sums[-1].to(bias.dtype)
        grad_history = None
        if ctx.needs_input_grad[4]:  # of a few tokens only
            num_first = min(num_taps - 1, ctx.lengths[0])
            with torch.enable_grad():
                history = history.detach().requires_grad_()
                first = ctx.in_torch(inputs[:num_first], weight, bias, [num_first], history)
            (grad_history,) = torch.autograd.grad(first, history, grad[:num_first])
        return grad_inputs, sums[:-1].T.to(weight.dtype), grad_bias, None, grad_history, None


def _sizes(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lengths: list[int], block: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int], dict]:
    """The chunks of the sequences, the grid of programs and what is constant in a kernel."""
    chunks = chunk_table(tuple(lengths), block[0], inputs.device)
    num_channels, num_taps = weight.shape
    constants = {"HAS_BIAS": bias is not None, "NUM_CHANNELS": num_channels, "NUM_TAPS": num_taps}
    constants |= {"BLOCK_T": block[0], "BLOCK_C": block[1]}
    return chunks, (len(chunks) * triton.cdiv(num_channels, block[1]),), constants


if triton is not None:

    @triton.jit
    def _load(
        inputs_ptr,
        stride,
        history_ptr,
        rows,
        is_row,
        first,
        channels,
        NUM_CHANNELS: tl.constexpr,
        NUM_TAPS: tl.constexpr,
    ):
        """The inputs of these rows in float32: zeros before a sequence, or what came before the first."""
        is_channel = channels < NUM_CHANNELS
        mask = (is_row & (rows >= first))[:, None] & is_channel
        inputs = tl.load(inputs_ptr + rows[:, None] * stride + channels, mask=mask, other=0.0).to(tl.float32)
        mask = (is_row & (rows < 0) & (first == 0))[:, None] & is_channel
        history_ptr += (rows[:, None] + (NUM_TAPS - 1)) * NUM_CHANNELS + channels
        return inputs + tl.load(history_ptr, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _apply(
        inputs_ptr,
        stride,
        weight_ptr,
        bias_ptr,
        history_ptr,
        tokens,
        is_token,
        first,
        channels,
        HAS_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        NUM_TAPS: tl.constexpr,
    ):
        """The convolution at these tokens, before SiLU."""
        outputs = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
        if HAS_BIAS:
            outputs += tl.load(bias_ptr + channels, mask=channels < NUM_CHANNELS, other=0.0).to(tl.float32)
        for tap in tl.static_range(NUM_TAPS):
            rows = tokens + (tap - NUM_TAPS + 1)
            inputs = _load(inputs_ptr, stride, history_ptr, rows, is_token, first, channels, NUM_CHANNELS, NUM_TAPS)
            weight = tl.load(weight_ptr + channels * NUM_TAPS + tap, mask=channels < NUM_CHANNELS, other=0.0)
            outputs += inputs * weight.to(tl.float32)
        return outputs

    @triton.jit
    def _convolve(
        inputs_ptr,
        stride,
        weight_ptr,
        bias_ptr,
        history_ptr,
        outputs_ptr,
        chunks_ptr,
        HAS_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        NUM_TAPS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        index, num_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(NUM_CHANNELS, BLOCK_C)
        chunks_ptr += index // num_blocks * 4
        start, end, first = tl.load(chunks_ptr), tl.load(chunks_ptr + 1), tl.load(chunks_ptr + 2)
        channels = index % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        is_channel = channels < NUM_CHANNELS
        tokens = start + tl.arange(0, BLOCK_T)
        is_token = tokens < end
        outputs = _apply(
            inputs_ptr,
            stride,
            weight_ptr,
            bias_ptr,
            history_ptr,
            tokens,
            is_token,
            first,
            channels,
            HAS_BIAS,
            NUM_CHANNELS,
            NUM_TAPS,
        )
        outputs *= tl.sigmoid(outputs)
        outputs_ptr += tokens[:, None] * NUM_CHANNELS + channels
        tl.store(outputs_ptr, outputs.to(outputs_ptr.dtype.element_ty), mask=is_token[:, None] & is_channel)

    @triton.jit
    def _grad_of_convolution(
        inputs_ptr,
        stride,
        weight_ptr,
        bias_ptr,
        history_ptr,
        grad_ptr,
        grad_inputs_ptr,
        parts_ptr,
        chunks_ptr,
        HAS_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        NUM_TAPS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """Of a block of inputs, by way of its outputs and the next; and its part of the gradients of the weights."""
        index, num_blocks = tl.program_id(0).to(tl.int64), tl.cdiv(NUM_CHANNELS, BLOCK_C)
        chunk = index // num_blocks
        chunks_ptr += chunk * 4
        start, end, first = tl.load(chunks_ptr), tl.load(chunks_ptr + 1), tl.load(chunks_ptr + 2)
        sequence_end = tl.load(chunks_ptr + 3)
        channels = index % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        is_channel = channels < NUM_CHANNELS
        parts_ptr += chunk * ((NUM_TAPS + 1) * NUM_CHANNELS) + channels
        tokens = start + tl.arange(0, BLOCK_T)
        is_own = tokens < end
        grad_inputs = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        own_grad = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)  # of what goes into SiLU
        for tap in range(NUM_TAPS):
            later = tokens + (NUM_TAPS - 1 - tap)
            is_token = later < sequence_end
            outputs = _apply(
                inputs_ptr,
                stride,
                weight_ptr,
                bias_ptr,
                history_ptr,
                later,
                is_token,
                first,
                channels,
                HAS_BIAS,
                NUM_CHANNELS,
                NUM_TAPS,
            )
            sigmoid = tl.sigmoid(outputs)
            grad_at = grad_ptr + later[:, None] * NUM_CHANNELS + channels
            own_grad = tl.load(grad_at, mask=is_token[:, None] & is_channel, other=0.0).to(tl.float32)
            own_grad *= sigmoid * (1.0 + outputs * (1.0 - sigmoid))
            weight = tl.load(weight_ptr + channels * NUM_TAPS + tap, mask=is_channel, other=0.0).to(tl.float32)
            grad_inputs += own_grad * weight
        # The last tap is that of the block's own tokens.
        own_grad = tl.where(is_own[:, None], own_grad, 0.0)
        tl.store(parts_ptr + NUM_TAPS * NUM_CHANNELS, tl.sum(own_grad, 0), mask=is_channel)
        for tap in range(NUM_TAPS):
            rows = tokens + (tap - NUM_TAPS + 1)
            inputs = _load(inputs_ptr, stride, history_ptr, rows, is_own, first, channels, NUM_CHANNELS, NUM_TAPS)
            tl.store(parts_ptr + tap * NUM_CHANNELS, tl.sum(own_grad * inputs, 0), mask=is_channel)
        grad_inputs_ptr += tokens[:, None] * NUM_CHANNELS + channels
        tl.store(grad_inputs_ptr, grad_inputs.to(grad_inputs_ptr.dtype.element_ty), mask=is_own[:, None] & is_channel)
