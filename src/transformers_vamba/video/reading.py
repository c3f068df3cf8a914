# SPDX-License-Identifier: Apache-2.0
"""Videos in every form, brought to frames that can be read."""

import logging
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch

from .container import count_missing_bytes
from .decoding import decode_in_parallel
from .download import SourceLimits
from .frames import (
    ArrayFrames,
    DecoderFrames,
    Frames,
    ImageFrames,
    image_files,
    is_array,
    is_frame,
    is_frame_list,
    is_of,
)
from .index import build_index, truncation_error
from .sources import (
    FileView,
    check_exists,
    describe_source,
    errors_of,
    file_kind,
    is_data_url,
    is_file,
    is_remote,
    local_path,
    open_source,
    plain_source,
)


logger = logging.getLogger(__name__)


class VideoWithOptions:
    """
    A video, and arguments of the video processor for it alone, as parts of a message give them. No dataclass:
    Transformers makes dictionaries of those that stand in messages.
    """

    def __init__(self, video, options: dict):
        self.video, self.options = video, options


class ImageFiles(tuple):
    """Paths of the frames of one video."""


def normalize_video(video):
    """
    Brings one video into a form that [`open_frames`] takes.

    Args:
        video:
            An encoded file (a path, a `file://`, http, https or `data:` URL, bytes, an open binary file, or a mapping
            of `bytes` and `path`); a folder of images; a list of frames (PIL images, arrays of shape (height, width),
            (height, width, channels) or (channels, height, width), or paths or URLs of images); one such frame; an
            array of shape (frames, height, width), (frames, height, width, channels) or (frames, channels, height,
            width); or a decoder that has `get_frames_at`, such as torchcodec's `VideoDecoder`.

    Raises:
        `ValueError`: for anything else, and for frames of different sizes.
    """
    if is_of(video, Frames, ImageFiles):
        return video
    if is_of(video, VideoWithOptions):
        return VideoWithOptions(normalize_video(video.video), video.options)
    if hasattr(video, "get_frames_at"):
        encoded = getattr(video, "_hf_encoded", None)  # what `datasets` has made the decoder from
        return DecoderFrames(video) if encoded is None else normalize_video(encoded)
    if is_file(video):
        video = plain_source(video)
        if isinstance(video, str) and not is_remote(video) and not is_data_url(video):
            if file_kind(video) is stat.S_ISDIR and (images := image_files(local_path(video))):
                return ImageFiles(images)
        return video
    if isinstance(video, (list, tuple)) and video and all(map(is_file, video)):
        return ImageFiles(video)
    if is_array(video) and (video.ndim == 4 or video.ndim == 3 and not is_frame(video)):
        return ArrayFrames(video)
    if is_frame(video) and not (is_array(video) and video.ndim == 2):
        video = [video]
    if not is_frame_list(video):
        form = f"an array of shape {tuple(video.shape)}" if hasattr(video, "shape") else f"{type(video)}"
        raise ValueError(
            "A video must be a path, a URL, bytes, an open file, a list of frames or an array of shape (frames, "
            f"height, width, channels) or (frames, channels, height, width), got {form}."
        )
    is_image = isinstance(video[0], PIL.Image.Image)
    frames: list[Any] = [
        np.asarray(frame.convert("RGB")) if isinstance(frame, PIL.Image.Image) else frame for frame in video
    ]
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) > 1:
        raise ValueError(f"The frames of a video must have one shape, got {shapes}.")
    all_tensors = all(isinstance(frame, torch.Tensor) for frame in frames)
    return ArrayFrames(torch.stack(frames) if all_tensors else np.stack(frames), True if is_image else None)


def is_one_video(video) -> bool:
    """Whether `video` is one video rather than a list of them; a list of paths is a list of videos."""
    return not isinstance(video, (list, tuple)) or is_of(video, ImageFiles) or is_frame_list(video)


def normalize_videos(videos) -> list:
    """
    Brings videos into a list with an entry for each video, or for each batch row a list of videos, as they were given.

    Args:
        videos:
            One video in any form that [`normalize_video`] takes, a list or five-dimensional array of videos, or a
            list with a list of videos for each batch row. Frames given as paths need the last form: a list of paths
            elsewhere is a list of videos.

    Returns:
        `list`: what [`normalize_video`] gives, or lists of it.
    """
    if getattr(videos, "ndim", None) == 5:
        videos = list(videos)
    elif is_one_video(videos):
        videos = [videos]
    return [
        normalize_video(item) if is_one_video(item) else [normalize_video(video) for video in item] for item in videos
    ]


def check_frame_files(videos, do_sample_frames: bool | None) -> None:
    """Raises a `ValueError` if a list of image files is to be sampled: it has been sampled before."""
    rows = [row for row in videos if isinstance(row, (list, tuple))] if isinstance(videos, (list, tuple)) else []
    has_frame_files = any(
        isinstance(video, (list, tuple))
        and len(video)
        and isinstance(video[0], str)
        and not is_of(video, ImageFiles)  # checked before, or a folder
        for row in rows
        for video in row
    )
    if do_sample_frames and has_frame_files:
        raise ValueError("Sampling frames from a list of images is not supported! Set `do_sample_frames=False`.")


def flatten_videos(videos: list) -> list:
    """Drops the row structure of what [`normalize_videos`] returns."""
    return [video for item in videos for video in (item if isinstance(item, list) else [item])]


def check_video(video, limits: SourceLimits) -> None:
    """Raises a `FileNotFoundError` for a path without a file. Opens nothing."""
    if not is_of(video, Frames, ImageFiles):
        check_exists(video, limits)


@contextmanager
def open_frames(
    video,
    limits: SourceLimits,
    on_damage: str = "raise",
    input_data_format: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Frames]:
    """
    Opens what [`normalize_video`] returns.

    Args:
        video: The video.
        limits ([`SourceLimits`]): What may be opened.
        on_damage (`str`): `"raise"`, or `"skip"`: the frames that can be decoded are those of the video.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, of an array.
        stop (`Callable`): Whether reading is to end early.

    Raises:
        `FileNotFoundError`: for a path without a file.
        `ValueError`: for what cannot be read as a video.
    """
    if on_damage not in ("raise", "skip"):
        raise ValueError(f"`on_damage` must be 'raise' or 'skip', got {on_damage!r}.")
    if is_of(video, ArrayFrames):
        yield video.in_layout(input_data_format)
    elif is_of(video, Frames):
        yield video
    elif is_of(video, ImageFiles):
        yield ImageFrames(video, limits)
    else:
        check_exists(video, limits)
        with open_named_source(video, limits) as file:
            yield FileFrames(video, file, on_damage, stop)


@contextmanager
def open_named_source(video, limits: SourceLimits, live: bool = False) -> Iterator:
    """[`open_source`], whose errors name the source; those of its reader are left as they are."""
    source = open_source(video, limits, live)
    with errors_of(video):
        file = source.__enter__()
    try:
        yield file
    finally:
        source.__exit__(None, None, None)


class FileFrames(Frames):
    """
    The frames of an encoded file.

    Args:
        source: What its errors name.
        file (`BinaryIO`): The file, which can be sought.
        on_damage (`str`), stop (`Callable`): As in [`open_frames`].
    """

    def __init__(self, source, file, on_damage: str, stop: Callable[[], bool]):
        self.source, self.file, self.stop = source, FileView(file), stop
        with errors_of(source):
            index = self.index = build_index(self.file, on_damage == "skip")
            if num_missing := count_missing_bytes(self.file):
                logger.warning(
                    "%s: the file is truncated, %s bytes are missing at its end. Its %d frames are taken.",
                    describe_source(source),
                    f"{num_missing:,}",
                    index.metadata.total_num_frames,
                )
        for damage in index.damage:
            logger.warning("%s: %s", describe_source(source), damage)
        failure = None
        if index.num_missing:
            failure = truncation_error(index.metadata.total_num_frames - index.num_missing, index.num_missing)
        super().__init__(index.metadata, failure)

    def read(self, indices, transform):
        with errors_of(self.source):
            size = (self.metadata.height, self.metadata.width)
            expected = (*size, 3) if all(size) else None
            frames = decode_in_parallel(
                self.file, self.index, indices, lambda frame: (frame.shape, transform(frame)), self.stop
            )
            for row, (shape, frame) in enumerate(frames):
                expected = expected or shape
                if shape != expected:
                    raise ValueError(f"sampled frame {row} is of shape {shape}, the first is of shape {expected}")
                yield frame
