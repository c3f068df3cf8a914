# SPDX-License-Identifier: Apache-2.0
"""
Processed videos on disk: a `cache_config.json`, one safetensors file per decoder layer and one of the time steps. If
the cache drops tokens, one more file says by what they are chosen.

A folder may come from a stranger or be what an interrupted save left. So all that a cache relies on is checked, in the
headers of the files, before anything is allocated: every file carries the id of the save that wrote it.
"""

import json
import math
import os
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..configuration_vamba import VambaTextConfig
from .changes import VideoChanges, check_pruning
from .excerpts import check_read_share
from .layers import VambaVideoLayer, resolve_implementation
from .steps import UNKNOWN_TIME, VideoSteps


CACHE_CONFIG_NAME = "cache_config.json"
STEPS_NAME = "steps.safetensors"
CHANGES_NAME = "changes.safetensors"
FIELDS: dict[str, type | tuple[type, ...]] = {
    "num_videos": int,
    "rows": (list, type(None)),
    "video_cache_implementation": str,
    "text_config": dict,
}
# Fields that folders of earlier versions lack, and what they mean there.
LATER_FIELDS: dict[str, tuple[type | tuple[type, ...], Any]] = {
    "video_pruning_rate": ((int, float), 0.0),
    "max_video_tokens": ((int, type(None)), None),
    "video_read_share": ((int, float, type(None)), None),
    "grid_sizes": (list, []),
}
FLOATS = ("F64", "F32", "F16", "BF16")


class SavedVideos(NamedTuple):
    """
    The part of a [`VambaCache`] that is saved.

    Args:
        videos (`list[list[VambaVideoLayer]]`): The videos, and of each its decoder layers.
        steps (`list[VideoSteps]`): The time steps of each video.
        changes (`list[VideoChanges]`): What is known of the changes in each video.
        rows (`list[int | None]`, *optional*): The video that each row of the batch reads.
        options (`dict`): The cache's `video_options`.
    """

    videos: list[list[VambaVideoLayer]]
    steps: list[VideoSteps]
    changes: list[VideoChanges]
    rows: list[int | None] | None
    options: dict


class Header(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def layer_file(folder: Path, layer_idx: int) -> Path:
    return folder / f"layer-{layer_idx:05d}.safetensors"


def damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"The processed video is damaged: {str(path)!r} {reason}. Process the video again, or copy the folder anew."
    )


def save_videos(save_directory: str | os.PathLike, config: VambaTextConfig, videos: SavedVideos) -> None:
    """Writes the videos of a cache, for [`~VambaCache.save_pretrained`]."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    cache_id = uuid.uuid4().hex
    content = {
        "cache_id": cache_id,
        "num_videos": len(videos.videos),
        "rows": None if videos.rows is not None and set(videos.rows) == {0} else videos.rows,
        **videos.options,
        "grid_sizes": [changes.size for changes in videos.changes],
        "text_config": config.to_dict(),
    }
    # What is there already may be what this cache reads, and stays whole until the last file is written.
    with TemporaryDirectory(dir=folder, prefix=".saving-") as new_folder:
        for layer_idx, layers in enumerate(zip(*videos.videos)):
            tensors = {
                f"{video}.{name}": tensor.contiguous()
                for video, layer in enumerate(layers)
                for name, tensor in layer.state_dict().items()
            }
            save_file(tensors, layer_file(Path(new_folder), layer_idx), metadata={"cache_id": cache_id})
        if videos.videos:
            steps = {
                f"{video}.{name}": each
                for video, steps in enumerate(videos.steps)
                for name, each in vars(steps).items()
            }
            save_file(steps, Path(new_folder) / STEPS_NAME, metadata={"cache_id": cache_id})
        changes = {
            f"{video}.{name}": tensor.contiguous()
            for video, changes in enumerate(videos.changes)
            for name, tensor in changes.state_dict().items()
        }
        if changes:
            save_file(changes, Path(new_folder) / CHANGES_NAME, metadata={"cache_id": cache_id})
        (Path(new_folder) / CACHE_CONFIG_NAME).write_text(json.dumps(content, indent=2, default=str) + "\n")
        written = {path.name for path in Path(new_folder).iterdir()}
        for name in sorted(written):
            (Path(new_folder) / name).replace(folder / name)
    # Of a deeper model, or of other videos.
    for path in [*folder.glob("layer-*.safetensors"), folder / STEPS_NAME, folder / CHANGES_NAME]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def load_videos(
    save_directory: str | os.PathLike, device: torch.device, implementation: str | None
) -> tuple[VambaTextConfig, SavedVideos]:
    """Reads what [`save_videos`] wrote, and of what model it is, for [`~VambaCache.from_pretrained`]."""
    folder = Path(save_directory)
    if not (folder / CACHE_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"Expected a folder with a {CACHE_CONFIG_NAME}, got {str(folder)!r}.")
    content = read_cache_config(folder / CACHE_CONFIG_NAME)
    saved_as = content["video_cache_implementation"]
    implementation = implementation or saved_as
    saved_class, _ = resolve_implementation(saved_as)
    layer_class, offloading = resolve_implementation(implementation)
    config = check_layers(folder, content, saved_class)

    videos: list[list[VambaVideoLayer]] = [[] for _ in range(content["num_videos"])]
    for layer_idx in range(config.num_hidden_layers if videos else 0):
        tensors = load_file(layer_file(folder, layer_idx), device="cpu" if offloading else str(device))
        for video, layers in enumerate(videos):
            prefix = f"{video}."
            states = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            layer = saved_class(offloading)
            layer.load_state_dict(states, device)
            layers.append(layer if saved_class is layer_class else layer_class.convert(layer, offloading))
    lengths = [layers[0].get_seq_length() for layers in videos]
    steps = load_steps(folder / STEPS_NAME, content.get("cache_id"), lengths)
    changes = load_changes(folder / CHANGES_NAME, content, config, lengths, device)
    options = {name: content[name] for name in ("video_pruning_rate", "max_video_tokens", "video_read_share")}
    options["video_cache_implementation"] = implementation
    return config, SavedVideos(videos, steps, changes, content["rows"], options)


def load_steps(path: Path, cache_id: str | None, lengths: list[int]) -> list[VideoSteps]:
    """The time steps of videos of these lengths; none from a folder that was saved before they were kept."""
    if not lengths or not path.exists():
        return []
    headers = read_headers(path, cache_id)
    names = list(vars(VideoSteps()))
    if set(headers) != {f"{video}.{name}" for video in range(len(lengths)) for name in names}:
        raise damaged(path, f"holds other tensors than {', '.join(names)} of {len(lengths)} videos")
    tensors, steps = load_file(path), []
    for video, length in enumerate(lengths):
        fields = {name: tensors[f"{video}.{name}"] for name in names}
        num_tokens, timestamps_ms = fields["num_tokens"], fields["timestamps_ms"]
        if any(each.dtype != torch.long or each.shape != (len(num_tokens.flatten()),) for each in fields.values()):
            raise damaged(path, f"holds no two rows of integers, of one length, for video {video}")
        if (num_tokens < 0).any() or num_tokens.sum() != length or (timestamps_ms < UNKNOWN_TIME).any():
            raise damaged(path, f"does not count the {length} tokens of video {video}, or has times below 0")
        steps.append(VideoSteps(**fields))
    return steps


def load_changes(
    path: Path, content: dict, config: VambaTextConfig, lengths: list[int], device: torch.device
) -> list[VideoChanges]:
    """The changes in videos of these lengths; none of a cache that dropped no tokens."""
    if not lengths or not (content["video_pruning_rate"] or content["max_video_tokens"]):
        return []
    check_changes(path, content, config, lengths)
    tensors = load_file(path, device=str(device))
    return [
        VideoChanges(tensors[f"{video}.last_step"], tuple(size), tensors[f"{video}.importance"])
        for video, size in enumerate(content["grid_sizes"])
    ]


def check_changes(path: Path, content: dict, config: VambaTextConfig, lengths: list[int]) -> None:
    """Raises a `ValueError` unless the file says of every token of videos of these lengths how much it changed."""
    sizes = content["grid_sizes"]
    if len(sizes) != len(lengths):
        raise damaged(path.with_name(CACHE_CONFIG_NAME), f"has {len(sizes)} grid_sizes for {len(lengths)} videos")
    headers = read_headers(path, content.get("cache_id"))
    for video, (size, num_tokens) in enumerate(zip(sizes, lengths)):
        missing = Header("no dtype", ())
        last_step, importance = (headers.get(f"{video}.{name}", missing) for name in ("last_step", "importance"))
        if importance != Header("F32", (num_tokens,)):
            raise damaged(path, f"has importance {importance} for the {num_tokens} tokens of video {video}")
        # The vision tower merges squares of patches.
        places = last_step.shape[0] if last_step.shape[1:] == (config.hidden_size,) else 0
        if not places or last_step.dtype not in FLOATS or size is None or math.prod(size) % places:
            raise damaged(path, f"has the last step {last_step} of grid {size} for video {video}")
    if len(headers) != 2 * len(lengths):
        raise damaged(path, f"holds {len(headers)} tensors for {len(lengths)} videos")


def read_cache_config(path: Path) -> dict:
    """The content of a `cache_config.json`, each field of its type; else a `ValueError`."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise damaged(path, f"holds a {type(content).__name__} instead of an object")
    if missing := [name for name in FIELDS if name not in content]:
        raise damaged(path, f"lacks {', '.join(missing)}")
    for name, kind in FIELDS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise damaged(path, f"has a {name} of type {type(content[name]).__name__}")
    for name, (kind, default) in LATER_FIELDS.items():
        if not isinstance(content.setdefault(name, default), kind) or isinstance(content[name], bool):
            raise damaged(path, f"has a {name} of type {type(content[name]).__name__}")
    num_videos, rows = content["num_videos"], content["rows"]
    if num_videos < 0:
        raise damaged(path, f"says {num_videos} videos")
    for row in rows or []:
        if row is not None and (type(row) is not int or not 0 <= row < num_videos):
            raise damaged(path, f"has a row that reads video {row!r} of {num_videos}")
    for size in content["grid_sizes"]:
        is_pair = isinstance(size, list) and len(size) == 2
        if size is not None and not (is_pair and all(type(edge) is int and edge > 0 for edge in size)):
            raise damaged(path, f"has a grid size {size!r}")
    try:
        check_pruning(content["video_pruning_rate"], content["max_video_tokens"])
        check_read_share(content["video_read_share"])
        resolve_implementation(content["video_cache_implementation"])
    except ValueError as error:
        raise damaged(path, f"is of another version ({error})") from error
    return content


def check_layers(folder: Path, content: dict, layer_class: type[VambaVideoLayer]) -> VambaTextConfig:
    """
    The configuration of the model that filled a saved cache, after a look at all its files: they are of one save, and
    hold the same videos in the shapes of this model, as many tokens in every layer. Else a `ValueError`.
    """
    config_path = folder / CACHE_CONFIG_NAME
    num_layers, num_videos = content["text_config"].get("num_hidden_layers"), content["num_videos"]
    num_files = len(list(folder.glob("layer-*.safetensors")))
    if num_videos and (type(num_layers) is not int or num_layers > num_files):
        raise damaged(config_path, f"says {num_layers!r} layers, and there are the files of {num_files}")
    try:
        config = VambaTextConfig(**content["text_config"])
    except Exception as error:  # of whatever kind: the file is not trusted
        raise damaged(config_path, f"has a text_config that is no Vamba's ({error})") from error

    lengths = dtypes = None
    for layer_idx in range(num_layers if num_videos else 0):
        path = layer_file(folder, layer_idx)
        headers = read_headers(path, content.get("cache_id"))
        if num_videos > len(headers):
            raise damaged(path, f"holds {len(headers)} tensors, and {CACHE_CONFIG_NAME} says {num_videos} videos")
        needs_state = layer_idx < num_layers - 1  # nothing reads the last mixer's output
        layer_lengths, layer_dtypes = check_tensors(path, headers, num_videos, layer_class, config, needs_state)
        if lengths not in (None, layer_lengths):
            raise damaged(path, f"holds videos of {layer_lengths} tokens, and the layers before it of {lengths}")
        if dtypes not in (None, layer_dtypes):
            raise damaged(path, f"holds videos in {layer_dtypes}, and the layers before it in {dtypes}")
        lengths, dtypes = layer_lengths, layer_dtypes
    return config


def read_headers(path: Path, cache_id: str | None) -> dict[str, Header]:
    """The tensors in a layer's file by name, if it is whole and of the save with this id; else a `ValueError`."""
    if not path.is_file():
        raise damaged(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            found_id = (file.metadata() or {}).get("cache_id")
            slices = {name: file.get_slice(name) for name in file.keys()}
            headers = {name: Header(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise damaged(path, f"is no whole safetensors file ({error})") from error
    if found_id != cache_id:
        raise damaged(
            path,
            f"is of another save (id {found_id!r}) than {CACHE_CONFIG_NAME} (id {cache_id!r}), as after a save that "
            "was interrupted",
        )
    return headers


def check_tensors(
    path: Path,
    headers: dict[str, Header],
    num_videos: int,
    layer_class: type[VambaVideoLayer],
    config: VambaTextConfig,
    needs_state: bool,
) -> tuple[list[int], list[str]]:
    """The number of tokens and the dtype of each video in a layer's file that holds what it should."""
    fixed_shapes = shapes_without_tokens(config)
    required = (*layer_class.token_tensors, *layer_class.other_tensors, *(("conv", "ssm") if needs_state else ()))
    lengths, dtypes, seen = [], [], set()
    for video in range(num_videos):
        if missing := [name for name in required if f"{video}.{name}" not in headers]:
            raise damaged(path, f"lacks {', '.join(missing)} of video {video}")
        tensors = {name: headers[f"{video}.{name}"] for name in required}
        first = tensors[required[0]]
        num_tokens = first.shape[2] if len(first.shape) == 4 else 0
        for name, tensor in tensors.items():
            shape = tuple(num_tokens if size is None else size for size in fixed_shapes[name])
            if tensor.shape != shape or not num_tokens:
                raise damaged(path, f"has {name} of shape {tensor.shape} for video {video}, expected {shape}")
            if tensor.dtype not in (("I8",) if name.endswith("_codes") else FLOATS):
                raise damaged(path, f"has {name} in {tensor.dtype} for video {video}")
        # The last of the tensors that grow, values or their scales, has the dtype of the model.
        growing = [tensors[name].dtype for name in layer_class.token_tensors if not name.endswith("_codes")]
        if len(set(growing)) > 1:
            raise damaged(path, f"holds video {video} in several dtypes, {', '.join(growing)}")
        lengths.append(num_tokens)
        dtypes.append(growing[-1])
        seen |= {f"{video}.{name}" for name in required}
    if unknown := sorted(headers.keys() - seen):
        raise damaged(path, f"holds unknown tensors ({', '.join(unknown[:4])})")
    return lengths, dtypes


def shapes_without_tokens(config: VambaTextConfig) -> dict[str, tuple[int | None, ...]]:
    """The shape of each tensor that a layer keeps of a video; `None` stands for the number of tokens."""
    head_dim = config.hidden_size // config.num_attention_heads
    inner_size = config.mamba_expand * config.hidden_size
    conv_dim = inner_size + 2 * config.mamba_n_groups * config.mamba_d_state
    states = (1, config.num_key_value_heads, None, head_dim)
    scales, centre = (*states[:3], 1), (*states[:2], 1, head_dim)
    shapes: dict[str, tuple[int | None, ...]] = {"conv": (1, config.mamba_d_conv - 1, conv_dim)}
    shapes["ssm"] = (1, inner_size // config.mamba_d_head, config.mamba_d_head, config.mamba_d_state)
    shapes |= {"keys": states, "values": states}
    for kind in ("key", "value"):
        shapes |= {f"{kind}_codes": states, f"{kind}_scales": scales, f"{kind}_centre": centre}
    return shapes
