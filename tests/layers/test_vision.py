# SPDX-License-Identifier: Apache-2.0
"""The vision tower beside Qwen2-VL's, and what is fused in it."""

import pytest
import torch
from tiny_vamba import VISION_CONFIG, make_media
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from transformers_vamba.layers import vision
from transformers_vamba.layers.vision import VambaVisionModel
from transformers_vamba.ops.branch import open_branch


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_fused_on_a_gpu(dtype, tolerance, monkeypatch):
    """Sums within the products, and sums by themselves, as far as a gradient is taken."""
    torch.manual_seed(0)
    tower = VambaVisionModel._from_config(Qwen2VLVisionConfig(**VISION_CONFIG)).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    media = make_media("video", (3, 4, 6))
    pixels, grid = media["pixel_values_videos"], media["video_grid_thw"]
    with torch.no_grad():
        expected = tower.double()(pixels.double(), grid_thw=grid, frame_length=24).last_hidden_state
    opened = []
    monkeypatch.setattr(vision, "open_branch", lambda *args: opened.append(args) or open_branch(*args))
    tower.to("cuda", dtype)
    for has_gradient in (False, True):
        with torch.set_grad_enabled(has_gradient):
            found = tower(pixels.to("cuda", dtype), grid_thw=grid.cuda(), frame_length=24).last_hidden_state
        error = (found.cpu().double() - expected).norm() / expected.norm()
        print(f"relative error {error:.1e}")
        assert error < tolerance and len(opened) == 4
