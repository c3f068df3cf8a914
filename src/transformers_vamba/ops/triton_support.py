# SPDX-License-Identifier: Apache-2.0
"""Triton, if it is installed and works."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:  # on machines without a GPU
    triton = tl = None


logger = logging.get_logger(__name__)


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


if triton is not None:

    @triton.jit
    def _do_nothing(ptr):
        tl.store(ptr, 0.0)
