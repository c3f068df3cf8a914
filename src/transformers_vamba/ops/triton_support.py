# SPDX-License-Identifier: Apache-2.0
"""Triton, if it is installed and works: what it runs on, and how its kernels are launched, or compiled beforehand."""

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
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

MAX_COMPILERS = 8  # threads; much of the work of a compiler is done without Python's lock
_compilations: dict = {}  # futures by kernel, of those that are compiled ahead and not launched yet


@contextmanager
def compiled_launches(device: torch.device) -> Iterator[None]:
    """
    In this thread tensors on the meta device, which hold nothing, stand for those of a GPU: what would be launched for
    them is compiled instead, several kernels at once, in threads that nobody has to wait for.
    """
    _thread.compiles_for = device
    _thread.pool = ThreadPoolExecutor(min(MAX_COMPILERS, os.cpu_count() or 1), "compiles-kernels")
    try:
        yield
    finally:
        _thread.pool.shutdown(wait=False)
        _thread.compiles_for = _thread.pool = None


def real_device(device: torch.device) -> torch.device:
    """The device that this one stands for."""
    return (getattr(_thread, "compiles_for", None) or device) if device.type == "meta" else device


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """`kernel[grid](*args, **constants)`, or what [`compiled_launches`] makes of it."""
    if not torch.compiler.is_compiling():
        if (device := getattr(_thread, "compiles_for", None)) is not None:
            compilation = _thread.pool.submit(_compile, device, kernel, args, constants)
            _compilations.setdefault(kernel, []).append(compilation)
            return
        if _compilations and (compilations := _compilations.pop(kernel, None)):
            wait(compilations)  # instead of doing the same
    kernel[grid](*args, **constants)


def _compile(device: torch.device, kernel, args: tuple, constants: dict) -> None:
    with torch.cuda.device(device):
        compiled = kernel.warmup(*args, grid=(1,), **constants)
        _ = compiled.run  # which loads the kernel, and in some versions builds its launcher


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


def is_usable(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: a GPU, and a C compiler, with which Triton builds what launches."""
    # What is only compiled need not wait for a first launch, nor run.
    return triton is not None if real_device(device) != device else _is_usable(device)


@functools.cache
def _is_usable(device: torch.device) -> bool:
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


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on this device."""
    return _shared_memory(real_device(device))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**16
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def num_processors(device: torch.device) -> int:
    """Multiprocessors of this device, each of which runs a program at a time, or a few."""
    device = real_device(device)
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


if triton is not None:

    @triton.jit
    def _do_nothing(ptr):
        tl.store(ptr, 0.0)
