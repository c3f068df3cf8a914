# SPDX-License-Identifier: Apache-2.0
"""The tower's activation as a Triton kernel. PyTorch's own functions make three passes over the hidden states."""

import torch
from torch.autograd.function import once_differentiable

from .triton_support import device_of, is_usable, launch, tl, triton


BLOCK = 1024


def quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 * x)`, of any shape and floating dtype."""
    if not is_usable(hidden_states.device):
        return hidden_states * torch.sigmoid(1.702 * hidden_states)
    return _QuickGelu.apply(hidden_states.contiguous())


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states):
        ctx.save_for_backward(hidden_states)
        outputs = torch.empty_like(hidden_states)
        _launch(hidden_states, outputs, outputs, is_backward=False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (hidden_states,) = ctx.saved_tensors
        outputs = torch.empty_like(hidden_states)
        _launch(hidden_states, grad.contiguous(), outputs, is_backward=True)
        return outputs


def _launch(hidden_states: torch.Tensor, grad: torch.Tensor, outputs: torch.Tensor, is_backward: bool) -> None:
    grid = (triton.cdiv(outputs.numel(), BLOCK),)
    with device_of(outputs):
        launch(_quick_gelu, grid, hidden_states, grad, outputs, outputs.numel(), BACKWARD=is_backward, BLOCK=BLOCK)


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
