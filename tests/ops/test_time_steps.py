# SPDX-License-Identifier: Apache-2.0
"""How much of each time step queries read, in PyTorch and by the kernel, and which of the two it is."""

import pytest
import torch
from kernel_checks import READINGS, reading_errors

from transformers_vamba.ops import time_steps
from transformers_vamba.ops.quantized_attention import quantize


HOUR = (299,) * 1800  # of 640x360 frames, one per second


@pytest.fixture(params=(2**24, 60), ids=("at once", "in chunks"))
def chunks(request, monkeypatch):
    monkeypatch.setattr(time_steps, "SCORES_AT_ONCE", request.param)


@pytest.mark.parametrize("case", READINGS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_in_torch(case, dtype, chunks):
    assert reading_errors(*case, dtype=dtype)[0] < 1e-4


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_which_states_the_kernel_takes(dtype, monkeypatch):
    taken = []

    def sum_in_kernel(query, keys, bounds, scaling):
        taken.append((bounds.tolist(), scaling))
        return torch.zeros(*query.shape[:2], len(bounds) - 1)

    monkeypatch.setattr("transformers_vamba.ops.flash_decoding.is_usable", lambda device: True)
    monkeypatch.setattr(time_steps, "log_sums_of_steps", sum_in_kernel)
    steps, query = torch.tensor([2, 0, 3]), torch.randn(2, 300, 16, dtype=dtype)
    keys = torch.randn(1, 2, 5, 16, dtype=dtype)
    for states in (keys, quantize(keys, torch.zeros(1, 2, 1, 16))):
        log_weights = time_steps.log_weights_of_steps(query, states, steps, 0.25)
        assert taken.pop() == ([0, 2, 2, 5], 0.25)
        torch.testing.assert_close(log_weights, torch.full((2, 300, 3), 1 / 3).log())
    others = [(query.float(), keys), (query, keys.float()), (query.double(), keys.double())]
    for other in (*others, (query[..., :12], keys[..., :12])):
        time_steps.log_weights_of_steps(*other, steps, 0.25)
    assert not taken


@pytest.mark.gpu
@pytest.mark.parametrize("is_token_major", (False, True), ids=("heads first", "tokens first"))
@pytest.mark.parametrize("is_quantized", (False, True), ids=("16 bits", "8 bits"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_on_a_gpu(is_quantized, is_token_major, dtype):
    cases = [case[:4] for case in READINGS] + [(4, 224, HOUR[:200], 128), (4, 7, (20_001, 5, 0, 64), 128)]
    for case in cases:
        found = reading_errors(*case, is_quantized, is_token_major, device="cuda", dtype=dtype)
        print(f"{case[:2]}: " + " ".join(f"{error:.1e}" for error in found))
        assert max(found) < 1e-4
