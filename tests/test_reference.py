# SPDX-License-Identifier: Apache-2.0
"""Agreement with the published implementation (tests/fixtures)."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_vamba import FIXTURES
from transformers import AutoModelForImageTextToText

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaModel


CASES = ("video", "image", "two_videos", "batch")
INPUTS = ("input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")


def load_case(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of `forward`, and all tensors, of one case."""
    tensors = load_file(FIXTURES / "cases" / f"{name}.safetensors")
    inputs = {key: tensors[key] for key in INPUTS if key in tensors}
    if "videos_per_sample" in tensors:
        inputs["video_sample_ids"] = torch.repeat_interleave(tensors["videos_per_sample"])
    return inputs, tensors


@pytest.fixture(scope="module", params=("eager", "sdpa"))
def model(request):
    model, info = VambaForConditionalGeneration.from_pretrained(
        FIXTURES / "published", attn_implementation=request.param, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("with_cache", (True, False), ids=("cache", "no cache"))
@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss(model, case, with_cache):
    inputs, expected = load_case(case)
    # Without a gradient the video goes into a cache segment by segment; with one, layer by layer beside the text.
    with torch.set_grad_enabled(not with_cache):
        outputs = model(**inputs, labels=expected["labels"], use_cache=with_cache)
    read = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(outputs.logits[read], expected["logits"][read], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.loss, expected["loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case != "batch"])
def test_vision_tower(model, case):
    inputs, expected = load_case(case)
    inputs = {name: value for name, value in inputs.items() if "pixel" in name or "grid" in name}
    features = model.get_image_features if case == "image" else model.get_video_features
    embeds = torch.cat(features(**inputs).pooler_output)
    torch.testing.assert_close(embeds, expected["visual_embeds"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case != "batch"])
def test_greedy_generation(model, case):
    inputs, expected = load_case(case)
    generated = model.generate(
        **inputs,
        max_new_tokens=expected["greedy_tokens"].shape[1],
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences[:, inputs["input_ids"].shape[1] :], expected["greedy_tokens"])
    torch.testing.assert_close(torch.stack(generated.logits, 1), expected["greedy_logits"], atol=1e-4, rtol=0)


def test_published_config_is_translated(tmp_path):
    config = VambaConfig.from_pretrained(FIXTURES / "published")
    assert config.model_type == "vamba" and config.text_config.model_type == "vamba_text"
    assert (config.text_config.mamba_d_state, config.text_config.mamba_d_head) == (16, 16)
    assert config.vision_config.embed_dim == 32 and config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    config.save_pretrained(tmp_path)
    assert VambaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_auto_class_with_the_config_of_a_published_checkpoint(model):
    config = VambaConfig.from_pretrained(FIXTURES / "published")
    auto = AutoModelForImageTextToText.from_pretrained(FIXTURES / "published", config=config)
    assert isinstance(auto, VambaForConditionalGeneration)
    assert all(torch.equal(a, b) for a, b in zip(auto.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("layout", ("ours", "published"))
def test_round_trip(model, layout, tmp_path):
    """Saved under either set of names, in several shards, and loaded again: the same parameters."""
    layouts = {} if layout == "published" else {"save_original_format": False}
    model.save_pretrained(tmp_path, max_shard_size="200KB", **layouts)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    names = {name for shard in shards for name in load_file(shard)}
    assert names == set(
        model.state_dict() if layout == "ours" else load_file(FIXTURES / "published/model.safetensors")
    )
    reloaded, info = VambaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state_dict = reloaded.state_dict()
    assert all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())

    base, info = VambaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"lm_head.weight"}
    base.save_pretrained(tmp_path / "base")
    base, info = VambaModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, state_dict[f"model.{name}"]) for name, value in base.state_dict().items())
