# SPDX-License-Identifier: Apache-2.0
"""The vision tower beside Qwen2-VL's, and what is fused in it."""

import pytest
import torch
from tiny_vamba import VISION_CONFIG, make_media
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from transformers_vamba.layers.vision import VambaVisionModel


@pytest.mark.parametrize("frame_length", (None, 24), ids=("any sizes", "one size"))
def test_agrees_with_qwen2_vl(frame_length):
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(**VISION_CONFIG)
    tower = VambaVisionModel._from_config(config).double().eval()
    theirs = Qwen2VisionTransformerPretrainedModel._from_config(config).double().eval()
    theirs.load_state_dict(tower.state_dict())
    media = make_media("video", (3, 4, 6))
    pixels, grid = media["pixel_values_videos"].double(), media["video_grid_thw"]
    with torch.no_grad():
        expected = theirs(pixels, grid_thw=grid).pooler_output
        torch.testing.assert_close(tower(pixels, grid_thw=grid, frame_length=frame_length).pooler_output, expected)
