# SPDX-License-Identifier: Apache-2.0
"""The supported versions of Transformers, one after the other and as a next one might be."""

import http.client
import importlib.util
import inspect
import logging

import accelerate
import pytest
import torch
import transformers
from tiny_vamba import cache_of, make_media, make_text, tiny_model
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, Trainer, masking_utils
from transformers.utils.import_utils import is_serve_available

from transformers_vamba import VambaCache, VambaForConditionalGeneration, compat
from transformers_vamba.training.trainer import VambaTrainer


# The private names of other packages that this one overrides or reads, with the reason. Those that every modeling file
# of Transformers has, such as `_init_weights` or `_no_split_modules`, are left out: its common tests check them.
OVERRIDDEN = {
    (PreTrainedModel, "_load_pretrained_model"): "kernels are compiled while the weights are read",
    (PreTrainedModel, "_set_gradient_checkpointing"): "lets layers checkpoint their parts; nothing public comes after",
    (GenerationMixin, "_prepare_cache_for_generation"): "videos go into the cache before rows are repeated",
    (GenerationMixin, "_expand_inputs_for_generation"): "beams and samples share their videos",
    (GenerationMixin, "_prefill"): "checks the prompt against the cache, and that the videos are read",
    (GenerationMixin, "_validate_model_kwargs"): "`video_cache_implementation` is for the cache, not for `forward`",
    (GenerationMixin, "_valid_auto_compile_criteria"): "videos in the host's memory cannot be part of a CUDA graph",
    (Trainer, "_get_num_items_in_batch"): "rows weigh equally, as published",
}
READ = {
    (transformers.core_model_loading, "_weight_conversions"): "those that were not used would be reversed in saving",
    (transformers.modeling_utils, "_gradient_checkpointing_func"): "checkpoints several layers at once",
    (accelerate.hooks, "_hf_hook"): "the device where a module computes whose weights are elsewhere",
    (torch.autograd.Variable._execution_engine, "queue_callback"): "runs after DDP and FSDP have given out gradients",
    (torch.ops.aten, "_scaled_dot_product_flash_attention"): "the flash kernel, without settings of the process",
    (torch._dynamo, "mark_static_address"): "CUDA graphs read a video in place",
    (http.client, "_create_connection"): "connects to the address that was checked",
}
if is_serve_available():
    from transformers.cli.serving.chat_completion import ChatCompletionHandler

    for name in ("_build_generation_config", "_build_completion", "_build_chunk_sse"):
        READ[ChatCompletionHandler, name] = "the server's answers in Transformers' form"
if compat.CACHE_NAME == "cache":  # since Transformers 5.24
    READ[transformers.generation.utils, "_mask_length"] = "length of a prompt whose mask of ones was dropped"


def name_of(value) -> str:
    """The same in each process of a run: not the address of an object."""
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


@pytest.mark.parametrize("owner, name", OVERRIDDEN, ids=name_of)
def test_what_is_overridden_is_there(owner, name):
    """An override of nothing would never be called."""
    ours = {PreTrainedModel: VambaForConditionalGeneration, GenerationMixin: VambaForConditionalGeneration}
    assert getattr(ours.get(owner, VambaTrainer), name) is not getattr(owner, name)


@pytest.mark.parametrize("owner, name", READ, ids=name_of)
def test_what_is_read_is_there(owner, name):
    # What is set on objects is in the source of the module that sets it.
    assert hasattr(owner, name) or name in inspect.getsource(owner)


VIDEO = make_media("video", (5, 4, 6))
BOTH_NAMES = pytest.mark.parametrize("name", compat.CACHE_NAMES)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def load_compat():
    """The module, loaded once more."""
    spec = importlib.util.spec_from_file_location("transformers_vamba.compat_again", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@BOTH_NAMES
def test_the_cache_has_two_names(model, name):
    cache = model.encode_video(**VIDEO)
    with torch.no_grad():
        expected = model(input_ids=make_text(), **VIDEO).logits
        for part in (model, model.model):
            outputs = part(input_ids=make_text(), **{name: cache.fork()})
            assert isinstance(cache_of(outputs), VambaCache)
        torch.testing.assert_close(model(input_ids=make_text(), **{name: cache.fork()}).logits, expected)
    tokens = model.generate(make_text(), max_new_tokens=4, do_sample=False, **VIDEO)
    assert torch.equal(model.generate(make_text(), max_new_tokens=4, do_sample=False, **{name: cache.fork()}), tokens)
    more = make_media("video", (2, 4, 6), seed=1)
    assert model.encode_video(**more, **{name: cache}).video_lengths == [30 + 12]
    inputs = model.prepare_inputs_for_generation(make_text(), **{name: cache})
    assert inputs["past_key_values"] is cache


def test_two_different_caches_are_an_error(model):
    caches = {name: DynamicCache() for name in compat.CACHE_NAMES}
    for call in (model, model.model.language_model, model.generate):
        with pytest.raises(TypeError, match="two names of one argument"):
            call(input_ids=make_text(), **caches)


@pytest.mark.parametrize("part", ("model", "base model", "decoder"))
def test_unknown_arguments_are_an_error(model, part):
    part = {"model": model, "base model": model.model, "decoder": model.model.language_model}[part]
    with pytest.raises(TypeError, match=r"unexpected arguments: kv_cache, pixel_value\. It takes .*input_ids"):
        part(input_ids=make_text(), kv_cache=None, pixel_value=None)
    part(input_ids=make_text(), output_hidden_states=True, return_dict=True, num_items_in_batch=3)


@pytest.mark.parametrize("given", ("pixels", "cache"))
@pytest.mark.parametrize("beams", (1, 2))
def test_a_further_renaming_is_an_error_and_no_answer(model, monkeypatch, given, beams):
    prepare = GenerationMixin.prepare_inputs_for_generation
    encoded = model.encode_video(**VIDEO)
    arguments = {"input_ids": make_text(), "max_new_tokens": 4, "num_beams": beams, "do_sample": False}

    def renamed(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {"kv_cache" if name in compat.CACHE_NAMES else name: value for name, value in inputs.items()}

    def dropped(*args, **kwargs):
        return {name: value for name, value in prepare(*args, **kwargs).items() if name not in compat.CACHE_NAMES}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="kv_cache"):
        model.generate(**arguments, **(VIDEO if given == "pixels" else {"cache": encoded.fork()}))
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", dropped)
    with pytest.raises(RuntimeError, match="has not read the videos"):
        model.generate(**arguments, **(VIDEO if given == "pixels" else {"cache": encoded.fork()}))


def test_what_generate_reads_itself_does_not_reach_forward(model, tokenizer):
    arguments = {"stop_strings": ["e"], "tokenizer": tokenizer}
    assert model.generate(make_text(), max_new_tokens=2, **arguments, **VIDEO).shape[1] > 12


def test_a_name_that_is_not_known_is_an_error_at_import(monkeypatch):
    monkeypatch.setattr(masking_utils, "create_causal_mask", lambda config, kv_cache: None)
    with pytest.raises(ImportError, match="neither 'cache' nor 'past_key_values'"):
        load_compat()


@pytest.mark.parametrize("version, warns", (("5.16.1", 1), ("5.17.0", 0), ("5.24.0", 0), ("5.24.1", 1), ("6.0.0", 1)))
def test_versions_that_were_not_tested_are_named_at_import(monkeypatch, caplog, version, warns):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers_vamba.compat_again"), "propagate", True)
    load_compat()
    assert len(caplog.messages) == warns
    assert all(f"tested with Transformers 5.17.0 to 5.24.0, and this is {version}" in text for text in caplog.messages)


def test_nothing_that_is_deprecated_is_used(model, caplog, recwarn, monkeypatch):
    """Some warnings of Transformers are logged; those that are raised are errors in all tests, see pyproject.toml."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.utils.logging.warning_once.cache_clear()
    outputs = model.generate(make_text(), max_new_tokens=3, num_beams=2, return_dict_in_generate=True, **VIDEO)
    model.train()(input_ids=make_text(), labels=make_text(), **VIDEO).loss.backward()
    model.eval().zero_grad()
    assert cache_of(outputs).video_lengths == [30]
    messages = caplog.messages + [str(warning.message) for warning in recwarn]
    assert not [message for message in messages if "deprecated" in message]
