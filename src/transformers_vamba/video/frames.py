# SPDX-License-Identifier: Apache-2.0
"""Videos that are given as frames: arrays of every layout, lists and folders of images, decoders of other packages."""

import os
import re
from collections.abc import Callable, Generator, Sequence

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_utils import ChannelDimension
from transformers.video_utils import VideoMetadata

from .download import SourceLimits
from .sources import describe_source, errors_of, open_source, plain_source


CHANNELS = (3, 1, 4)  # RGB, grey, RGB with transparency: the first is taken of two dimensions that may be it
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
DECODED_AT_ONCE = 16  # frames that are asked of another package's decoder in one call


def is_array(video) -> bool:
    return isinstance(video, (np.ndarray, torch.Tensor))


def is_frame(frame) -> bool:
    """Whether `frame` is one frame: a PIL image, or an array of shape (height, width) or one that has channels."""
    if not is_array(frame):
        return isinstance(frame, PIL.Image.Image)
    return frame.ndim == 2 or frame.ndim == 3 and (frame.shape[-1] in CHANNELS or frame.shape[0] in CHANNELS)


def is_frame_list(video) -> bool:
    """Whether `video` is a non-empty list of frames."""
    return isinstance(video, (list, tuple)) and len(video) > 0 and all(is_frame(frame) for frame in video)


def is_of(video, *classes: type) -> bool:
    """
    Whether `video` is an instance of one of the classes, by their names: as the Hub's remote code, this module is
    loaded once for each configuration that names the code, and what one copy has made is given to another.
    """
    names = {each.__name__ for each in classes}
    return any(base.__name__ in names for base in type(video).__mro__)


class Frames:
    """
    One video as frames that can be read.

    Args:
        metadata (`VideoMetadata`): What is known of it. Its `height` and `width` are those of the frames.
        failure (`ValueError`, *optional*): What to raise after the last frame that is there.
    """

    def __init__(self, metadata: VideoMetadata, failure: ValueError | None = None):
        self.metadata, self.failure = metadata, failure

    def read(self, indices: np.ndarray, transform: Callable) -> Generator[torch.Tensor]:
        """
        Gives `transform(frame)` for each of these frames, in order.

        Args:
            indices (`np.ndarray`): int64 of shape (frames,), ascending.
            transform (`Callable`): Takes an array or a tensor of shape (height, width, channels).
        """
        raise NotImplementedError


class ArrayFrames(Frames):
    """
    Frames in memory.

    Args:
        array (`np.ndarray` or `torch.Tensor`):
            Of shape (frames, height, width), (frames, height, width, channels) or (frames, channels, height, width).
        channels_last (`bool`, *optional*): Which of the last two it is. Inferred by default.
    """

    def __init__(self, array, channels_last: bool | None = None):
        self.given = array
        if array.ndim == 3:
            array, channels_last = array[..., None], True
        if channels_last is None:
            first, last = (CHANNELS.index(n) if n in CHANNELS else None for n in (array.shape[1], array.shape[-1]))
            if first is None and last is None:
                raise ValueError(
                    "The frames of a video need a dimension of 1, 3 or 4 channels, the second or the last, got an "
                    f"array of shape {tuple(array.shape)}."
                )
            channels_last = first is None or last is not None and last < first
        if not channels_last:
            array = array.movedim(1, -1) if isinstance(array, torch.Tensor) else np.moveaxis(array, 1, -1)
        self.array = array
        num_frames, height, width, _ = array.shape
        super().__init__(
            VideoMetadata(
                total_num_frames=num_frames, frames_indices=list(range(num_frames)), height=height, width=width
            )
        )

    def in_layout(self, input_data_format: str | ChannelDimension | None) -> "ArrayFrames":
        """The same array, with the channels on the axis that the caller names."""
        if input_data_format is None or self.given.ndim == 3:
            return self
        return ArrayFrames(self.given, ChannelDimension(input_data_format) == ChannelDimension.LAST)

    def scale(self) -> float:
        """
        What to multiply by to have levels of 0 to 255: 255 for floats between 0 and 1, as `torchvision` makes them,
        and for booleans.

        Raises:
            `ValueError`: for other levels, such as those of floats that have been normalized already.
        """
        dtype = str(self.array.dtype).removeprefix("torch.")
        if dtype in ("uint8", "bool") or 0 in self.array.shape:
            return 255.0 if dtype == "bool" else 1.0
        least, most = float(self.array.min()), float(self.array.max())
        if not (0 <= least and most <= 255):
            raise ValueError(
                f"Frames must have levels between 0 and 255, or floats between 0 and 1, got {dtype} from {least:g} to "
                f"{most:g}. Pass `do_rescale=False`, and `do_normalize=False` if they have been normalized already."
            )
        return 255.0 if most <= 1 and "float" in dtype else 1.0

    def read(self, indices, transform):
        return (transform(self.array[index]) for index in indices)


class ImageFrames(Frames):
    """
    Frames in one file each, or images, which are opened one at a time.

    Args:
        images (`Sequence`): PIL images, or paths, URLs or bytes of images, all of one size.
        limits ([`SourceLimits`]): What may be opened.
    """

    def __init__(self, images: Sequence, limits: SourceLimits):
        self.images, self.limits = images, limits
        height, width, _ = self.load(0).shape
        super().__init__(
            VideoMetadata(
                total_num_frames=len(images), frames_indices=list(range(len(images))), height=height, width=width
            )
        )

    def load(self, index: int) -> np.ndarray:
        image = self.images[index]
        if not isinstance(image, PIL.Image.Image):
            image = plain_source(image)
            with errors_of(image), open_source(image, self.limits) as file:
                image = PIL.ImageOps.exif_transpose(PIL.Image.open(file))
                image.load()
        return np.asarray(image.convert("RGB"))

    def read(self, indices, transform):
        expected = (self.metadata.height, self.metadata.width, 3)
        for index in indices:
            frame = self.load(index)
            if frame.shape != expected:
                raise ValueError(f"The frames of a video must have one shape, got {frame.shape} after {expected}.")
            yield transform(frame)


class DecoderFrames(Frames):
    """
    Frames of a decoder of another package, such as torchcodec's `VideoDecoder`.

    Args:
        decoder: Has `get_frames_at(indices)`, which gives `data` of shape (frames, channels, height, width) or
            (frames, height, width, channels), and a length or a `metadata` that tells the number of frames.
    """

    def __init__(self, decoder):
        self.decoder = decoder
        known = getattr(decoder, "metadata", None)
        num_frames = len(decoder) if hasattr(decoder, "__len__") else getattr(known, "num_frames", None)
        if not num_frames:
            raise ValueError(f"{describe_source(decoder)} has no frames, or does not tell how many.")
        _, height, width, _ = self.decode([0]).shape
        fps = getattr(known, "average_fps", None)
        super().__init__(
            VideoMetadata(
                total_num_frames=num_frames,
                fps=fps,
                duration=num_frames / fps if fps else None,
                video_backend=type(decoder).__module__.partition(".")[0],
                height=height,
                width=width,
            )
        )

    def decode(self, indices: list[int]) -> torch.Tensor:
        data = self.decoder.get_frames_at(indices=indices)
        data = torch.as_tensor(getattr(data, "data", data))
        return data if data.shape[-1] in CHANNELS and data.shape[1] not in CHANNELS else data.movedim(1, -1)

    def read(self, indices, transform):
        for start in range(0, len(indices), DECODED_AT_ONCE):
            yield from map(transform, self.decode([int(i) for i in indices[start : start + DECODED_AT_ONCE]]))


def image_files(folder: str) -> list[str]:
    """The images in a folder, in the order of the numbers in their names."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES)]
    parts = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in names}
    return [os.path.join(folder, name) for name in sorted(names, key=parts.__getitem__)]
