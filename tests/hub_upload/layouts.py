# SPDX-License-Identifier: Apache-2.0
"""The tiny model in the layouts that the Hub's checkpoints have."""

import json
from pathlib import Path

import torch
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from transformers_vamba import VambaForConditionalGeneration
from transformers_vamba.configuration_vamba import _PUBLISHED_MIXER_FIELDS


def write_published(folder: Path, **save_kwargs) -> Path:
    """The tiny model as the published code would have saved it: its names, `config.json` and processor files."""
    tiny = VambaForConditionalGeneration.from_pretrained(TINY_CHECKPOINT)
    model = VambaForConditionalGeneration(tiny.config)  # of no checkpoint, so that it is saved by the published names
    model.load_state_dict(tiny.state_dict())
    model.generation_config = tiny.generation_config
    model.save_pretrained(folder, **save_kwargs)
    config = json.loads((folder / "config.json").read_text())
    text_config, vision_config = config.pop("text_config"), config.pop("vision_config")
    mixer_config = {old: text_config.pop(new) for old, new in _PUBLISHED_MIXER_FIELDS.items()}
    rope_parameters = text_config.pop("rope_parameters")
    text_config["rope_theta"] = rope_parameters["rope_theta"]
    text_config["rope_scaling"] = {"type": "mrope", "mrope_section": rope_parameters["mrope_section"]}
    config |= text_config | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": config.pop("dtype"),
        "vision_config": vision_config | {"model_type": "qwen2_vl"},
        "vision_mamba_mixer_config": mixer_config,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_qwen2_vl_processor(folder)
    return folder


def write_qwen2_vl_processor(folder: Path) -> None:
    """The tiny model's processor in the files that Qwen2-VL's checkpoints have."""
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor.chat_template}))


def write_qwen2_vl(folder: Path, **config) -> Path:
    """A Qwen2-VL with random weights, a flat `config.json` as those on the Hub, and the tiny model's processor."""
    text_config = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    text_config |= config.pop("text_config", {})
    vision_config = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": text_config["hidden_size"]}
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        **config,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder, max_shard_size="500KB")
    config = json.loads((folder / "config.json").read_text())
    text_config, vision_config = config.pop("text_config"), config.pop("vision_config")
    rope_parameters = text_config.pop("rope_parameters")
    text_config["rope_theta"] = rope_parameters["rope_theta"]
    text_config["rope_scaling"] = {"type": "mrope", "mrope_section": rope_parameters["mrope_section"]}
    vision_names = ("depth", "embed_dim", "hidden_size", "mlp_ratio", "num_heads", "patch_size", "temporal_patch_size")
    vision_config = {name: vision_config[name] for name in (*vision_names, "spatial_merge_size")}
    vision_config |= {"in_chans": 3, "spatial_patch_size": 14}
    config = text_config | config | {"torch_dtype": config.pop("dtype"), "vision_config": vision_config}
    (folder / "config.json").write_text(json.dumps(config))
    write_qwen2_vl_processor(folder)
    return folder
