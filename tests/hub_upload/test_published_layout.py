# SPDX-License-Identifier: Apache-2.0
"""Folders exactly as the published code writes them: the Auto classes, the chat template, and every program."""

import json
import shutil
import sys
from pathlib import Path

import ask_video
import finetune_lora_trl
import pytest
import torch
from synthetic_videos import sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from transformers_vamba import (
    VambaConfig,
    VambaDataCollator,
    VambaForConditionalGeneration,
    VambaModel,
    VambaProcessor,
    VambaVideoProcessor,
)
from transformers_vamba.__main__ import ServedProcessor


TEMPLATE = (TINY_CHECKPOINT / "chat_template.jinja").read_text()
OWN_TEMPLATE = TEMPLATE.replace("You are a helpful assistant.", "You watch.")
QUESTION = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape moved?"}]}]
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|>"
    "<|vision_end|>Which shape moved?<|im_end|>\n<|im_start|>assistant\n"
)


def edit(file: Path, **fields) -> None:
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def as_trained(published: Path, folder: Path, template=..., processor_class="Qwen2VLProcessor") -> Path:
    """As Transformers 4.44 saved it after training: the template, if any, in `tokenizer_config.json` alone."""
    shutil.copytree(published, folder)
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", chat_template=template, processor_class=processor_class)
    edit(folder / "preprocessor_config.json", processor_class=processor_class)
    return folder


@pytest.fixture(scope="module", params=("template of the tokenizer", "no template"))
def trained(request, published, tmp_path_factory):
    template = TEMPLATE if request.param == "template of the tokenizer" else ...
    return as_trained(published, tmp_path_factory.mktemp("trained") / "vamba", template)


def test_chat_template(trained, tmp_path):
    processor = VambaProcessor.from_pretrained(trained)
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True) == PROMPT
    messages = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "A cube."}]}]
    frames = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    messages[0]["content"][0]["video"] = frames
    collator = VambaDataCollator(processor, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}})
    assert (collator([{"messages": messages}])["labels"] != -100).any()
    processor.save_pretrained(tmp_path)
    assert VambaProcessor.from_pretrained(tmp_path).chat_template == TEMPLATE


@pytest.mark.parametrize("place", ("chat_template.json", "chat_template.jinja", "processor", "tokenizer", "named"))
def test_a_template_of_its_own_goes_first(published, tmp_path, place):
    folder = as_trained(published, tmp_path / "x")
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": OWN_TEMPLATE}))
    elif place == "chat_template.jinja":
        (folder / place).write_text(OWN_TEMPLATE)
    elif place == "tokenizer":
        edit(folder / "tokenizer_config.json", chat_template=OWN_TEMPLATE)
    elif place == "named":
        templates = [{"name": "default", "template": OWN_TEMPLATE}, {"name": "other", "template": TEMPLATE}]
        edit(folder / "tokenizer_config.json", chat_template=templates)
    if place == "processor":
        processor = VambaProcessor.from_pretrained(folder, chat_template=OWN_TEMPLATE)
    else:
        processor = VambaProcessor.from_pretrained(folder)
    assert "You watch." in processor.apply_chat_template(QUESTION)


def test_auto_classes_recognise_it(trained):
    config = AutoConfig.from_pretrained(trained)
    assert type(config) is VambaConfig
    assert (config.model_type, config.architectures) == ("vamba", ["VambaForConditionalGeneration"])
    assert type(AutoModel.from_pretrained(trained)) is VambaModel
    model = AutoModelForImageTextToText.from_pretrained(trained)
    assert type(model) is VambaForConditionalGeneration
    expected = VambaForConditionalGeneration.from_pretrained(TINY_CHECKPOINT).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    _, unused = AutoConfig.from_pretrained(trained, return_unused_kwargs=True, unknown=1)
    assert unused == {"unknown": 1}


@pytest.mark.parametrize("processor_class", (None, "VambaProcessor"))
def test_auto_processor_where_the_files_leave_it_open(published, tmp_path, processor_class):
    processor = AutoProcessor.from_pretrained(as_trained(published, tmp_path / "x", processor_class=processor_class))
    assert type(processor) is VambaProcessor
    assert type(processor.video_processor) is VambaVideoProcessor


def test_prompts_of_qwen2_vls_processor_are_refused(trained):
    """Which `AutoProcessor` makes where the files name it."""
    processor = AutoProcessor.from_pretrained(trained, chat_template=TEMPLATE)
    assert type(processor) is Qwen2VLProcessor
    frames = torch.zeros(4, 3, 56, 84, dtype=torch.uint8)
    inputs = processor(text=PROMPT, videos=[frames], do_sample_frames=False, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(trained)
    with pytest.raises(ValueError, match="prepare it with `VambaProcessor`, not with Qwen2-VL's processor"):
        model.generate(**inputs, max_new_tokens=1)


def test_plain_qwen2_vl_is_as_without_this_package(tmp_path):
    section = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    text = section | {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": None, "eos_token_id": 1}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    found, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, use_cache=False, unknown=1)
    assert type(found) is Qwen2VLConfig
    assert found.to_json_string() == Qwen2VLConfig.from_pretrained(tmp_path).to_json_string()
    assert unused["unknown"] == 1
    assert type(AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision)) is Qwen2VLConfig
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is Qwen2VLForConditionalGeneration
    assert type(AutoModelForImageTextToText.from_config(found)) is Qwen2VLForConditionalGeneration


def test_a_qwen2_vl_with_code_of_its_own_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "repository"
    Qwen2VLConfig().save_pretrained(folder)
    edit(folder / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    code = "from transformers import Qwen2VLConfig\n\n\nclass OwnConfig(Qwen2VLConfig):\n    pass\n"
    (folder / "configuration_own.py").write_text(code)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "OwnConfig"
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) is Qwen2VLConfig


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    video, path = sample_video([80, 0], 8, "start_end"), tmp_path_factory.mktemp("video") / "video.mp4"
    write_mp4(path, video)
    return str(path)


def test_ask_video(trained, video, monkeypatch, capsys):
    arguments = [video, "Which shape moved?", "--model", str(trained), "--device", "cpu", "--longest-edge", "112"]
    monkeypatch.setattr(sys, "argv", ["ask_video.py", *arguments, "--num-frames", "4"])
    ask_video.main()
    printed = capsys.readouterr().out
    assert "Forecast: " in printed and "Question: Which shape moved?\nAnswer:   " in printed


def test_finetune_lora_trl(trained, video, tmp_path):
    row = {"file_name": video, "question": "Which shape moved?", "answer": "the cube"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    options = "--max_steps 1 --use_cpu --bf16 False --report_to none --save_strategy no --num_frames 2".split()
    options += "--dataloader_num_workers 0 --per_device_train_batch_size 1 --disable_tqdm True".split()
    finetune_lora_trl.main(
        ["--model", str(trained), "--videos", str(tmp_path), "--output_dir", str(tmp_path / "x"), *options]
    )
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "x")) is VambaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path / "x")) is VambaProcessor


def test_server(trained, tmp_path):
    processor = ServedProcessor.from_pretrained(trained, revision="main", trust_remote_code=False)
    assert type(processor) is VambaProcessor
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True) == PROMPT
    edit(shutil.copytree(trained, tmp_path / "plain") / "config.json", vision_mamba_mixer_config=...)
    assert type(ServedProcessor.from_pretrained(tmp_path / "plain")) is Qwen2VLProcessor
