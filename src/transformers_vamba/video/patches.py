# SPDX-License-Identifier: Apache-2.0
"""Frames cut into the patches of the vision tower."""

import math

import numpy as np
import torch


def whole_patches(num_frames: int, temporal_patch_size: int) -> int:
    """Number of frames left when those that fill no temporal patch are dropped, unless there is no whole patch."""
    return max(num_frames - num_frames % temporal_patch_size, min(num_frames, temporal_patch_size))


def patchify(frames: torch.Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> torch.Tensor:
    """
    Frames as patches in Qwen2-VL's order, which nothing has copied yet.

    Args:
        frames (`torch.Tensor`):
            Of shape (frames, channels, height, width). The last one is repeated to fill a temporal patch.

    Returns:
        `torch.Tensor`: a view of shape (temporal patches, rows of merged patches, columns of these, rows of patches in
        them, columns of these, channels, temporal_patch_size, patch_size, patch_size).
    """
    if missing := -len(frames) % temporal_patch_size:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    frames = frames.unflatten(0, (-1, temporal_patch_size))
    frames = frames.unflatten(-2, (-1, merge_size, patch_size)).unflatten(-1, (-1, merge_size, patch_size))
    return frames.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)


def allocate(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An empty tensor of this shape. Raises a `MemoryError` if there is no room for it."""
    num_bytes = math.prod(shape) * like.element_size()
    try:
        if like.device.type == "cpu":  # NumPy asks for large pages, which are filled in a third of the time
            return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8)).view(like.dtype).view(shape)
        return like.new_empty(shape)
    except (MemoryError, RuntimeError) as error:
        raise MemoryError(f"{num_bytes / 2**30:.1f} GiB for {'x'.join(map(str, shape))} values") from error


def put_frame(frames: torch.Tensor, row: int, frame: torch.Tensor):
    """`frames[row] = frame`, in one thread if frames are decoded: PyTorch's wait on cores that the decoders need."""
    if frame.dtype == torch.uint8 and frame.device.type == "cpu":
        np.copyto(frames[row].numpy(), frame.numpy())
    else:
        frames[row] = frame
