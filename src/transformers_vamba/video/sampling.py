# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are taken: those in the middle of equal intervals, by number or by time."""

import numpy as np
from transformers.video_utils import VideoMetadata


SAMPLING = ("num_frames", "fps")  # a video is sampled by one of them


def replace_sampling(options: dict) -> dict:
    """The options of one video. Its `num_frames` or `fps` replaces both defaults, and asks for sampling."""
    is_sampled = any(options.get(name) is not None for name in SAMPLING)
    return {**dict.fromkeys(SAMPLING), "do_sample_frames": True, **options} if is_sampled else options


def choose_middles(
    metadata: VideoMetadata, num_frames: int | None, fps: float | None, min_frames: int, max_frames: int
) -> np.ndarray:
    """
    The frames in the middle of each of N equal intervals.

    Args:
        metadata (`VideoMetadata`):
            With `total_num_frames`, with `fps` if that is asked for, and perhaps with `frame_times` in seconds, by
            which the frames are chosen then.
        num_frames (`int`, *optional*): N; by default all frames.
        fps (`float`, *optional*): Instead of `num_frames`: the intervals are `1 / fps` seconds long.
        min_frames (`int`), max_frames (`int`): Bounds of N. If `fps` would pass one, the bound is N.

    Returns:
        `np.ndarray`: int64 of shape (N,), ascending.
    """
    total, times = metadata.total_num_frames, getattr(metadata, "frame_times", None)
    indices = None
    if fps is not None:
        indices = middles_by_rate(total, metadata.fps, fps) if times is None else nearest_to_middles(times, fps)
        num_frames = max(len(indices), 1)
    elif num_frames is None:
        num_frames = total
    bounded = int(min(max(num_frames, min_frames), max_frames, total))
    if indices is not None and bounded == len(indices):
        return indices
    if times is not None:
        return spread_in_time(times, bounded)
    bounds = np.linspace(0, total, bounded + 1).astype(np.int64)
    return (bounds[:-1] + bounds[1:] - 1) // 2


def middles_by_rate(total: int, frame_rate: float, fps: float) -> np.ndarray:
    """The frames in the middles of intervals of `1 / fps` seconds, of `total` frames at a constant rate."""
    step = max(frame_rate / fps, 1)
    # To the nearest frame; a tie to the one before, so that a rate equal to the video's takes every frame.
    middles = np.ceil((np.arange(int(np.ceil(total / step))) + 0.5) * step - 0.5)
    return np.unique(middles[middles < total].astype(np.int64))


def nearest_to_middles(times: np.ndarray, fps: float) -> np.ndarray:
    """
    The frames that are nearest to the middles of intervals of `1 / fps` seconds, each of them once.

    Args:
        times (`np.ndarray`): float64 of shape (frames,), ascending from 0, in seconds.
    """
    end = times[-1] + times[-1] / max(len(times) - 1, 1)
    ends = (times + np.append(times[1:], end)) / 2  # up to here no other frame is nearer
    num_passed = np.floor(ends * fps + 0.5)
    return np.flatnonzero(np.diff(num_passed, prepend=0))


def spread_in_time(times: np.ndarray, num_frames: int) -> np.ndarray:
    """The frames that are nearest to the middles of `num_frames` equal intervals, no frame twice."""
    end = times[-1] + times[-1] / max(len(times) - 1, 1)
    middles = (np.arange(num_frames) + 0.5) * end / num_frames
    nearest = np.searchsorted((times[1:] + times[:-1]) / 2, middles)
    numbers = np.arange(num_frames)
    ascending = np.maximum.accumulate(nearest - numbers) + numbers
    return np.minimum(ascending, len(times) - num_frames + numbers)
