# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of another layout: those of the published research code, whose parameter names are Qwen2-VL's and are
changed on the way in, and those of Qwen2-VL itself.
"""

import re

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig


RENAME_DECODER = (r"^model(?!\.(language_model|visual))", "model.language_model")
RENAME_TOWER = (r"^visual", "model.visual")


def register_conversion_mapping() -> None:
    """For `from_pretrained`, and backwards for `save_pretrained`."""
    decoder, tower = WeightRenaming(*RENAME_DECODER), WeightRenaming(*RENAME_TOWER)
    register_checkpoint_conversion_mapping("VambaModel", [decoder], overwrite=True)
    register_checkpoint_conversion_mapping("VambaForConditionalGeneration", [tower, decoder], overwrite=True)


def rename_published(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """A hook for `load_state_dict`, by which `Trainer` resumes from what `save_pretrained` wrote with these names."""
    for key in list(state_dict):
        if key.startswith(prefix):
            name = key[len(prefix) :]
            for pattern, replacement in (RENAME_TOWER, RENAME_DECODER):
                name = re.sub(pattern, replacement, name)
            state_dict[prefix + name] = state_dict.pop(key)


def check_complete(cls: type, name_or_path: str, missing_keys: set[str]) -> None:
    """Raises a `ValueError` that names the parameters that a checkpoint lacks, if there are any."""
    if not missing_keys:
        return
    missing = sorted(missing_keys)
    raise ValueError(
        f"The checkpoint {name_or_path!r} lacks {len(missing)} parameters of {cls.__name__}: "
        f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. To start from a Qwen2-VL checkpoint, use "
        "`from_qwen2_vl`; to load it all the same and look at what is missing, pass `output_loading_info=True`."
    )


def read_qwen2_vl_config(name_or_path: str, text_config: dict) -> dict:
    """
    The arguments of a [`VambaConfig`] with the shapes of a Qwen2-VL checkpoint, and the fields of `text_config`.

    Raises:
        ValueError: for a checkpoint of another architecture.
    """
    config_dict, _ = Qwen2VLConfig.get_config_dict(name_or_path)
    if config_dict.get("model_type") != "qwen2_vl" or "vision_mamba_mixer_config" in config_dict:
        raise ValueError(
            f"{name_or_path!r} is no Qwen2-VL checkpoint: its config.json says model_type "
            f"{config_dict.get('model_type')!r}, expected 'qwen2_vl' without a Vamba mixer."
        )
    source = Qwen2VLConfig.from_dict(config_dict).to_dict()
    source["text_config"].update(text_config)
    for section in (source, source["text_config"], source["vision_config"]):
        section.pop("model_type")
    source.pop("architectures")
    return source


def check_qwen2_vl_filled(name_or_path: str, loading_info: dict) -> None:
    """Raises a `ValueError` unless a Qwen2-VL checkpoint filled all but Vamba's own parts."""
    own_parts = (".cross_attn.", ".vision_mixer.", ".alpha")
    missing = [key for key in sorted(loading_info["missing_keys"]) if not any(part in key for part in own_parts)]
    if missing or loading_info["unexpected_keys"]:
        raise ValueError(
            f"{name_or_path!r} does not fit Qwen2-VL: missing {missing[:8]}, unexpected "
            f"{sorted(loading_info['unexpected_keys'])[:8]}."
        )
