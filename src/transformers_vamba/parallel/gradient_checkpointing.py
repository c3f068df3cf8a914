# SPDX-License-Identifier: Apache-2.0
"""
Gradient checkpointing of two streams. What a layer keeps is dominated by its video, so it is not computed again as a
whole but in parts, the text's half and the mixer by stretches of video: only one part's activations exist at a time,
whatever the length of the video. What is kept, the layers' inputs, may wait in host memory.
"""

import functools
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..cache.storage import copy_stream


# Tokens of the video that a mixer computes again at a time: enough to fill a GPU, some 3 GiB at the shapes of the 7B.
MAX_TOKENS_PER_PART = 2**14


def run_in_parts(function: Callable, *args):
    """In the place of the function that checkpoints a whole layer, for a layer that checkpoints its parts itself."""
    return function(*args)


class CheckpointingMixin(PreTrainedModel):
    """What a model makes of the arguments of `activation_checkpointing_enable`, see [`resolve_checkpointing`]."""

    # Transformers 5.24 has a new name, and calls the method by its old one if a class defines that.
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        @functools.wraps(PreTrainedModel.activation_checkpointing_enable)
        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
        ):
            kwargs, offload = offload_beside(activation_checkpointing_kwargs, offload)
            super().activation_checkpointing_enable(kwargs, every_n_layers, offload)

    else:

        @functools.wraps(PreTrainedModel.gradient_checkpointing_enable)
        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs=None, every_n_layers: int = 1, offload: bool = False
        ):
            kwargs, offload = offload_beside(gradient_checkpointing_kwargs, offload)
            super().gradient_checkpointing_enable(kwargs, every_n_layers, offload)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As of Transformers, which warns of this name since 5.24. PEFT and TRL still ask by it."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = checkpoint,
        every_n_layers: int = 1,
    ):
        function, layers_per_checkpoint = resolve_checkpointing(gradient_checkpointing_func, every_n_layers)
        super()._set_gradient_checkpointing(enable, function, every_n_layers)
        for module in self.modules():
            if hasattr(module, "layers_per_checkpoint"):  # the decoder
                module.layers_per_checkpoint = layers_per_checkpoint if enable else 1
            elif hasattr(module, "checkpoint_in_parts"):  # its layers
                module.checkpoint_in_parts(function if enable else None, layers_per_checkpoint)


def offload_beside(checkpointing_kwargs: dict | None, offload: bool) -> tuple[dict, bool]:
    """
    Puts `offload=True` among the arguments of the checkpoint, for [`resolve_checkpointing`]: Transformers' own way
    copies in line with the computation. Only reentrant checkpoints take that.
    """
    kwargs = {"use_reentrant": False} if checkpointing_kwargs is None else checkpointing_kwargs
    if offload and not kwargs.get("use_reentrant", False):
        return {**kwargs, "offload": True}, False
    return kwargs, offload


def resolve_checkpointing(gradient_checkpointing_func: Callable, every_n_layers: int) -> tuple[partial, int]:
    """
    What Transformers' `activation_checkpointing_enable` has made of its arguments. Those of the checkpoint, which a
    `Trainer` takes as `activation_checkpointing_kwargs`, may hold `layers_per_checkpoint` and `offload` as well:
    `offload=True` copies beside the computation.

    Returns:
        `tuple[partial, int]`: The checkpointing function, and the number of layers for which one input is kept.

    Raises:
        ValueError: for a `layers_per_checkpoint` that is no positive integer, or what cannot be combined.
    """
    function = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func)
    kwargs = {"use_reentrant": False, **getattr(gradient_checkpointing_func, "keywords", {})}
    layers_per_checkpoint = kwargs.pop("layers_per_checkpoint", 1)
    if not isinstance(layers_per_checkpoint, int) or layers_per_checkpoint < 1:
        raise ValueError(f"`layers_per_checkpoint` must be an integer of at least 1, got {layers_per_checkpoint!r}.")
    if layers_per_checkpoint > 1 and (every_n_layers > 1 or kwargs["use_reentrant"]):
        raise ValueError(
            f"`layers_per_checkpoint={layers_per_checkpoint}` needs `use_reentrant=False` and `every_n_layers=1`, got "
            f"`use_reentrant={kwargs['use_reentrant']}` and `every_n_layers={every_n_layers}`."
        )
    offload = kwargs.pop("offload", False)
    if offload and kwargs["use_reentrant"]:
        raise ValueError("`offload=True` among the `gradient_checkpointing_kwargs` needs `use_reentrant=False`.")
    if offload:
        function = OffloadedCheckpoint()
    return partial(function, **kwargs), layers_per_checkpoint


def plain_checkpoint(gradient_checkpointing_func: partial) -> partial:
    """The checkpointing function with inputs that stay where they are."""
    if not isinstance(gradient_checkpointing_func.func, OffloadedCheckpoint):
        return gradient_checkpointing_func
    return partial(checkpoint, **gradient_checkpointing_func.keywords)


class OffloadedCheckpoint:
    """
    `torch.utils.checkpoint.checkpoint` whose inputs are kept in (pinned) host memory. Copies run beside the
    computation: out while the layer runs, and back one checkpoint ahead of the backward pass. Inputs that share a
    storage, as the stretches of a video do, are copied once. Small ones stay.
    """

    min_bytes = 2**20

    def __init__(self):
        # By the address of the storage that they are a copy of.
        self._copies: weakref.WeakValueDictionary[int, HostCopy] = weakref.WeakValueDictionary()
        self._last_copy: Callable[[], HostCopy | None] = lambda: None

    def __call__(self, function: Callable, *args, **kwargs):
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, **kwargs)

    def _pack(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.min_bytes or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return tensor.detach()
        host_copy = self._copies.get(storage.data_ptr())
        # Another storage may have come to lie at the address of one that is gone.
        if host_copy is None or not host_copy.is_of(tensor):
            host_copy = self._copies[storage.data_ptr()] = HostCopy(tensor, self._last_copy())
            self._last_copy = weakref.ref(host_copy)
        host_copy.num_readers += 1
        return host_copy, tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        host_copy, *view = packed
        return host_copy.read().as_strided(*view)


class HostCopy:
    """
    A copy of a tensor's storage in host memory.

    Args:
        tensor (`torch.Tensor`): The tensor.
        previous ([`HostCopy`], *optional*): The copy made before, which will be read after this one.
    """

    # Pinned memory comes in powers of two.
    _PIECE_BYTES = 2**26

    def __init__(self, tensor: torch.Tensor, previous: "HostCopy | None"):
        self.num_readers = 0
        self._previous = weakref.ref(previous) if previous is not None else lambda: None
        self._storage, self._version = StorageWeakRef(tensor.untyped_storage()), tensor._version
        self._dtype, self._device = tensor.dtype, tensor.device
        self._stream = copy_stream(tensor.device) if tensor.is_cuda else None
        self._on_device: torch.Tensor | None = None
        flat = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        self._pieces = [
            torch.empty(piece.shape, dtype=piece.dtype, pin_memory=self._stream is not None)
            for piece in flat.split(self._PIECE_BYTES // tensor.itemsize)
        ]
        self._copy(zip(self._pieces, flat.split(self._PIECE_BYTES // tensor.itemsize)), flat)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether this is a copy of what the tensor's storage holds now, read as its dtype."""
        return not self._storage.expired() and (self._version, self._dtype) == (tensor._version, tensor.dtype)

    def read(self) -> torch.Tensor:
        """The whole storage, back on its device; and begins to bring the copy that is read next."""
        flat = self._bring()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._is_back)
        self.num_readers -= 1
        if self.num_readers <= 0:
            self._on_device = None
        if (previous := self._previous()) is not None:
            previous._bring()
        return flat

    def _bring(self) -> torch.Tensor:
        if self._on_device is not None:
            return self._on_device
        num_elements = sum(len(piece) for piece in self._pieces)
        flat = self._on_device = torch.empty(num_elements, dtype=self._dtype, device=self._device)
        self._copy(zip(flat.split(self._PIECE_BYTES // self._dtype.itemsize), self._pieces), flat)
        if self._stream is not None:
            self._is_back = self._stream.record_event()
        return flat

    def _copy(self, pieces, on_device: torch.Tensor) -> None:
        """Copies sources into targets, on a CUDA device in the order of the stream for copies."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            on_device.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
