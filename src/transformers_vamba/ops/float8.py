# SPDX-License-Identifier: Apache-2.0
"""
The inputs of linear layers that torchao holds in float8, with one scale per row of inputs and weights
(`Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`): a Triton kernel rounds them as it computes them.
torchao's own functions read and write them several times before each product.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from .branch import has_hooks, is_plain, norm_constants, takes_no_gradient
from .triton_support import device_of, is_usable, launch, tl, triton


if triton is not None:
    from .branch import normalize

FLOAT8 = torch.float8_e4m3fn
MAX_CHANNELS = 2**14  # which a program holds


class Rows(NamedTuple):
    """Float8 numbers `(..., num_channels)`, and the float32 scale of each row, `(..., 1)`."""

    codes: torch.Tensor
    scales: torch.Tensor


def takes_rows(linear: Any, states: torch.Tensor, norm: nn.Module | None = None) -> bool:
    """Whether this layer is one of torchao's in float8 and nothing more, and the kernels take states and norm."""
    weight: Any = linear.weight if type(linear) is nn.Linear else None
    rounding = getattr(weight, "act_quant_kwargs", None)
    if type(weight).__name__ != "Float8Tensor" or rounding is None:
        return False
    return (
        takes_no_gradient(states.device)
        and is_usable(states.device)
        and states.dtype == weight.dtype == torch.bfloat16
        and weight.shape[1] <= MAX_CHANNELS
        and weight.qdata.dtype == rounding.float8_dtype == FLOAT8
        and weight.scale.shape == (weight.shape[0], 1)
        and type(rounding.granularity).__name__ == "PerRow"
        and rounding.hp_value_lb is None
        and rounding.hp_value_ub is None
        and not has_hooks(linear)
        and (norm is None or is_plain(norm, states))
    )


def apply_linear(linear: Any, states: torch.Tensor | Rows) -> torch.Tensor:
    """The layer's output, of shape `(..., num_outputs)`."""
    if not isinstance(states, Rows):
        return linear(states)
    codes, scales = (tensor.flatten(0, -2) for tensor in states)
    outputs = torch._scaled_mm(
        codes,
        linear.weight.qdata.t(),
        scale_a=scales,
        scale_b=linear.weight.scale.t(),
        bias=linear.bias,
        out_dtype=linear.weight.dtype,
        use_fast_accum=linear.weight.mm_config.use_fast_accum,
    )
    return outputs.view(*states.codes.shape[:-1], -1)


def round_rows(states: torch.Tensor, norm: nn.Module | None = None, function: str = "none") -> Rows:
    """
    The states, of shape `(..., num_channels)`, after a norm or function, for a layer that [`takes_rows`].

    Args:
        states (`torch.Tensor`): In bfloat16.
        norm (`nn.LayerNorm` or `nn.RMSNorm`, *optional*): What is applied first.
        function (`str`, *optional*, defaults to `"none"`): Or `"quick_gelu"`.
    """
    return _round(states, None, "norm" if norm is not None else function, norm)


def round_gated_norm(states: torch.Tensor, gate: torch.Tensor, norm: nn.Module) -> Rows:
    """`norm(states * silu(gate))`, an RMSNorm over all channels. The rows of the gate may lie apart."""
    return _round(states, gate, "gated_norm", norm)


def _round(states: torch.Tensor, gate: torch.Tensor | None, function: str, norm: nn.Module | None) -> Rows:
    states = states.contiguous()
    num_channels = states.shape[-1]
    codes = torch.empty_like(states, dtype=FLOAT8)
    scales = states.new_empty(*states.shape[:-1], 1, dtype=torch.float32)
    with device_of(states):
        launch(
            _round_rows,
            (scales.numel(),),
            states,
            gate,
            0 if gate is None else gate.stride(-2),
            getattr(norm, "weight", None),
            getattr(norm, "bias", None),
            codes,
            scales,
            FUNCTION=function,
            **norm_constants(norm, num_channels, states.dtype),
        )
    return Rows(codes, scales)


if triton is not None:

    @triton.jit
    def _round_rows(
        states_ptr,
        gate_ptr,
        gate_stride,
        weight_ptr,
        bias_ptr,
        codes_ptr,
        scales_ptr,
        FUNCTION: tl.constexpr,
        EPS: tl.constexpr,
        IS_CENTRED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        NUM_CHANNELS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        channels = tl.arange(0, BLOCK)
        is_channel = channels < NUM_CHANNELS
        row = token * NUM_CHANNELS + channels
        states = tl.load(states_ptr + row, mask=is_channel, other=0.0).to(tl.float32)
        if FUNCTION == "quick_gelu":
            states = states / (1 + tl.exp(-1.702 * states))
        elif FUNCTION == "gated_norm":
            gate = tl.load(gate_ptr + token * gate_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
            states *= gate * tl.sigmoid(gate)
        if FUNCTION == "norm" or FUNCTION == "gated_norm":
            states = normalize(states, channels, weight_ptr, bias_ptr, EPS, IS_CENTRED, HAS_BIAS, NUM_CHANNELS)
        scale = tl.maximum(tl.max(tl.abs(states), 0), 1e-12) / 448.0  # the largest of the format
        tl.store(scales_ptr + token, scale)
        codes = tl.minimum(tl.maximum(states / scale, -448.0), 448.0)
        tl.store(codes_ptr + row, codes.to(codes_ptr.dtype.element_ty), mask=is_channel)
