# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import sys

import init_from_qwen2_vl
import pytest
import torch
from layouts import write_qwen2_vl
from safetensors.torch import load_file, save_file
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

from transformers_vamba import VambaConfig, VambaForConditionalGeneration


# What sets the sizes of Qwen2-VL apart, scaled down: whether the embeddings are tied, and how many heads share a key.
SIZES = {
    "2B": {"tie_word_embeddings": True, "text_config": {"hidden_size": 96, "num_attention_heads": 6}},
    "7B": {"tie_word_embeddings": False, "text_config": {"hidden_size": 64, "num_attention_heads": 4}},
    "72B": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "num_hidden_layers": 6,
        },
    },
}
# Of the published sizes: hidden size, size of the MLP, heads, those for keys and values, layers.
SHAPES = {"2B": (1536, 8960, 12, 2, 28), "7B": (3584, 18944, 28, 4, 28), "72B": (8192, 29568, 64, 8, 80)}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["init_from_qwen2_vl.py", *map(str, arguments)])
    init_from_qwen2_vl.main()


@pytest.mark.parametrize("size", SIZES)
def test_starts_from_qwen2_vl(size, tmp_path, monkeypatch):
    config = json.loads(json.dumps(SIZES[size]))
    head_size = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
    height = 3 * head_size // 16
    section = [head_size // 2 - 2 * height, height, height]
    config["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": section,
    }
    source = write_qwen2_vl(tmp_path / "qwen2-vl", **config)
    run(monkeypatch, source, tmp_path / "vamba")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["qwen2-vl", "vamba"]

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "vamba")
    qwen2_vl = Qwen2VLForConditionalGeneration.from_pretrained(source)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == config["tie_word_embeddings"]
    state, expected = model.state_dict(), qwen2_vl.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    for layer in model.model.language_model.layers:
        for name, tensor in layer.self_attn.state_dict().items():
            assert torch.equal(layer.cross_attn.state_dict()[name], tensor)
        assert layer.alpha.item() == 0.5
        assert 1 <= layer.vision_mixer.mixer.A_log.exp().min() and layer.vision_mixer.mixer.A_log.exp().max() <= 16
        assert (layer.vision_mixer.mixer.D == 1).all()

    # Text alone is answered as before, and what the first stage trains has gradients.
    processor = AutoProcessor.from_pretrained(tmp_path / "vamba")
    text = processor(text="Which shape moved?", return_tensors="pt")
    text.pop("mm_token_type_ids")
    with torch.no_grad():
        torch.testing.assert_close(model(**text).logits, qwen2_vl(**text).logits)
    model.requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if any(part in name for part in (".cross_attn.", ".alpha"))]
    for parameter in trained:
        parameter.requires_grad_(True)
    frames = torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8)
    prompt = "<|vision_start|><|video_pad|><|vision_end|>Which shape moved?"
    inputs = processor(text=prompt, videos=[frames], do_sample_frames=False, return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained)


@pytest.mark.parametrize("size", SHAPES)
def test_published_sizes_are_valid(size):
    hidden_size, intermediate_size, num_heads, num_key_value_heads, num_layers = SHAPES[size]
    config = VambaConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "num_hidden_layers": num_layers,
        },
        vision_config={"hidden_size": hidden_size},
        tie_word_embeddings=size == "2B",
    )
    with torch.device("meta"):
        model = VambaForConditionalGeneration(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    inner_size, num_states, num_mixer_heads = 2 * hidden_size, 128, 2 * hidden_size // 64
    mixer = hidden_size + hidden_size * (2 * inner_size + 2 * num_states + num_mixer_heads)  # norm, in_proj
    mixer += 5 * (inner_size + 2 * num_states) + 3 * num_mixer_heads + inner_size + inner_size * hidden_size
    assert sum(size for name, size in sizes.items() if ".vision_mixer." in name) == num_layers * mixer
    if size == "7B":
        assert sum(sizes.values()) / 1e9 == pytest.approx(11.31, abs=0.01)  # as published


def test_faults_are_named_and_nothing_is_written(tmp_path, monkeypatch, published):
    source = write_qwen2_vl(tmp_path / "qwen2-vl")

    def broken(name, edit):
        edit(shutil.copytree(source, tmp_path / name))
        return tmp_path / name

    def reshape(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        name = next(name for name in index if name.endswith("mlp.up_proj.weight"))
        shard = folder / index[name]
        tensors = load_file(shard)
        save_file(tensors | {name: torch.zeros(3, 64)}, shard, metadata={"format": "pt"})

    shard = sorted(source.glob("*.safetensors"))[-1].name
    cases = (
        (published, "is no Qwen2-VL checkpoint"),
        (TINY_CHECKPOINT, "is no Qwen2-VL checkpoint"),
        (broken("missing", lambda folder: (folder / shard).unlink()), f"lacks 1 of .*{shard}"),
        (broken("truncated", lambda folder: (folder / shard).write_bytes(b"12345678")), "no whole safetensors file"),
        (broken("reshaped", reshape), "mlp.up_proj.weight"),
        (broken("bare", lambda folder: (folder / "tokenizer.json").unlink()), "its vocabulary is missing"),
        (source, "exists. Pass --overwrite"),
    )
    before = sorted(folder.name for folder in tmp_path.iterdir())
    for checkpoint, message in cases:
        destination = tmp_path / ("bare" if checkpoint == source else "vamba")
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, checkpoint, destination)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == before
