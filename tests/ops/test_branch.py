# SPDX-License-Identifier: Apache-2.0
"""Branches of a residual stream: when their sums are part of the products, and that nothing is added twice or lost."""

import pytest
import torch
from tiny_vamba import VISION_CONFIG, make_block, make_media
from torch import nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from transformers_vamba.layers.vision import VambaVisionModel
from transformers_vamba.ops.branch import can_fuse_branch
from transformers_vamba.ops.gelu_linear import can_fuse_gelu


@pytest.fixture(autouse=True)
def usable_kernels(monkeypatch):
    for name in ("branch", "gelu_linear"):
        monkeypatch.setattr(f"transformers_vamba.ops.{name}.is_usable", lambda device: True)
    monkeypatch.setattr("transformers_vamba.ops.gelu_linear.describe", lambda *args: None)
    monkeypatch.setattr("transformers_vamba.ops.gelu_linear.shared_memory", lambda device: 232_448)  # an H100's


def open_in_torch(states, norm, linear):
    """In place of the kernel."""
    return norm(states), states.clone() if linear.bias is None else states + linear.bias


@pytest.mark.parametrize("part", ("tower", "mixer"))
@torch.no_grad()
def test_sums_within_products(part, monkeypatch):
    if part == "tower":
        torch.manual_seed(0)
        tower = VambaVisionModel._from_config(Qwen2VLVisionConfig(**VISION_CONFIG)).eval()
        for parameter in tower.parameters():
            nn.init.normal_(parameter, mean=0.1, std=0.3)
        media = make_media("video", (3, 4, 6))
        pixels, grid = media["pixel_values_videos"], media["video_grid_thw"]

        def run():
            return tower(pixels, grid_thw=grid, frame_length=24).last_hidden_state
    else:
        block, video_states = make_block(), torch.randn(1, 50, 64)

        def run():
            given = video_states.clone()
            outputs = block(given, [30, 20])[0]
            assert torch.equal(given, video_states)  # the caller's are left alone
            return outputs

    opened = []
    for name in ("vision", "mixer"):
        path = f"transformers_vamba.layers.{name}.open_branch"
        monkeypatch.setattr(path, lambda *args: opened.append(args) or open_in_torch(*args))
    found = run()
    assert len(opened) == (4 if part == "tower" else 1)
    monkeypatch.undo()
    torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_does_more_than_its_parameters_is_not_fused():
    states, norm, linear = torch.randn(4096, 32), nn.LayerNorm(32), nn.Linear(32, 32)
    branch = nn.Sequential(linear)
    assert can_fuse_branch(states, branch, norm, linear)
    assert can_fuse_branch(states, branch, nn.RMSNorm(32), linear)
    assert not can_fuse_branch(states.double(), branch, norm, linear)
    assert not can_fuse_branch(states, branch, nn.Identity(), linear)
    assert not can_fuse_branch(states, branch, norm, branch)
    assert not can_fuse_branch(states, branch, norm, nn.Linear(32, 32).bfloat16())
    with torch.enable_grad():
        assert not can_fuse_branch(states, branch, norm, linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse_branch(states, branch, norm, linear)
    for module in (branch, norm, linear):
        handle = module.register_forward_hook(lambda *args: None)
        assert not can_fuse_branch(states, branch, norm, linear)
        handle.remove()
    assert can_fuse_branch(states, branch, norm, linear)


@torch.no_grad()
def test_when_the_activation_is_part_of_the_product(monkeypatch):
    states, linear = torch.randn(4096, 32).bfloat16(), nn.Linear(32, 64).bfloat16()
    assert can_fuse_gelu(states, linear)
    assert not can_fuse_gelu(states[1:], linear)
    assert not can_fuse_gelu(states.float(), linear.float())
    assert not can_fuse_gelu(states, nn.Sequential(linear.bfloat16()))
    assert not can_fuse_gelu(states, nn.Linear(32, 60).bfloat16())  # rows of the weight and outputs begin anywhere
    with torch.enable_grad():
        assert not can_fuse_gelu(states, linear)
    # An RTX 5090's, which is newer and has less.
    monkeypatch.setattr("transformers_vamba.ops.gelu_linear.shared_memory", lambda device: 101_376)
    assert not can_fuse_gelu(states, linear)
