# SPDX-License-Identifier: Apache-2.0
"""An answer that reads a share of its video, beside attention in float64 that masks all the rest."""

import copy
import gc
import json
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_config, tiny_model
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.video_utils import VideoMetadata

from transformers_vamba import VambaCache, forecast_memory
from transformers_vamba.cache import excerpts
from transformers_vamba.cache.excerpts import LEAST_STEPS, choose, num_read
from transformers_vamba.cache.layers import VambaVideoLayer
from transformers_vamba.cache.storage import HostStorage
from transformers_vamba.generation.read_share import TOKENS_WATCHED
from transformers_vamba.layers.decoder import VambaCrossAttention
from transformers_vamba.ops.quantized_attention import QuantizedStates


IMPLEMENTATIONS = ("dynamic", "quantized", "offloaded", "offloaded_quantized")
NUM_STEPS, TOKENS_PER_STEP = LEAST_STEPS + 10, 6
VIDEO = make_media("video", (NUM_STEPS, 4, 6))
NUM_TOKENS = NUM_STEPS * TOKENS_PER_STEP
NEW_TOKENS = 6


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.fixture(autouse=True)
def least(monkeypatch):
    """A tiny video has not many time steps."""
    monkeypatch.setattr(excerpts, "LEAST_STEPS", 1)


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="module")
def text():
    return make_text(length=TOKENS_WATCHED + 7)


def generate(model, text, **kwargs):
    options = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(input_ids=text, **options, **kwargs)


def logits_of(outputs):
    return torch.stack(outputs.logits, dim=1).double()  # `generate` has them in float32


class Reference:
    """
    In place of the cross-attention: full matrices in float64, over the whole text at once. The tokens of a prompt read
    all of the video, and those of its answer what the last tokens of the prompt have read most.

    Args:
        turns: Of each prompt of a conversation, where what is new in it begins and where it ends.
        steps: The time steps of the video of each row.
        mask: 0 for padding.
    """

    def __init__(self, turns, share, steps, rows=None, mask=None):
        self.turns, self.share, self.steps, self.rows, self.mask = turns, share, steps, rows or [0], mask
        self.chosen = []  # of each layer and row the tokens that the last answer reads

    def __call__(self, layer, hidden_states, reads, group=None):
        videos = [(keys, values) for length, keys, values in reads for _ in range(length // hidden_states.shape[1])]
        weights, values = [], []
        for texts, states in zip(hidden_states, videos):
            keys, value = (each.dequantize() if isinstance(each, QuantizedStates) else each for each in states)
            heads = layer.num_heads // layer.num_key_value_heads
            query = layer.q_proj(texts).unflatten(-1, (layer.num_heads, -1)).transpose(0, 1)
            scores = query @ keys[0].double().repeat_interleave(heads, 0).transpose(1, 2)
            weights.append((scores / math.sqrt(layer.head_dim)).softmax(-1))
            values.append(value[0].double().repeat_interleave(heads, 0))
        is_read = [torch.ones(hidden_states.shape[1], each.shape[-1], dtype=torch.bool) for each in weights]
        for start, end in self.turns:
            watched = [self.watched(row, start, end) for row in range(len(weights))]
            of_steps = [self.by_step(row, weights[row][:, watched[row]]) for row in range(len(weights))]
            for row, video in enumerate(self.rows):
                others = [i for i, other in enumerate(self.rows) if other == video]
                is_chosen = self.choose(row, torch.stack([of_steps[other] for other in others]).amax(0))
                is_read[row][end:] = is_chosen
                self.chosen.append(is_chosen)
            for row in range(len(weights)):  # until the next prompt
                following = [first for first, _ in self.turns if first > start]
                is_read[row][min(following) if following else len(is_read[row]) :] = True
        outputs = []
        for each, value, read in zip(weights, values, is_read):
            masked = each * read
            outputs.append(((masked / masked.sum(-1, keepdim=True)) @ value).transpose(0, 1).flatten(1))
        return layer.o_proj(torch.stack(outputs))

    def watched(self, row, start, end):
        tokens = [i for i in range(end) if self.mask is None or self.mask[row, i]][-TOKENS_WATCHED:]
        return [i for i in tokens if i >= start]

    def by_step(self, row, weights):
        """The share of each time step in what some tokens have read."""
        return torch.stack([read.sum() for read in weights.mean((0, 1)).split(self.steps[row].num_tokens.tolist())])

    def choose(self, row, read):
        steps = self.steps[row].num_tokens
        num_left = max(math.ceil(self.share * int(steps.sum())), int(steps.max()))
        is_chosen = torch.zeros(int(steps.sum()), dtype=torch.bool)
        for step in sorted(range(len(read)), key=lambda i: -float(read[i] / max(1, steps[i]))):
            start = int(steps[:step].sum())
            is_chosen[start : start + min(num_left, int(steps[step]))] = True
            num_left -= min(num_left, int(steps[step]))
        return is_chosen


def reference_logits(monkeypatch, model, tokens, reference, cache, attention_mask=None):
    """Of the tokens by one pass over the whole text."""
    videos = VambaCache(model.config, video_cache_implementation=cache.video_cache_implementation)
    videos.videos, videos.rows = cache.videos, list(reference.rows)
    inputs = {"input_ids": tokens, "cache": videos, "use_cache": False}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with monkeypatch.context() as context, torch.no_grad():
        context.setattr(VambaCrossAttention, "forward", lambda *args: reference(*args))
        return model(**inputs).logits


def assert_is_reference(monkeypatch, model, text, share, cache, rows=None, mask=None, **kwargs):
    """That an answer reads what the reference reads. Returns its tokens and what was chosen."""
    kwargs |= {} if mask is None else {"attention_mask": mask}
    before = [layer.nbytes for layer in cache.videos[0]]
    outputs = generate(model, text, cache=cache.fork(), video_read_share=share, **kwargs)
    tokens, rows = outputs.sequences[:, :-1], rows or [0] * len(text)
    steps = [cache.steps_of(video) for video in rows]
    reference = Reference([(0, text.shape[1])], share, steps, rows, mask)
    full_mask = None if mask is None else torch.nn.functional.pad(mask, (0, NEW_TOKENS - 1), value=1)
    expected = reference_logits(monkeypatch, model, tokens, reference, cache, full_mask)
    torch.testing.assert_close(logits_of(outputs), expected[:, text.shape[1] - 1 :], atol=1e-5, rtol=1e-5)
    assert [layer.nbytes for layer in cache.videos[0]] == before
    return outputs, reference.chosen


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("share", (0.5, 0.3, 0.05))
def test_is_attention_with_the_rest_masked(monkeypatch, model, text, implementation, share):
    cache = model.encode_video(**double(VIDEO), video_cache_implementation=implementation)
    outputs, chosen = assert_is_reference(monkeypatch, model, text, share, cache)
    num_tokens = math.ceil(share * NUM_TOKENS)
    assert [int(each.sum()) for each in chosen] == [num_tokens] * 3
    assert len({tuple(each.tolist()) for each in chosen}) > 1  # the layers choose for themselves
    assert not torch.allclose(logits_of(outputs), logits_of(generate(model, text, cache=cache.fork())), atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length, share", ((NUM_STEPS, 1.0), (NUM_STEPS, 1), (NUM_STEPS, 0.999), (1, 0.05)))
def test_what_covers_all_is_full_reading_to_the_bit(model, text, implementation, length, share):
    """All of it, all but what is rounded away, and a video of a single time step."""
    video = double(make_media("video", (length, 4, 6)))
    cache = model.encode_video(**video, video_cache_implementation=implementation)
    expected = logits_of(generate(model, text, cache=cache.fork()))
    assert torch.equal(logits_of(generate(model, text, cache=cache.fork(), video_read_share=share)), expected)


def test_several_questions_about_one_video(monkeypatch, model):
    texts = torch.cat([make_text(length=40, seed=seed) for seed in range(3)])
    mask = torch.ones_like(texts)
    mask[1, :3], mask[2, :30] = 0, 0  # of which the last one has fewer tokens than are watched
    cache = model.encode_video(**double(VIDEO))
    assert_is_reference(monkeypatch, model, texts, 0.25, cache, mask=mask)


def test_each_its_own_video_and_two_that_share(monkeypatch, model):
    videos = make_media("video", (NUM_STEPS, 4, 6), (12, 4, 4), seed=3)
    cache = model.encode_video(**double(videos), video_sample_ids=torch.tensor([0, 1]))
    cache.rows = [1, 0, 1]
    texts = torch.cat([make_text(length=20, seed=seed) for seed in range(3)])
    assert_is_reference(monkeypatch, model, texts, 0.25, cache, rows=[1, 0, 1])


def test_a_row_without_a_video(model, text):
    texts = torch.cat([text, make_text(length=text.shape[1], seed=9)])
    both = generate(model, texts, **double(VIDEO), video_sample_ids=torch.tensor([1]), video_read_share=0.2)
    alone = generate(model, texts[1:], **double(VIDEO), video_read_share=0.2)
    torch.testing.assert_close(logits_of(both)[1:], logits_of(alone))
    torch.testing.assert_close(logits_of(both)[:1], logits_of(generate(model, texts[:1])))


@pytest.mark.parametrize("copies", ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}))
def test_beams_agree_with_separate_copies(model, copies):
    """Of texts and videos: one row would choose another set if others had a say in it."""
    texts = torch.cat([make_text(length=20, seed=seed) for seed in range(2)])
    videos = double(make_media("video", (NUM_STEPS, 4, 6), (NUM_STEPS, 4, 6), seed=5))
    options = {"video_read_share": 0.2, "output_scores": True, **copies}
    together = generate(model, texts, **videos, **options)
    pixels, grid = videos["pixel_values_videos"].chunk(2), videos["video_grid_thw"].split(1)
    for row, sequences in enumerate(together.sequences.chunk(2)):
        alone = generate(
            model, texts[row : row + 1], pixel_values_videos=pixels[row], video_grid_thw=grid[row], **options
        )
        assert torch.equal(alone.sequences, sequences)


MODES = {
    "chunked prefill": {"prefill_chunk_size": 5},
    "single tokens": {"prefill_chunk_size": 1},
    "static": {"cache_implementation": "static"},
    "samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "kernel by kernel": {"disable_compile": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", ("pixels", "encoded"))
def test_modes_agree(model, text, mode, given):
    media = double(VIDEO) if given == "pixels" else {"cache": model.encode_video(**double(VIDEO))}
    expected = generate(model, text, **double(VIDEO), video_read_share=0.2)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **MODES[mode]}
    tokens = model.generate(text, **media, video_read_share=0.2, **options)
    assert torch.equal(tokens, expected.sequences.repeat(len(tokens), 1))


def test_assisted_generation(model, text):
    """What the first pass verifies reads all, as the prompt does with which it comes; after it the share is read."""
    cache = model.encode_video(**double(VIDEO))
    lengths, read = [], VambaVideoLayer.read
    with pytest.MonkeyPatch.context() as context:
        context.setattr(VambaVideoLayer, "read", lambda layer: lengths.append(layer.get_seq_length()) or read(layer))
        repeated = torch.cat([text, text], dim=1)
        model.generate(repeated, cache=cache, video_read_share=0.2, prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert lengths[:3] == [NUM_TOKENS] * 3 and len(lengths) > 3
    assert set(lengths[3:]) == {math.ceil(0.2 * NUM_TOKENS)}


def test_an_assistant_reads_all(model, text):
    """The assistant is asked without the option, and its candidates are verified by what reads the share."""
    cache, options = model.encode_video(**double(VIDEO)), {"video_read_share": 0.2, "max_new_tokens": 8}
    expected = model.generate(text, cache=cache.fork(), do_sample=False, **options)
    assistant = tiny_model(dtype=torch.float64)
    assistant.generation_config.num_assistant_tokens = 1
    tokens = model.generate(text, cache=cache.fork(), assistant_model=assistant, do_sample=False, **options)
    assert tokens.shape == expected.shape and torch.equal(
        tokens[:, : text.shape[1] + 1], expected[:, : text.shape[1] + 1]
    )


def test_text_that_is_embedded(model, text):
    expected = generate(model, text, **double(VIDEO), video_read_share=0.2)
    embeds = model.get_input_embeddings()(text)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "video_read_share": 0.2}
    tokens = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(text), **double(VIDEO), **options)
    assert torch.equal(tokens, expected.sequences[:, text.shape[1] :])


def test_threads_choose_for_themselves(model):
    cache = model.encode_video(**double(VIDEO))
    asked = [(make_text(length=30, seed=seed), share) for seed, share in enumerate((0.2, None, 0.5, 0.3))]

    def ask(text, share):
        with torch.no_grad():
            return logits_of(generate(model, text, cache=cache.fork(), video_read_share=share))

    expected = [ask(*each) for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(ask, *zip(*asked)), expected):
                torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_conversation_chooses_again(monkeypatch, model, text, implementation):
    share, cache = 0.2, model.encode_video(**double(VIDEO), video_cache_implementation=implementation)
    first = generate(model, text, cache=cache, video_read_share=share)
    held = cache.get_seq_length()
    prompt = torch.cat([first.sequences, make_text(length=5, seed=4)], dim=1)
    second = generate(model, prompt, cache=cache, video_read_share=share)
    turns = [(0, text.shape[1]), (held, prompt.shape[1])]
    reference = Reference(turns, share, [cache.steps_of(0)])
    expected = reference_logits(monkeypatch, model, second.sequences[:, :-1], reference, cache)
    torch.testing.assert_close(logits_of(first), expected[:, turns[0][1] - 1 : held], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(second), expected[:, turns[1][1] - 1 :], atol=1e-5, rtol=1e-5)
    assert not torch.equal(reference.chosen[0], reference.chosen[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept", ({"video_pruning_rate": 0.5}, {"max_video_tokens": 140}), ids=str)
def test_of_a_stream_that_is_pruned_or_bounded(monkeypatch, model, text, kept, implementation):
    """Its time steps have different numbers of tokens."""
    cache = None
    for pixels in double(make_media("video", (42, 4, 6)))["pixel_values_videos"].split(7 * 24):
        kwargs = {"cache": cache, "video_cache_implementation": implementation, **kept}
        cache = model.encode_video(pixels, torch.tensor([[7, 4, 6]]), **kwargs)
    assert len(set(cache.steps_of(0).num_tokens.tolist())) > 1
    _, chosen = assert_is_reference(monkeypatch, model, text, 0.4, cache)
    assert all(chosen[0].sum() <= each.numel() / 2 for each in chosen)


def test_offloaded_videos_are_fetched_once(monkeypatch, model, text):
    """The prompt brings each layer, and no token after it does."""
    fetched, fetch = [], HostStorage._fetch
    monkeypatch.setattr(HostStorage, "_fetch", lambda storage: fetched.append(storage) or fetch(storage))
    cache = model.encode_video(**double(VIDEO), video_cache_implementation="offloaded")
    fork = cache.fork()
    generate(model, text, cache=fork, video_read_share=0.2)
    assert fetched == [layer._storage for layer in fork.videos[0]]
    assert all(layer._storage._fetched is None for layer in fork.videos[0])
    fetched.clear()
    generate(model, text, cache=cache.fork())
    assert len(fetched) == 3 * NEW_TOKENS + 1


class BreaksOff(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("way", ("answered", "of pixels", "broken off"))
def test_the_excerpt_goes_with_the_generation(monkeypatch, model, text, way):
    made, excerpt = [], VambaVideoLayer.excerpt

    def make(*args):
        made.append(weakref.ref(layer := excerpt(*args)))
        return layer

    monkeypatch.setattr(VambaVideoLayer, "excerpt", make)
    cache = model.encode_video(**double(VIDEO))
    given = double(VIDEO) if way == "of pixels" else {"cache": cache}
    gc.disable()
    try:
        if way == "broken off":
            with pytest.raises(KeyboardInterrupt):
                generate(
                    model, text, **given, video_read_share=0.2, stopping_criteria=StoppingCriteriaList([BreaksOff()])
                )
        else:
            model.generate(text, **given, video_read_share=0.2, max_new_tokens=NEW_TOKENS)
        gc.collect() if way == "broken off" else None  # the traceback holds frames
        assert len(made) == 3 and not any(each() for each in made)
    finally:
        gc.enable()
    assert cache.excerpts == {} and cache.watcher is None


COPIES = {
    "fork": VambaCache.fork,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_running_generation_reads_all(model, text, way):
    """What streams an answer may ask another question about the video meanwhile."""
    cache = model.encode_video(**double(VIDEO))
    expected = logits_of(generate(model, text, cache=cache.fork()))
    found = []

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if not found:
                copied = COPIES[way](cache)
                found.append((copied.excerpts, copied.watcher, cache.excerpts))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    generate(model, text, cache=cache, video_read_share=0.2, stopping_criteria=StoppingCriteriaList([Asks()]))
    assert found[0][:2] == ({}, None) and len(found[0][2][0]) == 3
    fresh = model.encode_video(**double(VIDEO))
    assert torch.equal(logits_of(generate(model, text, cache=fresh)), expected)


def test_the_share_of_a_cache(model, text, tmp_path):
    """It goes with forks and folders, and holds unless `generate` is asked for another."""
    expected = {x: generate(model, text, **double(VIDEO), video_read_share=x) for x in (None, 0.2, 0.5)}
    expected = {share: logits_of(outputs) for share, outputs in expected.items()}
    assert not torch.allclose(expected[0.2], expected[0.5], atol=1e-4)
    cache = model.encode_video(**double(VIDEO), video_read_share=0.2)
    cache.save_pretrained(tmp_path)
    loaded = VambaCache.from_pretrained(tmp_path)
    assert cache.video_options["video_read_share"] == loaded.video_read_share == cache.fork().video_read_share == 0.2
    for each in (cache, loaded):
        torch.testing.assert_close(logits_of(generate(model, text, cache=each.fork())), expected[0.2])
        for share in (0.2, 0.5):
            outputs = generate(model, text, cache=each.fork(), video_read_share=share)
            torch.testing.assert_close(logits_of(outputs), expected[share])
        outputs = generate(model, text, cache=each.fork(), video_read_share=1.0)
        assert torch.equal(logits_of(outputs), expected[None])
        assert each.video_read_share == 0.2
    with pytest.raises(ValueError, match="`video_read_share` is 0.5, but the cache .* with video_read_share=0.2"):
        model.encode_video(**double(VIDEO), cache=cache, video_read_share=0.5)


def test_folders_of_before_and_damaged_ones(model, tmp_path):
    model.encode_video(**double(VIDEO)).save_pretrained(tmp_path)
    path = tmp_path / "cache_config.json"
    content = json.loads(path.read_text())
    del content["video_read_share"]
    path.write_text(json.dumps(content))
    assert VambaCache.from_pretrained(tmp_path).video_read_share is None
    for wrong in (0, 1.5, "0.5", True):
        path.write_text(json.dumps(content | {"video_read_share": wrong}))
        with pytest.raises(ValueError, match="video is damaged: .*cache_config.json.*video_read_share"):
            VambaCache.from_pretrained(tmp_path)


def test_locating_an_answer_reads_all(model, text):
    cache = model.encode_video(**double(VIDEO), video_read_share=0.2)
    tokens = generate(model, text, cache=cache).sequences
    (reading,) = model.locate(tokens, cache)
    (expected,) = model.locate(tokens, model.encode_video(**double(VIDEO)))
    assert torch.equal(reading.weights, expected.weights) and (reading.weights > 0).all()


def test_text_alone_is_as_ever(model, text):
    assert torch.equal(*(logits_of(generate(model, text, video_read_share=share)) for share in (None, 0.2)))


@pytest.mark.parametrize("wrong", (0, 0.0, -0.1, 1.01, "0.5", True, math.nan, math.inf))
def test_a_share_that_does_not_exist(model, text, wrong):
    described = VideoMetadata(total_num_frames=30, fps=10.0, height=64, width=96)
    calls = (
        lambda: VambaCache(model.config, video_read_share=wrong),
        lambda: model.encode_video(**double(VIDEO), video_read_share=wrong),
        lambda: generate(model, text, **double(VIDEO), video_read_share=wrong),
        lambda: generate(model, text, video_read_share=wrong),
        lambda: forecast_memory(tiny_config(), None, described, video_read_share=wrong),
    )
    for call in calls:
        with pytest.raises(ValueError, match="`video_read_share`.* above 0 and at most 1, or None for all, got"):
            call()


def test_without_a_cache_of_the_text(model, text):
    with pytest.raises(ValueError, match="`video_read_share` is 0.2, but without a cache of the text"):
        model.generate(text, **double(VIDEO), video_read_share=0.2, use_cache=False)
    cache = model.encode_video(**double(VIDEO))
    with pytest.raises(ValueError, match="`video_read_share` is 0.2, but without a cache of the text"):
        model.generate(text, cache=cache, **double(VIDEO), video_read_share=0.2, use_cache=False, num_beams=2)
    assert cache.rows is None and cache.video_lengths == [NUM_TOKENS]  # as it was
    with pytest.raises(TypeError, match="video_read_share"):
        model(input_ids=text, **double(VIDEO), video_read_share=0.2)


def test_choosing_takes_the_most_that_fits():
    weights, steps = torch.tensor([0.1, 0.3, 0.0, 0.4, 0.2]), torch.tensor([4, 4, 0, 8, 1])
    # Of each token: 0.025, 0.075, nothing, 0.05, 0.2.
    assert choose(weights, steps, 1).tolist() == [16]
    assert choose(weights, steps, 5).tolist() == [4, 5, 6, 7, 16]
    assert choose(weights, steps, 8).tolist() == [4, 5, 6, 7, 8, 9, 10, 16]
    assert choose(weights, steps, 17).tolist() == list(range(17))


def test_short_videos_are_read_whole(monkeypatch, model, text):
    """And of longer ones as much as of them. An image is a time step of its own, however many tokens it has."""
    monkeypatch.setattr(excerpts, "LEAST_STEPS", LEAST_STEPS)
    short = double({"pixel_values_videos": VIDEO["pixel_values_videos"][: LEAST_STEPS * 24]})
    short["video_grid_thw"] = torch.tensor([[LEAST_STEPS, 4, 6]])
    image = double(make_media("image", (1, 8, 8), seed=1))
    marks = torch.zeros_like(text)
    marks[0, :2] = torch.tensor([1, 2])
    for media in (short, {**image, **double(VIDEO), "mm_token_type_ids": marks}):
        outputs = [generate(model, text, **media, video_read_share=share) for share in (0.01, None)]
        assert torch.equal(*map(logits_of, outputs))
    shares = {1.0: 2000, 0.5: 1000, 0.401: 802, 0.16: 320, 0.1: 320, 0.0001: 320}
    assert {share: num_read(2000, 10, share) for share in shares} == shares


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_the_gpu_as_on_the_cpu(text, implementation):
    options = {"video_cache_implementation": implementation, "video_read_share": 0.2}
    expected = generate(tiny_model(), text, **VIDEO, **options)
    video = {name: value.to("cuda") for name, value in VIDEO.items()}
    outputs = generate(tiny_model().to("cuda"), text.to("cuda"), **video, **options)
    torch.testing.assert_close(logits_of(outputs).cpu(), logits_of(expected), atol=1e-2, rtol=1e-2)
