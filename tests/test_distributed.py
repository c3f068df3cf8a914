# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Two processes, of which one has no video at a time, give what one process gives with the samples of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


TESTS = Path(__file__).parent


def train(folder: Path, num_processes: int, *arguments: str):
    """Runs the program, and returns its losses and the weights it has saved."""
    command = [sys.executable, "-W", "ignore"]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, str(TESTS / "train_in_processes.py"), str(folder), *arguments],
        env=environment,
        cwd=TESTS,
        check=True,
        timeout=240,
    )
    weights = {}
    for path in (folder / "final").glob("*.safetensors"):
        weights |= load_file(path)
    return json.loads((folder / "losses.json").read_text()), weights


def assert_same_run(actual, expected):
    (losses, weights), (expected_losses, expected_weights) = actual, expected
    assert losses["train"] == pytest.approx(expected_losses["train"], rel=1e-4)
    assert losses["eval"] == pytest.approx(expected_losses["eval"], rel=1e-4)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {
        frozen: train(tmp_path_factory.mktemp("alone"), 1, *["--frozen-tower"] * frozen) for frozen in (False, True)
    }


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_a_process_without_video(tmp_path, alone, kind, frozen):
    arguments = ["--checkpointing", '{"use_reentrant": false}', *["--frozen-tower"] * frozen]
    assert_same_run(train(tmp_path, 2, *arguments, *["--fsdp2"] * (kind == "fsdp2")), alone[frozen])


@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_resume(tmp_path, alone, kind):
    arguments = ["--frozen-tower", "--checkpointing", '{"layers_per_checkpoint": 2}', *["--fsdp2"] * (kind == "fsdp2")]
    train(tmp_path, 2, "--steps", "2", *arguments)
    assert (tmp_path / "checkpoint-2").is_dir()
    assert_same_run(train(tmp_path, 2, *arguments), alone[True])
