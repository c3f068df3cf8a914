# SPDX-License-Identifier: Apache-2.0
"""
The captured decoding step gives the tokens of the ordinary one. Without a GPU its buffers are tested: the step that a
graph would replay is run instead.
"""

import copy
import functools
import gc
import threading

import pytest
import torch
from tiny_vamba import cache_of, make_media, make_text, tiny_model
from transformers import StoppingCriteria, StoppingCriteriaList

from transformers_vamba.generation import captured_step
from transformers_vamba.generation.captured_step import CapturedStep


VIDEO = make_media("video", (5, 4, 6))
NUM_NEW_TOKENS = 12


@pytest.fixture(params=("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(captured_step, "can_capture", lambda model, cache: not cache.reads_from_host)
        monkeypatch.setattr(CapturedStep, "_record", record_on_the_cpu)
    monkeypatch.setattr(captured_step, "_idle_steps", type(captured_step._idle_steps)())
    return request.param


def record_on_the_cpu(step, cache):
    return functools.partial(step._step, step._twin(cache))


@pytest.fixture
def num_recorded(monkeypatch, device):
    """Counts the graphs."""
    recorded, record = [], CapturedStep._record

    def counted(step, cache):
        recorded.append(step)
        return record(step, cache)

    monkeypatch.setattr(CapturedStep, "_record", counted)
    return lambda: len(recorded)


def to(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


def generate(model, text, **kwargs):
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, **kwargs}
    torch.manual_seed(0)
    return model.generate(text.to(model.device), **options)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "8 bits": {"video_cache_implementation": "quantized"},
}


@pytest.mark.parametrize("given", ("video", "two rows, one padded", "a row without", "text"))
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_ordinary_step(device, num_recorded, mode, given):
    model = tiny_model().to(device)
    text = make_text(1 if given == "video" else 2)
    inputs = {} if given == "text" else to(device, VIDEO)
    if given == "two rows, one padded":
        inputs = to(device, make_media("video", (5, 4, 6), (3, 4, 6)))
        inputs["attention_mask"] = torch.ones_like(text, device=device)
        inputs["attention_mask"][0, :4] = 0
    elif given == "a row without":
        inputs["video_sample_ids"] = torch.tensor([1], device=device)
    expected = generate(model, text, disable_compile=True, **MODES[mode], **inputs)
    assert num_recorded() == 0
    assert torch.equal(generate(model, text, **MODES[mode], **inputs), expected)
    assert num_recorded() == 1


def test_the_same_shape_is_recorded_once(device, num_recorded):
    model = tiny_model().to(device)
    cache = model.encode_video(**to(device, VIDEO))
    for seed, length in ((0, 12), (1, 20), (2, 5)):
        text = make_text(length=length, seed=seed)
        expected = generate(model, text, disable_compile=True, cache=cache.fork())
        assert torch.equal(generate(model, text, cache=cache.fork()), expected)
    assert num_recorded() == 1
    # Other videos, a video that has grown, other weights and other batches are recorded anew.
    other = model.encode_video(**to(device, make_media("video", (5, 4, 6), seed=1)))
    assert torch.equal(
        generate(model, make_text(), cache=other.fork()),
        generate(model, make_text(), cache=other.fork(), disable_compile=True),
    )
    model.encode_video(**to(device, make_media("video", (2, 4, 6), seed=2)), cache=cache)
    assert torch.equal(
        generate(model, make_text(2), cache=cache.fork()),
        generate(model, make_text(2), cache=cache.fork(), disable_compile=True),
    )
    assert num_recorded() == 3
    assert len(captured_step._idle_steps[model]) <= captured_step.MAX_IDLE_STEPS
    assert all(step.is_idle for step in captured_step._idle_steps[model])


@pytest.mark.parametrize("mode", ({}, {"num_beams": 3}, {"prefill_chunk_size": 1}), ids=("greedy", "beams", "chunks"))
@pytest.mark.parametrize("implementation", ("dynamic", "quantized", "offloaded", "offloaded_quantized"))
def test_a_share_of_the_video(device, num_recorded, implementation, mode):
    """From the host's memory too: the share is on the device."""
    model = tiny_model().to(device)
    videos = to(device, make_media("video", (50, 4, 6), (40, 4, 6)))
    options = {"video_cache_implementation": implementation, "video_read_share": 0.3}
    options["video_sample_ids"] = torch.tensor([0, 1], device=device)
    cache = model.encode_video(**videos, **options)
    for seed in range(3):  # each chooses for itself, and reads what it has chosen
        text = make_text(2, length=20, seed=seed)
        expected = generate(model, text, disable_compile=True, cache=cache.fork(), **mode)
        assert torch.equal(generate(model, text, cache=cache.fork(), **mode), expected)
        assert 1 <= num_recorded() <= seed + 1  # anew, unless the share lies where that of the question before lay


def test_a_share_that_is_all_of_a_video_in_host_memory(device, num_recorded):
    model = tiny_model().to(device)
    generate(model, make_text(), **to(device, VIDEO), video_cache_implementation="offloaded", video_read_share=0.3)
    assert num_recorded() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_graphs_leave_no_memory_behind(device):
    """Of cuBLAS, a graph keeps a workspace: that of a video that is gone serves the next."""
    model, held = tiny_model().to("cuda"), []
    for seed in range(6):
        cache = model.encode_video(**to("cuda", make_media("video", (5, 4, 6), seed=seed)))
        generate(model, make_text(), cache=cache.fork())
        del cache
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert len(captured_step._idle_steps[model]) == captured_step.MAX_IDLE_STEPS
    assert max(held[3:]) - held[2] < 2**20


def test_steps_go_with_their_model(device):
    model = tiny_model().to(device)
    generate(model, make_text(), **to(device, VIDEO))
    assert len(captured_step._idle_steps) == 1
    copy.deepcopy(model)
    del model
    gc.collect()
    assert len(captured_step._idle_steps) == 0


def test_a_conversation_goes_on(device):
    model = tiny_model().to(device)
    turns = []
    for options in ({}, {"disable_compile": True}):
        cache, tokens = model.encode_video(**to(device, VIDEO)), make_text().to(device)
        for seed in range(3):
            outputs = generate(model, tokens, cache=cache, return_dict_in_generate=True, **options)
            assert cache_of(outputs) is cache and cache.step_plan is None
            assert cache.get_seq_length() == outputs.sequences.shape[1] - 1
            tokens = torch.cat([outputs.sequences, make_text(length=4, seed=seed).to(device)], dim=1)
        turns.append((tokens, cache.layers[0].keys))
    torch.testing.assert_close(*turns, atol=1e-5, rtol=1e-4)


def test_an_answer_that_is_broken_off_leaves_its_text(device):
    class BreaksOff(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 17:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model = tiny_model().to(device)
    cache = model.encode_video(**to(device, VIDEO))
    with pytest.raises(KeyboardInterrupt):
        generate(model, make_text(), cache=cache, stopping_criteria=StoppingCriteriaList([BreaksOff()]))
    assert cache.step_plan is None and cache.get_seq_length() == cache.layers[0].keys.shape[2] == 16
    assert all(step.is_idle for step in captured_step._idle_steps[model])


@pytest.mark.parametrize(
    "options",
    (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"video_cache_implementation": "offloaded"},
        {"disable_compile": True},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"max_new_tokens": 3},
        {"prompt_lookup_num_tokens": 2},
    ),
    ids=lambda options: next(iter(options)),
)
def test_what_a_graph_cannot_do_goes_the_ordinary_way(device, num_recorded, options):
    generate(tiny_model().to(device), make_text(), **to(device, VIDEO), **options)
    assert num_recorded() == 0


def test_logits_and_scores_are_kept_step_by_step(device):
    model = tiny_model().to(device)
    options = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    outputs = [generate(model, make_text(), **to(device, VIDEO), **options, disable_compile=x) for x in (True, False)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1].scores, outputs[0].scores, atol=1e-4, rtol=1e-4)


def test_threads_that_generate_at_once(device):
    model = tiny_model().to(device)
    cache = model.encode_video(**to(device, VIDEO))
    texts = [make_text(length=12, seed=seed) for seed in range(4)]
    expected = [generate(model, text, cache=cache.fork(), disable_compile=True) for text in texts]
    answers = {}

    def ask(index):
        for _ in range(3):
            answers[index] = model.generate(
                texts[index].to(device), cache=cache.fork(), max_new_tokens=NUM_NEW_TOKENS, do_sample=False
            )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(answers[index], expected[index]) for index in range(4)] == [True] * 4


def test_adapters_that_change_between_questions(device):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model().to(device), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    cache = model.encode_video(**to(device, VIDEO))

    def same():
        answers = [generate(model, make_text(), cache=cache.fork(), disable_compile=x) for x in (True, False)]
        assert torch.equal(*answers)
        return answers[0]

    adapted = same()
    with model.disable_adapter():
        plain = same()
    assert not torch.equal(plain, adapted) and torch.equal(same(), adapted)
    model.merge_adapter()
    same()
