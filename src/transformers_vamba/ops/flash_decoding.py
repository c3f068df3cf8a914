# SPDX-License-Identifier: Apache-2.0
"""
Attention of few queries over a long video, in 16 or 8 bits, which is read once (Triton).

The tokens are split among programs, as in [flash decoding](https://pytorch.org/blog/flash-decoding/). Each gives its
output and the logarithm of the sum of its weights, by which a second kernel combines the outputs. The 8 bits are never
brought back to full size.

In the same way, but without the values: how much of each time step of the video the queries read.
"""

import torch

from .triton_support import device_of, is_usable, launch, num_processors, shared_memory, tl, triton


MAX_QUERIES_AT_ONCE = 128  # that a program keeps at hand
MAX_QUERIES = 256  # with more, products decide, and other kernels are better at them
TOKENS_AT_ONCE = 64  # of a time step
LOG2_E = 1.4426950408889634


def can_flash_decode(query: torch.Tensor) -> bool:
    """Whether `flash_decode` takes these queries, of shape `(1, num_heads, num_queries, head_dim)`."""
    return len(query) == 1 and query.shape[2] <= MAX_QUERIES and can_score(query)


def can_score(query: torch.Tensor) -> bool:
    """Whether the kernels take these queries, of shape `(..., head_dim)`, however many they are."""
    head_dim = query.shape[-1]
    is_power_of_two = head_dim >= 16 and head_dim & (head_dim - 1) == 0
    has_gradient = torch.is_grad_enabled() and query.requires_grad
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return is_half and is_power_of_two and not has_gradient and is_usable(query.device)


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
    (key_states, key_scales), (value_states, value_scales) = _split_scales(keys), _split_scales(values)
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
    block_bytes = 2 * block_tokens * head_dim * key_states.itemsize  # keys and values
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
            num_stages=_num_stages(query, block_queries, block_bytes),
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


def log_sums_of_steps(query: torch.Tensor, keys, bounds: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    The log-sum-exp of each query's scores of the keys of each time step, read once: float32 of shape `(num_heads,
    num_queries, num_steps)`, `-inf` for a step without keys.

    Args:
        query (`torch.Tensor` of shape `(num_heads, num_queries, head_dim)`): Any number per head.
        keys (`torch.Tensor` or `QuantizedStates` of shape `(1, num_heads, num_tokens, head_dim)`):
            The video, in the query's dtype or in 8 bits, whose centre is left out: the same is missing from all sums
            of a query.
        bounds (`torch.LongTensor` of shape `(num_steps + 1,)`): Where each step begins, and where the last one ends.
        scaling (`float`): Factor of the scores.
    """
    key_states, key_scales = _split_scales(keys)
    num_heads, num_queries, head_dim = query.shape
    log_sums = query.new_empty(num_heads, num_queries, len(bounds) - 1, dtype=torch.float32)
    num_blocks = triton.cdiv(num_queries, MAX_QUERIES_AT_ONCE)
    block_bytes = TOKENS_AT_ONCE * head_dim * key_states.itemsize
    with device_of(query):
        launch(
            _sum_step,
            (num_blocks * log_sums.shape[2], num_heads),
            query.contiguous(),
            key_states,
            key_scales,
            bounds,
            log_sums,
            num_queries,
            log_sums.shape[2],
            *key_states.stride()[1:3],
            *((0, 0) if key_scales is None else key_scales.stride()[1:3]),
            SCALING=scaling * LOG2_E,
            LOG2_E=LOG2_E,
            HEAD_DIM=head_dim,
            BLOCK_QUERIES=MAX_QUERIES_AT_ONCE,
            BLOCK_TOKENS=TOKENS_AT_ONCE,
            num_stages=_num_stages(query, MAX_QUERIES_AT_ONCE, block_bytes),
        )
    return log_sums


def _split_scales(states) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys or values as they lie, and the scales of those in 8 bits."""
    return (states, None) if isinstance(states, torch.Tensor) else (states.codes, states.scales)


def _num_stages(query: torch.Tensor, block_queries: int, block_bytes: int) -> int:
    """As many blocks of the video on their way as there is room for beside the queries."""
    room = shared_memory(query.device) - block_queries * query.shape[-1] * query.itemsize
    return max(1, min(3, room // block_bytes))


if triton is not None:

    @triton.jit
    def _score(query, keys_ptr, scales_ptr, tokens, is_token, key_stride, scale_stride, SCALING: tl.constexpr):
        """The scores of some tokens of a head, `-inf` for what is none. The scales of keys in 8 bits go into them."""
        factors = SCALING
        if scales_ptr is not None:  # whose loads are on their way during the product
            factors *= tl.load(scales_ptr + tokens * scale_stride, mask=is_token, other=0.0).to(tl.float32)
        channels = tl.arange(0, query.shape[1])
        keys = tl.load(keys_ptr + tokens[:, None] * key_stride + channels, mask=is_token[:, None], other=0)
        scores = tl.dot(query, tl.trans(keys.to(query.dtype))) * factors
        return tl.where(is_token, scores, float("-inf"))

    @triton.jit
    def _weigh(scores, largest, total):
        """
        The largest score of each query so far, and the sum of the weights beside it, with those of these scores. Also
        the weights, and the factor of what was weighed before.
        """
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        decay = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        return new_largest, total * decay + tl.sum(weights, 1), weights, decay

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
        if key_scales_ptr is not None:
            key_scales_ptr += head * key_scale_head_stride
            value_scales_ptr += head * value_scale_head_stride

        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        output = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
        start = split * tokens_per_split
        for first in range(start, tl.minimum(start + tokens_per_split, num_tokens), BLOCK_TOKENS):
            tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
            is_token = tokens < num_tokens
            scores = _score(
                query, keys_ptr, key_scales_ptr, tokens, is_token, key_token_stride, key_scale_token_stride, SCALING
            )
            values = tl.load(
                values_ptr + tokens[:, None] * value_token_stride + channels, mask=is_token[:, None], other=0
            )
            largest, total, weights, decay = _weigh(scores, largest, total)
            if value_scales_ptr is not None:  # which go into the weights
                scales_ptr = value_scales_ptr + tokens * value_scale_token_stride
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

    # The strides of the scales have any divisor: one compilation for videos on the device and from the host.
    @triton.jit(do_not_specialize=["num_queries", "num_steps", "key_scale_head_stride", "key_scale_token_stride"])
    def _sum_step(
        query_ptr,
        keys_ptr,
        key_scales_ptr,  # None in 16 bits
        bounds_ptr,
        log_sums_ptr,
        num_queries,
        num_steps,
        key_head_stride,
        key_token_stride,
        key_scale_head_stride,
        key_scale_token_stride,
        SCALING: tl.constexpr,  # as in `_attend_split`
        LOG2_E: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_QUERIES: tl.constexpr,
        BLOCK_TOKENS: tl.constexpr,
    ):
        """
        The tokens of one time step and one head, for one block of its queries. The blocks of one step run side by side
        and share what the first one reads.
        """
        num_blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
        step, head = tl.program_id(0) // num_blocks, tl.program_id(1).to(tl.int64)
        queries = tl.program_id(0) % num_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        is_query = queries < num_queries
        row = head * num_queries + queries
        channels = tl.arange(0, HEAD_DIM)
        query = tl.load(query_ptr + row[:, None] * HEAD_DIM + channels, mask=is_query[:, None], other=0.0)
        keys_ptr += head * key_head_stride
        if key_scales_ptr is not None:
            key_scales_ptr += head * key_scale_head_stride

        largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        stop = tl.load(bounds_ptr + step + 1).to(tl.int32)
        for first in range(tl.load(bounds_ptr + step).to(tl.int32), stop, BLOCK_TOKENS):
            tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
            is_token = tokens < stop
            scores = _score(
                query, keys_ptr, key_scales_ptr, tokens, is_token, key_token_stride, key_scale_token_stride, SCALING
            )
            largest, total, _, _ = _weigh(scores, largest, total)
        tl.store(log_sums_ptr + row * num_steps + step, (largest + tl.log2(total)) / LOG2_E, mask=is_query)
