# SPDX-License-Identifier: Apache-2.0
"""Linear layers that torchao holds in 8 bits: which of them take inputs that our kernels round, and what they give."""

import pytest
import torch
from kernel_checks import has_capability
from tiny_vamba import VISION_CONFIG, make_block, make_media
from torch import nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from transformers_vamba.layers.vision import VambaVisionModel
from transformers_vamba.ops.float8 import Rows, apply_linear, takes_rows


quantization = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "float8, rows": lambda: float8(),
    "float8, tensor": lambda: float8(granularity=quantization.PerTensor()),
    "float8, limit": lambda: float8(activation_value_ub=10.0),
    "float8, weights": lambda: quantization.Float8WeightOnlyConfig(),
    "int8": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
}


def float8(**options):
    options = {"granularity": quantization.PerRow(), **options}
    return quantization.Float8DynamicActivationFloat8WeightConfig(**options)


@pytest.fixture(autouse=True)
def any_hardware(monkeypatch):
    """torchao wants a GPU with float8, and PyTorch has the product on a CPU as well."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("transformers_vamba.ops.float8.is_usable", lambda device: True)


def make_linear(kind: str | None = "float8, rows", bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    if kind is not None:
        quantization.quantize_(linear, CONFIGS[kind]())
    return linear


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
def test_product_of_rows_is_torchaos(bias):
    linear, states = make_linear(bias=bias), torch.randn(2, 5, 64, dtype=torch.bfloat16)
    scales = (states.abs().amax(-1, keepdim=True) / 448).float()  # rounded to bfloat16, as torchao does
    rows = Rows((states / scales).to(torch.float8_e4m3fn), scales)
    with torch.no_grad():
        assert torch.equal(apply_linear(linear, rows), linear(states))
        assert torch.equal(apply_linear(linear, states), linear(states))


@torch.no_grad()
def test_which_layers_take_rows():
    states, norm = torch.randn(5, 64, dtype=torch.bfloat16), nn.LayerNorm(64, dtype=torch.bfloat16)
    assert takes_rows(make_linear(), states) and takes_rows(make_linear(), states, norm)
    for kind in (None, *CONFIGS):
        assert takes_rows(make_linear(kind), states) == (kind == "float8, rows"), kind
    linear = make_linear()
    assert not takes_rows(linear, states.float())
    assert not takes_rows(linear, states, norm.float())
    assert not takes_rows(nn.Sequential(linear), states)
    with torch.enable_grad():
        assert not takes_rows(linear, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_rows(linear, states)
    for module in (norm.bfloat16(), linear):
        handle = module.register_forward_hook(lambda *args: None)
        assert not takes_rows(linear, states, norm)
        handle.remove()
    assert takes_rows(linear, states, norm)


def round_in_torch(states, norm=None, function="none"):
    """In place of the kernel."""
    if norm is not None:
        states = norm(states)
    if function == "quick_gelu":
        states = states * torch.sigmoid(1.702 * states)
    scales = states.float().abs().amax(-1, keepdim=True) / 448
    return Rows((states / scales).to(torch.float8_e4m3fn), scales)


def round_gated_in_torch(states, gate, norm):
    return round_in_torch(norm(states, gate))


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ("cpu", GPU))
@pytest.mark.parametrize("part", ("tower", "mixer"))
@torch.no_grad()
def test_rounded_in_kernels(part, device, monkeypatch):
    """No further from bfloat16 than torchao's own rounding, and every layer of the part takes part."""
    if device == "cuda" and not has_capability(8, 9):
        pytest.skip("the GPU has no float8")
    if device == "cpu":
        for name in ("vision", "mixer"):
            monkeypatch.setattr(f"transformers_vamba.layers.{name}.round_rows", round_in_torch)
        monkeypatch.setattr("transformers_vamba.layers.mixer.round_gated_norm", round_gated_in_torch)
    torch.manual_seed(0)
    if part == "tower":
        module = VambaVisionModel._from_config(Qwen2VLVisionConfig(**VISION_CONFIG)).to(device, torch.bfloat16).eval()
        media = make_media("video", (3, 4, 6))
        pixels = media["pixel_values_videos"].to(device, torch.bfloat16)
        inputs = {"hidden_states": pixels, "grid_thw": media["video_grid_thw"].to(device), "frame_length": 24}
        linears = [layer for block in module.blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    else:
        module = make_block(device, torch.bfloat16, mamba_n_groups=1, mamba_d_head=8)
        inputs = {"video_states": torch.randn(1, 50, 64).to(device, torch.bfloat16), "lengths": [50]}
        linears = [module.mixer.in_proj, module.mixer.out_proj]

    def run() -> torch.Tensor:
        outputs = module(**inputs)
        return (outputs[0] if part == "mixer" else outputs.last_hidden_state).float()

    full = run()
    for linear in linears:
        quantization.quantize_(linear, float8())
    taken = []
    for name in ("vision", "mixer"):
        path = f"transformers_vamba.layers.{name}.apply_linear"
        monkeypatch.setattr(path, lambda *args: taken.append(isinstance(args[1], Rows)) or apply_linear(*args))
    ours = run()
    assert taken == [True] * len(linears) and len(linears) == (8 if part == "tower" else 2)
    for name in ("vision", "mixer"):
        monkeypatch.setattr(f"transformers_vamba.layers.{name}.takes_rows", lambda *args: False)
    theirs = run()
    error, expected = ((each - full).norm() / full.norm() for each in (ours, theirs))
    print(f"relative error {error:.1e}, torchao's {expected:.1e}")
    assert 0 < error < 1.5 * expected < 0.2
