# SPDX-License-Identifier: Apache-2.0
"""The first layer of the tower's MLP as a Triton kernel that applies the activation before it writes anything."""

from typing import Any

import torch
from torch import nn

from .branch import is_plain, takes_no_gradient
from .triton_support import device_of, is_usable, launch, num_processors, shared_memory, tl, triton


try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton, or an old one
    TensorDescriptor = None
describe: Any = getattr(TensorDescriptor, "from_tensor", None)

MIN_ROWS = 4096  # fewer do not fill a GPU
# Rows, outputs and inputs per step of a program; warps, steps that are loaded ahead, and programs per processor.
BLOCK = (128, 256, 64)
LAUNCH = (8, 3, 1)
# Bytes that a program takes for those steps and its outputs, in 16 bits, and a little more. GPUs for data centres have
# them since Hopper; those that have not lack the loads of whole blocks as well, or are quicker with smaller ones.
SHARED_MEMORY = 2 * (LAUNCH[1] * (BLOCK[0] + BLOCK[1]) * BLOCK[2] + BLOCK[0] * BLOCK[1]) + 2**10
GROUP = 8  # blocks of rows that are taken together, so that they share the weight in the cache


def can_fuse_gelu(states: torch.Tensor, linear: nn.Module) -> bool:
    """Whether the kernel takes these states, `(num_rows, num_inputs)`, and this layer; it has no gradient."""
    return (
        describe is not None
        and takes_no_gradient(states.device)
        and is_usable(states.device)
        and states.dtype in (torch.bfloat16, torch.float16)
        and len(states) >= MIN_ROWS
        and type(linear) is nn.Linear
        and linear.bias is not None
        and linear.in_features % 8 == linear.out_features % 8 == 0
        and states.data_ptr() % 16 == linear.weight.data_ptr() % 16 == 0  # a view of a larger tensor may not
        and is_plain(linear, states)
        and shared_memory(states.device) >= SHARED_MEMORY
    )


def quick_gelu_linear(states: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """`quick_gelu(linear(states))` of `(num_rows, num_inputs)`, if [`can_fuse_gelu`] says so."""
    states, weight = states.contiguous(), linear.weight.contiguous()
    (num_rows, num_inputs), num_outputs = states.shape, len(weight)
    outputs = states.new_empty(num_rows, num_outputs)
    block_rows, block_outputs, block_inputs = BLOCK
    num_warps, num_stages, num_per_processor = LAUNCH
    num_programs = num_processors(states.device) * num_per_processor
    with device_of(states):
        launch(
            _linear_quick_gelu,
            (num_programs,),
            describe(states, [block_rows, block_inputs]),
            describe(weight, [block_outputs, block_inputs]),
            linear.bias,
            describe(outputs, [block_rows, block_outputs]),
            num_rows,
            num_outputs,
            num_inputs,
            *BLOCK,
            GROUP,
            num_programs,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return outputs


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows"])
    def _linear_quick_gelu(
        states,
        weight,
        bias_ptr,
        outputs,
        num_rows,
        num_outputs,
        num_inputs,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_OUTPUTS: tl.constexpr,
        BLOCK_INPUTS: tl.constexpr,
        GROUP: tl.constexpr,
        NUM_PROGRAMS: tl.constexpr,
    ):
        num_row_blocks, num_output_blocks = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_outputs, BLOCK_OUTPUTS)
        per_group = GROUP * num_output_blocks
        for tile in tl.range(tl.program_id(0), num_row_blocks * num_output_blocks, NUM_PROGRAMS, flatten=True):
            first = tile // per_group * GROUP
            height = min(num_row_blocks - first, GROUP)
            row = (first + tile % per_group % height) * BLOCK_ROWS
            column = tile % per_group // height * BLOCK_OUTPUTS
            sums = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
            for step in range(tl.cdiv(num_inputs, BLOCK_INPUTS)):
                start = step * BLOCK_INPUTS
                sums = tl.dot(states.load([row, start]), weight.load([column, start]).T, sums)
            columns = column + tl.arange(0, BLOCK_OUTPUTS)
            bias = tl.load(bias_ptr + columns, mask=columns < num_outputs, other=0.0)
            sums += bias.to(tl.float32)[None, :]
            sums = sums / (1 + tl.exp(-1.702 * sums))
            outputs.store([row, column], sums.to(outputs.dtype))
