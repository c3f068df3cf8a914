# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: what is in one, whether it is whole, and how a new one comes into being."""

import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from source_files import checked_copy, find_file, keep_known, read_json, read_known
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_vamba import VambaConfig, VambaForConditionalGeneration


SHARD_NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**24  # bytes that are read at once
RECORD_NAME = "unfinished.json"


def find_checkpoint(name_or_path: str) -> Path:
    """The folder of a checkpoint. One that is named as on the Hub is downloaded into the cache of the Hub's client."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(f"There is no folder {name_or_path!r}, and it is no name of a Hub repository.")
    return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))


def read_config_fields(checkpoint: Path) -> dict:
    """
    The known fields of a config.json. The number of layers is checked by the headers of the weights, before anything
    is made of it; else a `ValueError`.
    """
    fields = read_known(checkpoint, CONFIG_NAME)
    if fields is None:
        raise FileNotFoundError(f"{str(checkpoint)!r} has no {CONFIG_NAME}.")
    num_tensors = sum(len(read_header(shard)) for shard in find_shards(checkpoint))
    for section in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(section.get(name), int) and section[name] > num_tensors:
                raise ValueError(
                    f"The {CONFIG_NAME} of {str(checkpoint)!r} says {name} {section[name]}, and its files hold "
                    f"{num_tensors} tensors."
                )
    return fields


def make_config(checkpoint: Path, config_class: type[PreTrainedConfig], fields: dict) -> PreTrainedConfig:
    """A configuration of the known fields of a config.json; else a `ValueError`."""
    try:
        return config_class.from_dict(fields)
    except Exception as error:  # of whatever kind: the file is not trusted
        name = config_class.__name__.removesuffix("Config")
        raise ValueError(f"The {CONFIG_NAME} of {str(checkpoint)!r} is no {name}'s: {error}") from error


def read_config(checkpoint: Path) -> VambaConfig:
    """The configuration of a Vamba checkpoint in this package's layout or the published one; else a `ValueError`."""
    fields = read_config_fields(checkpoint)
    model_type = fields.get("model_type")
    if model_type != VambaConfig.model_type and "vision_mamba_mixer_config" not in fields:
        raise ValueError(
            f"{str(checkpoint)!r} is no Vamba checkpoint: its config.json says model_type {model_type!r}, expected "
            "'vamba', or 'qwen2_vl' with a `vision_mamba_mixer_config` as published. A Qwen2-VL checkpoint becomes a "
            "Vamba with init_from_qwen2_vl.py."
        )
    return make_config(checkpoint, VambaConfig, fields | {"model_type": VambaConfig.model_type})


def find_shards(checkpoint: Path) -> list[Path]:
    """
    The safetensors files that hold the weights, all of which are there; else a `FileNotFoundError`.

    Raises:
        ValueError: for an index that is no index, or names anything but safetensors files beside it.
    """
    index = find_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{str(index)!r} has no weight_map of parameters and their files.")
        for name in weight_map.values():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                raise ValueError(
                    f"{str(index)!r} lists the shard {name!r}, expected the plain name of a .safetensors file beside "
                    "it."
                )
        names = sorted(set(weight_map.values()))
    elif find_file(checkpoint, SAFE_WEIGHTS_NAME) is not None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        raise FileNotFoundError(
            f"{str(checkpoint)!r} has no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}."
        )
    missing = [name for name in names if find_file(checkpoint, name) is None]
    if missing:
        raise FileNotFoundError(
            f"{str(checkpoint)!r} lacks {len(missing)} of the {len(names)} shards that {SAFE_WEIGHTS_INDEX_NAME} "
            f"lists: {', '.join(missing)}."
        )
    return [checkpoint / name for name in names]


def read_header(shard: Path) -> dict[str, tuple[str, torch.Size]]:
    """Dtype and shape of each tensor in a safetensors file, whose length is checked; the tensors are not read."""
    try:
        with safe_open(shard, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (tensor.get_dtype(), torch.Size(tensor.get_shape())) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{str(shard)!r} is no whole safetensors file: {error}.") from error


def open_tensors(file: BinaryIO) -> dict:
    """
    Reads the header of a safetensors file that has been checked: a JSON object after its length (8 bytes,
    little-endian). The tensors follow, the first one where the file stands then.
    """
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def check_numbers(shard: Path) -> None:
    """Raises a `ValueError` naming the tensors of a safetensors file that hold anything but finite floating point."""
    integer, not_finite = [], []
    with open(shard, "rb") as file:
        header = open_tensors(file)
        start = file.tell()
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            dtype = FLOATS.get(tensor["dtype"])
            if dtype is None:
                integer.append(f"{name} {tensor['dtype']}")
                continue
            begin, end = tensor["data_offsets"]
            file.seek(start + begin)
            # A piece at a time, whatever the size of the tensor; not by memory map, whose pages count as memory.
            pieces = (bytearray(file.read(min(PIECE, end - at))) for at in range(begin, end, PIECE))
            if not all(torch.frombuffer(piece, dtype=dtype).isfinite().all() for piece in pieces):
                not_finite.append(name)
    for fault, names in (
        ("that are not floating point of 16 bits or more", integer),
        ("with NaN or infinite values", not_finite),
    ):
        if names:
            raise ValueError(f"{str(shard)!r} holds {len(names)} parameters {fault} {some(names)}.")


def notes_in(shard: Path) -> list[str]:
    """Names of what else than tensors a safetensors file holds in its header, where anything can be written."""
    with open(shard, "rb") as file:
        return sorted(open_tensors(file).get("__metadata__", {}).keys() - {"format"})


def some(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def check_parameters(
    checkpoint: Path, config: PreTrainedConfig, model_class: type[PreTrainedModel] = VambaForConditionalGeneration
) -> dict[str, str]:
    """
    Checks that the shards of a checkpoint hold the parameters that its configuration describes, by their headers, and
    that all numbers in them are finite.

    Returns:
        `dict[str, str]`: for each name in the shards, the parameter of the model that it stands for.

    Raises:
        FileNotFoundError: naming the shards that are missing.
        ValueError: naming the parameters that are missing, unknown, there twice, of another shape or no numbers.
    """
    shards = find_shards(checkpoint)
    shapes, repeated = {}, []
    for shard in shards:
        for name, (_, shape) in read_header(shard).items():
            if name in shapes:
                repeated.append(name)
            shapes[name] = shape

    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # of whatever kind: the sizes are not trusted
        raise ValueError(f"The {CONFIG_NAME} of {str(checkpoint)!r} describes no model: {error}") from error
    expected = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names = {
        name: rename_source_key(
            name, renamings, [], base_model_prefix=model.base_model_prefix, meta_state_dict=expected
        )[0]
        for name in shapes
    }
    found = {names[name]: shape for name, shape in shapes.items()}
    times = Counter(names.values())
    faults = {
        "missing": expected.keys() - found.keys() - model.all_tied_weights_keys.keys(),
        "unknown": found.keys() - expected.keys(),
        "in two shards": repeated,
        "under two names": [name for name in names if times[names[name]] > 1],
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {tuple(expected[name].shape)}"
            for name in found.keys() & expected.keys()
            if found[name] != expected[name].shape
        ],
    }
    faults = [f"{len(each)} {fault} {some(each)}" for fault, each in faults.items() if each]
    if faults:
        raise ValueError(
            f"The weights of {str(checkpoint)!r} do not fit its config.json: parameters {'; '.join(faults)}."
        )
    for shard in shards:
        check_numbers(shard)
    return names


def write_index(shards: list[Path], folder: Path, names: dict[str, str] | None = None) -> None:
    """
    Writes the index of shards, by their headers, into another folder. `names` renames the parameters. A single file of
    the usual name needs none.
    """
    if [shard.name for shard in shards] == [SAFE_WEIGHTS_NAME]:
        return
    weight_map, total_size = {}, 0
    for shard in shards:
        for name, (dtype, shape) in read_header(shard).items():
            weight_map[names[name] if names else name] = shard.name
            total_size += shape.numel() * FLOATS[dtype].itemsize
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def left_out(
    folder: Path, known_fields: dict[str, dict], shards: list[Path], other_files: tuple[str, ...]
) -> list[str]:
    """Which fields of the known files and shards in a folder, and which of its other files, are not taken over."""
    unknown: dict[str, list[str]] = {name: [] for name in known_fields}
    for name, known in known_fields.items():
        if (path := find_file(folder, name)) is not None:
            keep_known(read_json(path), known, unknown[name])
    unknown |= {shard.name: notes_in(shard) for shard in shards}
    lines = [f"{name}: {', '.join(map(repr, sorted(fields)))}" for name, fields in unknown.items() if fields]
    files = {path.name for path in folder.iterdir()} - {*unknown, *other_files}
    return lines + [repr(name) for name in sorted(files)]


@contextmanager
def checked_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """A temporary folder with what is taken over of a checkpoint, its weights as links, for Transformers to load."""
    shards = find_shards(checkpoint)
    with checked_copy(checkpoint) as copy:
        for shard in shards:
            (copy / shard.name).symlink_to(shard.resolve())
        write_index(shards, copy)
        yield copy


def partial_folder(folder: Path) -> Path:
    """Where a folder is written until it is whole."""
    return folder.with_name(folder.name + ".partial")


def replaced_folder(folder: Path) -> Path:
    """Where the folder that had this name is, while the new one takes its place."""
    return folder.with_name(folder.name + ".replaced")


def read_record(partial: Path) -> dict:
    """What the command that writes into a partial folder has noted there; empty where none of ours does."""
    record = partial / RECORD_NAME
    return read_json(record) if record.is_file() and not record.is_symlink() else {}


def check_destination(folder: Path, overwrite: bool, command: str, *sources: Path) -> None:
    """
    Raises where writing a folder would lose something that was not given up, or one of its own sources: that folder,
    what an interrupted run left beside it, or what another command (than `command`) has begun there.
    """
    partial, replaced = partial_folder(folder), replaced_folder(folder)
    for source, path in itertools.product(sources, (folder, partial, replaced)):
        if not path.is_symlink() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{str(path)!r} is where {str(source)!r} is read from: write into another folder.")
    for path in (folder, partial):
        if path.is_symlink():
            raise FileExistsError(
                f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not followed: remove it."
            )
    if replaced.exists() or replaced.is_symlink():
        raise FileExistsError(
            f"{str(replaced)!r} exists, and is needed to replace {str(folder)!r}. It is what had that name, if a run "
            "was interrupted while it put the new folder in place: rename it back, or remove it."
        )
    if partial.exists() and not (partial.is_dir() and not any(partial.iterdir())):
        begun_by = read_record(partial).get("command") if partial.is_dir() else None
        if begun_by != command:
            whose = "is not of these commands" if begun_by is None else f"is the unfinished work of {begun_by!r}"
            raise FileExistsError(f"{str(partial)!r} exists and {whose}. Rename or remove it, or go on with that.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists. Pass --overwrite to replace it.")
    if not any((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise FileExistsError(f"{str(folder)!r} exists and holds no model, so --overwrite does not replace it.")


def start(folder: Path, command: str, **details) -> Path:
    """Makes the partial folder of a folder, with a record of the command that writes into it."""
    partial = partial_folder(folder)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / RECORD_NAME).write_text(json.dumps({"command": command, **details}, indent=2))
    return partial


def put_in_place(folder: Path) -> None:
    """Gives what was written into `partial_folder(folder)` its name, in exchange for what has that name."""
    (partial_folder(folder) / RECORD_NAME).unlink()
    if folder.exists():
        folder.rename(replaced_folder(folder))
    partial_folder(folder).rename(folder)
    shutil.rmtree(replaced_folder(folder), ignore_errors=True)


@contextmanager
def new_folder(folder: Path, command: str) -> Iterator[Path]:
    """
    A folder to write into, which takes its name only when all went well and is gone otherwise. `check_destination` has
    been asked.
    """
    shutil.rmtree(partial_folder(folder), ignore_errors=True)
    partial = start(folder, command)
    try:
        yield partial
        put_in_place(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
