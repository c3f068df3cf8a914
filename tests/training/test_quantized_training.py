# SPDX-License-Identifier: Apache-2.0
"""LoRA on weights in 4 bits (bitsandbytes) and in 8 (torchao): needs these packages."""

import peft
import pytest
import torch
from tiny_vamba import TINY_CHECKPOINT, make_media, make_text
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from transformers_vamba import lora_target_modules
from transformers_vamba.training.peft import VambaPeftModel


# The layers whose weights a kernel that takes more than one step at a time could go past.
QUANTIZED = ("self_attn.q_proj", "cross_attn.k_proj", "mlp.down_proj", "vision_mixer.mixer.in_proj")
QUANTIZED += ("vision_mixer.mixer.out_proj",)

devices = pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))


def quantized_model(kind: str, device: str):
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        )
    else:
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    model = AutoModelForImageTextToText.from_pretrained(
        TINY_CHECKPOINT, quantization_config=config, dtype=torch.bfloat16, device_map=device
    )
    return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("kind", ("bitsandbytes", "torchao"))
@devices
def test_lora_on_quantized_weights(kind, device, tmp_path):
    base = quantized_model(kind, device)
    layer = base.model.language_model.layers[0]
    weights = {name: layer.get_submodule(name).weight for name in QUANTIZED}
    assert all(type(weight) not in (torch.Tensor, torch.nn.Parameter) for weight in weights.values())

    torch.manual_seed(0)
    model = VambaPeftModel(base, peft.LoraConfig(r=4, target_modules=lora_target_modules(base.config))).train()
    input_ids = make_text(2, 10)
    inputs = {"input_ids": input_ids, "labels": input_ids, **make_media("video", (3, 4, 4), (2, 4, 6))}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in trained.items():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    assert {name.rsplit(".", 1)[-1] for name in trained if ".lora_" not in name} == {"alpha"}

    model.save_pretrained(tmp_path)
    loaded = VambaPeftModel.from_pretrained(quantized_model(kind, device), tmp_path).train()
    with torch.no_grad():  # in training mode: on a CPU, bitsandbytes infers on shapes larger than these only
        expected = model(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-2, rtol=1e-2)
