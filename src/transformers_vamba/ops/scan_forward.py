# SPDX-License-Identifier: Apache-2.0
"""The scan's kernels of the forward pass, and what those of the backward pass share. Imported where Triton is."""

from .triton_support import tl, triton


UNSPECIALIZED = ["num_tokens", "num_chunks", "heads_per_part"]  # or every length would compile anew


@triton.jit
def load_rows(ptr, rows, is_row, stride, columns, is_column):
    """A tile of `(num_tokens, size)`, zeros outside."""
    return tl.load(ptr + rows[:, None] * stride + columns, mask=is_row[:, None] & is_column, other=0.0)


@triton.jit
def load_state(ptr, HEAD_DIM: tl.constexpr, STATE_SIZE: tl.constexpr, p, n):
    """A tile of a state `(head_dim, state_size)`, zeros outside."""
    mask = (p < HEAD_DIM)[:, None] & (n < STATE_SIZE)
    return tl.load(ptr + p[:, None] * STATE_SIZE + n, mask=mask, other=0.0)


@triton.jit
def chunk_of(chunks_ptr, chunk):
    return tl.load(chunks_ptr + 4 * chunk), tl.load(chunks_ptr + 4 * chunk + 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_decays(
    dt_ptr,
    dt_stride,
    dt_head_stride,
    A_ptr,
    bias_ptr,
    chunks_ptr,
    steps_ptr,
    decays_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The time steps of a chunk and head after bias and softplus, and the sums of their decays."""
    chunk, head = tl.program_id(0).to(tl.int64) // NUM_HEADS, tl.program_id(0).to(tl.int64) % NUM_HEADS
    start, end = chunk_of(chunks_ptr, chunk)
    tokens = start + tl.arange(0, CHUNK)
    is_token = tokens < end
    dt = tl.load(dt_ptr + tokens * dt_stride + head * dt_head_stride, mask=is_token, other=0.0).to(tl.float32)
    dt += tl.load(bias_ptr + head).to(tl.float32)
    # log(1 + e) by way of what is left of e in 1 + e, so that small time steps keep their digits.
    e = tl.exp(tl.minimum(dt, 20.0))
    sum_ = 1.0 + e
    softplus = tl.where(sum_ == 1.0, e, tl.log(sum_) * (e / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    steps = tl.where(is_token, tl.where(dt > 20.0, dt, softplus), 0.0)
    decays = tl.cumsum(steps * tl.load(A_ptr + head).to(tl.float32), 0)
    tl.store(steps_ptr + head * num_tokens + tokens, steps, mask=is_token)
    tl.store(decays_ptr + head * num_tokens + tokens, decays, mask=is_token)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def carry(
    x_ptr,
    x_stride,
    B_ptr,
    B_stride,
    steps_ptr,
    decays_ptr,
    first_ptr,
    states_ptr,
    last_ptr,
    chunks_ptr,
    num_chunks,
    num_tokens,
    IS_BACKWARD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    One tile of one head's state, from chunk to chunk. Backward: of the gradient of the state after each chunk,
    with the gradient of the outputs in the place of `x`, and C in that of B.
    """
    head = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    n = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
    x_ptr += head * HEAD_DIM
    B_ptr += head // HEADS_PER_GROUP * STATE_SIZE
    steps_ptr += head * num_tokens
    decays_ptr += head * num_tokens
    state_size = HEAD_DIM * STATE_SIZE
    offsets = head * state_size + p[:, None] * STATE_SIZE + n
    is_state = (p < HEAD_DIM)[:, None] & (n < STATE_SIZE)
    state = tl.load(first_ptr + offsets, mask=is_state, other=0.0)
    for index in range(num_chunks):
        chunk = tl.cast(num_chunks - 1 - index if IS_BACKWARD else index, tl.int64)
        start, end = chunk_of(chunks_ptr, chunk)
        # Where a sequence begins (backward: ends), nothing is carried on.
        if IS_BACKWARD:
            is_edge = end == tl.load(chunks_ptr + 4 * chunk + 3)
        else:
            is_edge = start == tl.load(chunks_ptr + 4 * chunk + 2)
        state = tl.where(is_edge & (index > 0), 0.0, state)
        states_at = states_ptr + chunk * NUM_HEADS * state_size + offsets
        tl.store(states_at, state.to(states_ptr.dtype.element_ty), mask=is_state)
        last = tl.load(decays_ptr + end - 1)
        state *= tl.exp(last)
        for block in tl.static_range(0, CHUNK, BLOCK):
            tokens = start + block + tl.arange(0, BLOCK)
            is_token = tokens < end
            x = load_rows(x_ptr, tokens, is_token, x_stride, p, p < HEAD_DIM)
            B = load_rows(B_ptr, tokens, is_token, B_stride, n, n < STATE_SIZE)
            decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
            if IS_BACKWARD:
                weight = tl.exp(decay)
            else:
                step = tl.load(steps_ptr + tokens, mask=is_token, other=0.0)
                weight = tl.exp(tl.minimum(last - decay, 0.0)) * step
            x = (x.to(tl.float32) * weight[:, None]).to(B.dtype)
            state = tl.dot(tl.trans(x), B, state, input_precision=PRECISION)
    tl.store(last_ptr + offsets, state, mask=is_state)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def output(
    x_ptr,
    x_stride,
    B_ptr,
    B_stride,
    C_ptr,
    C_stride,
    D_ptr,
    steps_ptr,
    decays_ptr,
    states_ptr,
    y_ptr,
    chunks_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of one head for a block of tokens of a chunk."""
    head, index = tl.program_id(0).to(tl.int64) % NUM_HEADS, tl.program_id(0).to(tl.int64) // NUM_HEADS
    chunk, block = index // (CHUNK // BLOCK), index % (CHUNK // BLOCK)
    start, end = chunk_of(chunks_ptr, chunk)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    if start + block * BLOCK >= end:
        return
    is_token = tokens < end
    p, n = tl.arange(0, TILE_P), tl.arange(0, TILE_N)
    is_p, is_n = p < HEAD_DIM, n < STATE_SIZE
    x_ptr += head * HEAD_DIM
    B_ptr += head // HEADS_PER_GROUP * STATE_SIZE
    C_ptr += head // HEADS_PER_GROUP * STATE_SIZE
    steps_ptr += head * num_tokens
    decays_ptr += head * num_tokens
    state_ptr = states_ptr + (chunk * NUM_HEADS + head) * (HEAD_DIM * STATE_SIZE)

    C = load_rows(C_ptr, tokens, is_token, C_stride, n, is_n)
    decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
    state = load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
    y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * tl.exp(decay)[:, None]
    for earlier in range(0, block + 1):
        others = start + earlier * BLOCK + tl.arange(0, BLOCK)
        is_other = others < end
        x = load_rows(x_ptr, others, is_other, x_stride, p, is_p)
        B = load_rows(B_ptr, others, is_other, B_stride, n, is_n)
        step = tl.load(steps_ptr + others, mask=is_other, other=0.0)
        difference = decay[:, None] - tl.load(decays_ptr + others, mask=is_other, other=0.0)
        weight = tl.where(tokens[:, None] >= others, tl.exp(tl.minimum(difference, 0.0)), 0.0) * step
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION) * weight
        y = tl.dot(scores.to(x.dtype), x, y, input_precision=PRECISION)
    x = load_rows(x_ptr, tokens, is_token, x_stride, p, is_p)
    y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
    y_ptr += (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + p
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_p)
