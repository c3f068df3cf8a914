# SPDX-License-Identifier: Apache-2.0
"""A tiny Vamba with random weights, random images and videos for it, and what is in the video files."""

from pathlib import Path

import torch
from transformers.utils import ModelOutput

from transformers_vamba import VambaCache, VambaConfig, VambaForConditionalGeneration
from transformers_vamba.compat import CACHE_NAME
from transformers_vamba.layers.mixer import VambaVisionMixer


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
TINY_CHECKPOINT = ROOT / "checkpoints" / "vamba-tiny"


# Fields that make every axis of the architecture visible: grouped heads, two SSM groups, several chunks a video.
TEXT_CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION_CONFIG = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
PATCH_DIM = 3 * 2 * 14 * 14


def tiny_config(**text_config) -> VambaConfig:
    return VambaConfig(
        text_config={**TEXT_CONFIG, **text_config},
        vision_config=VISION_CONFIG,
        image_token_id=101,
        video_token_id=102,
        vision_start_token_id=103,
        vision_end_token_id=104,
    )


def tiny_model(attn_implementation="sdpa", dtype=torch.float32, **text_config) -> VambaForConditionalGeneration:
    """A model whose parameters are all away from their initial values, so that a term left out shows."""
    torch.manual_seed(0)
    model = VambaForConditionalGeneration._from_config(
        tiny_config(**text_config), attn_implementation=attn_implementation
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.02 if name.endswith(("A_log", "dt_bias")) else 0.08
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.to(dtype)


def make_media(kind: str, *grids: tuple[int, int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random patches of images (`kind="image"`) or videos of the given grids, as the processor names them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), PATCH_DIM, generator=generator)
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels, torch.tensor(grids))))


def cache_of(outputs: ModelOutput) -> VambaCache:
    """The cache among a model's outputs, which Transformers calls by another name since 5.24."""
    return getattr(outputs, CACHE_NAME)


def make_text(batch_size: int = 1, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 100, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def level_of_frame(index: int) -> int:
    """Grey level of frame `index` of the test videos: it tells the frame apart in spite of lossy coding."""
    return 16 + 4 * (index % 50)


def levels_of(outputs, video_processor):
    """Mean grey level of each frame that went into `pixel_values_videos`, whose videos must be of one size."""
    grid_t = int(outputs["video_grid_thw"][:, 0].sum())
    channels, temporal, patch = 3, video_processor.temporal_patch_size, video_processor.patch_size
    pixels = outputs["pixel_values_videos"].view(grid_t, -1, channels, temporal, patch * patch)
    mean, std = (torch.tensor(value)[:, None] for value in (video_processor.image_mean, video_processor.image_std))
    return ((pixels.mean(dim=(1, 4)) * std + mean) * 255).mean(dim=1).flatten()


def make_block(device="cpu", dtype=torch.float32, **text_config) -> VambaVisionMixer:
    torch.manual_seed(0)
    block = VambaVisionMixer(tiny_config(**text_config).text_config)
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or name.endswith(".D") else 0.0, std=0.3)
    return block.to(device, dtype)
