# SPDX-License-Identifier: Apache-2.0
"""
The scan of `ops.scan` as Triton kernels: what launches those of `ops.scan_forward` and `ops.scan_backward`. They need
PyTorch and its Triton alone, nothing is tuned, and every offset has 64 bits.

In a chunk that starts from the state S, with `decay_i` the sum of `dt * A` from the chunk's first token to token i:

    y_i = exp(decay_i) S C_i + sum over j <= i of exp(decay_i - decay_j) (C_i . B_j) dt_j x_j + D x_i

No exponent is positive. States are carried from chunk to chunk in float32 by one program per tile of a head's state,
and kept per chunk in the dtype of `x`, which is the dtype of the matrix products.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .chunks import chunk_table
from .state import ScanInputs
from .triton_support import is_usable, launch, shared_memory, triton


if triton is not None:
    from .scan_backward import grad_of_inputs, grad_of_matrices, grad_of_steps
    from .scan_forward import carry, output, sum_decays


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


def scan_in_triton(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`ops.scan.scan`]."""
    return _Scan.apply(*inputs)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, lengths, state):
        x, B, C = (_rows(tensor, x.dtype) for tensor in (x, B, C))
        ctx.sizes = _Sizes(x, B, lengths)
        sizes = ctx.sizes
        num_tokens, num_heads, head_dim = x.shape
        steps, decays = x.new_empty(2, num_heads, num_tokens, dtype=torch.float32)
        grid = (sizes.num_chunks * num_heads,)
        launch(
            sum_decays,
            grid,
            dt,
            *dt.stride(),
            A,
            dt_bias,
            sizes.chunks,
            steps,
            decays,
            num_tokens,
            **sizes.of_heads,
        )
        states, last_state = sizes.carry(x, B, steps, decays, state, is_backward=False)
        y = torch.empty_like(x)
        launch(
            output,
            (sizes.num_blocks * num_heads,),
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
            **sizes.options("output"),
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
        launch(
            grad_of_inputs,
            (sizes.num_blocks * num_heads,),
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
            **sizes.options("inputs"),
        )
        grads = []
        for own, other, own_matrix, other_matrix, own_states, sums, is_B in (
            (x, grad_y, B, C, grad_states, written, True),
            (grad_y, x, C, B, states, read, False),
        ):
            parts = x.new_empty(sizes.num_parts, num_tokens, num_groups, state_size, dtype=torch.float32)
            launch(
                grad_of_matrices,
                (sizes.num_blocks, num_groups, sizes.num_parts),
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
                **sizes.options("matrices"),
            )
            grads.append(parts.sum(0).to(B.dtype))
        grad_dt, grad_A = torch.empty_like(steps), torch.empty_like(steps)
        launch(
            grad_of_steps,
            (sizes.num_chunks * num_heads,),
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
            None,
            grad_first if ctx.has_state else None,
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

    def options(self, kernel: str) -> dict[str, int]:
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
        launch(
            carry,
            (num_heads, triton.cdiv(head_dim, tile_p), triton.cdiv(state_size, tile_n)),
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
            **self.options("carry"),
        )
        return states, last_state
