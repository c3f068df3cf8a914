# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: what is in one, whether it is whole, and how a new one comes into being."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_vamba import VambaConfig, VambaForConditionalGeneration


def find_checkpoint(name_or_path: str) -> Path:
    """The folder of a checkpoint. One that is named as on the Hub is downloaded into the cache of the Hub's client."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(f"There is no folder {name_or_path!r}, and it is no name of a Hub repository.")
    return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))


def read_config(checkpoint: Path) -> VambaConfig:
    """The configuration of a Vamba checkpoint in this package's layout or the published one; else a `ValueError`."""
    config_dict, _ = PreTrainedConfig.get_config_dict(checkpoint)
    model_type = config_dict.get("model_type")
    if model_type != "vamba" and "vision_mamba_mixer_config" not in config_dict:
        raise ValueError(
            f"{str(checkpoint)!r} is no Vamba checkpoint: its config.json says model_type {model_type!r}, expected "
            "'vamba', or 'qwen2_vl' with a `vision_mamba_mixer_config` as published. A Qwen2-VL checkpoint becomes a "
            "Vamba with init_from_qwen2_vl.py."
        )
    try:
        return VambaConfig.from_pretrained(checkpoint)
    except StrictDataclassError as error:
        raise ValueError(f"The config.json of {str(checkpoint)!r} is no Vamba's: {error}") from error


def find_shards(checkpoint: Path) -> list[Path]:
    """The safetensors files that hold the weights, all of which are there; else a `FileNotFoundError`."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (checkpoint / SAFE_WEIGHTS_NAME).is_file():
        names = [SAFE_WEIGHTS_NAME]
    else:
        raise FileNotFoundError(
            f"{str(checkpoint)!r} has no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}."
        )
    missing = [name for name in names if not (checkpoint / name).is_file()]
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


def check_parameters(
    checkpoint: Path, config: PreTrainedConfig, model_class: type[PreTrainedModel] = VambaForConditionalGeneration
) -> dict[str, str]:
    """
    Checks that the shards of a checkpoint hold the parameters that its configuration describes, by their headers.

    Returns:
        `dict[str, str]`: for each name in the shards, the parameter of the model that it stands for.

    Raises:
        FileNotFoundError: naming the shards that are missing.
        ValueError: naming the parameters that are missing, unknown, in two shards or of another shape.
    """
    shapes, repeated = {}, []
    for shard in find_shards(checkpoint):
        for name, (_, shape) in read_header(shard).items():
            if name in shapes:
                repeated.append(name)
            shapes[name] = shape

    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names = {
        name: rename_source_key(
            name, renamings, [], base_model_prefix=model.base_model_prefix, meta_state_dict=expected
        )[0]
        for name in shapes
    }
    found = {names[name]: shape for name, shape in shapes.items()}
    faults = {
        "missing": expected.keys() - found.keys() - model.all_tied_weights_keys.keys(),
        "unknown": found.keys() - expected.keys(),
        "in two shards": repeated,
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {tuple(expected[name].shape)}"
            for name in found.keys() & expected.keys()
            if found[name] != expected[name].shape
        ],
    }
    faults = [
        f"{len(parameters)} {fault} ({', '.join(sorted(parameters)[:4])}{', ...' if len(parameters) > 4 else ''})"
        for fault, parameters in faults.items()
        if parameters
    ]
    if faults:
        raise ValueError(
            f"The weights of {str(checkpoint)!r} do not fit its config.json: parameters {'; '.join(faults)}."
        )
    return names


def partial_folder(folder: Path) -> Path:
    """Where a folder is written until it is whole."""
    return folder.with_name(folder.name + ".partial")


def check_destination(folder: Path, overwrite: bool, *sources: Path) -> None:
    """Raises where writing a folder would lose something that was not given up, or one of its own sources."""
    for source in sources:
        if folder.resolve() == source.resolve() or folder.resolve() in source.resolve().parents:
            raise ValueError(f"{str(folder)!r} is where {str(source)!r} is read from: write into another folder.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists. Pass --overwrite to replace it.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileExistsError(f"{str(folder)!r} exists and holds no model, so --overwrite does not replace it.")


def put_in_place(folder: Path) -> None:
    """Gives what was written into `partial_folder(folder)` its name, in exchange for what has that name."""
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.rename(replaced)
    partial_folder(folder).rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when all went well and is gone otherwise."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
