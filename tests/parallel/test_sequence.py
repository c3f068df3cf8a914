# SPDX-License-Identifier: Apache-2.0
"""A video in stretches on several ranks gives the loss and the gradients that one process gives with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_vamba import tiny_model
from train_sequence_parallel import CASES, make_sample, prepare


TESTS = Path(__file__).parent


def run(folder: Path, *ranks: int, device: str = "cpu") -> dict[int, list[dict]]:
    """What each rank has saved, by the number of ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(ranks))]
    program = [str(TESTS / "train_sequence_parallel.py"), str(folder), "--device", device, "--ranks", *map(str, ranks)]
    subprocess.run(
        [sys.executable, "-W", "ignore", *launch, *program],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=TESTS,
        check=True,
        timeout=120,
    )
    return {
        num_ranks: [torch.load(folder / f"{num_ranks}-{rank}.pt") for rank in range(num_ranks)] for num_ranks in ranks
    }


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), 2, 3)


def assert_same_step(actual, case: str, loss_tolerance: float = 1e-6, grad_tolerance: float = 1e-5):
    """Loss and gradients of a rank are those of one process in float64."""
    (loss, grads), model = actual, prepare(case)
    expected_loss = model(**make_sample(case)).loss
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=loss_tolerance)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # frozen, or read by nobody: DDP waits for it all the same
            assert name not in grads or (parameter.requires_grad and not grads[name].any()), name
            continue
        scale = float(parameter.grad.abs().max())
        if name.endswith("cross_attn.k_proj.bias"):  # the same number for all keys changes nothing
            assert scale < 1e-7
            scale = 1e-2
        torch.testing.assert_close(
            grads[name].to(parameter.dtype), parameter.grad, rtol=0, atol=grad_tolerance * scale, msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(on_ranks, case):
    for result in on_ranks[2] + on_ranks[3]:
        assert_same_step(result[case], case)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", (2, 4))
def test_on_gpus(tmp_path, num_ranks):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} CUDA devices")
    for result in run(tmp_path, num_ranks, device="cuda")[num_ranks]:
        for case in CASES:
            assert_same_step(result[case], case, loss_tolerance=1e-4, grad_tolerance=1e-2)


def test_evaluation(on_ranks):
    expected_loss = prepare("plain").eval()(**make_sample("plain")).loss.item()
    assert [result["eval_loss"] for result in on_ranks[2] + on_ranks[3]] == pytest.approx(
        [expected_loss] * 5, rel=1e-6
    )


@pytest.mark.parametrize("num_ranks", (2, 3))
def test_errors(on_ranks, num_ranks):
    for result in on_ranks[num_ranks]:
        for error, expected in zip(
            result["errors"],
            ("none of them any", "same text", "one sample", "keeps no cache", "one video"),
            strict=True,
        ):
            assert expected in error


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="attention_dropout"):
        tiny_model(attention_dropout=0.1).set_sequence_parallel_group(object())
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    with pytest.raises(ValueError, match="lora_dropout"):
        adapted.set_sequence_parallel_group(object())
