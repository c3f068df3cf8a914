# SPDX-License-Identifier: Apache-2.0
"""The model: rows, segments, gradients, initialisation, checkpoints, errors."""

import json

import pytest
import torch
from batches import TEXTS, gradients, make_batch, make_row
from safetensors.torch import load_file
from tiny_vamba import VISION_CONFIG, cache_of, make_media, make_text, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

from transformers_vamba import VambaCache, VambaConfig, VambaForConditionalGeneration, VambaModel, VambaTextModel
from transformers_vamba.inputs.media import Medium


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("padding_side", ("left", "right"))
@pytest.mark.parametrize("attn_implementation", ("eager", "sdpa"))
def test_batch_gives_each_row_what_it_gives_alone(model, attn_implementation, padding_side, use_cache):
    model.set_attn_implementation(attn_implementation)
    batch = make_batch(padding_side)
    # Without a cache but with a gradient, both streams go through the decoder layer by layer.
    with torch.set_grad_enabled(not use_cache):
        logits = model(**batch, use_cache=use_cache).logits
        for row in range(4):
            alone = model(**make_row(row), use_cache=use_cache).logits[0]
            torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], alone, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("use_cache", (True, False))
def test_videos_of_one_length(model, use_cache):
    """As many videos as rows, all of one length, which the cross-attention takes as a batch where no cache is kept."""
    videos = [make_media("video", (3, 4, 6), seed=seed) for seed in range(3)]
    text = make_text(3)
    batch = {name: torch.cat([video[name] for video in videos]) for name in videos[0]}
    with torch.set_grad_enabled(not use_cache):
        logits = model(input_ids=text, use_cache=use_cache, **batch).logits
        for row, video in enumerate(videos):
            alone = model(input_ids=text[row : row + 1], use_cache=use_cache, **video).logits[0]
            torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grids", ([(3, 4, 6)], [(2, 4, 6), (1, 4, 6)], [(2, 4, 6), (1, 4, 4)]))
def test_frames_of_one_size_are_a_batch_of_the_vision_tower(model, grids):
    video = make_media("video", *grids)
    with torch.no_grad():
        expected = torch.cat(model.get_video_features(**video).pooler_output)
        pixels = video["pixel_values_videos"].split([t * h * w for t, h, w in grids])
        embeds = model.model.embed_media(list(map(Medium, pixels, grids)))[0]
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)


def test_batch_generates_what_each_row_does_alone(model):
    batch = make_batch("left")
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row in range(4):
        alone = model.generate(**make_row(row), max_new_tokens=8, do_sample=False)[0, len(TEXTS[row]) :]
        assert torch.equal(generated[row], alone)


def test_batch_gives_the_gradient_of_its_rows(model):
    batch = make_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    together = gradients(model, [model(**batch, labels=labels, use_cache=False, num_items_in_batch=1).loss])
    singles = [make_row(row) for row in range(4)]
    alone = gradients(
        model, (model(**row, labels=row["input_ids"], use_cache=False, num_items_in_batch=1).loss for row in singles)
    )
    assert together.keys() == alone.keys()
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", ("cache", "checkpointing", "reentrant checkpointing"))
def test_gradient_is_the_same_in_every_mode(variant):
    model = tiny_model().train()
    inputs = {**make_row(3), "labels": make_row(3)["input_ids"]}
    expected = gradients(model, [model(**inputs).loss])
    if variant != "cache":
        model.gradient_checkpointing_enable({"use_reentrant": variant.startswith("reentrant")})
        model.enable_input_require_grads()
    outputs = model(**inputs, use_cache=variant == "cache")
    assert (cache_of(outputs) is not None) == (variant == "cache")
    torch.testing.assert_close(gradients(model, [outputs.loss]), expected, atol=1e-5, rtol=1e-4)


def test_every_parameter_that_is_read_gets_a_gradient():
    model = tiny_model().train()
    grads = gradients(model, [model(**make_row(2), labels=make_row(2)["input_ids"]).loss])
    last = f"layers.{model.config.text_config.num_hidden_layers - 1}.vision_mixer."
    for name, _ in model.named_parameters():
        if last in name:
            assert name not in grads  # nobody reads what the last mixer gives
        else:
            assert torch.isfinite(grads[name]).all() and grads[name].any(), name
    assert grads.keys() == {name for name, _ in model.named_parameters() if last not in name}


@pytest.mark.parametrize("value, clamped", [(-0.5, 0.0), (1.7, 1.0), (0.3, 0.3)])
def test_alpha_is_clamped_and_keeps_its_gradient(model, value, clamped):
    layer = model.model.language_model.layers[0]
    before = layer.alpha.data.clone()

    def run(alpha):
        layer.alpha.data.fill_(alpha)
        logits = model(**make_row(1), use_cache=False).logits
        return logits.detach(), gradients(model, [logits.square().mean()])["model.language_model.layers.0.alpha"]

    logits, gradient = run(value)
    expected_logits, expected_gradient = run(clamped)
    assert layer.alpha.item() == pytest.approx(clamped)  # the forward pass left the parameter alone
    layer.alpha.data.copy_(before)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.any()


@pytest.mark.parametrize("segment_frames", (1, 2, 4, 6, 10_000))
def test_segments_change_nothing(model, segment_frames):
    video = make_media("video", (7, 4, 6), (2, 4, 4), seed=5)
    text = make_text()
    with torch.no_grad():
        expected = model(input_ids=text, **video).logits
        cache = model.encode_video(**video, segment_frames=segment_frames)
        logits = model(input_ids=text, cache=cache).logits
    assert cache.video_lengths == [7 * 6 + 2 * 4]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", ([1], [3, 4], [1, 2, 3, 4, 5, 6]))
def test_appending_changes_nothing(model, cuts):
    video = make_media("video", (7, 4, 6), seed=5)
    expected = model.encode_video(**video)
    cache = None
    for piece in video["pixel_values_videos"].view(7, 24, -1).tensor_split(cuts):
        grid = torch.tensor([[len(piece), 4, 6]])
        cache = model.encode_video(piece.flatten(0, 1), grid, cache=cache)
    for layer, expected_layer in zip(cache.videos[0], expected.videos[0]):
        torch.testing.assert_close(layer.keys, expected_layer.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected_layer.values, atol=1e-5, rtol=1e-4)


def test_order_of_images_and_videos(model):
    """A video before an image reads otherwise than an image before a video."""
    inputs = make_row(3)
    with torch.no_grad():
        video_first = model(**inputs).logits
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].flip(1)
        image_first = model(**inputs).logits
        del inputs["mm_token_type_ids"]
        default = model(**inputs).logits
    assert not torch.allclose(video_first, image_first)
    torch.testing.assert_close(default, image_first)


def test_hidden_states_attentions_and_logits_to_keep(model):
    model.set_attn_implementation("eager")
    batch = make_batch("left")
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        last = model(**batch, logits_to_keep=2).logits
    model.set_attn_implementation("sdpa")
    assert len(outputs.hidden_states) == 4 and outputs.hidden_states[0].shape == (4, 12, 64)
    assert len(outputs.attentions) == 3 and outputs.attentions[0].shape == (4, 4, 12, 12)
    torch.testing.assert_close(last, outputs.logits[:, -2:])


def test_auto_classes(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VambaConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), VambaModel)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(reloaded, VambaForConditionalGeneration)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.state_dict().values(), model.state_dict().values()))
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**make_row(3)).logits, model(**make_row(3)).logits)


def test_load_state_dict_takes_what_is_saved(tmp_path, model):
    """Under the published names, as `Trainer` does when it resumes."""
    model.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in state_dict and "model.embed_tokens.weight" in state_dict
    other = VambaForConditionalGeneration(tiny_config())
    other.load_state_dict(state_dict)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("offloaded", ("decoder", "vision tower", "everything"))
def test_offload_to_disk(offloaded, model, tmp_path):
    """Weights that Accelerate brings in as they are needed, those read past their module's forward included."""
    model.save_pretrained(tmp_path)
    decoder = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
    parts = ["model.visual", "lm_head", *(f"model.language_model.{part}" for part in decoder)]
    kept = {"decoder": parts[:2], "vision tower": parts[1:], "everything": parts[3:4]}[offloaded]
    device_map = {part: "cpu" if part in kept else "disk" for part in parts}
    moved = VambaForConditionalGeneration.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in moved.parameters())
    with torch.no_grad():
        torch.testing.assert_close(moved(**make_row(3)).logits, model(**make_row(3)).logits)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(moved.generate(**make_row(2), **kwargs), model.generate(**make_row(2), **kwargs))


@pytest.mark.parametrize("on_meta", (False, True))
def test_initialisation(on_meta, tmp_path):
    """Every parameter as it should start, also when the model was created without memory."""
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=4)
    if on_meta:
        model, info = VambaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict={}, output_loading_info=True
        )
        assert len(info["missing_keys"]) == len(model.state_dict())
    else:
        model = VambaForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        mixer = layer.vision_mixer.mixer
        assert layer.alpha.item() == 0.5
        assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all() and (layer.vision_mixer.norm.weight == 1).all()
        A = mixer.A_log.exp()
        assert A.min() >= 1 and A.max() <= 16.001 and A.std() > 1
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert dt.min() >= 9.9e-4 and dt.max() <= 0.101 and dt.log().std() > 0.3
        assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert mixer.conv1d.weight.abs().max() <= 0.5 and mixer.conv1d.weight.std() > 0.2
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_from_qwen2_vl(tmp_path):
    text_config = {name: value for name, value in tiny_config().text_config.to_dict().items() if "mamba" not in name}
    text_config.pop("model_type")
    qwen = Qwen2VL(Qwen2VLConfig(text_config=text_config, vision_config=VISION_CONFIG))
    qwen.save_pretrained(tmp_path)
    model = VambaForConditionalGeneration.from_qwen2_vl(tmp_path, text_config={"mamba_d_state": 8, "mamba_d_head": 16})
    assert model.config.text_config.mamba_d_state == 8
    state_dict = model.state_dict()
    for name, value in qwen.state_dict().items():
        assert torch.equal(state_dict[name], value), name
        if ".self_attn." in name:
            assert torch.equal(state_dict[name.replace(".self_attn.", ".cross_attn.")], value)
    # With α at 1 nothing of the video is read, and Qwen2-VL's logits come back.
    text = make_text(2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=text).logits, qwen(input_ids=text).logits, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path / "vamba")
    with pytest.raises(ValueError, match="no Qwen2-VL checkpoint.*'vamba'"):
        VambaForConditionalGeneration.from_qwen2_vl(tmp_path / "vamba")


def test_checkpoint_with_missing_parameters(tmp_path, model):
    state_dict = model.state_dict()
    del state_dict["model.language_model.layers.1.vision_mixer.mixer.A_log"]
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match="lacks 1 parameters.*layers.1.vision_mixer.mixer.A_log"):
        VambaForConditionalGeneration.from_pretrained(tmp_path)


VIDEO = make_media("video", (2, 4, 4))
BAD_INPUTS = {
    "video without grid": (1, {"pixel_values_videos": VIDEO["pixel_values_videos"]}, "without `video_grid_thw`"),
    "grid without video": (1, {"video_grid_thw": VIDEO["video_grid_thw"]}, "without `pixel_values_videos`"),
    "grid of the wrong shape": (1, {**VIDEO, "video_grid_thw": torch.tensor([2, 4, 4])}, r"shape .*got \(3,\)"),
    "too few patches": (
        1,
        {**VIDEO, "pixel_values_videos": VIDEO["pixel_values_videos"][:-1]},
        r"shape \(32, 1176\).*\(31, 1176\)",
    ),
    "odd grid": (1, {**make_media("video", (2, 3, 4))}, r"\[2, 3, 4\].*multiples of the merge size 2"),
    "media for no row": (3, {**make_media("video", (1, 4, 4), (1, 4, 4))}, "describes 2 media for 3 rows"),
    "too few sample ids": (
        2,
        {**make_media("video", (1, 4, 4), (1, 4, 4)), "video_sample_ids": torch.tensor([0])},
        "`video_sample_ids` has 1 entries for the 2",
    ),
    "a row that is not there": (2, {**VIDEO, "video_sample_ids": torch.tensor([2])}, r"must lie in 0\.\.1.*\[2\]"),
    "prompt with another count": (
        1,
        {**VIDEO, "mm_token_type_ids": torch.tensor([[2, 2, 0]])},
        "0 images and 2 videos.*0 images and 1 videos",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("call", ("forward", "generate"))
def test_bad_inputs(model, case, call):
    batch_size, inputs, message = BAD_INPUTS[case]
    text = make_text(batch_size, length=3)
    with pytest.raises(ValueError, match=message):
        if call == "forward":
            model(input_ids=text, **inputs)
        else:
            model.generate(input_ids=text, max_new_tokens=2, **inputs)


def test_no_text(model):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**VIDEO)


BAD_CONFIGS = {
    "heads": ({"num_attention_heads": 5}, r"`hidden_size` \(64\) must be a multiple of `num_attention_heads` \(5\)"),
    "key heads": ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`"),
    "mamba heads": ({"mamba_d_head": 48}, r"\(128\) must be a multiple of `mamba_d_head` \(48\)"),
    "groups": ({"mamba_n_groups": 3}, "multiple of `mamba_n_groups`"),
    "zero": ({"mamba_d_state": 0}, "`mamba_d_state` must be at least 1, got 0"),
    "width": (
        {"hidden_size": 128},
        r"`vision_config.hidden_size` \(64\) must equal `text_config.hidden_size` \(128\)",
    ),
    "sections": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 3]}},
        "must sum to half of the attention head size .*got 6",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case):
    fields, message = BAD_CONFIGS[case]
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    "section, name, value",
    [
        (None, "use_alpha_balancing", False),
        (None, "cross_attn_use_position_embeddings", True),
        (None, "cross_attn_use_layer_norm", True),
        ("vision_mamba_mixer_config", "enable", False),
        ("vision_mamba_mixer_config", "norm_type", "layernorm"),
        ("vision_mamba_mixer_config", "D_has_hdim", True),
        ("vision_mamba_mixer_config", "norm_before_gate", True),
        ("vision_mamba_mixer_config", "dt_limit", [0.0, 1.0]),
        ("vision_mamba_mixer_config", "d_ssm", 64),
    ],
)
def test_published_config_with_an_unsupported_switch(section, name, value, tmp_path):
    from test_reference import FIXTURES

    published = json.loads((FIXTURES / "published/config.json").read_text())
    (published if section is None else published[section])[name] = value
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match=f"`.*{name}` is .*only .* is supported"):
        VambaConfig.from_pretrained(tmp_path)


def test_text_model_alone():
    model = VambaTextModel(tiny_config().text_config).eval()
    text = make_text(2)
    with torch.no_grad():
        whole = model(input_ids=text).last_hidden_state
        cache = cache_of(model(input_ids=text[:, :5]))
        rest = model(input_ids=text[:, 5:], cache=cache).last_hidden_state
    assert isinstance(cache, VambaCache)
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("trained", ("", "merger", "visual"))
def test_pixels_take_a_gradient_in_every_mode(trained, training):
    model = tiny_model().train(training)
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(bool(trained) and (trained == "visual" or trained in name))
    video = make_media("video", (3, 4, 6))
    pixels = video.pop("pixel_values_videos").requires_grad_()
    model(
        input_ids=make_text(), labels=make_text(), pixel_values_videos=pixels, use_cache=False, **video
    ).loss.backward()
    reference = tiny_model()
    expected = pixels.detach().clone().requires_grad_()
    reference(input_ids=make_text(), labels=make_text(), pixel_values_videos=expected, **video).loss.backward()
    torch.testing.assert_close(pixels.grad, expected.grad, atol=1e-6, rtol=1e-4)
