# SPDX-License-Identifier: Apache-2.0
"""The vision tower beside Qwen2-VL's, and what is fused in it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_vamba import VISION_CONFIG, make_media
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from transformers_vamba.layers import vision as vision_module
from transformers_vamba.layers.vision import VambaVisionModel, call_fused


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


def test_what_cannot_be_compiled_is_called_as_it_is(monkeypatch):
    def fail(function):
        def compiled(*args):
            raise torch._dynamo.exc.TorchDynamoException("no C compiler")

        return compiled

    def double(x):
        return 2 * x.value

    monkeypatch.setattr("transformers_vamba.layers.vision._compile", fail)
    monkeypatch.setattr("transformers_vamba.layers.vision.is_triton_available", lambda: True)
    monkeypatch.setattr("transformers_vamba.layers.vision._cannot_compile", set())
    on_a_gpu = SimpleNamespace(is_cuda=True, value=3)
    assert [call_fused(double, on_a_gpu) for _ in range(2)] == [6, 6]
    assert vision_module._cannot_compile == {double}
