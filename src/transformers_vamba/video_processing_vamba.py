# SPDX-License-Identifier: Apache-2.0
"""Video processor class for Vamba."""

import os
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor, smart_resize
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import requires_backends
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_metadata

from .video.reading import (
    absence_error,
    check_frame_files,
    errors_of,
    flatten_videos,
    is_remote,
    local_path,
    normalize_videos,
    read_video,
)


class VambaVideoProcessorKwargs(VideosKwargs, total=False):
    r"""
    min_pixels (`int`, *optional*, defaults to `56 * 56`):
        Least number of pixels of a frame after the last resize, to multiples of `patch_size * merge_size`.
    max_pixels (`int`, *optional*, defaults to `28 * 28 * 1280`):
        Greatest number of pixels of a frame after the last resize.
    patch_size (`int`, *optional*, defaults to 14):
        Edge of a patch of the vision encoder, in pixels.
    temporal_patch_size (`int`, *optional*, defaults to 2):
        Number of frames in a patch of the vision encoder.
    merge_size (`int`, *optional*, defaults to 2):
        Number of patches along each edge that become one token.
    min_frames (`int`, *optional*):
        Least number of frames to sample. The number of frames of the video still bounds it.
    max_frames (`int`, *optional*):
        Greatest number of frames to sample.
    max_patches (`int`, *optional*):
        Greatest number of patches of a whole video, which bounds its frames by their size: before they are brought to
        multiples of `patch_size * merge_size`, and counting `temporal_patch_size` frames once.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int | None
    max_frames: int | None
    max_patches: int | None


def whole_patches(num_frames: int, temporal_patch_size: int) -> int:
    """Number of frames left when those that fill no temporal patch are dropped, unless there is no whole patch."""
    return max(num_frames - num_frames % temporal_patch_size, min(num_frames, temporal_patch_size))


class VambaVideoProcessor(BaseVideoProcessor):
    r"""
    Constructs a Vamba video processor: samples frames, resizes them, and flattens them into patches as Qwen2-VL does.

    Frames are sampled by count (`num_frames`, the default) or by rate (`fps`, frames per second), one of the two;
    given in a call, either replaces the other's default. A frame that is longer than `size["longest_edge"]` pixels is
    shrunk to it and its aspect kept; then an edge below `size["shortest_edge"]` is raised to it; then both edges are
    brought to multiples of `patch_size * merge_size`, within `min_pixels` and `max_pixels`. Frames that fill no
    whole temporal patch at the end are dropped; a video of fewer frames than one temporal patch repeats its last one.
    Files and URLs are decoded with PyAV.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 256, "longest_edge": 640}
    min_pixels = 56 * 56
    max_pixels = 28 * 28 * 1280
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    patch_size = 14
    temporal_patch_size = 2
    merge_size = 2
    do_sample_frames = True
    num_frames = 128
    fps = None
    min_frames = None
    max_frames = None
    max_patches = None
    valid_kwargs = VambaVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    # How much of a video is resized and turned to float at a time: the rest stays as it was decoded until its turn.
    temporal_patches_per_step = 16

    patchify = Qwen2VLVideoProcessor.patchify

    def __init__(self, **kwargs: Unpack[VambaVideoProcessorKwargs]):
        kwargs = self.choose_sampling(kwargs)
        super().__init__(**kwargs)
        if kwargs.get("fps") is not None:
            self.num_frames = None

    @staticmethod
    def choose_sampling(kwargs: dict) -> dict:
        """Returns `kwargs` with `num_frames` set to `None` where `fps` is given, and the other way round."""
        given = [name for name in ("num_frames", "fps") if kwargs.get(name) is not None]
        bounds = ("min_frames", "max_frames", "max_patches")
        for name in given + [name for name in bounds if kwargs.get(name) is not None]:
            if not isinstance(kwargs[name], (int, float)) or kwargs[name] <= 0:
                raise ValueError(f"`{name}` must be a positive number, got {kwargs[name]!r}.")
        if len(given) == 2:
            raise ValueError(
                f"`num_frames` and `fps` are mutually exclusive, got num_frames={kwargs['num_frames']} and "
                f"fps={kwargs['fps']}: pass one of them, and `None` for the other where it was set before."
            )
        return {**kwargs, **{"num_frames": None, "fps": None, given[0]: kwargs[given[0]]}} if given else kwargs

    def preprocess(self, videos, **kwargs: Unpack[VambaVideoProcessorKwargs]) -> BatchFeature:
        """
        Samples, resizes and flattens videos.

        Args:
            videos:
                See [`normalize_videos`].
            **kwargs:
                Replacements for the attributes of the processor, for this call.

        Returns:
            `BatchFeature`: `pixel_values_videos`, float32 of shape (patches of all videos, channels *
            temporal_patch_size * patch_size * patch_size), and `video_grid_thw`, int64 of shape (videos, 3): temporal
            patches, patches along the height and along the width of each. With `return_metadata=True` also
            `video_metadata`, whose `frames_indices` are the sampled frames.

        Raises:
            `FileNotFoundError`: for a path without a file.
            `ValueError`: for what cannot be read as a video, has no frames, or is sampled in a way that it does not
                allow.
        """
        check_frame_files(videos, kwargs.get("do_sample_frames"))
        return super().preprocess(videos, **self.choose_sampling(kwargs))

    def sample_frames(
        self,
        metadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        max_patches: int | None = None,
        temporal_patch_size: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Chooses the middle frame of each of N equal intervals of a video, as the published code does.

        Args:
            metadata (`VideoMetadata`):
                Its `total_num_frames`, and with `fps` also its `fps`, are read.
            num_frames (`int`, *optional*):
                N, at most the number of frames of the video.
            fps (`int` or `float`, *optional*):
                Instead of `num_frames`: the intervals are `1 / fps` seconds long, the last one cut off where its
                middle lies behind the end. No frame is taken twice, and of the shortest video at least one.
            min_frames (`int`, *optional*), max_frames (`int`, *optional*):
                Bounds of N. Where `fps` would pass one, the bound is the N of equal intervals.
            max_patches (`int`, *optional*):
                A further bound, by the `height` and `width` of the video: N frames have at most so many patches, two
                frames (`temporal_patch_size`) counted once. As the published training chooses N.
            temporal_patch_size (`int`, *optional*):
                The sampled frames at the end that fill no whole temporal patch are left out.

        Returns:
            `np.ndarray`: int64 of shape (sampled frames,), ascending.
        """
        total = metadata.total_num_frames
        temporal_patch_size = temporal_patch_size or self.temporal_patch_size
        if not total:
            raise ValueError("the video has no frames")
        if max_patches is not None:
            num_patches = self._count_patches_of_frame(metadata, temporal_patch_size, **kwargs)
            max_frames = min(max_frames or total, max(max_patches // max(num_patches, 1), 1))
        indices = None
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    f"Sampling {fps} frames per second needs the frame rate of the video: pass `video_metadata` with "
                    "its `fps`, or use `num_frames`."
                )
            step = max(metadata.fps / fps, 1)
            # To the nearest frame; a tie to the one before, so that a rate equal to the video's takes every frame.
            middles = (np.arange(int(np.ceil(total / step))) + 0.5) * step
            indices = np.unique(np.ceil(middles - 0.5).astype(np.int64))
            indices = indices[indices < total]
            num_frames = max(len(indices), 1)
        elif num_frames is None:
            num_frames = total
        bounded = min(max(num_frames, min_frames or 1), max_frames or total, total)
        if indices is None or bounded != len(indices):
            bounds = np.linspace(0, total, bounded + 1).astype(np.int64)
            indices = (bounds[:-1] + bounds[1:] - 1) // 2
        return indices[: whole_patches(len(indices), temporal_patch_size)]

    def _count_patches_of_frame(self, metadata, temporal_patch_size: int, patch_size: int | None = None, **kwargs):
        """What a frame adds to the patches of its video, before the last resize."""
        if not metadata.height or not metadata.width:
            raise ValueError(
                "`max_patches` bounds the frames by their size: pass `video_metadata` with the `height` and `width` "
                "of the video, or use `num_frames`."
            )
        height, width = self.get_resized_sizes(metadata.height, metadata.width, patch_size=patch_size, **kwargs)[0]
        patch_size = patch_size or self.patch_size
        return (height // patch_size) * (width // patch_size) // temporal_patch_size

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """
        Decodes the sampled frames of a video file with PyAV.

        Args:
            video_url_or_urls (`str` or `list`):
                A path, a `file://`, `http://` or `https://` URL, or a list of these.
            sample_indices_fn (`Callable`, *optional*):
                Gives the frames to decode from the metadata. All of them, by default.

        Returns:
            `tuple[np.ndarray, VideoMetadata]`: the frames, uint8 of shape (frames, height, width, 3), and what is
            known of the video; for a list, a list of the videos and a list of their metadata.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            return list(zip(*[self.fetch_videos(url, sample_indices_fn) for url in video_url_or_urls], strict=True))

        requires_backends(self, ["av"])
        source = os.fspath(video_url_or_urls)
        if not is_remote(source) and not os.path.isfile(local_path(source)):
            raise absence_error(video_url_or_urls)
        with errors_of(video_url_or_urls):
            if is_remote(source):
                with urlopen(source, timeout=60) as response:
                    file = BytesIO(response.read())
            else:
                file = open(local_path(source), "rb")
            with file:
                return read_video(file, sample_indices_fn)

    def _decode_and_sample_videos(self, videos, video_metadata, do_sample_frames=None, sample_indices_fn=None):
        videos = flatten_videos(normalize_videos(videos))
        if not videos:
            raise ValueError("Expected at least one video, got none.")
        if video_metadata is None:
            video_metadata = [None] * len(videos)
        else:
            video_metadata = make_batched_metadata(videos, video_metadata=video_metadata)
        if len(video_metadata) != len(videos):
            raise ValueError(f"Got {len(videos)} videos and {len(video_metadata)} entries of `video_metadata`.")

        sampled_videos, sampled_metadata = [], []
        for video, metadata in zip(videos, video_metadata, strict=True):
            if isinstance(video, str):
                video, metadata = self.fetch_videos(video, sample_indices_fn=sample_indices_fn)
            else:
                metadata = metadata or make_batched_metadata([video], video_metadata=None)[0]
                if do_sample_frames:
                    metadata.frames_indices = sample_indices_fn(metadata=metadata)
                    video = video[metadata.frames_indices]
            sampled_videos.append(video)
            sampled_metadata.append(metadata)
        return sampled_videos, sampled_metadata

    def _prepare_input_videos(self, videos, input_data_format=None, **kwargs) -> list[torch.Tensor]:
        # One by one: the base class takes the channel dimension of the first video for that of all.
        return [
            super(VambaVideoProcessor, self)._prepare_input_videos(
                [video], input_data_format=input_data_format, **kwargs
            )[0]
            for video in videos
        ]

    def get_resized_sizes(self, height: int, width: int, **kwargs) -> list[tuple[int, int]]:
        """
        Sizes that a frame passes through.

        Args:
            height (`int`), width (`int`):
                Edges of the frame in pixels.
            **kwargs:
                `size`, `min_pixels`, `max_pixels`, `patch_size` and `merge_size`, where they replace the attributes.

        Returns:
            `list[tuple[int, int]]`: height and width after the edges are brought into `size`, and then after they are
            brought to multiples of `patch_size * merge_size`.
        """
        size, min_pixels, max_pixels, patch_size, merge_size = (
            kwargs.get(name) or getattr(self, name)
            for name in ("size", "min_pixels", "max_pixels", "patch_size", "merge_size")
        )
        size = dict(size)
        if not size.get("shortest_edge") or not size.get("longest_edge"):
            raise ValueError(f"`size` must have the keys `shortest_edge` and `longest_edge`, in pixels, got {size}.")
        shortest_edge, longest_edge = size["shortest_edge"], size["longest_edge"]
        aspect_ratio = width / height
        if width >= height and width > longest_edge:
            height, width = int(longest_edge / aspect_ratio), longest_edge
        elif height > width and height > longest_edge:
            height, width = longest_edge, int(longest_edge * aspect_ratio)
        height, width = max(height, shortest_edge), max(width, shortest_edge)
        return [
            (height, width),
            smart_resize(height, width, patch_size * merge_size, min_pixels=min_pixels, max_pixels=max_pixels),
        ]

    def get_num_of_video_patches(self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None):
        """
        Number of patches of a video.

        Args:
            num_frames (`int`), height (`int`), width (`int`):
                Sampled frames of the video, and edges in pixels.
            videos_kwargs (`dict`, *optional*):
                Replacements for the attributes of the processor.

        Returns:
            `int`: rows of `pixel_values_videos`.
        """
        videos_kwargs = videos_kwargs or {}
        patch_size = videos_kwargs.get("patch_size") or self.patch_size
        temporal_patch_size = videos_kwargs.get("temporal_patch_size") or self.temporal_patch_size
        height, width = self.get_resized_sizes(height, width, **videos_kwargs)[-1]
        grid_t = max(num_frames // temporal_patch_size, 1)
        return grid_t * (height // patch_size) * (width // patch_size)

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        min_pixels: int,
        max_pixels: int,
        patch_size: int,
        temporal_patch_size: int,
        merge_size: int,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        sizes, grids = [], []
        for video in videos:
            num_frames, _, height, width = video.shape
            if not num_frames or not height or not width:
                raise ValueError(f"A video needs frames of at least one pixel, got {num_frames} of {height}x{width}.")
            factor = patch_size * merge_size
            if do_resize:
                sizes.append(
                    self.get_resized_sizes(
                        height,
                        width,
                        size=size,
                        min_pixels=min_pixels,
                        max_pixels=max_pixels,
                        patch_size=patch_size,
                        merge_size=merge_size,
                    )
                )
            elif height % factor or width % factor:
                raise ValueError(
                    f"Without `do_resize`, the edges of a frame must be multiples of {factor}, got {height}x{width}."
                )
            else:
                sizes.append([(height, width)])
            height, width = sizes[-1][-1]
            grids.append([max(num_frames // temporal_patch_size, 1), height // patch_size, width // patch_size])
        video_grid_thw = torch.tensor(grids)

        pixel_values, row = None, 0
        for video, video_sizes in zip(videos, sizes, strict=True):
            video = video[: whole_patches(len(video), temporal_patch_size)]
            for frames in video.split(self.temporal_patches_per_step * temporal_patch_size):
                patches, *_ = self.patchify(
                    self._resize_and_normalize(frames, video_sizes, **kwargs)[None],
                    patch_size=patch_size,
                    merge_size=merge_size,
                    temporal_patch_size=temporal_patch_size,
                )
                if pixel_values is None:
                    pixel_values = patches.new_empty(int(video_grid_thw.prod(dim=1).sum()), patches.shape[-1])
                pixel_values[row : row + patches.shape[1]] = patches[0]
                row += patches.shape[1]
        return BatchFeature(
            data={"pixel_values_videos": pixel_values, "video_grid_thw": video_grid_thw}, tensor_type=return_tensors
        )

    def _resize_and_normalize(
        self,
        frames: torch.Tensor,
        sizes: list[tuple[int, int]],
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_convert_rgb: bool = False,  # newer versions of Transformers have converted the frames before
        **kwargs,
    ) -> torch.Tensor:
        """Brings frames of shape (frames, channels, height, width) to each of `sizes` in turn and normalizes them."""
        if do_convert_rgb:
            frames = self.convert_to_rgb(frames)
        for height, width in sizes:
            frames = self.resize(frames, SizeDict(height=height, width=width), resample=resample)
        return self.rescale_and_normalize(frames, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
