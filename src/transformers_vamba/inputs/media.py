# SPDX-License-Identifier: Apache-2.0
"""Images and videos as `forward` gets them, checked and brought into order row by row."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from .checks import check_tensor


class Medium(NamedTuple):
    """
    One image or video.

    Args:
        pixel_values (`torch.Tensor` of shape `(t * h * w, channels * temporal_patch_size * patch_size**2)`): Patches.
        grid (`tuple[int, int, int]`): `(t, h, w)`, in patches.
        timestamps_ms (`torch.LongTensor` of shape `(t,)`, *optional*): When each step of time begins, if it is known.
        goes_on (`bool`, *optional*, defaults to `False`): Whether it is a part of a video that has begun before.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    timestamps_ms: torch.Tensor | None = None
    goes_on: bool = False


# The inputs of `forward` that describe images and videos.
MEDIA_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_sample_ids",
    "pixel_values_videos",
    "video_grid_thw",
    "video_sample_ids",
    "video_timestamps_ms",
    "mm_token_type_ids",
)


def pop_media(model_kwargs: dict) -> dict:
    """Takes the inputs that describe images and videos out of the arguments of `generate`."""
    return {name: model_kwargs.pop(name) for name in MEDIA_INPUTS if name in model_kwargs}


def drop_grids_without_pixels(inputs: dict) -> dict:
    """The inputs without those that describe media whose pixels are gone."""
    for pixels, *descriptions in (MEDIA_INPUTS[:3], MEDIA_INPUTS[3:7]):
        if inputs.get(pixels) is None:
            inputs = {name: value for name, value in inputs.items() if name not in descriptions}
    return inputs


def count_patch_values(vision_config: Qwen2VLVisionConfig) -> int:
    """The number of pixel values in a patch, `patch_dim`."""
    return vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2


def count_tokens(media: list[Medium], merge_size: int) -> int:
    """The number of tokens that the vision tower makes of images and videos."""
    return sum(math.prod(medium.grid) for medium in media) // merge_size**2


def group_media_by_row(
    batch_size: int,
    vision_config: Qwen2VLVisionConfig,
    pixel_values: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None,
    image_sample_ids: torch.Tensor | None = None,
    pixel_values_videos: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    video_sample_ids: torch.Tensor | None = None,
    video_timestamps_ms: torch.Tensor | None = None,
    mm_token_type_ids: torch.Tensor | None = None,
) -> list[list[Medium]]:
    """
    The images and videos of each row, in the order of the prompt.

    Args:
        batch_size (`int`): Number of rows.
        vision_config ([`Qwen2VLVisionConfig`]): Says how large a patch is, and how many are merged.
        pixel_values (`torch.Tensor` of shape `(num_patches, patch_dim)`, *optional*): Patches of all images.
        image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*): Grid of each image, in patches.
        image_sample_ids (`torch.LongTensor` of shape `(num_images,)` or `(num_images, 2)`, *optional*):
            The row of each image, or the first and the last of the rows that share it.
        pixel_values_videos, video_grid_thw, video_sample_ids: The same of videos.
        video_timestamps_ms (`torch.LongTensor` of shape `(num_steps,)`, *optional*):
            When each step of time of the videos begins, one video after another, in milliseconds; -1 if not known.
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 for an image's place in the prompt, 2 for a video's. Without it, a row's images come before its videos.

    Raises:
        TypeError: for an input that is no tensor, or one of another kind.
        ValueError: if the inputs contradict one another, naming both sides.
    """
    if mm_token_type_ids is not None:
        check_tensor("mm_token_type_ids", mm_token_type_ids, False, (batch_size, "sequence_length"))
        image_sample_ids = _restore_rows(image_sample_ids, image_grid_thw, mm_token_type_ids == 1)
        video_sample_ids = _restore_rows(video_sample_ids, video_grid_thw, mm_token_type_ids == 2)
    images = _split_by_row(
        ("pixel_values", "image_grid_thw", "image_sample_ids"),
        (pixel_values, image_grid_thw, image_sample_ids),
        batch_size,
        vision_config,
    )
    videos = _split_by_row(
        ("pixel_values_videos", "video_grid_thw", "video_sample_ids"),
        (pixel_values_videos, video_grid_thw, video_sample_ids),
        batch_size,
        vision_config,
        video_timestamps_ms,
    )
    if mm_token_type_ids is None or not (any(images) or any(videos)):
        return [row_images + row_videos for row_images, row_videos in zip(images, videos)]

    media = []
    for row, types in enumerate(mm_token_type_ids.tolist()):
        types = [token_type for token_type in types if token_type]
        if not set(types) <= {1, 2}:
            raise ValueError(
                f"`mm_token_type_ids` must be 0 for text, 1 for an image or 2 for a video, got {sorted(set(types))}."
            )
        counts = types.count(1), types.count(2)
        if types and counts != (len(images[row]), len(videos[row])):
            raise ValueError(
                f"The prompt of row {row} has {counts[0]} images and {counts[1]} videos (`mm_token_type_ids`), but "
                f"{len(images[row])} images and {len(videos[row])} videos are given for it. With Vamba a prompt has "
                "one mark per image or video: prepare it with `VambaProcessor`, not with Qwen2-VL's processor."
            )
        queues = {1: iter(images[row]), 2: iter(videos[row])}
        media.append([next(queues[token_type]) for token_type in types] or images[row] + videos[row])
    return media


def _restore_rows(
    sample_ids: torch.Tensor | None, grid_thw: torch.Tensor | None, marks: torch.Tensor
) -> torch.Tensor | None:
    """
    Infers the row of each medium from the marks if `sample_ids` are missing, or if they were made row by row and then
    concatenated.
    """
    if grid_thw is None or (sample_ids is not None and sample_ids.any()):
        return sample_ids
    rows = marks.nonzero()[:, 0]
    return rows if len(rows) == len(grid_thw) else sample_ids


def _split_by_row(
    names: tuple[str, str, str],
    tensors: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    batch_size: int,
    vision_config: Qwen2VLVisionConfig,
    timestamps_ms: torch.Tensor | None = None,
) -> list[list[Medium]]:
    """The media of one kind, by row."""
    pixels_name, grid_name, ids_name = names
    pixel_values, grid_thw, sample_ids = tensors
    rows: list[list[Medium]] = [[] for _ in range(batch_size)]
    if pixel_values is None and grid_thw is None:
        if sample_ids is not None:
            raise ValueError(f"`{ids_name}` was given without `{grid_name}`; the two go together.")
        return rows
    if pixel_values is None or grid_thw is None:
        given, missing = (pixels_name, grid_name) if grid_thw is None else (grid_name, pixels_name)
        raise ValueError(f"`{given}` was given without `{missing}`; the two go together.")
    merge_size = vision_config.spatial_merge_size
    patch_dim = count_patch_values(vision_config)
    check_tensor(grid_name, grid_thw, False, ("number of media", 3))
    check_tensor(pixels_name, pixel_values, True, ("num_patches", patch_dim))
    grids = [tuple(grid) for grid in grid_thw.tolist()]
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge_size or grid[2] % merge_size:
            raise ValueError(
                f"`{grid_name}` has an entry {list(grid)}; frames, height and width must be at least 1, and height "
                f"and width multiples of the merge size {merge_size}."
            )
    num_patches = [math.prod(grid) for grid in grids]
    if pixel_values.shape[0] != sum(num_patches):
        cause = ""
        if pixel_values.shape[0] < sum(num_patches):
            cause = (
                " If the data set is streamed, Accelerate has cut the batch by row, and pixels have none: pass "
                '`accelerator_config={"dispatch_batches": False}` to the trainer.'
            )
        raise ValueError(
            f"`{pixels_name}` must have shape ({sum(num_patches)}, {patch_dim}) to match `{grid_name}`, got "
            f"{tuple(pixel_values.shape)}.{cause}"
        )

    if sample_ids is not None:
        is_shared = getattr(sample_ids, "ndim", 1) == 2
        check_tensor(ids_name, sample_ids, False, ("number of media", 2) if is_shared else ("number of media",))
        sample_ids = sample_ids.tolist()
        if len(sample_ids) != len(grids):
            raise ValueError(f"`{ids_name}` has {len(sample_ids)} entries for the {len(grids)} of `{grid_name}`.")
        spans = sample_ids if is_shared else [(row, row) for row in sample_ids]
        if not all(0 <= first <= last < batch_size for first, last in spans):
            raise ValueError(
                f"`{ids_name}` must lie in 0..{batch_size - 1}, the rows of the batch; got {sample_ids}. (Samples "
                "packed in one row are told apart by `position_ids` that start anew; no `attention_mask`, no cache.)"
            )
    elif batch_size == 1:
        spans = [(0, 0)] * len(grids)
    elif len(grids) == batch_size:
        spans = [(row, row) for row in range(batch_size)]
    else:
        raise ValueError(
            f"`{grid_name}` describes {len(grids)} media for {batch_size} rows: say with `{ids_name}` which row each "
            "belongs to."
        )
    times = _split_timestamps(timestamps_ms, [t for t, _, _ in grids])
    for *medium, (first, last) in zip(pixel_values.split(num_patches), grids, times, spans):
        medium = Medium(*medium)
        for row in range(first, last + 1):
            rows[row].append(medium)
    return rows


def _split_timestamps(
    timestamps_ms: torch.Tensor | None, num_steps: list[int]
) -> tuple[torch.Tensor, ...] | list[None]:
    """The times of each video."""
    if timestamps_ms is None:
        return [None] * len(num_steps)
    check_tensor("video_timestamps_ms", timestamps_ms, False, ("number of steps",))
    if len(timestamps_ms) != sum(num_steps):
        raise ValueError(
            f"`video_timestamps_ms` has {len(timestamps_ms)} entries for the {sum(num_steps)} steps of time of "
            "`video_grid_thw`."
        )
    return timestamps_ms.split(num_steps)


def distinct_videos(media: list[list[Medium]]) -> tuple[list[list[Medium]], list[int | None]]:
    """
    The media of the rows, listed once for consecutive rows that share them (they hold the same objects), and for each
    row the index of its media in that list, `None` for a row without any.
    """
    videos: list[list[Medium]] = []
    rows: list[int | None] = []
    for row_media in media:
        if row_media and not (videos and list(map(id, row_media)) == list(map(id, videos[-1]))):
            videos.append(row_media)
        rows.append(len(videos) - 1 if row_media else None)
    return videos, rows


def split_into_segments(media: list[Medium], max_steps: int) -> Iterator[list[Medium]]:
    """
    Cuts images and videos, in order, into segments of at most `max_steps` steps of time, that is, entries of the
    grid's first axis: `temporal_patch_size` frames each, or one image.
    """
    segment: list[Medium] = []
    room = max_steps
    for pixel_values, (t, h, w), timestamps_ms, goes_on in media:
        start = 0
        while start < t:
            steps = min(t - start, room)
            times = None if timestamps_ms is None else timestamps_ms[start : start + steps]
            pixels = pixel_values[start * h * w : (start + steps) * h * w]
            segment.append(Medium(pixels, (steps, h, w), times, goes_on or start > 0))
            start += steps
            room -= steps
            if room == 0:
                yield segment
                segment, room = [], max_steps
    if segment:
        yield segment
