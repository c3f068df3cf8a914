# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A tiny Vamba with random weights, random images and videos for it, and what is in the video files."""

import torch
from transformers.utils import ModelOutput

from transformers_vamba import VambaCache, VambaConfig, VambaForConditionalGeneration
from transformers_vamba.compat import CACHE_NAME


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
