# SPDX-License-Identifier: Apache-2.0
"""Several processes, of which some have no video at a time, give what one process gives with the samples of all."""

import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from tiny_vamba import TEXT_CONFIG, VISION_CONFIG, make_media, make_text, tiny_config, tiny_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from transformers_vamba import VambaForConditionalGeneration


TESTS = Path(__file__).parent
CONFIGS = TESTS.parents[1] / "examples" / "accelerate"

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
SHARDED = ("fsdp2", pytest.param("zero3", marks=needs_deepspeed))


def launcher(kind: str, num_processes: int, mixed_precision: str) -> list[str]:
    """The part of the command before the program."""
    if kind == "alone":
        return []
    processes = str(num_processes)
    if kind == "ddp":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{kind}.yaml")]
    return [*command, "--num_processes", processes, "--main_process_port", "0", "--mixed_precision", mixed_precision]


def run(
    kind: str,
    program: str,
    *arguments: str,
    num_processes: int = 2,
    on_gpus: bool = False,
    mixed_precision: str = "no",
    timeout: int = 240,
):
    """Runs a program of this folder, in one process or several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not on_gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            *launcher(kind, num_processes, mixed_precision),
            str(TESTS / program),
            *arguments,
        ],
        env=environment,
        cwd=TESTS,
        check=True,
        timeout=timeout,
    )


def train(folder: Path, kind: str, *arguments: str, **kwargs):
    """Runs the training program, and returns its losses and the weights it has saved."""
    folder.mkdir(exist_ok=True)
    if not (folder / "initial").is_dir():
        tiny_model().save_pretrained(folder / "initial")
    run(kind, "train_in_processes.py", str(folder), *arguments, **kwargs)
    losses = json.loads((folder / "losses.json").read_text())
    return losses, VambaForConditionalGeneration.from_pretrained(folder / "final", dtype=torch.float32).state_dict()


def assert_same_run(actual, expected, atol=1e-5, rtol=1e-4):
    (losses, weights), (expected_losses, expected_weights) = actual, expected
    assert losses["train"] == pytest.approx(expected_losses["train"], rel=rtol)
    assert losses["eval"] == pytest.approx(expected_losses["eval"], rel=rtol)
    torch.testing.assert_close(weights, expected_weights, atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and weights of one process, by what is trained of the tower and the samples of a step."""
    return functools.cache(
        lambda tower, batch=2: train(
            tmp_path_factory.mktemp("alone"), "alone", "--tower", tower, "--batch", str(batch)
        )
    )


@pytest.mark.parametrize(
    "tower, arguments",
    (
        ("trained", ("--checkpointing", '{"use_reentrant": false}')),
        ("merger", ("--skip-logits",)),
        ("frozen", ("--checkpointing", '{"use_reentrant": false}')),
    ),
)
@pytest.mark.parametrize("kind", ("ddp", *SHARDED))
def test_a_process_without_video(tmp_path, alone, kind, tower, arguments):
    assert_same_run(train(tmp_path, kind, "--tower", tower, *arguments), alone(tower))


@pytest.mark.parametrize(
    "arguments",
    (
        ("--steps", "4"),  # in the last step no process has media
        ("--steps", "2", "--accumulate", "2"),  # in the second half of the last step
        ("--steps", "8", "--checkpointing", '{"use_reentrant": false}'),  # and others follow
    ),
)
@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_what_no_process_uses_has_no_gradient(tmp_path, kind, arguments):
    """Or AdamW would move it by its momentum, and decay the weights that nobody reads."""
    arguments = ("--optim", "adamw_torch", *arguments)
    expected = train(tmp_path / "alone", "alone", *arguments)
    assert_same_run(train(tmp_path / "several", kind, *arguments), expected)
    initial = tiny_model().state_dict()
    unread = [name for name in initial if ".layers.2.vision_mixer." in name]
    assert unread and all(torch.equal(expected[1][name], initial[name]) for name in unread)


def train_and_resume(folder: Path, kind: str, before: int = 2, after: int = 2, **kwargs):
    """The first half of the steps with so many processes, and the second with so many."""
    arguments = ("--tower", "frozen", "--checkpointing", '{"layers_per_checkpoint": 2}')
    arguments += ("--batch", str(max(before, after)))
    train(folder, kind, "--steps", "2", *arguments, num_processes=before, **kwargs)
    assert (folder / "checkpoint-2").is_dir()
    return train(folder, kind, *arguments, num_processes=after, **kwargs)


@pytest.mark.parametrize("kind", ("ddp", *SHARDED))
def test_resume(tmp_path, alone, kind):
    assert_same_run(train_and_resume(tmp_path, kind), alone("frozen"))


def test_resume_on_fewer_processes(tmp_path, alone):
    assert_same_run(train_and_resume(tmp_path, "fsdp2", before=4, after=2), alone("frozen", 4))


def test_a_step_holds_nothing_after_it(monkeypatch):
    monkeypatch.setattr("transformers_vamba.modeling_vamba.is_distributed", lambda: True)
    model = tiny_model().train()
    model(input_ids=make_text(), labels=make_text(), **make_media("video", (2, 4, 4)), use_cache=False).loss.backward()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@needs_deepspeed
def test_from_qwen2_vl(tmp_path):
    text_config = {name: value for name, value in TEXT_CONFIG.items() if not name.startswith("mamba")}
    text_config["rope_parameters"] = tiny_config().text_config.rope_parameters
    config = Qwen2VLConfig(text_config=text_config, vision_config=VISION_CONFIG)
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    run("ddp", "init_in_processes.py", str(tmp_path), timeout=120)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision, atol, rtol", (("no", 1e-4, 1e-3), ("bf16", 5e-3, 2e-2)))
@pytest.mark.parametrize(
    "kind, before, after",
    (
        ("fsdp2", 2, 2),
        ("fsdp2", 4, 4),
        ("fsdp2", 4, 2),
        pytest.param("zero3", 2, 2, marks=needs_deepspeed),
        pytest.param("zero3", 4, 4, marks=needs_deepspeed),
    ),
)
def test_on_gpus(tmp_path, alone, kind, before, after, mixed_precision, atol, rtol):
    if torch.cuda.device_count() < before:
        pytest.skip(f"needs {before} CUDA devices")
    resumed = train_and_resume(tmp_path, kind, before, after, on_gpus=True, mixed_precision=mixed_precision)
    assert_same_run(resumed, alone("frozen", before), atol, rtol)
