# SPDX-License-Identifier: Apache-2.0
"""Which frames the published evaluation scripts take of a video: others than its demo and its training do."""

import numpy as np

from ..video.patches import whole_patches
from ..video_processing_vamba import VambaVideoProcessor


def middle_indices(num_frames: int, total: int) -> np.ndarray:
    """
    The frame at the middle of each of `num_frames` equal intervals, the later of two; of a video that has no more, all
    frames. int64 of shape (frames,), ascending.
    """
    if num_frames >= total:
        return np.arange(total)
    bounds = np.linspace(0, total, num_frames + 1).astype(np.int64)
    return (bounds[:-1] + bounds[1:]) // 2


def repeated_indices(num_frames: int, total: int) -> np.ndarray:
    """
    As many frames as asked for of every video, as MVBench's own loader takes them: those of a shorter one come several
    times. int64 of shape (num_frames,), ascending.
    """
    step = (total - 1) / num_frames
    return (step / 2 + np.round(step * np.arange(num_frames))).astype(np.int64)


class EvaluationVideoProcessor(VambaVideoProcessor):
    """A [`VambaVideoProcessor`] that samples by number as the published evaluation scripts do."""

    def sample_frames(  # type: ignore[override]  # called with keywords alone
        self, metadata, num_frames=None, temporal_patch_size=None, **kwargs
    ) -> np.ndarray:
        if num_frames is None:
            return super().sample_frames(metadata, temporal_patch_size=temporal_patch_size, **kwargs)
        indices = middle_indices(num_frames, metadata.total_num_frames)
        return indices[: whole_patches(len(indices), temporal_patch_size or self.temporal_patch_size)]

    def read_repeated(self, video: str, num_frames: int) -> np.ndarray:
        """
        Decodes a video file and repeats its frames.

        Returns:
            `np.ndarray`: uint8 of shape (num_frames, height, width, 3).

        Raises:
            `FileNotFoundError`: for a path without a file.
            `ValueError`: for what cannot be read as a video.
        """

        def sample(metadata, **kwargs):
            return np.unique(repeated_indices(num_frames, metadata.total_num_frames))

        frames, metadata = self.fetch_videos(video, sample)
        indices = repeated_indices(num_frames, metadata.total_num_frames)
        return frames[np.searchsorted(metadata.frames_indices, indices)]
