# SPDX-License-Identifier: Apache-2.0
"""What goes into a scan, and the state that a Mamba-2 mixer hands on."""

from typing import NamedTuple

import torch


class MambaState(NamedTuple):
    """
    Where a Mamba-2 mixer stands behind a stretch of tokens: all it needs to go on with the next.

    Args:
        conv (`torch.Tensor` of shape `(1, mamba_d_conv - 1, conv_dim)`): The convolution's last inputs.
        ssm (`torch.Tensor` of shape `(1, num_mamba_heads, mamba_d_head, mamba_d_state)`): The recurrent state.
    """

    conv: torch.Tensor
    ssm: torch.Tensor


class ScanInputs(NamedTuple):
    """The arguments of [`ops.scan.scan`], as its implementations take them."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    lengths: list[int]
    state: torch.Tensor | None
