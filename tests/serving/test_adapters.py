# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT saved are served with their base."""

import itertools
import json
import os
import shutil

import pytest
import torch
from asking import QUESTION, answer, ask, num_cached, text, video
from peft import LoraConfig, PeftModel
from test_videos import wait_until
from tiny_vamba import TINY_CHECKPOINT

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor, lora_target_modules
from transformers_vamba.serving import adapters
from transformers_vamba.serving.command import serve
from transformers_vamba.training.peft import VambaPeftModel


def save_adapter(folder, seed: int, base=TINY_CHECKPOINT) -> str:
    """One that changes answers, with an `alpha` of its own."""
    torch.manual_seed(seed)
    base = VambaForConditionalGeneration.from_pretrained(base)
    targets = lora_target_modules(base.config)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    model = VambaPeftModel(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter += 0.1
    model.save_pretrained(folder)
    return str(folder)


def answer_with_peft(folder, path) -> str:
    processor = VambaProcessor.from_pretrained(TINY_CHECKPOINT)
    model = PeftModel.from_pretrained(VambaForConditionalGeneration.from_pretrained(TINY_CHECKPOINT), folder)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "path": str(path)}, text(QUESTION.text)]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_adapter_is_served_with_its_base(start, media_root, tmp_path):
    base, videos = shutil.copytree(TINY_CHECKPOINT, tmp_path / "base"), tmp_path / "videos"
    adapter = save_adapter(tmp_path / "adapter", 0, base)
    expected = answer_with_peft(adapter, media_root / "movement.mp4")
    assert expected != QUESTION.answer
    number = itertools.count(1)

    def asked(model):
        with start(model=model, media_root=media_root, video_folder=videos) as server:
            completion = ask(server, video("movement.mp4"), text(QUESTION.text), max_tokens=8)
            if not num_cached(completion):  # then it is kept
                wanted = next(number)
                wait_until(lambda: len([*videos.glob("*/layer-00003.safetensors")]) == wanted, "saved")
            return answer(completion), num_cached(completion)

    assert asked(str(base)) == (QUESTION.answer, 0)
    assert asked(adapter) == (expected, 0)  # not what the base has kept
    assert asked(adapter) == (expected, 8 * 16)
    save_adapter(tmp_path / "adapter", 1, base)
    assert asked(adapter)[1] == 0  # what was trained further has kept nothing yet
    os.utime(base / "model.safetensors")
    assert asked(adapter)[1] == 0  # nor has it on another base


def test_the_processor_of_an_adapter(start, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", 0)
    with start(model=adapter) as server:
        assert server.handler.processor.video_processor.fps == 2.0  # of the base
    processor = VambaProcessor.from_pretrained(TINY_CHECKPOINT)
    processor.video_processor.fps = 0.5
    processor.save_pretrained(adapter)
    with start(model=adapter) as server:
        assert server.handler.processor.video_processor.fps == 0.5


def test_an_adapter_that_cannot_be_served(prepared, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", 0)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        serve(adapter, device="cpu")
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="is an adapter, and adapters need PEFT: pip install peft"):
        serve(adapter, device="cpu")
