# SPDX-License-Identifier: Apache-2.0
"""Which kernels are compiled before they are needed, and when."""

import json
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_config, tiny_model
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel

from transformers_vamba import VambaForConditionalGeneration
from transformers_vamba.layers.compile_ahead import Purpose, run_parts, start_compiling
from transformers_vamba.ops import triton_support
from transformers_vamba.ops.triton_support import compiled_launches, launch, recorded_launches


CUDA = torch.device("cuda", 0)
OPS = "activation", "branch", "convolution_kernels", "flash_decoding", "gated_norm", "gelu_linear", "rotary"
OPS += "scan_kernels", "step_kernels"
VIDEO = make_media("video", (5, 4, 6))
needs_triton = pytest.mark.skipif(triton_support.triton is None, reason="Triton is not installed")


@pytest.fixture
def launches(monkeypatch):
    """What is launched, by all that Triton compiles for anew: on a CPU nothing runs, and outputs stay empty."""
    launched = []

    def record(kernel, grid, *args, **constants):
        assert all(size > 0 for size in grid)
        kinds = []
        for value, parameter in zip(args, kernel.params):
            if isinstance(value, torch.Tensor):
                kinds.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, int) and not parameter.do_not_specialize:
                kinds.append((value == 1, value % 16 == 0))
            else:
                kinds.append(type(value))
        launched.append((kernel.fn.__name__, tuple(kinds), tuple(sorted(constants.items()))))

    for name in OPS:
        module = sys.modules[f"transformers_vamba.ops.{name}"]
        monkeypatch.setattr(module, "launch", record)
        monkeypatch.setattr(module, "is_usable", lambda device: True)
    return launched


def compiled_for(launches: list, dtype: torch.dtype, **purpose: bool) -> set:
    launches.clear()
    with compiled_launches(torch.device("cpu")), torch.device("meta"):
        run_parts(tiny_config(), Purpose(dtype, CUDA, **purpose))
    compiled = set(launches)
    launches.clear()
    return compiled


@needs_triton
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_covers_training(launches, dtype):
    compiled = compiled_for(launches, dtype, is_training=True)
    model = tiny_model(dtype=dtype).train()
    model.model.visual.requires_grad_(False)
    text = make_text(length=80)  # is long enough to be rotated by a kernel
    model(input_ids=text, labels=text, use_cache=False, **VIDEO).loss.backward()
    assert set(launches) <= compiled
    assert {name for name, *_ in launches} == {name for name, *_ in compiled}


@needs_triton
@pytest.mark.parametrize("implementation", ("dynamic", "quantized"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_covers_a_question(launches, monkeypatch, dtype, implementation):
    """
    From the video to a recorded step, in which PyTorch reads the video in float32, and to what was read of its time
    steps.
    """
    compiled = compiled_for(launches, dtype, is_quantized=implementation == "quantized")
    monkeypatch.setattr("transformers_vamba.layers.decoder.prefers_flash", lambda query, *_: query.itemsize == 2)
    model = tiny_model(dtype=dtype)
    cache = model.encode_video(**VIDEO, segment_frames=4, video_cache_implementation=implementation)
    with torch.no_grad(), recorded_launches():
        model(input_ids=make_text(length=1), cache=cache)
        model.locate(make_text(length=3), cache)
    assert set(launches) <= compiled
    assert {name for name, *_ in launches} == {name for name, *_ in compiled}


@needs_triton
@pytest.mark.parametrize("num_steps", (5, 200))
def test_covers_few_and_many_patches(launches, monkeypatch, num_steps):
    """On an H100 the tower's activation is part of a product if there are many patches."""
    monkeypatch.setattr("transformers_vamba.ops.gelu_linear.shared_memory", lambda device: 232_448)
    monkeypatch.setattr("transformers_vamba.ops.gelu_linear.describe", lambda tensor, block: tensor)
    compiled = compiled_for(launches, torch.bfloat16)
    tiny_model(dtype=torch.bfloat16).encode_video(**make_media("video", (num_steps, 4, 6)), segment_frames=400)
    names = {name for name, *_ in launches}
    assert set(launches) <= compiled
    assert ("_linear_quick_gelu" in names) == (num_steps == 200) == ("_quick_gelu" not in names)


@needs_triton
def test_goes_on_after_what_it_cannot_run(launches):
    config = tiny_config(mamba_implementation="mamba_ssm")
    with compiled_launches(torch.device("cpu")), torch.device("meta"):
        run_parts(config, Purpose(torch.bfloat16, CUDA))
    names = {name for name, *_ in launches}
    assert "_rotate" in names and "_gate_and_up" in names and "carry" not in names


class Kernel:
    """What `launch` needs of a Triton kernel."""

    run = None

    def __init__(self):
        self.calls, self.may_go_on = [], threading.Event()

    def warmup(self, *args, grid, **constants):
        self.calls.append("compiling")
        assert self.may_go_on.wait(60)
        self.calls.append("compiled")
        return self

    def __getitem__(self, grid):
        return lambda *args, **constants: self.calls.append(("launched", grid, args, constants))


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: triton_support.nullcontext())


def test_a_launch_waits_for_its_own_kernel_alone(no_device):
    kernel, other = Kernel(), Kernel()
    with compiled_launches(CUDA):
        launch(kernel, (1,), 1, size=2)
        launch(other, (1,))
    threading.Timer(0.2, kernel.may_go_on.set).start()
    launch(kernel, (3,), 4, size=5)
    launch(kernel, (3,), 4, size=5)
    assert kernel.calls == ["compiling", "compiled"] + 2 * [("launched", (3,), (4,), {"size": 5})]
    assert "compiled" not in other.calls
    other.may_go_on.set()


def test_what_does_not_compile_is_launched_nevertheless(no_device):
    kernel = Kernel()
    kernel.warmup = None
    with compiled_launches(CUDA):
        launch(kernel, (1,))
    launch(kernel, (2,))
    assert kernel.calls == [("launched", (2,), (), {})]


def test_a_failure_is_silent(caplog, capfd):
    start_compiling(None, Purpose(torch.bfloat16, CUDA)).join()
    assert not caplog.text and not any(capfd.readouterr())


def test_random_numbers_stay():
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.device("cpu"):
        start_compiling(tiny_config(), Purpose(torch.float32, CUDA, is_training=True)).join()
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def started(monkeypatch):
    purposes = []

    def start(config, purpose):
        purposes.append(purpose)
        return threading.Thread(name="has ended", target=int)

    monkeypatch.setattr("transformers_vamba.modeling_vamba.start_compiling", start)
    monkeypatch.setattr(threading.Thread, "join", lambda thread: None)
    return purposes


def test_nothing_is_compiled_for_a_cpu(started):
    model = tiny_model()
    model(input_ids=make_text(), labels=make_text(), use_cache=False, **VIDEO).loss.backward()
    model.encode_video(**VIDEO)
    assert started == []


def test_once_per_purpose(started, monkeypatch):
    monkeypatch.setattr("transformers_vamba.modeling_vamba.execution_device", lambda module: torch.device("cpu"))
    model = tiny_model()
    compile_for = model.model.compile_ahead
    monkeypatch.setattr(model.model, "compile_ahead", lambda device, **purpose: compile_for(CUDA, **purpose))
    for _ in range(2):
        model.encode_video(**VIDEO)
        model.encode_video(**VIDEO, video_cache_implementation="quantized")
        model(input_ids=make_text(), use_cache=False, **VIDEO)
    usual = Purpose(torch.float32, CUDA)
    assert started == [usual, usual._replace(is_quantized=True), usual._replace(is_training=True)]


@pytest.mark.parametrize(
    "device_map, device",
    [
        (None, None),
        ({"": "cpu"}, None),
        ({"": 0}, torch.device(0) if torch.accelerator.is_available() else torch.device("cuda", 0)),
        ({"model.visual": "cpu", "model.language_model": "cuda:1", "lm_head": "disk"}, torch.device("cuda", 1)),
    ],
)
def test_starts_before_the_weights_are_read(started, monkeypatch, device_map, device):
    read = []
    monkeypatch.setattr(Qwen2VLPreTrainedModel, "_load_pretrained_model", lambda *args: read.append(args))
    model = tiny_model()
    load_config = types.SimpleNamespace(device_map=device_map)
    VambaForConditionalGeneration._load_pretrained_model(model, None, ["file"], load_config)
    assert read == [(model, None, ["file"], load_config)]
    assert started == ([] if device is None else [Purpose(torch.float32, device)])


PROGRAM = """
import json, sys, torch, triton
from tiny_vamba import make_media, make_text, tiny_model
from transformers_vamba.ops.triton_support import _compilations, is_usable

compiled = []
def listen(*, src, cache_hit, **kwargs):
    compiled.append(src.name)
triton.knobs.compilation.listener = listen

device = torch.device("cuda", 0)
assert is_usable(device)
model = tiny_model(dtype=torch.bfloat16).cuda()
for purpose in ({"is_quantized": False}, {"is_quantized": True}, {"is_training": True}):
    model.model.compile_ahead(device, **purpose)
for futures in _compilations.values():
    for future in futures:
        future.result()
ahead = len(compiled)
video = make_media("video", (40, 4, 6))
text = make_text(length=140).cuda()  # so long that PyTorch reads the video in 8 bits for it
for implementation in ("dynamic", "quantized"):
    cache = model.encode_video(**video, video_cache_implementation=implementation)
    model.generate(input_ids=text, cache=cache, max_new_tokens=16, do_sample=False, eos_token_id=None)
model.train()
model.model.visual.requires_grad_(False)
model(input_ids=text, labels=text, use_cache=False, **video).loss.backward()
torch.cuda.synchronize()
print(json.dumps([ahead, compiled[ahead:]]))
"""


@pytest.mark.gpu
def test_nothing_is_left_to_compile(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, check=True)
    ahead, later = json.loads(process.stdout.splitlines()[-1])
    assert ahead >= 20 and later == []
