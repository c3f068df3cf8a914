# SPDX-License-Identifier: Apache-2.0
"""The mixer's functions against their definitions in float64, and which implementation is taken when."""

import os
import subprocess
import sys

import kernel_checks
import pytest
import torch
from kernel_checks import (
    ACTIVATED,
    BRANCHES,
    CONVOLUTIONS,
    NORMS,
    ROUNDINGS,
    SCANS,
    STEPS,
    TEXTS,
    TOWERS,
    activated_errors,
    branch_errors,
    convolution_errors,
    decoding_errors,
    has_capability,
    norm_errors,
    rounding_errors,
    scan_errors,
    step_errors,
    text_errors,
    tower_errors,
    worst,
)
from tiny_vamba import make_block, tiny_model
from transformers.utils import is_mamba_2_ssm_available

from transformers_vamba.ops import scan as scan_module
from transformers_vamba.ops import triton_support
from transformers_vamba.ops.scan import IMPLEMENTATIONS, choose_implementation, scan
from transformers_vamba.ops.step_kernels import can_fuse


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# A video in several chunks, an odd length after another, two groups, the 7B's sizes of a head and a state.
LARGE_SCANS = [
    ([300], True, (8, 64, 128, 1)),
    ([129, 1, 260], True, (8, 64, 128, 2)),
    ([4096], False, (8, 64, 128, 1)),
]


@pytest.mark.parametrize("case", SCANS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_scan_in_torch(case, dtype, tolerance):
    assert worst(scan_errors(*case, dtype=dtype)) < tolerance


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_convolution_in_torch(case, dtype, tolerance):
    assert max(convolution_errors(*case, dtype=dtype)) < tolerance


@pytest.mark.skipif(triton_support.triton is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, kernel_checks.__file__], env=environment, check=True, timeout=600)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SCANS + LARGE_SCANS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("implementation", ("triton", "mamba_ssm", "torch"))
def test_scan_on_a_gpu(case, dtype, tolerance, implementation):
    if implementation == "mamba_ssm":
        if not is_mamba_2_ssm_available() or dtype != torch.bfloat16:
            pytest.skip("mamba-ssm is not installed, or rounds float32 to TF32")
        tolerance *= 3
    found = scan_errors(*case, device="cuda", dtype=dtype, implementation=implementation)
    print(" ".join(f"{error:.1e}" for error in found))
    assert worst(found) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_other_kernels_on_a_gpu(dtype, tolerance):
    for case in CONVOLUTIONS:
        assert max(convolution_errors(*case, device="cuda", dtype=dtype)) < tolerance
    for case in [*NORMS, (50, 7168, 7168)]:
        assert max(norm_errors(*case, device="cuda", dtype=dtype)) < tolerance
    for case in TOWERS:
        assert max(tower_errors(*case, device="cuda", dtype=dtype)) < tolerance
    for case in TEXTS:
        assert max(text_errors(*case, device="cuda", dtype=dtype)) < tolerance
    for case in [*BRANCHES, (1, 100, 1280, 5120, True, True), (1, 100, 3584, 7168, False, False)]:
        assert max(branch_errors(*case, device="cuda", dtype=dtype)) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not has_capability(9, 0), reason="the GPU is older than Hopper")
@pytest.mark.parametrize("case", [*ACTIVATED, (5000, 1280, 5120)], ids=str)
def test_activated_products_on_a_gpu(case):
    for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
        assert max(activated_errors(*case, device="cuda", dtype=dtype)) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not has_capability(8, 9), reason="the GPU has no float8")
@pytest.mark.parametrize("case", [*ROUNDINGS, (50, 3584), (50, 5120)], ids=str)
def test_rounding_on_a_gpu(case):
    found = rounding_errors(*case, device="cuda")
    print(" ".join(f"{error:.1e}" for error in found))
    assert max(found) < 1.5e-2  # a division that is not exact lets ties fall either way; a code is 2.5e-2 off


@pytest.mark.gpu
@pytest.mark.parametrize("is_token_major", (False, True), ids=("heads first", "tokens first"))
@pytest.mark.parametrize("is_quantized", (False, True), ids=("16 bits", "8 bits"))
@pytest.mark.parametrize("num_tokens", (1, 63, 5000, 200_001))
def test_decoding_on_a_gpu(num_tokens, is_quantized, is_token_major):
    for num_heads, num_queries, head_dim in [(4, 7, 128), (4, 112, 128), (4, 245, 128), (2, 1, 16)]:
        case = (num_heads, num_queries, num_tokens, head_dim, is_quantized, is_token_major)
        for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
            (error,) = decoding_errors(*case, device="cuda", dtype=dtype)
            print(f"{case}, {dtype}: relative error {error:.1e}")
            assert error < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*STEPS, (1, 1, 3584, 18944), (16, 1, 3584, 18944)], ids=str)
def test_step_on_a_gpu(case):
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        assert max(step_errors(*case, device="cuda", dtype=dtype)) < tolerance


@pytest.mark.gpu
def test_what_is_not_plain_is_not_fused():
    states, plain = torch.randn(1, 1, 64, device="cuda").half(), torch.nn.Linear(64, 64, bias=False).cuda().half()
    with torch.no_grad(), triton_support.recorded_launches():
        assert can_fuse(states, plain)
        assert not can_fuse(states.float(), plain)
        assert not can_fuse(states.expand(1, 17, 64), plain)
        assert not can_fuse(states, torch.nn.Sequential(plain))
        assert not can_fuse(states, torch.nn.Linear(64, 64).cuda().half())  # has a bias
        with torch.autocast("cuda", torch.float16):
            assert not can_fuse(states, plain)
        plain.register_forward_hook(lambda *args: None)
        assert not can_fuse(states, plain)
    with torch.no_grad():
        assert not can_fuse(states, torch.nn.Linear(64, 64, bias=False).cuda().half())  # is not recorded


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_functions_of_the_tower_in_torch(case):
    assert max(tower_errors(*case)) < 1e-6


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_rotation_of_the_text_in_torch(case):
    assert max(text_errors(*case)) < 1e-6


def test_a_tensor_on_the_cpu_takes_pytorch(monkeypatch):
    """Whatever is installed, and whatever runs on this machine's GPU."""
    monkeypatch.setattr(scan_module, "is_mamba_2_ssm_available", lambda: True)
    assert choose_implementation(CPU, torch.float32, 64, 128) == "torch"
    with pytest.raises(ValueError, match="'mamba_ssm'` cannot take torch.float32 tensors on cpu, heads of 64 and a"):
        choose_implementation(CPU, torch.float32, 64, 128, "mamba_ssm")


def test_choice_on_a_gpu(monkeypatch):
    monkeypatch.setattr("transformers_vamba.ops.scan_kernels.is_usable", lambda device: device.type == "cuda")
    monkeypatch.setattr(scan_module, "is_mamba_2_ssm_available", lambda: True)
    assert choose_implementation(CUDA, torch.bfloat16, 64, 128) == "triton"
    assert choose_implementation(CUDA, torch.bfloat16, 64, 128, "mamba_ssm") == "mamba_ssm"
    assert choose_implementation(CUDA, torch.bfloat16, 64, 128, "torch") == "torch"
    assert choose_implementation(CUDA, torch.float64, 64, 128) == "torch"
    assert choose_implementation(CUDA, torch.float32, 256, 256) == "torch"  # does not fit into a program
    assert choose_implementation(CPU, torch.bfloat16, 64, 128) == "torch"
    monkeypatch.setattr("transformers_vamba.ops.scan_kernels.is_usable", lambda device: False)
    assert choose_implementation(CUDA, torch.bfloat16, 64, 128) == "torch"


@pytest.mark.skipif(triton_support.triton is None, reason="Triton is not installed")
def test_kernels_that_cannot_run_are_no_choice(monkeypatch, caplog):
    """Such as without a C compiler: one warning, and PyTorch."""

    def fail(device):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.cuda, "device", fail)
    monkeypatch.setattr(triton_support.logger, "propagate", True)
    for _ in range(2):
        assert not triton_support.is_usable(torch.device("cuda", 77))
    assert caplog.text.count("runs no kernel (Failed to find C compiler.)") == 1


def test_unknown_implementation():
    model = tiny_model(mamba_implementation="cuda")
    block = model.model.language_model.layers[0].vision_mixer
    with pytest.raises(ValueError, match="must be one of 'triton', 'torch', 'mamba_ssm', or None .*, got 'cuda'"):
        block(torch.randn(1, 4, 64), [4])


def test_the_user_is_asked_first(monkeypatch):
    calls = []
    taken = (lambda *sizes: True, lambda *args: calls.append(args) or IMPLEMENTATIONS["torch"][1](*args))
    monkeypatch.setitem(IMPLEMENTATIONS, "mamba_ssm", taken)
    block = make_block(mamba_implementation="mamba_ssm")
    block(torch.randn(1, 4, 64), [4])
    assert len(calls) == 1


def test_no_gradient_of_what_needs_none():
    """A frozen parameter, or a state that no gradient goes back to."""
    sizes = [(9, 2, 16), (9, 2), (2,), (9, 1, 16), (9, 1, 16), (2,), (2,)]
    x, dt, A, B, C, D, dt_bias = (torch.randn(size) for size in sizes)
    y, state = scan(x.requires_grad_(), dt, -A.abs(), B, C, D, dt_bias, [9], torch.randn(2, 16, 16))
    assert torch.autograd.grad(state.sum(), x, retain_graph=True)[0].isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
