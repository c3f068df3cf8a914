# SPDX-License-Identifier: Apache-2.0
"""Initialises a Vamba from a Qwen2-VL checkpoint where ZeRO-3 holds the parameters: for test_distributed.py."""

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig

from transformers_vamba import VambaForConditionalGeneration


folder = Path(sys.argv[1])
deepspeed.init_distributed("gloo")
# As long as this is there, every model is loaded in parts.
config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
model = VambaForConditionalGeneration.from_qwen2_vl(folder)
assert all(parameter.numel() == 0 for parameter in model.parameters())
source = load_file(folder / "model.safetensors")
for i, layer in enumerate(model.model.language_model.layers):
    for name, parameter in layer.cross_attn.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            assert torch.equal(parameter, source[f"model.layers.{i}.self_attn.{name}"]), (i, name)
    with deepspeed.zero.GatheredParameters(layer.alpha):
        assert layer.alpha.item() == 0.5
torch.distributed.barrier()
