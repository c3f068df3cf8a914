# SPDX-License-Identifier: Apache-2.0
"""
Attention of few queries over a long video, in 16 or 8 bits, which is read once (Triton).

The tokens are split among programs, as in [flash decoding](https://pytorch.org/blog/flash-decoding/). Each gives its
output and the logarithm of the sum of its weights, by which a second kernel combines the outputs. The 8 bits are never
brought back to full size.
"""

import torch

from .triton_support import device_of, is_usable, launch, num_processors, shared_memory, tl, triton


MAX_QUERIES_AT_ONCE = 128  # that a program keeps at hand
MAX_QUERIES = 256  # with more, products decide, and other kernels are better at them
LOG2_E = 1.4426950408889634


def can_flash_decode(query: torch.Tensor) -> bool:
    """Whether the kernel takes these queries, of shape `(1, num_heads, num_queries, head_dim)`."""
    head_dim = query.shape[-1]
    is_power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    is_small = len(query) == 1 and query.shape[2] <= MAX_QUERIES and query.dtype in (torch.bfloat16, torch.float16)
    has_gradient = torch.is_grad_enabled() and query.requires_grad
    return is_small and is_power_of_two and not has_gradient and is_usable(query.device)


def flash_decode(query: torch.Tensor, keys, values, scaling: float) -> torch.Tensor:
    """
    Attention without a mask.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, num_queries, head_dim)`): At most `MAX_QUERIES` per head.
        keys, values (`torch.Tensor` of shape `(1, num_heads, num_tokens, head_dim)` or `QuantizedStates`):
            The video, in the query's dtype or in 8 bits. What all keys have in common adds the same to every score of
            a query, which the softmax takes off again: their centre is left out.
        scaling (`float`): Factor of the scores.

    Returns:
        `torch.Tensor`: In the query's dtype, of shape `(1, num_queries, num_heads, head_dim)`.
    """
    key_states, key_scales = (keys, None) if isinstance(keys, torch.Tensor) else (keys.codes, keys.scales)
    value_states, value_scales = (values, None) if isinstance(values, torch.Tensor) else (values.codes, values.scales)
    centre = None if isinstance(values, torch.Tensor) else values.centre
    _, num_heads, num_queries, head_dim = query.shape
    num_tokens = key_states.shape[2]
    block_queries = min(max(16, triton.next_power_of_2(num_queries)), MAX_QUERIES_AT_ONCE)
    # The fastest on an H100. In 16 bits one program per processor waits for nothing but the memory; in 8 bits, one
    # converts while another waits.
    block_tokens, programs = 64, 1
    if key_scales is not None:
        block_tokens, programs = (64, 3) if block_queries < MAX_QUERIES_AT_ONCE else (32, 2)
    max_splits = max(programs * (num_processors(query.device) // num_heads), 1)
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, max_splits), block_tokens) * block_tokens
    num_splits = triton.cdiv(num_tokens, tokens_per_split)
    partial_outputs = query.new_empty(num_splits, num_heads, num_queries, head_dim, dtype=torch.float32)
    log_sums = query.new_empty(num_splits, num_heads, num_queries, dtype=torch.float32)
    outputs = torch.empty_like(query, memory_format=torch.contiguous_format)
    # As many blocks of keys and values on their way as there is room for beside the queries.
    room = shared_memory(query.device) - block_queries * head_dim * query.itemsize
    num_stages = max(1, min(3, room // (2 * block_tokens * head_dim * key_states.itemsize)))
    with device_of(query):
        launch(
            _attend_split,
            (num_splits, num_heads, triton.cdiv(num_queries, block_queries)),
            query.contiguous(),
            key_states,
            key_scales,
            value_states,
            value_scales,
            partial_outputs,
            log_sums,
            num_queries,
            num_tokens,
            tokens_per_split,
            *key_states.stride()[1:3],
            *((0, 0) if key_scales is None else key_scales.stride()[1:3]),
            *value_states.stride()[1:3],
            *((0, 0) if value_scales is None else value_scales.stride()[1:3]),
            SCALING=scaling * LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_QUERIES=block_queries,
            BLOCK_TOKENS=block_tokens,
            num_stages=num_stages,
        )
        launch(
            _combine,
            (num_heads, num_queries),
            partial_outputs,
            log_sums,
            centre,
            outputs,
            num_splits,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=triton.next_power_of_2(max_splits),
        )
    return outputs.transpose(1, 2)


if triton is not None:
    # One compilation for videos and questions of any length.
    @triton.jit(do_not_specialize=["num_queries", "num_tokens", "tokens_per_split"])
    def _attend_split(
        query_ptr,
        keys_ptr,
        key_scales_ptr,  # None in 16 bits
        values_ptr,
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
        """One split of the tokens of one head, for one block of its queries. Exponents are of base 2."""
        split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        queries = tl.program_id(2) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        channels = tl.arange(0, HEAD_DIM)
        is_query = queries < num_queries
        row = head * num_queries + queries
        query = tl.load(query_ptr + row[:, None] * HEAD_DIM + channels, mask=is_query[:, None], other=0.0)
        keys_ptr += head * key_head_stride
        values_ptr += head * value_head_stride

        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        output = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
        start = split * tokens_per_split
        for first in range(start, tl.minimum(start + tokens_per_split, num_tokens), BLOCK_TOKENS):
            tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
            is_token = tokens < num_tokens
            keys = tl.load(keys_ptr + tokens[:, None] * key_token_stride + channels, mask=is_token[:, None], other=0)
            values = tl.load(
                values_ptr + tokens[:, None] * value_token_stride + channels, mask=is_token[:, None], other=0
            )
            # The scales of the keys go into the scores, and those of the values into their weights.
            scores = tl.dot(query, tl.trans(keys.to(query.dtype))) * SCALING
            if key_scales_ptr is not None:
                scales_ptr = key_scales_ptr + head * key_scale_head_stride + tokens * key_scale_token_stride
                scores *= tl.load(scales_ptr, mask=is_token, other=0.0).to(tl.float32)
            scores = tl.where(is_token, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            decay = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])
            total = total * decay + tl.sum(weights, 1)
            largest = new_largest
            if value_scales_ptr is not None:
                scales_ptr = value_scales_ptr + head * value_scale_head_stride + tokens * value_scale_token_stride
                weights *= tl.load(scales_ptr, mask=is_token, other=0.0).to(tl.float32)
            output = output * decay[:, None] + tl.dot(weights.to(query.dtype), values.to(query.dtype))

        row += split.to(tl.int64) * tl.num_programs(1) * num_queries
        tl.store(outputs_ptr + row[:, None] * HEAD_DIM + channels, output / total[:, None], mask=is_query[:, None])
        tl.store(log_sums_ptr + row, largest + tl.log2(total), mask=is_query)

    @triton.jit(do_not_specialize=["num_splits"])
    def _combine(
        partial_outputs_ptr,
        log_sums_ptr,
        centre_ptr,  # of the values in 8 bits, else None
        outputs_ptr,
        num_splits,
        HEAD_DIM: tl.constexpr,
        BLOCK_SPLITS: tl.constexpr,
    ):
        """The splits of one query of one head."""
        head, query, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        splits, channels = tl.arange(0, BLOCK_SPLITS), tl.arange(0, HEAD_DIM)
        is_split = splits < num_splits
        rows = (splits.to(tl.int64) * num_heads + head) * tl.num_programs(1) + query
        log_sums = tl.load(log_sums_ptr + rows, mask=is_split, other=float("-inf"))
        weights = tl.exp2(log_sums - tl.max(log_sums, 0))
        weights /= tl.sum(weights, 0)
        partial_ptr = partial_outputs_ptr + rows[:, None] * HEAD_DIM + channels
        partial_outputs = tl.load(partial_ptr, mask=is_split[:, None], other=0.0)
        output = tl.sum(weights[:, None] * partial_outputs, 0)
        if centre_ptr is not None:  # the weights of the values sum to 1
            output += tl.load(centre_ptr + head * HEAD_DIM + channels)
        outputs_ptr += (head * tl.num_programs(1) + query) * HEAD_DIM + channels
        tl.store(outputs_ptr, output.to(outputs_ptr.dtype.element_ty))
