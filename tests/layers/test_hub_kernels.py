# SPDX-License-Identifier: Apache-2.0
"""The scan from the Hub, with `use_kernels=True`: a repository on the disk takes the Hub's place."""

import inspect
import json
from types import MethodType

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_model
from transformers import PreTrainedModel
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.utils import is_kernels_available

from transformers_vamba import VambaForConditionalGeneration
from transformers_vamba.layers.mixer import VambaHubScan
from transformers_vamba.ops.scan import _scan_in_torch
from transformers_vamba.ops.state import ScanInputs


NAME = "mamba_chunk_scan_combined"
KERNEL = """
import torch
from test_hub_kernels import chunk_scan


class mamba_chunk_scan_combined(torch.nn.Module):
    forward = chunk_scan


class layers:
    mamba_chunk_scan_combined = mamba_chunk_scan_combined
"""
TEXT = make_text(2)
VIDEO = {**make_media("video", (9, 6, 8), (2, 4, 4)), "video_sample_ids": torch.tensor([0, 1])}
CALLS = []


def chunk_scan(
    self,
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **kwargs,
):
    """With the Hub's arguments, of shape `(1, num_tokens, ...)`."""
    assert dt_softplus and return_final_states and hidden_states.shape[:2] == dt.shape[:2]
    lengths = [dt.shape[1]]
    if kwargs.get("seq_idx") is not None:
        lengths = kwargs["seq_idx"][0].unique_consecutive(return_counts=True)[1].tolist()
    CALLS.append(lengths)
    state = None if initial_states is None else initial_states[0]
    y, state = _scan_in_torch(ScanInputs(hidden_states[0], dt[0], A, B[0], C[0], D, dt_bias, lengths, state))
    return y[None], state[None]


def logits(model):
    CALLS.clear()
    with torch.no_grad():
        return model(input_ids=TEXT, use_cache=False, **VIDEO).logits


@pytest.fixture
def model(monkeypatch):
    """A model whose mixers have the kernel, put there as `kernels` does it."""

    def replace(model, use_kernels):
        for module in model.modules():
            if isinstance(module, VambaHubScan):
                module.forward = MethodType(chunk_scan, module)

    monkeypatch.setattr(PreTrainedModel, "set_use_kernels", replace)
    model = tiny_model()
    model.set_use_kernels(True)
    return model


def test_order_of_choice(model):
    """What is asked for by name, then the Hub's, then our own."""
    expected = logits(tiny_model())
    assert not CALLS
    assert torch.equal(logits(model), expected) and len(CALLS) == 4  # two videos, in two of three layers
    model.config.text_config.mamba_implementation = "torch"
    assert torch.equal(logits(model), expected) and not CALLS


def test_packed_videos(model):
    """Several in one call."""
    mixer = model.model.language_model.layers[0].vision_mixer
    states = torch.randn(1, 12, 64)
    CALLS.clear()
    found, _ = mixer(states, [5, 7])
    assert CALLS == [[5, 7]]
    model.config.text_config.mamba_implementation = "torch"
    assert torch.equal(found, mixer(states, [5, 7])[0])


def test_a_tensor_meets_no_kernel_for_another_device(model):
    for module in model.modules():
        if isinstance(module, VambaHubScan):
            assert module.device_type == "cpu"
            module.device_type = "cuda"
    assert torch.equal(logits(model), logits(tiny_model())) and not CALLS
    mixer = model.model.language_model.layers[0].vision_mixer.mixer
    assert mixer.hub_scan.on(torch.device("cuda", 1)) and not mixer.hub_scan.on(torch.device("cpu"))


def test_nothing_in_checkpoints():
    assert not any("hub_scan" in name for name in tiny_model().state_dict())


@pytest.mark.skipif(is_kernels_available(), reason="the function is a module then")
def test_arguments_are_those_of_transformers():
    """`kernels` takes none that has others."""
    ours = inspect.signature(VambaHubScan().forward)
    assert list(ours.parameters.values()) == list(inspect.signature(mamba2_chunk_scan).parameters.values())


@pytest.mark.skipif(not is_kernels_available(), reason="`kernels` is not installed in a version for this Transformers")
def test_with_the_kernels_package(tmp_path):
    from kernels import LocalLayerRepository, use_kernel_mapping

    metadata = {"id": "scan_1", "name": "scan", "version": 1, "license": "Apache-2.0", "python-depends": []}
    (tmp_path / "kernel" / "build").mkdir(parents=True)
    (tmp_path / "kernel" / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    (tmp_path / "kernel" / "__init__.py").write_text(KERNEL)
    repository = LocalLayerRepository(tmp_path / "kernel", layer_name=NAME)
    tiny_model().save_pretrained(tmp_path / "model")
    expected = logits(tiny_model())
    with use_kernel_mapping({NAME: {"cpu": repository}}, inherit_mapping=False):
        model = VambaForConditionalGeneration.from_pretrained(tmp_path / "model", use_kernels=True)
        assert torch.equal(logits(model), expected) and len(CALLS) == 4
        model.train()
        assert torch.equal(logits(model), expected) and len(CALLS) == 4
    loss = model(input_ids=TEXT, labels=TEXT, use_cache=False, **VIDEO).loss
    loss.backward()
    assert model.model.language_model.layers[0].vision_mixer.mixer.A_log.grad.abs().sum() > 0
