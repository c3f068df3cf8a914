# SPDX-License-Identifier: Apache-2.0
"""Append-only tensors, grown along the token axis: on their device, or in the host's memory."""

import functools
import itertools

import torch


class DeviceStorage:
    """
    Tensors of shape `(1, num_heads, num_tokens, size)` on the device that made them. They are written once, into
    memory that grows ahead of need or is reserved. Tensors that take a gradient are concatenated instead.
    """

    def __init__(self):
        self._states: tuple[torch.Tensor, ...] = ()
        self._memory: list[torch.Tensor] = []
        self._reserved = 0

    @property
    def num_tokens(self) -> int:
        return self._states[0].shape[-2] if self._states else 0

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the last tensor, `None` before there is one."""
        return self._states[-1].dtype if self._states else None

    @property
    def device(self) -> torch.device | None:
        """Where they are read, `None` before there is one."""
        return self._states[0].device if self._states else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are held."""
        return sum(states.nbytes for states in self._states)

    def reserve(self, num_tokens: int) -> None:
        """Sizes the memory, once it is allocated, for `num_tokens` more tokens than are held now."""
        self._reserved = self.num_tokens + num_tokens

    def append(self, states: tuple[torch.Tensor, ...]) -> None:
        """Writes `(1, num_heads, num_new_tokens, size)` of each tensor after what is there."""
        if any(new.requires_grad for new in states):
            held = self._states or [new[:, :, :0] for new in states]
            self._states = tuple(torch.cat(pair, dim=-2) for pair in zip(held, states))
            self._memory = []
            return
        start = self.num_tokens
        end = start + states[0].shape[-2]
        if not self._memory or self._memory[0].shape[-2] < end:
            self._grow(states, start, max(end, self._reserved, start + start // 16))
        for memory, new in zip(self._memory, states):
            memory[:, :, start:end] = new
        self._states = tuple(memory[:, :, :end] for memory in self._memory)

    def _grow(self, states: tuple[torch.Tensor, ...], num_tokens: int, capacity: int) -> None:
        # Only one tensor at a time exists twice. If the memory does not suffice, none is lost.
        grown, self._memory = [], []
        for i, new in enumerate(states):
            with torch.inference_mode(False):  # or it could be written in inference mode alone
                grown.append(torch.empty(*new.shape[:2], capacity, new.shape[-1], dtype=new.dtype, device=new.device))
            if num_tokens:
                moved = grown[i][:, :, :num_tokens]
                moved.copy_(self._states[i])
                self._states = (*self._states[:i], moved, *self._states[i + 1 :])
        self._memory = grown

    def crop(self, num_tokens: int) -> None:
        """Drops all but the first tokens."""
        self._states = tuple(states[:, :, :num_tokens] for states in self._states)

    def select(self, indices: torch.Tensor) -> None:
        """Keeps some of the tokens, in memory of their own: forks keep what they have."""
        indices, num_tokens = indices.to(self.device), len(indices)
        if not self._memory:
            self._states = tuple(states.index_select(2, indices) for states in self._states)
            return
        for i, memory in enumerate(self._memory):
            with torch.inference_mode(False):  # or it could be written in inference mode alone
                self._memory[i] = torch.empty_like(memory)
            kept = self._memory[i][:, :, :num_tokens].copy_(self._states[i].index_select(2, indices))
            self._states = (*self._states[:i], kept, *self._states[i + 1 :])

    def read(self) -> tuple[torch.Tensor, ...]:
        """All tokens of each tensor, as they lie."""
        return self._states

    save = read

    def load(self, states: tuple[torch.Tensor, ...], device: torch.device) -> None:
        """Takes over tensors that have been saved."""
        self._states, self._memory = tuple(tensor.to(device) for tensor in states), []

    def to(self, device: torch.device) -> None:
        """Moves the tensors to a device."""
        if self.device not in (None, torch.empty(0, device=device).device):
            self.load(self._states, device)

    def prefetch(self) -> None:
        """There is nothing to bring."""

    def fork(self) -> "DeviceStorage":
        """
        A second view of the same memory. What either appends is not seen by the other: the original goes on in place,
        the fork copies on its first append.
        """
        fork = DeviceStorage()
        fork._states, fork._reserved = self._states, self._reserved
        return fork


class HostStorage:
    """
    As [`DeviceStorage`], but in the host's memory (pinned, if the device is a CUDA device). Each read copies all
    tokens to the device. After `prefetch` the copy runs ahead of the read, on its own stream.

    The memory is made of blocks of `tokens_per_block` tokens, one token after another. So it never has to grow, what
    is copied is contiguous, and PyTorch's allocator, which rounds pinned memory up to a power of two, wastes little.
    """

    tokens_per_block = 4096

    def __init__(self):
        self.num_tokens = 0
        self.device: torch.device | None = None  # where they are read
        self._blocks: list[list[torch.Tensor]] = []  # of each tensor `(tokens_per_block, num_heads, size)`
        self._shares_last_block = False
        self._fetched: tuple[torch.Tensor, ...] | None = None

    @property
    def _is_pinned(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the last tensor, `None` before there is one."""
        return self._blocks[0][-1].dtype if self._blocks else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are held."""
        return sum(memory[0].nbytes for block in self._blocks[:1] for memory in block) * self.num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Does nothing: blocks are allocated as tokens come."""

    def append(self, states: tuple[torch.Tensor, ...]) -> None:
        """Writes `(1, num_heads, num_new_tokens, size)` of each tensor after what is there."""
        self.device = self.device or states[0].device
        self._write(tuple(new[0].transpose(0, 1).contiguous() for new in states))

    def _write(self, states: tuple[torch.Tensor, ...]) -> None:
        """Appends `(num_new_tokens, num_heads, size)` of each tensor."""
        self._fetched = None
        start, num_new_tokens = 0, len(states[0])
        while start < num_new_tokens:
            filled = self.num_tokens % self.tokens_per_block
            if filled == 0:
                self._blocks.append([self._new_block(new) for new in states])
            elif self._shares_last_block:
                self._wait()
                self._blocks[-1] = [self._new_block(memory).copy_(memory) for memory in self._blocks[-1]]
            self._shares_last_block = False
            length = min(self.tokens_per_block - filled, num_new_tokens - start)
            for memory, new in zip(self._blocks[-1], states):
                memory[filled : filled + length].copy_(new[start : start + length], non_blocking=self._is_pinned)
            start += length
            self.num_tokens += length

    def crop(self, num_tokens: int) -> None:
        """Drops all but the first tokens."""
        self._fetched = None
        self.num_tokens = num_tokens
        del self._blocks[-(-num_tokens // self.tokens_per_block) :]

    def select(self, indices: torch.Tensor) -> None:
        """Keeps some of the tokens, in blocks of their own: forks keep what they have."""
        self._wait()
        indices, blocks = indices.cpu(), self._blocks
        self._blocks, self.num_tokens, self._shares_last_block = [], 0, False
        for start, block in zip(itertools.count(step=self.tokens_per_block), blocks):
            kept = indices[(start <= indices) & (indices < start + self.tokens_per_block)] - start
            self._write(tuple(memory[kept] for memory in block))

    def _new_block(self, states: torch.Tensor) -> torch.Tensor:
        shape = (self.tokens_per_block, *states.shape[1:])
        with torch.inference_mode(False):  # or it could be written in inference mode alone
            return torch.empty(shape, dtype=states.dtype, pin_memory=self._is_pinned)

    def read(self) -> tuple[torch.Tensor, ...]:
        """All tokens of each tensor, on the device. Nothing is kept of them there."""
        if self._fetched is None:
            return self._fetch()
        if self._is_pinned:
            torch.cuda.current_stream(self.device).wait_stream(copy_stream(self.device))
        fetched, self._fetched = self._fetched, None
        return fetched

    def prefetch(self) -> None:
        """Starts copying all tokens to the device, for the next `read`."""
        if self._fetched is not None or self.device is None:
            return
        if not self._is_pinned:
            self._fetched = self._fetch()
            return
        # What has been written is on its way to the host, and what has been read before may still be in use in memory
        # that is taken again.
        stream = copy_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._fetched = self._fetch()

    def _fetch(self) -> tuple[torch.Tensor, ...]:
        fetched = []
        for blocks in zip(*self._blocks):
            states = blocks[0].new_empty(self.num_tokens, *blocks[0].shape[1:], device=self.device)
            for piece, block in zip(states.split(self.tokens_per_block), blocks):
                piece.copy_(block[: len(piece)], non_blocking=self._is_pinned)
            fetched.append(states.transpose(0, 1)[None])
        return tuple(fetched)

    def save(self) -> tuple[torch.Tensor, ...]:
        """All tokens of each tensor, in the host's memory."""
        self._wait()
        return tuple(torch.cat(blocks)[: self.num_tokens].transpose(0, 1)[None] for blocks in zip(*self._blocks))

    def load(self, states: tuple[torch.Tensor, ...], device: torch.device) -> None:
        """Takes over tensors that have been saved, into an empty storage."""
        self.device = device
        self.append(states)

    def to(self, device: torch.device) -> None:
        """Lets the tensors be read on a device."""
        self._wait()
        self.device, self._fetched = device, None
        if self._is_pinned:
            self._blocks = [[m if m.is_pinned() else m.pin_memory() for m in block] for block in self._blocks]

    def _wait(self) -> None:
        # What the device writes to pinned memory is there once it has done so.
        if self._is_pinned:
            torch.cuda.synchronize(self.device)

    def fork(self) -> "HostStorage":
        """A second view of the same memory: a fork that appends copies no more than the last block."""
        fork = HostStorage()
        fork.num_tokens, fork.device, fork._blocks = self.num_tokens, self.device, list(self._blocks)
        fork._shares_last_block = True
        return fork


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies tensors between a CUDA device and the host while the device computes."""
    return torch.cuda.Stream(device)
