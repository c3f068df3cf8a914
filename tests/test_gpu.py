# SPDX-License-Identifier: Apache-2.0
"""The model on a CUDA device in bfloat16, with and without kernels, against float32 on the CPU."""

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_model
from transformers.utils import is_flash_attn_2_available, is_mamba_2_ssm_available

from transformers_vamba.ops.scan import IMPLEMENTATIONS
from transformers_vamba.parallel.gradient_checkpointing import HostCopy, OffloadedCheckpoint


pytestmark = pytest.mark.gpu

BATCH = {
    "input_ids": make_text(3),
    "attention_mask": torch.tensor([[1] * 12, [0] * 4 + [1] * 8, [1] * 12]),
    "video_sample_ids": torch.tensor([0, 2, 2]),
    **make_media("video", (9, 6, 8), (2, 4, 4), (3, 4, 6)),
}


@pytest.fixture(scope="module")
def expected():
    with torch.no_grad():
        return tiny_model()(**BATCH).logits


@pytest.fixture(params=("triton", "torch", "mamba_ssm"))
def scan(request, monkeypatch):
    if request.param == "mamba_ssm" and not is_mamba_2_ssm_available():
        pytest.skip("mamba-ssm is not installed")
    # On the CPU PyTorch's is still there.
    implementations = {name: IMPLEMENTATIONS[name] for name in (request.param, "torch")}
    monkeypatch.setattr("transformers_vamba.ops.scan.IMPLEMENTATIONS", implementations)


def relative_error(logits, expected):
    read = BATCH["attention_mask"].bool()
    return ((logits.cpu().float() - expected)[read].norm() / expected[read].norm()).item()


@pytest.mark.parametrize("with_cache", (True, False), ids=("cache", "no cache"))
@pytest.mark.parametrize("attn_implementation", ("eager", "sdpa", "flash_attention_2"))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-3), (torch.bfloat16, 2e-2)])
def test_agrees_with_the_cpu(scan, expected, attn_implementation, dtype, tolerance, with_cache):
    if attn_implementation == "flash_attention_2":
        if not is_flash_attn_2_available():
            pytest.skip("flash-attn is not installed")
        if dtype == torch.float32:
            pytest.skip("flash-attn has no float32")
    model = tiny_model(attn_implementation).to("cuda", dtype)
    batch = {name: value.cuda() for name, value in BATCH.items()}
    with torch.set_grad_enabled(not with_cache):
        logits = model(**batch, use_cache=with_cache).logits.detach()
    error = relative_error(logits, expected)
    print(f"relative error {error:.1e}")
    assert error < tolerance


def test_gradients_agree_with_the_cpu(scan):
    inputs = {**BATCH, "labels": BATCH["input_ids"], "use_cache": False}
    expected, model = tiny_model(), tiny_model().cuda()
    expected(**inputs).loss.backward()
    model(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}).loss.backward()
    for (name, parameter), reference in zip(model.named_parameters(), expected.parameters()):
        if reference.grad is None:
            assert parameter.grad is None
        else:
            error = (parameter.grad.cpu() - reference.grad).norm() / reference.grad.norm().clamp(min=1e-6)
            assert error < 2e-2, (name, error)


@pytest.mark.parametrize("options", ({}, {"offload": True}))
@pytest.mark.parametrize("kwargs", ({}, {"layers_per_checkpoint": 2}))
def test_gradients_of_every_checkpointing_agree(scan, monkeypatch, kwargs, options):
    """Stretches of 48 tokens, so that each video has several and one stretch has several videos."""
    monkeypatch.setattr("transformers_vamba.layers.mixer.MAX_TOKENS_PER_PART", 48)
    monkeypatch.setattr(OffloadedCheckpoint, "min_bytes", 0)
    monkeypatch.setattr(HostCopy, "_PIECE_BYTES", 4096)
    inputs = {name: value.cuda() for name, value in BATCH.items()}
    inputs |= {"labels": inputs["input_ids"], "use_cache": False}
    model, expected = tiny_model().cuda().train(), tiny_model().cuda().train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs or None, **options)
    expected(**inputs).loss.backward()
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        for (name, parameter), reference in zip(model.named_parameters(), expected.parameters()):
            if reference.grad is not None:
                error = (parameter.grad - reference.grad).norm() / reference.grad.norm().clamp(min=1e-6)
                assert error < 2e-2, (name, error)


@pytest.mark.parametrize("kwargs", ({}, {"num_beams": 4}, {"cache_implementation": "static"}))
def test_generation_agrees_with_the_cpu(scan, kwargs):
    model = tiny_model()
    kwargs = {"max_new_tokens": 8, "do_sample": False, **kwargs}
    expected = model.generate(**BATCH, **kwargs)
    generated = model.cuda().generate(**{name: value.cuda() for name, value in BATCH.items()}, **kwargs)
    assert (generated.cpu() == expected).float().mean() > 0.95  # a tie may fall the other way


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kwargs", ({}, {"video_cache_implementation": "quantized"}))
def test_generation_on_a_device_that_is_not_the_current_one(kwargs):
    model = tiny_model()
    generated = [
        model.to(device, torch.bfloat16).generate(
            **{name: value.to(device) for name, value in BATCH.items()}, max_new_tokens=12, do_sample=False, **kwargs
        )
        for device in ("cuda:0", "cuda:1")
    ]
    assert torch.cuda.current_device() == 0
    assert torch.equal(generated[0].cpu(), generated[1].cpu())


@torch.no_grad()
def test_the_host_does_not_wait_between_segments():
    """It launches the kernels of a segment while the one before is computed."""
    model = tiny_model("sdpa").to("cuda", torch.bfloat16)
    segments = [make_media("video", (3, 4, 6), seed=seed) for seed in range(3)]
    cache = model.encode_video(**segments[0], num_remaining_tokens=36)  # compiles, and allocates
    cache = model.encode_video(**segments[1], cache=cache, num_remaining_tokens=18)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.encode_video(**segments[2], cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
