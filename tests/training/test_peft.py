# SPDX-License-Identifier: Apache-2.0
"""PEFT's tuners on a Vamba: start as the identity, train, save, load, merge and generate, with a video and without."""

import copy
import re
from functools import lru_cache, partial

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_vamba import make_media, make_text, tiny_config, tiny_model
from torch import nn

from transformers_vamba import lora_target_modules
from transformers_vamba.cache import excerpts
from transformers_vamba.generation.read_share import TOKENS_WATCHED
from transformers_vamba.training.peft import VambaPeftModel


# Every linear layer of the decoder, the mixers' and the cross-attention's included.
DECODER = r".*language_model\.layers\.\d+\.(self_attn|cross_attn|mlp|vision_mixer\.mixer)\.\w+_proj"
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj", "out_proj"}
TUNERS = {
    "LoRA": peft.LoraConfig(r=4, target_modules="all-linear"),
    "LoRA as recommended": peft.LoraConfig(r=4, target_modules=lora_target_modules(tiny_config())),
    "LoRA on names": peft.LoraConfig(r=4, target_modules=PROJECTIONS),
    "LoRA and embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "in_proj", "o_proj"]),
    "LoRA and a trained lm_head": peft.LoraConfig(r=4, target_modules=DECODER, modules_to_save=["lm_head"]),
    "DoRA": peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rsLoRA": peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "IA3": peft.IA3Config(target_modules=DECODER, feedforward_modules=r".*(down|out)_proj"),
    "VeRA": peft.VeraConfig(r=8, target_modules=DECODER),
    "AdaLoRA": peft.AdaLoraConfig(
        init_r=6, target_r=4, total_step=20, tinit=2, tfinal=5, deltaT=2, target_modules=DECODER
    ),
    "LoHa": peft.LoHaConfig(r=4, target_modules=DECODER),
    "LoKr": peft.LoKrConfig(r=4, target_modules=DECODER),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=DECODER),
}
PROMPT_TUNERS = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}

TEXT = {"input_ids": make_text(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
INPUTS = {
    "text": TEXT,
    "video": {**TEXT, **make_media("video", (3, 4, 4), (2, 4, 6), seed=1)},
    "video in one row": {**TEXT, **make_media("video", (3, 4, 4), seed=1), "video_sample_ids": torch.tensor([1])},
}

tuners = pytest.mark.parametrize("tuner", TUNERS)
prompt_tuners = pytest.mark.parametrize("tuner", PROMPT_TUNERS)
inputs = pytest.mark.parametrize("inputs", INPUTS)


def base_model():
    # No other matrix has as many rows as the vocabulary: by this PEFT finds the embedding for prompt tuning.
    return tiny_model(vocab_size=131)


def adapted_model(tuner: str) -> peft.PeftModel:
    base = base_model()
    torch.manual_seed(0)
    return peft.get_peft_model(base, copy.deepcopy((TUNERS | PROMPT_TUNERS)[tuner])).eval()


@torch.no_grad()
def logits(model, inputs: str) -> torch.Tensor:
    return model(**INPUTS[inputs]).logits


def train(model, inputs: str, num_steps: int = 5) -> list[float]:
    """A few steps on one batch; leaves the last step's gradients, and returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(**INPUTS[inputs], labels=INPUTS[inputs]["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@lru_cache
def trained_model(tuner: str, inputs: str) -> tuple[peft.PeftModel, list[float]]:
    """A trained model that the tests share, with the gradients of its last step, and its losses."""
    model = adapted_model(tuner)
    return model, train(model, inputs)


def is_read(name: str, inputs: str) -> bool:
    """Whether the layer of a parameter has a part in the result."""
    if inputs == "text":
        return not any(part in name for part in (".visual.", ".cross_attn.", ".vision_mixer."))
    return ".layers.2.vision_mixer." not in name  # nobody reads what the last mixer gives


@tuners
@inputs
def test_adapter_starts_as_the_identity(tuner, inputs):
    torch.testing.assert_close(logits(adapted_model(tuner), inputs), logits(base_model(), inputs), atol=1e-5, rtol=0)


@tuners
@inputs
def test_training_lowers_the_loss_and_reaches_every_layer(tuner, inputs):
    model, losses = trained_model(tuner, inputs)
    before = adapted_model(tuner).state_dict()
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
        elif is_read(name, inputs):
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_adapters_are_on_every_linear_layer():
    linear = {name for name, module in base_model().named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    for tuner in ("LoRA", "DoRA", "rsLoRA"):
        assert set(adapted_model(tuner).base_model.targeted_module_names) == linear
    decoder = {name for name in linear if ".language_model." in name}
    assert {name.rsplit(".", 1)[1] for name in decoder} == PROJECTIONS
    for tuner in ("IA3", "VeRA", "AdaLoRA", "LoHa", "LoKr", "OFT"):
        assert set(adapted_model(tuner).base_model.targeted_module_names) == decoder


@pytest.mark.parametrize("tuner", [*TUNERS, *PROMPT_TUNERS])
@inputs
def test_saved_adapter_gives_the_same_logits(tuner, inputs, tmp_path):
    model, _ = trained_model(tuner, inputs)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert not torch.allclose(logits(model, inputs), logits(adapted_model(tuner), inputs), atol=1e-3)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-6, rtol=0)


@tuners
@inputs
def test_merged_model_gives_the_same_logits(tuner, inputs):
    model, _ = trained_model(tuner, inputs)
    expected = logits(model, inputs)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-5, rtol=0)


@tuners
@inputs
def test_generation_goes_through_the_adapter(tuner, inputs):
    model, _ = trained_model(tuner, inputs)
    tokens = model.generate(**INPUTS[inputs], max_new_tokens=4, do_sample=False)
    # The whole sequence at once, as in training: without a cache, both streams layer by layer.
    whole = {**INPUTS[inputs], "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model(**whole, use_cache=False).logits[:, 9:-1].argmax(-1)
    assert tokens.shape == (2, 14) and torch.equal(tokens[:, 10:], expected)


@tuners
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(tuner, use_reentrant):
    """With a frozen base there is no gradient at a layer's input to start from, unless it is asked for."""

    def gradients(model):
        train(model, "video", num_steps=2)  # the second step: LoRA's A gets no gradient in the first
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    expected = gradients(adapted_model(tuner))
    model = adapted_model(tuner)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.get_base_model().model.language_model.gradient_checkpointing
    torch.testing.assert_close(gradients(model), expected, atol=1e-4, rtol=1e-3)


def test_adapter_can_be_switched_off_and_a_second_one_on():
    model = adapted_model("LoRA")
    train(model, "video")
    first = logits(model, "video")
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, "video"), logits(base_model(), "video"), atol=1e-6, rtol=0)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj"]))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, "video"), logits(base_model(), "video"), atol=1e-6, rtol=0)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, "video"), first, atol=1e-6, rtol=0)


def model_with_alpha() -> VambaPeftModel:
    base = base_model()
    torch.manual_seed(0)
    return VambaPeftModel(base, peft.LoraConfig(r=4, target_modules=lora_target_modules(base.config)))


def alphas_of(model) -> dict[str, torch.Tensor]:
    return {name: alpha for name, alpha in model.named_parameters() if name.endswith(".alpha")}


def test_alpha_trains_beside_an_adapter(tmp_path):
    """PEFT alone loads what `VambaPeftModel` trained and saved."""
    model = model_with_alpha()
    before = {name: alpha.clone() for name, alpha in alphas_of(model).items()}
    train(model, "video")
    assert len(before) == 3
    assert all(a.grad.any() and not torch.equal(a, before[name]) for name, a in alphas_of(model).items())

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path).eval()
    expected = logits(model, "video")
    torch.testing.assert_close(logits(loaded, "video"), expected, atol=1e-6, rtol=0)
    goes_on = VambaPeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    torch.testing.assert_close(alphas_of(goes_on), alphas_of(model), atol=0, rtol=0)
    assert all(alpha.requires_grad for alpha in alphas_of(goes_on).values())
    assert not any(p.requires_grad for p in VambaPeftModel.from_pretrained(base_model(), tmp_path).parameters())
    torch.testing.assert_close(logits(model.merge_and_unload(), "video"), expected, atol=1e-5, rtol=0)


def test_alpha_trains_on_after_loading(tmp_path):
    base = base_model()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=lora_target_modules(base.config))
    VambaPeftModel(base, config).save_pretrained(tmp_path)
    model = VambaPeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    train(model, "video")
    model.save_pretrained(tmp_path)
    loaded = alphas_of(peft.PeftModel.from_pretrained(base_model(), tmp_path))
    assert all(torch.equal(alpha, loaded[name]) for name, alpha in alphas_of(model).items())
    assert not any(torch.equal(alpha, base.get_parameter(name[17:])) for name, alpha in loaded.items())


def test_alpha_is_saved_with_every_adapter_and_only_by_the_main_process(tmp_path):
    model = model_with_alpha()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["in_proj"]))
    assert all(alpha.requires_grad for alpha in alphas_of(model).values())
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not list(tmp_path.glob("worker/**/*.safetensors"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    for file in ("adapter_model", "second/adapter_model", "one/second/adapter_model"):
        saved = load_file(tmp_path / f"{file}.safetensors")
        assert alphas_of(model).keys() <= saved.keys(), file
        assert any(".lora_A." in name for name in saved)
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()


def test_recommended_targets_are_every_linear_layer_of_the_decoder_that_is_read():
    model = model_with_alpha()
    linear = {name for name, module in base_model().named_modules() if isinstance(module, nn.Linear)}
    read = {name for name in linear if ".language_model." in name and is_read(f".{name}.", "video")}
    assert set(model.base_model.targeted_module_names) == read
    train(model, "video", num_steps=2)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all(), name
    every_number = lora_target_modules(tiny_config(num_hidden_layers=13))
    names = [f"model.language_model.layers.{i}.vision_mixer.mixer.in_proj" for i in range(13)]
    assert [bool(re.fullmatch(every_number, name)) for name in names] == [True] * 12 + [False]


@prompt_tuners
@inputs
def test_prompt_tuning_trains(tuner, inputs):
    model, losses = trained_model(tuner, inputs)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("prompt_encoder" in name), name
        assert not parameter.requires_grad or parameter.grad.any(), name


@pytest.mark.parametrize("tuner", ("prompt tuning", "P-tuning"))
@inputs
def test_prompt_tuned_model_generates(tuner, inputs):
    model, _ = trained_model(tuner, inputs)
    tokens = model.generate(**INPUTS[inputs], max_new_tokens=4, do_sample=False)
    whole = {**INPUTS[inputs], "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = model(**whole).logits[:, 4 + 9 : -1].argmax(-1)
    assert tokens.shape == (2, 14) and torch.equal(tokens[:, 10:], expected)


@pytest.mark.parametrize("tuner", ("prompt tuning", "P-tuning"))
def test_virtual_tokens_are_not_taken_for_the_beginning_of_a_prompt(tuner, monkeypatch):
    """What an answer reads of a video is what the last tokens of the prompt have read, wherever they stand."""
    monkeypatch.setattr(excerpts, "LEAST_STEPS", 1)
    model = adapted_model(tuner).double()
    base, text = model.get_base_model(), make_text(length=TOKENS_WATCHED + 7)
    media = make_media("video", (20, 4, 6))
    cache = base.encode_video(media["pixel_values_videos"].double(), media["video_grid_thw"])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"video_read_share": 0.2}
    tuned = model.generate(input_ids=text, attention_mask=torch.ones_like(text), cache=cache.fork(), **options)
    embeds = torch.cat([model.get_prompt(1), base.get_input_embeddings()(text)], dim=1)
    expected = base.generate(inputs_embeds=embeds, cache=cache.fork(), **options)
    torch.testing.assert_close(torch.stack(tuned.logits), torch.stack(expected.logits))


def test_a_prompt_that_virtual_tokens_would_cut_is_refused():
    """PEFT reads the last token alone of what comes after its virtual tokens and their chunk."""
    model, text = adapted_model("prompt tuning"), make_text(length=10)
    ask = partial(model.generate, max_new_tokens=2, do_sample=False)
    cache = model.get_base_model().encode_video(**make_media("video", (3, 4, 4)))
    mask = torch.ones_like(text)
    expected = ask(input_ids=text, attention_mask=mask, cache=cache.fork())
    chunk = ask(input_ids=text, attention_mask=mask, cache=cache.fork(), prefill_chunk_size=10)
    assert torch.equal(chunk, expected)
    with pytest.raises(ValueError, match="`prefill_chunk_size` is 9, and PEFT's prompt tuning reads .* of 10 tokens"):
        ask(input_ids=text, attention_mask=mask, cache=cache.fork(), prefill_chunk_size=9)
    ask(input_ids=text, attention_mask=mask, cache=cache)
    text = torch.cat([expected, make_text(length=9)], dim=1)
    with pytest.raises(ValueError, match="holds 15 tokens of text, and PEFT's prompt tuning cannot go on from them"):
        ask(input_ids=text, attention_mask=torch.ones_like(text), cache=cache)


def test_prefix_tuning_does_not_lose_the_video_in_generation():
    """PEFT puts a cache of its own, with the prefix, in the place of the one that holds the video."""
    model = adapted_model("prefix tuning")
    model.generate(**INPUTS["text"], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="has not read the videos .* prefix tuning"):
        model.generate(**INPUTS["video"], max_new_tokens=2)


def test_mixed_adapters_beside_videos_are_an_error_that_names_the_cause():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear"))
    model.eval()
    cache = model.get_base_model().encode_video(**make_media("video", (3, 4, 4)))
    with torch.no_grad():
        model(**INPUTS["text"], adapter_names=["default", "other"])
        with pytest.raises(ValueError, match="cannot mix adapters in a batch with images or videos.*set_adapter"):
            model(**INPUTS["video"], adapter_names=["default", "other"])
    for inputs in (INPUTS["video"], {**TEXT, "cache": cache}):
        with pytest.raises(ValueError, match="cannot mix adapters in a batch with images or videos.*set_adapter"):
            model.generate(**inputs, adapter_names=["default", "other"], max_new_tokens=2)
