# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a video in 8 bits, and the attention of a text over them."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .flash_decoding import can_flash_decode, flash_decode


class QuantizedStates(NamedTuple):
    """
    Keys or values in 8 bits: `centre + scales * codes`. The centre is what the tokens have in common, such as the bias
    of the projection, next to which the tokens would otherwise differ by a few steps only.

    Args:
        codes (`torch.CharTensor` of shape `(1, num_heads, num_tokens, head_dim)`): Integers from -127 to 127.
        scales (`torch.Tensor` of shape `(1, num_heads, num_tokens, 1)`): One scale per token and head.
        centre (`torch.FloatTensor` of shape `(1, num_heads, 1, head_dim)`): What has been taken off each token.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    centre: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that they had."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self) -> torch.Tensor:
        """The states, in the dtype that they had."""
        return (self.codes * self.scales + self.centre).to(self.dtype)


def quantize(states: torch.Tensor, centre: torch.Tensor) -> QuantizedStates:
    """
    Rounds states to 8 bits, by at most half of a 127th of the largest number of each token and head.

    Args:
        states (`torch.Tensor` of shape `(1, num_heads, num_tokens, head_dim)`): Keys or values.
        centre (`torch.FloatTensor` of shape `(1, num_heads, 1, head_dim)`): What to take off each token.
    """
    centred = states.float() - centre
    scales = (centred.abs().amax(-1, keepdim=True) / 127).to(states.dtype).clamp(min=torch.finfo(states.dtype).tiny)
    codes = (centred / scales).round().clamp(-127, 127).to(torch.int8)
    return QuantizedStates(codes, scales, centre)


def attend_quantized(
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    keys: QuantizedStates,
    values: QuantizedStates,
    scaling: float,
) -> torch.Tensor:
    """
    Attention without a mask over keys and values in 8 bits. A head at a time is brought back to full size, except for
    few queries on a CUDA device, which read the 8 bits (see `ops.flash_decoding`).

    What all keys have in common adds the same to every score of a query, which the softmax takes off again: the centre
    of the keys is left out. The weights of the values sum to 1: their centre is added to what comes out.

    Args:
        attention (`Callable`):
            Gives `(1, num_queries, num_heads, head_dim)` of a query, keys and values of shape `(1, num_heads, ...,
            head_dim)`.
        query (`torch.Tensor` of shape `(1, num_heads, num_queries, head_dim)`): The queries of each head.
        keys (`QuantizedStates`), values (`QuantizedStates`): The video.
        scaling (`float`): Factor of the scores.
    """
    if can_flash_decode(query):
        return flash_decode(query, keys, values, scaling)

    def attend_head(head: int) -> torch.Tensor:
        one = slice(head, head + 1)
        head_keys = keys.codes[:, one] * keys.scales[:, one]
        head_values = values.codes[:, one] * values.scales[:, one]
        return attention(query[:, one], head_keys, head_values)

    outputs = torch.cat([attend_head(head) for head in range(query.shape[1])], dim=2)
    return (outputs + values.centre.transpose(1, 2)).to(query.dtype)
