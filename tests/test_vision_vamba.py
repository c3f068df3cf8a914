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
"""The vision tower beside Qwen2-VL's, and what is fused in it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_vamba import VISION_CONFIG, make_media
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from transformers_vamba import vision_vamba
from transformers_vamba.vision_vamba import VambaVisionModel, call_fused


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

    monkeypatch.setattr(vision_vamba, "_compile", fail)
    monkeypatch.setattr(vision_vamba, "is_triton_available", lambda: True)
    monkeypatch.setattr(vision_vamba, "_cannot_compile", set())
    on_a_gpu = SimpleNamespace(is_cuda=True, value=3)
    assert [call_fused(double, on_a_gpu) for _ in range(2)] == [6, 6]
    assert vision_vamba._cannot_compile == {double}
