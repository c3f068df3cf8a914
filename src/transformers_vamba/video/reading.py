# SPDX-License-Identifier: Apache-2.0
"""The forms in which a video may be given, and its frames from a file, by PyAV."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import BinaryIO
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import PIL.Image
import torch
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata, is_valid_video_frame


# FFmpeg's formats that name further files or URLs. Reading a video must not open those, and the list of a live
# broadcast waits for more of them forever.
PLAYLIST_FORMATS = {"concat", "dash", "hls", "imf", "sdp", "vobsub"}


def is_frame_list(video) -> bool:
    """Whether `video` is a non-empty list of frames: PIL images or three-dimensional arrays."""
    return isinstance(video, (list, tuple)) and len(video) > 0 and all(is_valid_video_frame(frame) for frame in video)


def normalize_video(video) -> str | np.ndarray | torch.Tensor:
    """
    Brings one video into one of two forms.

    Args:
        video:
            A path, a URL, a list of frames (PIL images, arrays of shape (height, width, channels) or (channels,
            height, width), or paths or URLs of images), one such frame, or an array of shape (frames, height, width,
            channels) or (frames, channels, height, width).

    Returns:
        `str`, `np.ndarray` or `torch.Tensor`: the path or URL, or a four-dimensional array.

    Raises:
        `ValueError`: for anything else, and for frames of different sizes.
    """
    if isinstance(video, (str, os.PathLike)):
        return os.fspath(video)
    if getattr(video, "ndim", None) == 4:
        return video
    if isinstance(video, (list, tuple)) and video and all(isinstance(frame, (str, os.PathLike)) for frame in video):
        video = [load_image(os.fspath(frame)) for frame in video]
    if is_valid_video_frame(video):
        video = [video]
    if not is_frame_list(video):
        form = f"an array of shape {tuple(video.shape)}" if hasattr(video, "shape") else f"{type(video)}"
        raise ValueError(
            "A video must be a path, a URL, a list of frames or an array of shape (frames, height, width, channels) "
            f"or (frames, channels, height, width), got {form}."
        )
    frames = [np.asarray(frame.convert("RGB")) if isinstance(frame, PIL.Image.Image) else frame for frame in video]
    shapes = sorted({tuple(frame.shape) for frame in frames})
    if len(shapes) > 1:
        raise ValueError(f"The frames of a video must have one shape, got {shapes}.")
    if all(isinstance(frame, torch.Tensor) for frame in frames):
        return torch.stack(frames)
    return np.stack(frames)


def normalize_videos(videos) -> list:
    """
    Brings videos into a list with an entry for each video, or for each batch row a list of videos, as they were given.

    Args:
        videos:
            One video in any form that [`normalize_video`] takes, a list or five-dimensional array of videos, or a
            list with a list of videos for each batch row. Frames given as paths need the last form: a list of paths
            elsewhere is a list of videos.

    Returns:
        `list`: strings and four-dimensional arrays, or lists of these.
    """
    if getattr(videos, "ndim", None) == 5:
        videos = list(videos)
    elif not isinstance(videos, (list, tuple)) or is_frame_list(videos):
        videos = [videos]
    return [
        [normalize_video(video) for video in item]
        if isinstance(item, (list, tuple)) and not is_frame_list(item)
        else normalize_video(item)
        for item in videos
    ]


def check_frame_files(videos, do_sample_frames: bool | None) -> None:
    """Raises a `ValueError` where sampling is asked for of a list of image files: those have been sampled before."""
    rows = [row for row in videos if isinstance(row, (list, tuple))] if isinstance(videos, (list, tuple)) else []
    has_frame_files = any(
        isinstance(video, (list, tuple)) and len(video) and isinstance(video[0], str) for row in rows for video in row
    )
    if do_sample_frames and has_frame_files:
        raise ValueError("Sampling frames from a list of images is not supported! Set `do_sample_frames=False`.")


def flatten_videos(videos: list) -> list[str | np.ndarray | torch.Tensor]:
    """Drops the row structure of what [`normalize_videos`] returns."""
    return [video for item in videos for video in (item if isinstance(item, list) else [item])]


def open_video(file: BinaryIO):
    """
    Opens the container of a video with PyAV, without reaching for anything but `file` itself.

    Args:
        file (`BinaryIO`):
            The file, at any position if it can be sought. Given as a path, a name such as `talk:1.mp4` would pass for
            a URL.

    Returns:
        `av.container.InputContainer`: the container, which has a video stream that can be decoded.

    Raises:
        `ValueError`: when it has none.
    """
    import av

    if file.seekable():
        file.seek(0)
    options = {
        "format_whitelist": ",".join(sorted(av.formats_available - PLAYLIST_FORMATS)),
        "protocol_whitelist": "none",
    }
    try:
        # A title that is not UTF-8 is no reason to refuse the video.
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.EINVAL:
            raise ValueError("it is no video, or a playlist that names further files") from error
        raise
    if not container.streams.video or container.streams.video[0].codec_context is None:
        container.close()
        raise ValueError("it has no video stream of a known codec")
    # Several frames at a time, where the codec allows it. With PyAV's logging on, a thread that logs an error and the
    # one that waits for it would wait for one another.
    if av.logging.get_level() is None:
        container.streams.video[0].thread_type = "AUTO"
    return container


def count_frames(file: BinaryIO) -> tuple[int, int]:
    """
    Counts the frames that decoding the first video stream of a file gives, without decoding it.

    Many containers (Matroska, fragmented MP4) do not state the number, and an MP4 edit list hides frames it states.

    Returns:
        `tuple[int, int]`: the frames that are there, and those that the container lists but that are not in the file,
        as in a truncated file.
    """
    found = hidden = 0
    with open_video(file) as container:
        stated = container.streams.video[0].frames
        for packet in container.demux(video=0):
            if packet.size and not packet.is_corrupt:
                found += 1
                hidden += packet.is_discard
    return found - hidden, max(stated - found, 0)


def truncation_error(num_frames: int, num_missing: int) -> ValueError:
    return ValueError(f"only {num_frames} of its {num_frames + num_missing} frames are there, the file is truncated")


def describe_stream(stream, num_frames: int | None) -> VideoMetadata:
    """What is known of the frames of a PyAV video stream."""
    fps = float(stream.average_rate) if stream.average_rate else None
    return VideoMetadata(
        total_num_frames=num_frames,
        fps=fps,
        duration=num_frames / fps if fps and num_frames else None,
        video_backend="pyav",
        height=stream.height,
        width=stream.width,
    )


def pick_frames(frames: Iterable, indices: np.ndarray) -> Iterator:
    """The frames at these indices, which ascend. Raises a `ValueError` where there are not so many."""
    numbered = enumerate(frames)
    for row, index in enumerate(indices):
        frame = next((frame for i, frame in numbered if i == index), None)
        if frame is None:
            raise ValueError(f"only {row} of {len(indices)} sampled frames could be decoded")
        yield frame


def to_arrays(frames: Iterable) -> Iterator[np.ndarray]:
    """
    PyAV's frames as arrays, uint8 of shape (height, width, 3), upright: a phone held upright films sideways, and notes
    the turn that a player has to make. Raises a `ValueError` where the size changes.
    """
    first_shape = None
    for row, frame in enumerate(frames):
        array = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        first_shape = first_shape or array.shape
        if array.shape != first_shape:
            raise ValueError(f"sampled frame {row} is of shape {array.shape}, the first is of shape {first_shape}")
        yield array


def stack_frames(arrays: Iterator[np.ndarray], num_frames: int) -> np.ndarray | None:
    """The next frames, at most `num_frames`: uint8 of shape (frames, height, width, 3), `None` where none is left."""
    video, length = None, 0
    for length, array in zip(range(1, num_frames + 1), arrays):
        if video is None:
            # All at once, so that too large a video is refused before it fills the memory.
            video = np.empty((num_frames, *array.shape), dtype=np.uint8)
        video[length - 1] = array
    return video if length == num_frames or video is None else video[:length].copy()


def read_video(file: BinaryIO, sample_indices_fn=None) -> tuple[np.ndarray, VideoMetadata]:
    """
    Decodes frames of the first video stream of a file.

    Args:
        file (`BinaryIO`):
            The file.
        sample_indices_fn (`Callable`, *optional*):
            Gives the frames to decode, in ascending order, from the metadata. All of them, by default.

    Returns:
        `tuple[np.ndarray, VideoMetadata]`: the frames, uint8 of shape (frames, height, width, 3), and what is known of
        the video.

    Raises:
        `ValueError`: when a frame is missing or of another size than the first.
    """
    total, missing = count_frames(file)
    if missing:
        raise truncation_error(total, missing)
    if not total:
        raise ValueError("the video has no frames")
    with open_video(file) as container:
        stream = container.streams.video[0]
        metadata = describe_stream(stream, total)
        indices = np.arange(total) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
        metadata.frames_indices = indices
        arrays = to_arrays(pick_frames(container.decode(stream), indices))
        video = stack_frames(arrays, len(indices))
    return video, metadata


def is_remote(source: str) -> bool:
    return source.partition("://")[0].lower() in ("http", "https")


def local_path(source: str) -> str:
    """The path that a path or `file://` URL means."""
    return url2pathname(urlparse(source).path) if source.lower().startswith("file://") else source


def absence_error(source) -> FileNotFoundError:
    """What to raise for a path without a file that could be a video."""
    return FileNotFoundError(f"Expected the path or the file, http or https URL of a video, got {source!r}.")


@contextmanager
def errors_of(source):
    """Turns the errors of reading `source` into a `ValueError` that names it."""
    import av

    try:
        yield
    except (av.FFmpegError, HTTPException, MemoryError, OSError, ValueError) as error:
        raise ValueError(f"Could not read {source!r} as a video: {error}") from error
