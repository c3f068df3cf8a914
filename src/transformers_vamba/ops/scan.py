# SPDX-License-Identifier: Apache-2.0
"""
The recurrence of Mamba-2 ([Dao and Gu, 2024](https://huggingface.co/papers/2405.21060)), in its chunked matrix form:
products of matrices inside a chunk of tokens, and a state in float32 that is handed from chunk to chunk.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch.nn.functional import pad, softplus
from transformers.utils import is_mamba_2_ssm_available

from .scan_kernels import can_scan, scan_in_triton
from .state import ScanInputs
from .triton_support import device_of, real_device


CHUNK_SIZE = 64  # tokens per chunk of the PyTorch scan, whose work inside a chunk grows with it


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    lengths: list[int],
    state: torch.Tensor | None = None,
    implementation: str | Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    For each head, with `dt` after its bias and softplus, token after token:
    `state = exp(dt * A) * state + dt * x B^T` and `y = state C + D * x`.

    Args:
        x (`torch.Tensor` of shape `(num_tokens, num_heads, head_dim)`):
            The inputs of one or several sequences, one after another.
        dt (`torch.Tensor` of shape `(num_tokens, num_heads)`): Time steps, before their bias and softplus.
        A (`torch.Tensor` of shape `(num_heads,)`): Negative; in float32 at least.
        B, C (`torch.Tensor` of shape `(num_tokens, num_groups, state_size)`): Shared by the heads of a group.
        D, dt_bias (`torch.Tensor` of shape `(num_heads,)`): The skip connection, and what is added to `dt`.
        lengths (`list[int]`): Length of each sequence, at least 1; together `num_tokens`.
        state (`torch.Tensor` of shape `(num_heads, head_dim, state_size)`, *optional*):
            The state before the first sequence. The others start from zeros.
        implementation (`str` or `Callable`, *optional*):
            A key of `IMPLEMENTATIONS`; see [`choose_implementation`]. Or a function that takes the arguments of the
            `mamba_chunk_scan_combined` of `mamba-ssm`, as those from the Hub do.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The outputs, of the shape and dtype of `x`, and the state after the last
        token, in float32 (in float64, if `x` is).
    """
    if callable(implementation):
        run: Callable = partial(_scan_like_mamba_ssm, implementation)
    else:
        run = IMPLEMENTATIONS[choose_implementation(x.device, x.dtype, x.shape[-1], B.shape[-1], implementation)][1]
    with torch.autocast(real_device(x.device).type, enabled=False), device_of(x):
        return run(ScanInputs(x, dt, A, B, C, D, dt_bias, lengths, state))


def choose_implementation(
    device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int, requested: str | None = None
) -> str:
    """
    Which implementation takes tensors of this dtype on this device, and heads and states of these sizes: the requested
    one, else the first of `IMPLEMENTATIONS` that can.

    Raises:
        ValueError: if the requested one does not exist, or cannot take them.
    """
    sizes = (device, dtype, head_dim, state_size)
    if requested is None:
        return next(name for name, (can_take, _) in IMPLEMENTATIONS.items() if can_take(*sizes))
    if requested not in IMPLEMENTATIONS:
        raise ValueError(
            f"`mamba_implementation` must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, or None for the fastest "
            f"without tuning, got {requested!r}."
        )
    if not IMPLEMENTATIONS[requested][0](*sizes):
        raise ValueError(
            f"`mamba_implementation={requested!r}` cannot take {dtype} tensors on {device}, heads of {head_dim} "
            f"and a state of {state_size}, or its package is not installed. None chooses one that can."
        )
    return requested


def max_tokens(implementation: str, num_heads: int, head_dim: int, state_size: int, row_size: int) -> int:
    """
    The most tokens to scan at once. The PyTorch scan holds two numbers per head for each pair of tokens of a chunk,
    and a state per chunk, which the limit keeps to half a gigabyte. The kernels hold little; those of `mamba-ssm`
    index rows of `row_size` numbers in 32 bits, and more tokens than this make no GPU faster.
    """
    if implementation == "torch":
        numbers_per_token, limit = num_heads * (2 * CHUNK_SIZE + head_dim * state_size // CHUNK_SIZE), 2**27
    else:
        numbers_per_token, limit = row_size, 2**29
    return max(1, limit // numbers_per_token // 256) * 256


def _scan_in_torch(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32 at least, on any device."""
    x, dt, A, B, C, D, dt_bias, lengths, state = inputs
    input_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    num_groups, heads_per_group = B.shape[1], x.shape[1] // B.shape[1]
    size = min(CHUNK_SIZE, max(lengths))
    dt = softplus(dt.to(dtype) + dt_bias.to(dtype))
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    skip = D.to(dtype)[:, None] * x
    # A token of zeros, with a time step of 0, changes no state.
    x, B, C, log_decay = (
        torch.cat([pad(piece, (0, 0) * (piece.dim() - 1) + (0, -len(piece) % size)) for piece in whole.split(lengths)])
        .unflatten(0, (-1, size))
        .transpose(1, 2)  # (num_chunks, num_heads or num_groups, size, ...)
        for whole in (x * dt[..., None], B, C, dt * A.to(dtype))
    )
    total = log_decay.cumsum(-1)
    last = total[..., -1:]

    # What each chunk adds to the state, a matrix product for all heads of a group.
    weighted = (x * (last - total).exp()[..., None]).unflatten(1, (num_groups, heads_per_group))
    added = weighted.transpose(-1, -2).flatten(2, 3) @ B
    added = added.unflatten(2, (heads_per_group, -1)).flatten(1, 2)
    states, decays, chunk = [], last[..., None].exp(), 0
    empty = torch.zeros_like(added[0])
    running = empty if state is None else state.to(dtype)
    for index, length in enumerate(lengths):
        running = empty if index > 0 else running
        for _ in range(-(-length // size)):
            states.append(running)
            running = running * decays[chunk] + added[chunk]
            chunk += 1

    within = (total[..., :, None] - total[..., None, :]).masked_fill_(
        torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1), -torch.inf
    )
    scores = (C @ B.transpose(-1, -2)).unsqueeze(2) * within.exp_().unflatten(1, (num_groups, -1))
    y = scores.flatten(1, 2) @ x
    before = torch.stack(states).unflatten(1, (num_groups, heads_per_group)).flatten(2, 3).transpose(-1, -2)
    from_before = (C @ before).unflatten(-1, (heads_per_group, -1)).transpose(2, 3).flatten(1, 2)
    y = (y + from_before * total.exp()[..., None]).transpose(1, 2).flatten(0, 1)
    if len(y) > len(skip):
        chunks_of_each = y.split([-(-length // size) * size for length in lengths])
        y = torch.cat([piece[:length] for piece, length in zip(chunks_of_each, lengths)])
    return (y + skip).to(input_dtype), running


def _scan_in_mamba_ssm(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels of `mamba-ssm`, which tune themselves at their first call and index in 32 bits."""
    # An import statement would make the package a requirement of the Hub's remote code.
    module = import_module("mamba_ssm.ops.triton.ssd_combined")
    return _scan_like_mamba_ssm(module.mamba_chunk_scan_combined, inputs)


def _scan_like_mamba_ssm(chunk_scan: Callable, inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    x, dt, A, B, C, D, dt_bias, lengths, state = inputs
    seq_idx = None
    if len(lengths) > 1:
        numbers = torch.arange(len(lengths), device=x.device, dtype=torch.int32)
        seq_idx = numbers.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))[None]
    y, state = chunk_scan(
        x[None],
        dt[None].float(),
        A,
        B[None],
        C[None],
        chunk_size=256,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        initial_states=None if state is None else state[None],
        return_final_states=True,
        seq_idx=seq_idx,
    )
    return y[0], state[0].clone()  # its state is a view of those of all chunks


def _can_scan_in_mamba_ssm(device: torch.device, dtype: torch.dtype, head_dim: int, state_size: int) -> bool:
    return device.type == "cuda" and is_mamba_2_ssm_available()


# By name: whether it takes tensors like these (see `choose_implementation`), and the function. The fastest that needs
# no tuning comes first.
IMPLEMENTATIONS: dict[str, tuple[Callable, Callable]] = {
    "triton": (can_scan, scan_in_triton),
    "torch": (lambda *sizes: True, _scan_in_torch),
    "mamba_ssm": (_can_scan_in_mamba_ssm, _scan_in_mamba_ssm),
}
