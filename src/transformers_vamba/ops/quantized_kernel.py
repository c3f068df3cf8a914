# SPDX-License-Identifier: Apache-2.0
"""Attention of few queries over a video in 8 bits, which is read once and never converted to full size (Triton)."""

import torch

from .triton_support import device_of, tl, triton


NUM_SPLITS = 128  # parts of each head's tokens, at most: four heads keep a large GPU busy
MAX_QUERIES_AT_ONCE = 64  # per program
MAX_QUERIES = 256  # with more, converting to full size once costs less than reading the 8 bits again and again


def can_attend(query: torch.Tensor) -> bool:
    """Whether the kernel takes these queries, of shape `(1, num_heads, num_queries, head_dim)`."""
    head_dim = query.shape[-1]
    is_power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    is_small = query.shape[2] <= MAX_QUERIES and query.dtype in (torch.bfloat16, torch.float16)
    has_gradient = torch.is_grad_enabled() and query.requires_grad
    return triton is not None and query.is_cuda and is_small and is_power_of_two and not has_gradient


def attend(query: torch.Tensor, keys, values, scaling: float) -> torch.Tensor:
    """
    Attention over the codes and scales of [`QuantizedStates`], without their centres.

    The tokens are split among programs, as in flash decoding. Each gives its output and the logarithm of the sum of
    its weights, by which the outputs are then combined.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, num_queries, head_dim)`): At most `MAX_QUERIES` per head.
        keys (`QuantizedStates`), values (`QuantizedStates`): The video.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor`: In float32, of shape `(1, num_queries, num_heads, head_dim)`.
    """
    _, num_heads, num_queries, head_dim = query.shape
    num_tokens = keys.codes.shape[2]
    block_tokens = 64
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, NUM_SPLITS), block_tokens) * block_tokens
    num_splits = triton.cdiv(num_tokens, tokens_per_split)
    outputs = query.new_empty(num_splits, num_heads, num_queries, head_dim, dtype=torch.float32)
    log_sums = query.new_empty(num_splits, num_heads, num_queries, dtype=torch.float32)
    block_queries = min(max(16, triton.next_power_of_2(num_queries)), MAX_QUERIES_AT_ONCE)
    with device_of(query):
        _attend_split[(num_splits, num_heads, triton.cdiv(num_queries, block_queries))](
            query.contiguous(),
            keys.codes,
            keys.scales,
            values.codes,
            values.scales,
            outputs,
            log_sums,
            num_queries,
            num_tokens,
            tokens_per_split,
            *keys.codes.stride()[1:3],
            *keys.scales.stride()[1:3],
            *values.codes.stride()[1:3],
            *values.scales.stride()[1:3],
            SCALING=scaling,
            HEAD_DIM=head_dim,
            BLOCK_QUERIES=block_queries,
            BLOCK_TOKENS=block_tokens,
        )
    weights = log_sums.softmax(dim=0)[..., None]
    return (weights * outputs).sum(dim=0).transpose(0, 1)[None]


if triton is not None:

    @triton.jit
    def _attend_split(
        query_ptr,
        key_codes_ptr,
        key_scales_ptr,
        value_codes_ptr,
        value_scales_ptr,
        outputs_ptr,
        log_sums_ptr,
        num_queries,
        num_tokens,
        tokens_per_split,
        key_head_stride,
        key_token_stride,
        key_scale_head_stride,
        key_scale_token_stride,
        value_head_stride,
        value_token_stride,
        value_scale_head_stride,
        value_scale_token_stride,
        SCALING: tl.constexpr,  # a compiled caller would pass a float64
        HEAD_DIM: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
    ):
        """One split of the tokens of one head, for one block of its queries."""
        split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        queries = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        channels = tl.arange(0, HEAD_DIM)
        is_query = queries < num_queries
        row = head * num_queries + queries
        query = tl.load(query_ptr + row[:, None] * HEAD_DIM + channels, mask=is_query[:, None], other=0.0)
        key_codes_ptr += head * key_head_stride
        key_scales_ptr += head * key_scale_head_stride
        value_codes_ptr += head * value_head_stride
        value_scales_ptr += head * value_scale_head_stride

        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        output = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
        start = split * tokens_per_split
        for first in range(start, tl.minimum(start + tokens_per_split, num_tokens), BLOCK_TOKENS):
            tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
            is_token = tokens < num_tokens
            # The scales of the keys go into the scores, and those of the values into their weights.
            codes_ptr = key_codes_ptr + tokens[:, None] * key_token_stride + channels
            codes = tl.load(codes_ptr, mask=is_token[:, None], other=0).to(tl.float32).to(query.dtype)
            scales = tl.load(key_scales_ptr + tokens * key_scale_token_stride, mask=is_token, other=0.0)
            scores = tl.dot(query, tl.trans(codes)) * (scales.to(tl.float32) * SCALING)
            scores = tl.where(is_token, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            decay = tl.exp(largest - new_largest)
            weights = tl.exp(scores - new_largest[:, None])
            total = total * decay + tl.sum(weights, 1)
            largest = new_largest

            codes_ptr = value_codes_ptr + tokens[:, None] * value_token_stride + channels
            codes = tl.load(codes_ptr, mask=is_token[:, None], other=0).to(tl.float32).to(query.dtype)
            scales = tl.load(value_scales_ptr + tokens * value_scale_token_stride, mask=is_token, other=0.0)
            weights = (weights * scales.to(tl.float32)).to(query.dtype)
            output = output * decay[:, None] + tl.dot(weights, codes)

        row += split.to(tl.int64) * tl.num_programs(1) * num_queries
        tl.store(outputs_ptr + row[:, None] * HEAD_DIM + channels, output / total[:, None], mask=is_query[:, None])
        tl.store(log_sums_ptr + row, largest + tl.log(total), mask=is_query)
