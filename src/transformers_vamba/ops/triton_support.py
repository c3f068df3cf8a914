# SPDX-License-Identifier: Apache-2.0
"""Triton, where it is installed and works."""

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:  # on machines without a GPU
    triton = tl = None


logger = logging.get_logger(__name__)

_thread = threading.local()


@contextmanager
def recorded_launches() -> Iterator[None]:
    """Around what this thread records as a graph, and the run before it that compiles its kernels."""
    _thread.is_recording = True
    try:
        yield
    finally:
        _thread.is_recording = False


def are_launches_recorded() -> bool:
    """
    Whether launches are recorded for a graph. Triton takes some 20 microseconds for a launch, and PyTorch 5: small
    kernels pay off only if they are launched once for many steps.
    """
    return not torch.compiler.is_compiling() and getattr(_thread, "is_recording", False)


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: a GPU, and a C compiler, with which Triton builds what launches."""
    if triton is None or device.type != "cuda":
        return False
    try:
        with torch.cuda.device(device):
            _do_nothing[(1,)](torch.empty(1, device=device))
    except Exception as error:
        logger.warning(f"Triton is installed but runs no kernel ({error}); the mixers take slower PyTorch instead.")
        return False
    return True


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """
    In this context Triton launches on the device of the tensor, which need not be the current one. As
    `torch.cuda.device_of`, which `torch.compile` cannot trace.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on this device."""
    if device.type != "cuda":
        return 2**16
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of this device, each of which runs a program at a time, or a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


if triton is not None:

    @triton.jit
    def _do_nothing(ptr):
        tl.store(ptr, 0.0)
