# SPDX-License-Identifier: Apache-2.0
"""
PyTorch's flash attention for few queries over a long video. Of PyTorch's kernels, it alone cuts the keys up among the
processors when there are few queries. It is called by name: `sdpa_kernel` would change the settings of the process.
"""

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention


FEW_QUERIES = 2048  # of all heads that share a key


def prefers_flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """
    Whether these, of shape `(num_videos, num_heads, num_tokens, head_dim)`, go to a flash kernel: few queries on a
    CUDA device, without a gradient, unless the user has turned flash attention off (`enable_flash_sdp`).
    """
    if not query.is_cuda or query.shape[2] > FEW_QUERIES or torch.is_grad_enabled() or query.dtype != keys.dtype:
        return False
    return can_use_flash_attention(SDPAParams(query, keys, values, None, 0.0, False, False))


def attend_with_flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention without a mask, of the query's shape and dtype."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, scale=scaling)[0]
