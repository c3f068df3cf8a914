# SPDX-License-Identifier: Apache-2.0
"""
The scan of `ops.scan` as Triton kernels, forward and backward. They need PyTorch and its Triton alone, nothing is
tuned, and every offset has 64 bits.

In a chunk that starts from the state S, with `decay_i` the sum of `dt * A` from the chunk's first token to token i:

    y_i = exp(decay_i) S C_i + sum over j <= i of exp(decay_i - decay_j) (C_i . B_j) dt_j x_j + D x_i

No exponent is positive. States are carried from chunk to chunk in float32 by one program per tile of a head's state,
and kept per chunk in the dtype of `x`, which is the dtype of the matrix products.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .chunks import chunk_table
from .triton_support import is_usable, shared_memory, tl, triton


CHUNK = 128  # tokens from state to state
MAX_SIZE, MAX_STATE_BYTES = 256, 2**15  # of a head or a state, that fit into a program
# Warps per program, and steps of a loop that are loaded ahead; see `examples/benchmarks/mixer_kernels.py --sweep`.
LAUNCH = {"carry": (4, 2), "output": (4, 1), "inputs": (4, 1), "matrices": (8, 3)}


def can_scan(device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int) -> bool:
    """Whether the kernels take tensors of this dtype on this device, and heads and states of these sizes."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or not is_usable(device):
        return False
    tile_p, tile_n = _tile(head_dim), _tile(state_size)
    return max(tile_p, tile_n) <= MAX_SIZE and tile_p * tile_n * dtype.itemsize <= MAX_STATE_BYTES


def _tile(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def scan_in_triton(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    lengths: list[int],
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`ops.scan.scan`]."""
    return _Scan.apply(x, dt, A, B, C, D, dt_bias, state, lengths)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, state, lengths):
        x, B, C = (_rows(tensor, x.dtype) for tensor in (x, B, C))
        ctx.sizes = _Sizes(x, B, lengths)
        sizes = ctx.sizes
        num_tokens, num_heads, head_dim = x.shape
        steps, decays = x.new_empty(2, num_heads, num_tokens, dtype=torch.float32)
        _decay[(sizes.num_chunks * num_heads,)](
            dt, *dt.stride(), A, dt_bias, sizes.chunks, steps, decays, num_tokens, **sizes.of_heads
        )
        states, last_state = sizes.carry(x, B, steps, decays, state, is_backward=False)
        y = torch.empty_like(x)
        _output[(sizes.num_blocks * num_heads,)](
            x,
            x.stride(0),
            B,
            B.stride(0),
            C,
            C.stride(0),
            D,
            steps,
            decays,
            states,
            y,
            sizes.chunks,
            num_tokens,
            **sizes.of_blocks,
            **sizes.launch("output"),
        )
        ctx.has_state = state is not None
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, steps, decays, states)
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, dt, A, B, C, D, dt_bias, steps, decays, states = ctx.saved_tensors
        sizes = ctx.sizes
        num_tokens, num_heads, head_dim = x.shape
        num_groups, state_size = B.shape[1:]
        grad_y = torch.zeros_like(x) if grad_y is None else _rows(grad_y, x.dtype)
        grad_states, grad_first = sizes.carry(grad_y, C, steps, decays, grad_state, is_backward=True)

        grad_x = torch.empty_like(x)
        # What each token adds to the gradients of its time step and of D, and to those of the decays between tokens.
        grad_steps, grad_D, columns, read, written = x.new_empty(5, num_heads, num_tokens, dtype=torch.float32)
        rows = x.new_empty(CHUNK // sizes.block, num_heads, num_tokens, dtype=torch.float32)
        _grad_of_inputs[(sizes.num_blocks * num_heads,)](
            x,
            x.stride(0),
            B,
            B.stride(0),
            C,
            C.stride(0),
            D,
            grad_y,
            grad_y.stride(0),
            steps,
            decays,
            grad_states,
            grad_x,
            grad_steps,
            grad_D,
            columns,
            rows,
            sizes.chunks,
            num_tokens,
            **sizes.of_blocks,
            **sizes.launch("inputs"),
        )
        grads = []
        for own, other, own_matrix, other_matrix, own_states, sums, is_B in (
            (x, grad_y, B, C, grad_states, written, True),
            (grad_y, x, C, B, states, read, False),
        ):
            parts = x.new_empty(sizes.num_parts, num_tokens, num_groups, state_size, dtype=torch.float32)
            _grad_of_matrices[(sizes.num_blocks, num_groups, sizes.num_parts)](
                own,
                own.stride(0),
                other,
                other.stride(0),
                own_matrix,
                own_matrix.stride(0),
                other_matrix,
                other_matrix.stride(0),
                steps,
                decays,
                own_states,
                parts,
                sums,
                sizes.chunks,
                num_tokens,
                sizes.heads_per_part,
                IS_B=is_B,
                **sizes.of_blocks,
                **sizes.launch("matrices"),
            )
            grads.append(parts.sum(0).to(B.dtype))
        grad_dt, grad_A = torch.empty_like(steps), torch.empty_like(steps)
        _grad_of_steps[(sizes.num_chunks * num_heads,)](
            dt,
            *dt.stride(),
            A,
            dt_bias,
            steps,
            decays,
            states,
            grad_states,
            grad_steps,
            columns,
            rows,
            read,
            written,
            grad_dt,
            grad_A,
            sizes.chunks,
            num_tokens,
            BLOCK=sizes.block,
            NUM_VALUES=head_dim * state_size,
            **sizes.of_heads,
        )
        return (
            grad_x,
            grad_dt.T.to(dt.dtype),
            grad_A.sum(1).to(A.dtype),
            *grads,
            grad_D.sum(1).to(D.dtype),
            grad_dt.sum(1).to(dt_bias.dtype),
            grad_first if ctx.has_state else None,
            None,
        )


def _rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(num_tokens, num_heads, size)` in `dtype`, in which only the tokens may lie apart."""
    tensor = tensor.to(dtype)
    is_dense = tensor.stride()[1:] == (tensor.shape[2], 1) or (tensor.shape[1] == 1 and tensor.stride(2) == 1)
    return tensor if is_dense else tensor.contiguous()


class _Sizes:
    """The sizes of blocks and grids for these tensors, by their shape and dtype."""

    def __init__(self, x: torch.Tensor, B: torch.Tensor, lengths: list[int]):
        (_, num_heads, head_dim), (_, num_groups, state_size) = x.shape, B.shape
        tile_p, tile_n = _tile(head_dim), _tile(state_size)
        is_small = x.itemsize == 2 and tile_p <= 64 and tile_n <= 128
        self.block = 64 if is_small else 32  # tokens per program
        self._has_room = shared_memory(x.device) >= 2**17
        self._is_half = x.itemsize == 2
        self.chunks = chunk_table(tuple(lengths), CHUNK, x.device)
        self.num_chunks = len(self.chunks)
        self.num_blocks = self.num_chunks * (CHUNK // self.block)
        heads_per_group = num_heads // num_groups
        # Enough programs for a large GPU, few enough that adding up their parts costs nothing.
        num_parts = min(heads_per_group, triton.cdiv(512, self.num_blocks * num_groups))
        self.heads_per_part = triton.cdiv(heads_per_group, num_parts)
        self.num_parts = triton.cdiv(heads_per_group, self.heads_per_part)
        # The state of a head is carried in tiles, so that there are enough programs.
        self.tiles = min(tile_p, 64), min(tile_n, 64)
        self.of_heads = {"NUM_HEADS": num_heads, "CHUNK": CHUNK}
        self.of_states: dict[str, Any] = self.of_heads | {
            "HEADS_PER_GROUP": heads_per_group,
            "HEAD_DIM": head_dim,
            "STATE_SIZE": state_size,
            "BLOCK": self.block,
            # In float32 as PyTorch's own products are by default. Half precision takes no notice.
            "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        }
        self.of_blocks = self.of_states | {"TILE_P": tile_p, "TILE_N": tile_n}

    def launch(self, kernel: str) -> dict[str, int]:
        """How a kernel of `LAUNCH` is launched for these tensors."""
        num_warps, num_stages = LAUNCH[kernel]
        return {
            "num_warps": num_warps if self._is_half else 8,
            "num_stages": num_stages if self._has_room else 1,
        }

    def carry(
        self,
        x: torch.Tensor,
        B: torch.Tensor,
        steps: torch.Tensor,
        decays: torch.Tensor,
        state: torch.Tensor | None,
        is_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each chunk, and after the last; or, from the last to the first, their gradients."""
        (num_tokens, num_heads, head_dim), state_size = x.shape, B.shape[2]
        states = x.new_empty(self.num_chunks, num_heads, head_dim, state_size)
        last_state = x.new_zeros(num_heads, head_dim, state_size, dtype=torch.float32)
        tile_p, tile_n = self.tiles
        _carry[(num_heads, triton.cdiv(head_dim, tile_p), triton.cdiv(state_size, tile_n))](
            x,
            x.stride(0),
            B,
            B.stride(0),
            steps,
            decays,
            # A program has read its tile of the first state before it writes that of the last.
            last_state if state is None else state.to(torch.float32).contiguous(),
            states,
            last_state,
            self.chunks,
            self.num_chunks,
            num_tokens,
            IS_BACKWARD=is_backward,
            TILE_P=tile_p,
            TILE_N=tile_n,
            **self.of_states,
            **self.launch("carry"),
        )
        return states, last_state


if triton is not None:
    _UNSPECIALIZED = ["num_tokens", "num_chunks", "heads_per_part"]  # or every length would compile anew

    @triton.jit
    def _load_rows(ptr, rows, is_row, stride, columns, is_column):
        """A tile of `(num_tokens, size)`, zeros outside."""
        return tl.load(ptr + rows[:, None] * stride + columns, mask=is_row[:, None] & is_column, other=0.0)

    @triton.jit
    def _load_state(ptr, HEAD_DIM: tl.constexpr, STATE_SIZE: tl.constexpr, p, n):
        """A tile of a state `(head_dim, state_size)`, zeros outside."""
        mask = (p < HEAD_DIM)[:, None] & (n < STATE_SIZE)
        return tl.load(ptr + p[:, None] * STATE_SIZE + n, mask=mask, other=0.0)

    @triton.jit
    def _chunk_of(chunks_ptr, chunk):
        return tl.load(chunks_ptr + 4 * chunk), tl.load(chunks_ptr + 4 * chunk + 1)

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _decay(
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
        start, end = _chunk_of(chunks_ptr, chunk)
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

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _carry(
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
            start, end = _chunk_of(chunks_ptr, chunk)
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
                x = _load_rows(x_ptr, tokens, is_token, x_stride, p, p < HEAD_DIM)
                B = _load_rows(B_ptr, tokens, is_token, B_stride, n, n < STATE_SIZE)
                decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
                if IS_BACKWARD:
                    weight = tl.exp(decay)
                else:
                    step = tl.load(steps_ptr + tokens, mask=is_token, other=0.0)
                    weight = tl.exp(tl.minimum(last - decay, 0.0)) * step
                x = (x.to(tl.float32) * weight[:, None]).to(B.dtype)
                state = tl.dot(tl.trans(x), B, state, input_precision=PRECISION)
        tl.store(last_ptr + offsets, state, mask=is_state)

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _output(
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
        start, end = _chunk_of(chunks_ptr, chunk)
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

        C = _load_rows(C_ptr, tokens, is_token, C_stride, n, is_n)
        decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
        state = _load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
        y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * tl.exp(decay)[:, None]
        for earlier in range(0, block + 1):
            others = start + earlier * BLOCK + tl.arange(0, BLOCK)
            is_other = others < end
            x = _load_rows(x_ptr, others, is_other, x_stride, p, is_p)
            B = _load_rows(B_ptr, others, is_other, B_stride, n, is_n)
            step = tl.load(steps_ptr + others, mask=is_other, other=0.0)
            difference = decay[:, None] - tl.load(decays_ptr + others, mask=is_other, other=0.0)
            weight = tl.where(tokens[:, None] >= others, tl.exp(tl.minimum(difference, 0.0)), 0.0) * step
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION) * weight
            y = tl.dot(scores.to(x.dtype), x, y, input_precision=PRECISION)
        x = _load_rows(x_ptr, tokens, is_token, x_stride, p, is_p)
        y += x.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        y_ptr += (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + p
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_p)

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _grad_of_inputs(
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
        sums over i and over j, of the same numbers, are what `_grad_of_steps` makes that gradient of.
        """
        head, index = tl.program_id(0).to(tl.int64) % NUM_HEADS, tl.program_id(0).to(tl.int64) // NUM_HEADS
        chunk, block = index // (CHUNK // BLOCK), index % (CHUNK // BLOCK)
        start, end = _chunk_of(chunks_ptr, chunk)
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

        x = _load_rows(x_ptr, tokens, is_token, x_stride, p, is_p)
        B = _load_rows(B_ptr, tokens, is_token, B_stride, n, is_n)
        step = tl.load(steps_ptr + of_token, mask=is_token, other=0.0)
        decay = tl.load(decays_ptr + tokens, mask=is_token, other=0.0)
        grad_state = _load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
        last = tl.load(decays_ptr + end - 1)
        grad = tl.dot(B, tl.trans(grad_state), input_precision=PRECISION)
        grad *= tl.exp(tl.minimum(last - decay, 0.0))[:, None]
        columns = tl.zeros([BLOCK], tl.float32)
        for later in range(block, tl.cdiv(end - start, BLOCK)):
            others = start + later * BLOCK + tl.arange(0, BLOCK)
            is_other = others < end
            C = _load_rows(C_ptr, others, is_other, C_stride, n, is_n)
            grad_y = _load_rows(grad_y_ptr, others, is_other, grad_y_stride, p, is_p)
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
        grad_y = _load_rows(grad_y_ptr, tokens, is_token, grad_y_stride, p, is_p).to(tl.float32)
        tl.store(grad_steps_ptr + of_token, tl.sum(x * grad, 1), mask=is_token)
        tl.store(grad_D_ptr + of_token, tl.sum(x * grad_y, 1), mask=is_token)
        tl.store(columns_ptr + of_token, columns, mask=is_token)
        grad = grad * step[:, None] + grad_y * tl.load(D_ptr + head).to(tl.float32)
        grad_x_ptr += (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + p
        tl.store(grad_x_ptr, grad.to(grad_x_ptr.dtype.element_ty), mask=is_token[:, None] & is_p)

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _grad_of_matrices(
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
        start, end = _chunk_of(chunks_ptr, chunk)
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

        own_matrix = _load_rows(own_matrix_ptr, tokens, is_token, own_matrix_stride, n, is_n).to(tl.float32)
        grad = tl.zeros([BLOCK, TILE_N], tl.float32)
        for head in range(first_head, end_head):
            own = _load_rows(own_ptr + head * HEAD_DIM, tokens, is_token, own_stride, p, is_p)
            state_ptr = states_ptr + (chunk * NUM_HEADS + head) * (HEAD_DIM * STATE_SIZE)
            state = _load_state(state_ptr, HEAD_DIM, STATE_SIZE, p, n)
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
                own = _load_rows(own_ptr + head * HEAD_DIM, tokens, is_token, own_stride, p, is_p)
                other = _load_rows(other_ptr + head * HEAD_DIM, others, is_other, other_stride, p, is_p)
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
            other_matrix = _load_rows(other_matrix_ptr, others, is_other, other_matrix_stride, n, is_n)
            products = tl.where(is_read, products, 0.0).to(other_matrix.dtype)
            grad = tl.dot(products, other_matrix, grad, input_precision=PRECISION)
        num_groups = NUM_HEADS // HEADS_PER_GROUP
        parts_ptr += ((part * num_tokens + tokens[:, None]) * num_groups + group) * STATE_SIZE + n
        tl.store(parts_ptr, grad, mask=is_token[:, None] & is_n)

    @triton.jit(do_not_specialize=_UNSPECIALIZED)
    def _grad_of_steps(
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
        start, end = _chunk_of(chunks_ptr, chunk)
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
