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
import train_in_processes
from tiny_vamba import TEXT_CONFIG, VISION_CONFIG, make_media, make_text, tiny_config, tiny_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from transformers_vamba import VambaForConditionalGeneration


TESTS = Path(__file__).parent
CONFIGS = TESTS.parents[1] / "examples" / "accelerate"

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
SHARDED = ("fsdp2", pytest.param("zero3", marks=needs_deepspeed))
# The arguments of train_in_processes.py; of a resumed run, before and after it.
WITHOUT_VIDEO = {
    "trained": [("--tower", "trained", "--checkpointing", '{"use_reentrant": false}')],
    "merger": [("--tower", "merger", "--skip-logits")],
    "frozen": [("--tower", "frozen", "--checkpointing", '{"use_reentrant": false}')],
}
ADAMW = ("--optim", "adamw_torch")
WITHOUT_GRADIENT = {
    "last step": [(*ADAMW, "--steps", "4")],  # in which no process has media
    "half of the last step": [(*ADAMW, "--steps", "2", "--accumulate", "2")],
    "and others follow": [(*ADAMW, "--steps", "8", "--checkpointing", '{"use_reentrant": false}')],
}
FROZEN = ("--tower", "frozen", "--checkpointing", '{"layers_per_checkpoint": 2}')
RUNS = {**WITHOUT_VIDEO, **WITHOUT_GRADIENT, "resumed": [(*FROZEN, "--steps", "2"), (*FROZEN, "--resume")]}


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


def result(folder: Path):
    """Losses and saved weights of a run."""
    losses = json.loads((folder / "losses.json").read_text())
    return losses, VambaForConditionalGeneration.from_pretrained(folder / "final", dtype=torch.float32).state_dict()


def train_alone(folder: Path, *arguments: str):
    """In the process of the tests."""
    tiny_model().save_pretrained(folder / "initial")
    train_in_processes.train(str(folder), *arguments)
    return result(folder)


def train(folder: Path, kind: str, names, **kwargs) -> dict[str, tuple]:
    """Losses and weights of these runs, which one launch does one after another."""
    commands = []
    for name in names:
        tiny_model().save_pretrained(folder / name / "initial")
        for arguments in RUNS[name]:
            commands += ["--then", str(folder / name), *arguments]
    run(kind, "train_in_processes.py", *commands, **kwargs)
    return {name: result(folder / name) for name in names}


def assert_same_run(actual, expected, atol=1e-5, rtol=1e-4):
    (losses, weights), (expected_losses, expected_weights) = actual, expected
    assert losses["train"] == pytest.approx(expected_losses["train"], rel=rtol)
    assert losses["eval"] == pytest.approx(expected_losses["eval"], rel=rtol)
    torch.testing.assert_close(weights, expected_weights, atol=atol, rtol=rtol)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and weights of one process, by its arguments."""
    return functools.cache(lambda *arguments: train_alone(tmp_path_factory.mktemp("alone"), *arguments))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Losses and weights of all runs that processes of a kind do."""
    runs = {"ddp": RUNS, "fsdp2": RUNS, "zero3": [*WITHOUT_VIDEO, "resumed"]}
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp(kind), kind, runs[kind]))


@pytest.mark.parametrize("tower", WITHOUT_VIDEO)
@pytest.mark.parametrize("kind", ("ddp", *SHARDED))
def test_a_process_without_video(several, alone, kind, tower):
    assert_same_run(several(kind)[tower], alone("--tower", tower))


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_what_no_process_uses_has_no_gradient(several, alone, kind, name):
    """Or AdamW would move it by its momentum, and decay the weights that nobody reads."""
    expected = alone(*WITHOUT_GRADIENT[name][0])
    assert_same_run(several(kind)[name], expected)
    initial = tiny_model().state_dict()
    unread = [name for name in initial if ".layers.2.vision_mixer." in name]
    assert unread and all(torch.equal(expected[1][name], initial[name]) for name in unread)


@pytest.mark.parametrize("kind", ("ddp", *SHARDED))
def test_resume(several, alone, kind):
    assert_same_run(several(kind)["resumed"], alone("--tower", "frozen"))


def train_and_resume(folder: Path, kind: str, before: int, after: int, **kwargs):
    """The first half of the steps with so many processes, and the second with so many."""
    tiny_model().save_pretrained(folder / "initial")
    for num_processes, arguments in zip((before, after), RUNS["resumed"]):
        arguments = (*arguments, "--batch", str(max(before, after)))
        run(kind, "train_in_processes.py", str(folder), *arguments, num_processes=num_processes, **kwargs)
        assert (folder / "checkpoint-2").is_dir()
    return result(folder)


def test_resume_on_fewer_processes(tmp_path, alone):
    resumed = train_and_resume(tmp_path, "fsdp2", before=4, after=2)
    assert_same_run(resumed, alone("--tower", "frozen", "--batch", "4"))


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
    assert_same_run(resumed, alone("--tower", "frozen", "--batch", str(before)), atol, rtol)
