# SPDX-License-Identifier: Apache-2.0
"""Video processor class for Vamba."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torchvision.transforms.v2.functional import normalize
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import requires_backends
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .video.download import SourceLimits
from .video.frames import ArrayFrames, Frames, is_of
from .video.index import seconds_of_frames
from .video.patches import allocate, patchify, put_frame, whole_patches
from .video.reading import (
    FileFrames,
    VideoWithOptions,
    check_frame_files,
    flatten_videos,
    normalize_video,
    normalize_videos,
    open_frames,
)
from .video.sampling import SAMPLING, choose_middles, replace_sampling
from .video.sources import errors_of


class VambaVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]  # a `TypedDict`
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
    on_damage (`str`, *optional*, defaults to `"raise"`):
        What to do with a damaged or truncated file: `"raise"` an error, or `"skip"` what cannot be decoded and log it.
        The video then has the frames that can be decoded.
    return_video_timestamps (`bool`, *optional*, defaults to `False`):
        Whether to return `video_timestamps_ms` as well, by which the model's cache knows when each step of time was.
    """

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int | None
    max_frames: int | None
    max_patches: int | None
    on_damage: str
    return_video_timestamps: bool


def describe_frames(frames: Frames) -> str:
    metadata = frames.metadata
    return f"{metadata.total_num_frames} of {metadata.height}x{metadata.width}"


class VambaVideoProcessor(BaseVideoProcessor):
    r"""
    Constructs a Vamba video processor: samples frames, resizes them, and flattens them into patches as Qwen2-VL does.

    Frames are sampled by count (`num_frames`, the default) or by rate (`fps`, frames per second), one of the two;
    given in a call, either replaces the other's default. A frame longer than `size["longest_edge"]` pixels is
    shrunk to it and its aspect kept; then an edge below `size["shortest_edge"]` is raised to it; then both edges are
    brought to multiples of `patch_size * merge_size`, within `min_pixels` and `max_pixels`. Frames that fill no
    whole temporal patch at the end are dropped; a video of fewer frames than one temporal patch repeats its last one.
    Files and URLs are decoded with PyAV; `source_limits` says what may be opened, see [`SourceLimits`].
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
    on_damage = "raise"
    return_video_timestamps = False
    source_limits = SourceLimits()
    valid_kwargs = VambaVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, **kwargs: Unpack[VambaVideoProcessorKwargs]):
        kwargs = self.choose_sampling(kwargs)
        super().__init__(**kwargs)
        for name in SAMPLING:  # the base class has set both, in whichever order
            if kwargs.get(name) is not None:
                setattr(self, name, kwargs[name])

    def __setattr__(self, name, value):
        """Setting one of `num_frames` and `fps` takes the place of the other."""
        super().__setattr__(name, value)
        if name in SAMPLING and value is not None:
            super().__setattr__(next(other for other in SAMPLING if other != name), None)

    def to_dict(self) -> dict:
        """The settings that are saved. What may be opened is a matter of the program, not of the checkpoint."""
        return {name: value for name, value in super().to_dict().items() if name != "source_limits"}

    @staticmethod
    def choose_sampling(kwargs: dict) -> dict:
        """Returns `kwargs` with `num_frames` set to `None` if `fps` is given, and the other way round."""
        given = [name for name in SAMPLING if kwargs.get(name) is not None]
        bounds = ("min_frames", "max_frames", "max_patches")
        for name in given + [name for name in bounds if kwargs.get(name) is not None]:
            value = kwargs[name]
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {value!r}.")
            if name != "fps" and value != int(value):
                raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
        if len(given) == 2:
            raise ValueError(
                f"`num_frames` and `fps` are mutually exclusive, got num_frames={kwargs['num_frames']} and "
                f"fps={kwargs['fps']}: pass one of them, and `None` for the other where it was set before."
            )
        return {**kwargs, **{"num_frames": None, "fps": None, given[0]: kwargs[given[0]]}} if given else kwargs

    def complete_kwargs(self, kwargs: dict) -> dict:
        """The arguments of a call, and what it leaves out from the attributes."""
        defaults = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        return {**defaults, **self.choose_sampling(kwargs)}

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
            `video_metadata`, whose `frames_indices` are the sampled frames. With `return_video_timestamps=True` also
            `video_timestamps_ms`, int64 of shape (temporal patches of all videos,): when the first frame of each is
            shown, in milliseconds after the first frame of the video; -1 if that is not known.

        Raises:
            `FileNotFoundError`: for a path without a file.
            `ValueError`: for what cannot be read as a video, has no frames, or is sampled in a way that it does not
                allow.
        """
        check_frame_files(videos, kwargs.get("do_sample_frames"))
        completed = self.complete_kwargs(kwargs)
        videos = flatten_videos(normalize_videos(videos))
        if not videos:
            raise ValueError("Expected at least one video, got none.")
        given = self._metadata_of_each(videos, completed["video_metadata"])
        read = [self.read_sampled(video, metadata, completed) for video, metadata in zip(videos, given, strict=True)]
        frames, metadata = zip(*read, strict=True)
        outputs = self.preprocess_resized(list(frames), **{**kwargs, "video_metadata": list(metadata)})
        if completed["return_video_timestamps"]:
            seconds = [seconds_of_frames(known, len(video)) for known, video in zip(metadata, frames, strict=True)]
            self.add_timestamps(outputs, seconds, **kwargs)
        return outputs

    def add_timestamps(self, outputs: BatchFeature, seconds: list[np.ndarray], return_tensors=None, **kwargs) -> None:
        """Adds `video_timestamps_ms` to outputs, of videos whose frames are shown at these times; NaN if unknown."""
        temporal_patch_size = self.complete_kwargs(kwargs)["temporal_patch_size"]
        starts = [
            times[: int(grid[0]) * temporal_patch_size : temporal_patch_size]
            for times, grid in zip(seconds, outputs["video_grid_thw"], strict=True)
        ]
        milliseconds = torch.from_numpy(np.nan_to_num(1000 * np.concatenate(starts), nan=-1)).round().long()
        outputs.update(BatchFeature({"video_timestamps_ms": milliseconds}, tensor_type=return_tensors))

    @staticmethod
    def _metadata_of_each(videos: list, video_metadata) -> list:
        if video_metadata is None:
            return [None] * len(videos)
        given = make_batched_metadata(videos, video_metadata=video_metadata)
        if len(given) != len(videos):
            raise ValueError(f"Got {len(videos)} videos and {len(given)} entries of `video_metadata`.")
        return given

    def preprocess_resized(self, videos: list[torch.Tensor], **kwargs) -> BatchFeature:
        """[`preprocess`] of frames that [`frame_transform`] has resized, each of shape (frames, channels, h, w)."""
        own = {"do_resize": False, "do_sample_frames": False, "do_convert_rgb": False, "num_frames": None, "fps": None}
        return super().preprocess(videos, **{**kwargs, **own, "input_data_format": "channels_first"})

    def read_sampled(self, video, metadata: VideoMetadata | None, kwargs: dict) -> tuple[torch.Tensor, VideoMetadata]:
        """The sampled frames of one video, resized, of shape (frames, channels, height, width), and its metadata."""
        if is_of(video, VideoWithOptions):
            video, kwargs = video.video, self.choose_sampling({**kwargs, **replace_sampling(video.options)})
        with open_frames(video, self.source_limits, kwargs["on_damage"], kwargs["input_data_format"]) as frames:
            if frames.failure is not None:
                with errors_of(video):
                    raise frames.failure
            indices, metadata = self.choose_frames(frames, {**kwargs, "video_metadata": metadata})
            resized, row = None, 0
            for row, frame in enumerate(frames.read(indices, self.frame_transform(frames, kwargs))):
                if resized is None:  # all at once, so that too large a video is refused before it fills the memory
                    with errors_of(video):
                        resized = allocate((len(indices), *frame.shape), frame)
                put_frame(resized, row, frame)
        if resized is None:
            raise ValueError(f"A video needs frames of at least one pixel, got {describe_frames(frames)}.")
        return resized, metadata

    def choose_frames(self, frames: Frames, kwargs: dict) -> tuple[np.ndarray, VideoMetadata]:
        """
        Chooses the frames of a video that are taken.

        Args:
            frames ([`Frames`]): The video.
            kwargs (`dict`):
                From [`complete_kwargs`]. Its `video_metadata` replaces what is known of frames in memory; of a file
                its `fps` does, if it has one.

        Returns:
            `tuple[np.ndarray, VideoMetadata]`: their indices, int64, ascending, and what is known of the video.
        """
        if isinstance(frames, ArrayFrames) and 0 in frames.array.shape[1:]:
            raise ValueError(f"A video needs frames of at least one pixel, got {describe_frames(frames)}.")
        metadata, given = frames.metadata, kwargs["video_metadata"]
        if isinstance(given, (list, tuple)) or isinstance(given, dict):
            (given,) = self._metadata_of_each([frames], given)
        if given is not None and not isinstance(frames, FileFrames):
            metadata = given
        elif given is not None and given.fps:
            metadata.fps, metadata.frame_times = float(given.fps), None
            metadata.duration = metadata.total_num_frames / metadata.fps
        if kwargs["do_sample_frames"]:
            with errors_of(frames.source) if isinstance(frames, FileFrames) else nullcontext():
                indices = self.sample_frames(**{**kwargs, "metadata": metadata})
        else:
            indices = np.arange(frames.metadata.total_num_frames)
        if kwargs["do_sample_frames"] or isinstance(frames, FileFrames):
            metadata.frames_indices = indices
        return indices, metadata

    def frame_transform(self, frames: Frames | None, kwargs: dict) -> Callable:
        """
        Returns the function that brings a frame of shape (height, width, channels) to its final size, as a tensor of
        shape (channels, height, width).

        Args:
            frames ([`Frames`], *optional*): The video, whose levels say how floats are to be read.
            kwargs (`dict`): From [`complete_kwargs`].
        """
        names = ("size", "min_pixels", "max_pixels", "patch_size", "merge_size")
        sizing = {name: kwargs[name] for name in names}
        scale = frames.scale() if isinstance(frames, ArrayFrames) and kwargs["do_rescale"] else 1.0
        do_resize, resample, device = kwargs["do_resize"], kwargs["resample"], kwargs["device"]

        def transform(frame) -> torch.Tensor:
            if isinstance(frame, np.ndarray):
                frame = torch.from_numpy(np.require(frame, requirements=["C", "W"]))
            # A batch of one, whose channels stay the last in memory: torchvision is fastest with these.
            frame = frame.to(device or frame.device).movedim(-1, 0)[None]
            if scale != 1.0:
                frame = (frame * scale).round().to(torch.uint8)
            if kwargs["do_convert_rgb"]:
                frame = frame.expand(-1, 3, -1, -1) if frame.shape[1] == 1 else frame[:, :3]
            for height, width in self.get_resized_sizes(*frame.shape[-2:], **sizing) if do_resize else ():
                frame = self.resize(frame, SizeDict(height=height, width=width), resample=resample)
            return frame[0]

        return transform

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
        Chooses the middle frame of each of N equal intervals of a video, as the published code does. Of frames that
        are not shown at a constant rate, the one is taken that comes nearest in time to the middle.

        Args:
            metadata (`VideoMetadata`):
                Its `total_num_frames`, and with `fps` also its `fps`, are read; and its `frame_times`, in seconds, if
                it has them.
            num_frames (`int`, *optional*):
                N, at most the number of frames of the video.
            fps (`int` or `float`, *optional*):
                Instead of `num_frames`: the intervals are `1 / fps` seconds long. The last one is left out if its
                middle lies after the end. No frame is taken twice, and at least one is taken.
            min_frames (`int`, *optional*), max_frames (`int`, *optional*):
                Bounds of N. If `fps` would pass one, N is that bound.
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
        if fps is not None and not metadata.fps:
            raise ValueError(
                f"Sampling {fps} frames per second needs the frame rate of the video: pass `video_metadata` with its "
                "`fps`, or use `num_frames`."
            )
        indices = choose_middles(metadata, num_frames, fps, min_frames or 1, max_frames or total)
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
                An encoded file in any form of [`normalize_video`], or a list of these.
            sample_indices_fn (`Callable`, *optional*):
                Gives the frames to decode from the metadata. All of them, by default.

        Returns:
            `tuple[np.ndarray, VideoMetadata]`: the frames, uint8 of shape (frames, height, width, 3), and what is
            known of the video; for a list, a list of the videos and a list of their metadata.
        """
        if isinstance(video_url_or_urls, (list, tuple)):
            return list(zip(*[self.fetch_videos(url, sample_indices_fn) for url in video_url_or_urls], strict=True))

        requires_backends(self, ["av"])
        video = normalize_video(video_url_or_urls)
        with open_frames(video, self.source_limits, self.on_damage) as frames:
            if frames.failure is not None:
                with errors_of(video):
                    raise frames.failure
            metadata = frames.metadata
            if sample_indices_fn is None:
                metadata.frames_indices = np.arange(metadata.total_num_frames)
            else:
                metadata.frames_indices = sample_indices_fn(metadata=metadata)
            return np.stack(list(frames.read(metadata.frames_indices, np.asarray))), metadata

    def _decode_and_sample_videos(self, videos, video_metadata, do_sample_frames=None, sample_indices_fn=None):
        return videos, video_metadata  # by `preprocess`

    def get_resized_sizes(self, height: int, width: int, **kwargs) -> list[tuple[int, int]]:
        """
        Sizes that a frame passes through.

        Args:
            height (`int`), width (`int`):
                Edges of the frame in pixels.
            **kwargs:
                `size`, `min_pixels`, `max_pixels`, `patch_size` and `merge_size`, if they replace the attributes.

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
        patch_size: int,
        temporal_patch_size: int,
        merge_size: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        """Flattens and normalizes videos of their final size, each of shape (frames, channels, height, width)."""
        grids, factor = [], patch_size * merge_size
        for video in videos:
            num_frames, _, height, width = video.shape
            if height % factor or width % factor:
                raise ValueError(
                    f"Without `do_resize`, the edges of a frame must be multiples of {factor}, got {height}x{width}."
                )
            grids.append([max(num_frames // temporal_patch_size, 1), height // patch_size, width // patch_size])
        video_grid_thw = torch.tensor(grids)

        mean, std, do_rescale = self._fuse_mean_std_and_rescale_factor(
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            device=videos[0].device,
        )
        like = videos[0][:0]
        like = like.float() if do_normalize else like * rescale_factor if do_rescale else like
        num_channels = like.shape[1]
        patch_dim = num_channels * temporal_patch_size * patch_size**2
        pixel_values, row = allocate((int(video_grid_thw.prod(dim=1).sum()), patch_dim), like), 0
        for video in videos:
            video = video[: whole_patches(len(video), temporal_patch_size)]
            # A temporal patch at a time, which a CPU's cache holds, and where it stays: new memory is slow.
            for frames in video.split(temporal_patch_size):
                patches = patchify(frames, patch_size, temporal_patch_size, merge_size)
                rows = pixel_values[row : row + math.prod(patches.shape[:5])]
                rows.view(patches.shape).copy_(patches)
                if do_normalize:
                    normalize(rows.view(len(rows), num_channels, -1, patch_size), mean, std, inplace=True)
                elif do_rescale:
                    rows *= rescale_factor
                row += len(rows)
        return BatchFeature(
            data={"pixel_values_videos": pixel_values, "video_grid_thw": video_grid_thw}, tensor_type=return_tensors
        )
