# SPDX-License-Identifier: Apache-2.0
"""The causal convolution of a Mamba-2 mixer: a few taps per channel, and SiLU."""

import torch
from torch.nn.functional import silu

from .convolution_kernels import Convolution, can_convolve
from .triton_support import device_of


def convolve(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: list[int],
    history: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Args:
        inputs (`torch.Tensor` of shape `(num_tokens, num_channels)`): One or several sequences, one after another.
        weight (`torch.Tensor` of shape `(num_channels, num_taps)`): The last tap is that of the token itself.
        bias (`torch.Tensor` of shape `(num_channels,)`, *optional*): Added before SiLU.
        lengths (`list[int]`): Length of each sequence, at least 1; together `num_tokens`.
        history (`torch.Tensor` of shape `(num_taps - 1, num_channels)`, *optional*):
            The last inputs before the first sequence. Zeros stand before the others.

    Returns:
        `torch.Tensor`: SiLU of the convolution, of the shape and dtype of the inputs.
    """
    if can_convolve(inputs):
        with device_of(inputs):
            return Convolution.apply(inputs, weight, bias, lengths, history, _convolve_in_torch)
    return _convolve_in_torch(inputs, weight, bias, lengths, history)


def _convolve_in_torch(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lengths: list[int],
    history: torch.Tensor | None,
) -> torch.Tensor:
    num_taps = weight.shape[1]
    # All at once, with room before each sequence.
    empty = inputs.new_zeros(num_taps - 1, inputs.shape[1])
    before = empty if history is None else history
    rows = []
    for piece in inputs.split(lengths):
        rows += [before, piece]
        before = empty
    rows = torch.cat(rows).to(torch.promote_types(inputs.dtype, torch.float32))
    num_rows = len(rows) - num_taps + 1
    outputs = rows[:num_rows] * weight[:, 0]
    if bias is not None:
        outputs = outputs + bias
    for tap in range(1, num_taps):
        outputs = torch.addcmul(outputs, rows[tap : tap + num_rows], weight[:, tap].to(rows.dtype))
    outputs = silu(outputs).to(inputs.dtype)
    if len(lengths) == 1:
        return outputs
    # Between two sequences are outputs of the room.
    sizes = [size for length in lengths for size in (length, num_taps - 1)][:-1]
    return torch.cat(outputs.split(sizes)[::2])
