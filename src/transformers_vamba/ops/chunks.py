# SPDX-License-Identifier: Apache-2.0
"""Sequences that lie one after another, cut into chunks that a kernel works through."""

import functools

import torch


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def chunk_table(lengths: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """
    Cuts each sequence into chunks of at most `size` tokens.

    Returns:
        `torch.LongTensor` of shape `(num_chunks, 4)`: Where each chunk starts and ends, and where its sequence does.
    """
    rows, first = [], 0
    for length in lengths:
        end = first + length
        rows += [(start, min(start + size, end), first, end) for start in range(first, end, size)]
        first = end
    return torch.tensor(rows, dtype=torch.int64).to(device)
