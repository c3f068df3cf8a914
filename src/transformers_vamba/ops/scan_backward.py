# SPDX-License-Identifier: Apache-2.0
"""The scan's kernels of the backward pass, which also takes `carry` of the forward pass. Imported where Triton is."""

from .scan_forward import UNSPECIALIZED, chunk_of, load_rows, load_state
from .triton_support import tl, triton


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_of_inputs(
    x_ptr,
    x_stride,
    B_ptr,
    B_stride,
    C_ptr,
    C_stride,
    D_ptr,
    grad_y_ptr,
    grad_y_stride,
    steps_ptr,
    decays_ptr,
    grad_states_ptr,
    grad_x_ptr,
    grad_steps_ptr,
    grad_D_ptr,
    columns_ptr,
    rows_ptr,
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
    """
    The gradient of `x` of one head for a block of tokens, and that of their time steps but for the decays. What
    passes from token j to token i has a share m_ij in the loss's gradient of every decay between the two: the
    sums over i and over j, of the same numbers, are what `grad_of_steps` makes that gradient of.
    """
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
    grad_y_ptr += head * HEAD_DIM
    B_ptr += head // HEADS_PER_GROUP * STATE_SIZE
    C_ptr += head // HEADS_PER_GROUP * STATE_SIZE
    of_token = head * num_tokens + tokens
    decays_ptr += head * num_tokens
    state_ptr = grad_states_ptr + (chunk * NUM_HEADS + head) * (HEAD_DIM * STATE_SIZE)

    x = load_rows(x_ptr, tokens, is_token, x_stride, p, is_p)
    B = load_rows(B_ptr, tokens, is_token, B_stride, n, is_n)
    step = tl.load(steps_ptr + of_token, mask=is_token, other=0.0)
    decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
    grad_state = load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
    last = tl.load(decays_ptr + end - 1)
    grad = tl.dot(B, tl.trans(grad_state), input_precision=PRECISION)
    grad *= tl.exp(tl.minimum(last - decay, 0.0))[:, None]
    columns = tl.zeros([BLOCK], tl.float32)
    for later in range(block, tl.cdiv(end - start, BLOCK)):
        others = start + later * BLOCK + tl.arange(0, BLOCK)
        is_other = others < end
        C = load_rows(C_ptr, others, is_other, C_stride, n, is_n)
        grad_y = load_rows(grad_y_ptr, others, is_other, grad_y_stride, p, is_p)
        difference = tl.load(decays_ptr + others, mask=is_other, other=0.0) - decay[:, None]
        weight = tl.where(tokens[:, None] <= others, tl.exp(tl.minimum(difference, 0.0)), 0.0)
        scores = tl.dot(B, tl.trans(C), input_precision=PRECISION) * weight
        grad = tl.dot(scores.to(x.dtype), grad_y, grad, input_precision=PRECISION)
        shares = scores * tl.dot(x, tl.trans(grad_y), input_precision=PRECISION) * step[:, None]
        shares = tl.where(tokens[:, None] < others, shares, 0.0)
        columns += tl.sum(shares, 1)
        rows_at = rows_ptr + (block * NUM_HEADS + head) * num_tokens + others
        tl.store(rows_at, tl.sum(shares, 0), mask=is_other)
    x = x.to(tl.float32)
    grad_y = load_rows(grad_y_ptr, tokens, is_token, grad_y_stride, p, is_p).to(tl.float32)
    tl.store(grad_steps_ptr + of_token, tl.sum(x * grad, 1), mask=is_token)
    tl.store(grad_D_ptr + of_token, tl.sum(x * grad_y, 1), mask=is_token)
    tl.store(columns_ptr + of_token, columns, mask=is_token)
    grad = grad * step[:, None] + grad_y * tl.load(D_ptr + head).to(tl.float32)
    grad_x_ptr += (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + p
    tl.store(grad_x_ptr, grad.to(grad_x_ptr.dtype.element_ty), mask=is_token[:, None] & is_p)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_of_matrices(
    own_ptr,
    own_stride,
    other_ptr,
    other_stride,
    own_matrix_ptr,
    own_matrix_stride,
    other_matrix_ptr,
    other_matrix_stride,
    steps_ptr,
    decays_ptr,
    states_ptr,
    parts_ptr,
    sums_ptr,
    chunks_ptr,
    num_tokens,
    heads_per_part,
    IS_B: tl.constexpr,
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
    The gradient of B (or C) of one group for a block of tokens, summed over some of its heads: their own inputs
    (gradients of outputs), times the gradients of the later outputs (the earlier inputs) and C (B) of those
    tokens; and times the gradient of the state after the chunk (the state before). What comes by way of that state
    is also summed up per head and token, for the gradients of the decays.
    """
    index = tl.program_id(0).to(tl.int64)
    group, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    chunk, block = index // (CHUNK // BLOCK), index % (CHUNK // BLOCK)
    start, end = chunk_of(chunks_ptr, chunk)
    tokens = start + block * BLOCK + tl.arange(0, BLOCK)
    if start + block * BLOCK >= end:
        return
    is_token = tokens < end
    p, n = tl.arange(0, TILE_P), tl.arange(0, TILE_N)
    is_p, is_n = p < HEAD_DIM, n < STATE_SIZE
    own_matrix_ptr += group * STATE_SIZE
    other_matrix_ptr += group * STATE_SIZE
    first_head = group * HEADS_PER_GROUP + part * heads_per_part
    end_head = tl.minimum(first_head + heads_per_part, (group + 1) * HEADS_PER_GROUP)

    own_matrix = load_rows(own_matrix_ptr, tokens, is_token, own_matrix_stride, n, is_n).to(tl.float32)
    grad = tl.zeros([BLOCK, TILE_N], tl.float32)
    for head in range(first_head, end_head):
        own = load_rows(own_ptr + head * HEAD_DIM, tokens, is_token, own_stride, p, is_p)
        state_ptr = states_ptr + (chunk * NUM_HEADS + head) * (HEAD_DIM * STATE_SIZE)
        state = load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
        weight = tl.load(decays_ptr + head * num_tokens + tokens, mask=is_token, other=0.0)
        if IS_B:
            last = tl.load(decays_ptr + head * num_tokens + end - 1)
            weight = tl.exp(tl.minimum(last - weight, 0.0))
            weight *= tl.load(steps_ptr + head * num_tokens + tokens, mask=is_token, other=0.0)
        else:
            weight = tl.exp(weight)
        through_state = tl.dot(own, state, input_precision=PRECISION) * weight[:, None]
        sums = tl.sum(through_state * own_matrix, 1)
        tl.store(sums_ptr + head * num_tokens + tokens, sums, mask=is_token)
        grad += through_state

    first_block = block if IS_B else 0
    end_block = tl.cdiv(end - start, BLOCK) if IS_B else block + 1
    for other_block in range(first_block, end_block):
        others = start + other_block * BLOCK + tl.arange(0, BLOCK)
        is_other = others < end
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
        for head in range(first_head, end_head):
            own = load_rows(own_ptr + head * HEAD_DIM, tokens, is_token, own_stride, p, is_p)
            other = load_rows(other_ptr + head * HEAD_DIM, others, is_other, other_stride, p, is_p)
            decay = tl.load(decays_ptr + head * num_tokens + tokens, mask=is_token, other=0.0)
            other_decay = tl.load(decays_ptr + head * num_tokens + others, mask=is_other, other=0.0)
            if IS_B:
                step = tl.load(steps_ptr + head * num_tokens + tokens, mask=is_token, other=0.0)
                weight = tl.exp(tl.minimum(other_decay - decay[:, None], 0.0)) * step[:, None]
            else:
                step = tl.load(steps_ptr + head * num_tokens + others, mask=is_other, other=0.0)
                weight = tl.exp(tl.minimum(decay[:, None] - other_decay, 0.0)) * step
            products += tl.dot(own, tl.trans(other), input_precision=PRECISION) * weight
        is_read = (tokens[:, None] <= others) if IS_B else (tokens[:, None] >= others)
        other_matrix = load_rows(other_matrix_ptr, others, is_other, other_matrix_stride, n, is_n)
        products = tl.where(is_read, products, 0.0).to(other_matrix.dtype)
        grad = tl.dot(products, other_matrix, grad, input_precision=PRECISION)
    num_groups = NUM_HEADS // HEADS_PER_GROUP
    parts_ptr += ((part * num_tokens + tokens[:, None]) * num_groups + group) * STATE_SIZE + n
    tl.store(parts_ptr, grad, mask=is_token[:, None] & is_n)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_of_steps(
    dt_ptr,
    dt_stride,
    dt_head_stride,
    A_ptr,
    bias_ptr,
    steps_ptr,
    decays_ptr,
    states_ptr,
    grad_states_ptr,
    grad_steps_ptr,
    columns_ptr,
    rows_ptr,
    read_ptr,
    written_ptr,
    grad_dt_ptr,
    grad_A_ptr,
    chunks_ptr,
    num_tokens,
    BLOCK: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """
    The gradients of the time steps of a chunk and head. A token's decay lies between the earlier tokens and
    itself with the later ones: what the state before the chunk gave to the latter, what the former gave to the
    latter and to the state after the chunk, and what is left of the state before in the state after.
    """
    chunk, head = tl.program_id(0).to(tl.int64) // NUM_HEADS, tl.program_id(0).to(tl.int64) % NUM_HEADS
    start, end = chunk_of(chunks_ptr, chunk)
    tokens = start + tl.arange(0, CHUNK)
    is_token = tokens < end
    of_token = head * num_tokens + tokens
    values = tl.arange(0, 1024)
    left = tl.zeros([1024], tl.float32)
    state_at = (chunk * NUM_HEADS + head) * NUM_VALUES
    for first in range(0, NUM_VALUES, 1024):
        is_value = first + values < NUM_VALUES
        state = tl.load(states_ptr + state_at + first + values, mask=is_value, other=0.0).to(tl.float32)
        grad_state = tl.load(grad_states_ptr + state_at + first + values, mask=is_value, other=0.0)
        left += state * grad_state.to(tl.float32)
    left = tl.sum(left, 0) * tl.exp(tl.load(decays_ptr + head * num_tokens + end - 1))

    given = tl.load(read_ptr + of_token, mask=is_token, other=0.0)
    given -= tl.load(columns_ptr + of_token, mask=is_token, other=0.0)
    for block in tl.static_range(0, CHUNK // BLOCK):
        is_row = is_token & (tokens - start >= block * BLOCK)
        given += tl.load(rows_ptr + (block * NUM_HEADS + head) * num_tokens + tokens, mask=is_row, other=0.0)
    written = tl.load(written_ptr + of_token, mask=is_token, other=0.0)
    grad_decay = tl.cumsum(given, 0, reverse=True) + tl.cumsum(written, 0) - written + left

    steps = tl.load(steps_ptr + of_token, mask=is_token, other=0.0)
    A = tl.load(A_ptr + head).to(tl.float32)
    tl.store(grad_A_ptr + of_token, steps * grad_decay, mask=is_token)
    dt = tl.load(dt_ptr + tokens * dt_stride + head * dt_head_stride, mask=is_token, other=0.0).to(tl.float32)
    dt += tl.load(bias_ptr + head).to(tl.float32)
    grad = tl.load(grad_steps_ptr + of_token, mask=is_token, other=0.0) + A * grad_decay
    tl.store(grad_dt_ptr + of_token, grad * tl.sigmoid(dt), mask=is_token)
