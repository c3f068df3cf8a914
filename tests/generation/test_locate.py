# SPDX-License-Identifier: Apache-2.0
"""What `locate` says was read of each moment, beside plain attention in float64."""

import math

import pytest
import torch
from tiny_vamba import cache_of, make_media, make_text, tiny_model

from transformers_vamba import VambaCache
from transformers_vamba.generation import locate
from transformers_vamba.generation.locate import VideoReading
from transformers_vamba.ops import time_steps
from transformers_vamba.ops.quantized_attention import quantize
from transformers_vamba.ops.time_steps import log_weights_of_steps


VIDEO, TIMES = make_media("video", (5, 4, 6)), torch.tensor([0, 500, 1250, 1500, 2000])
IMPLEMENTATIONS = ("dynamic", "quantized", "offloaded", "offloaded_quantized")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def reference(model, text, cache, video, predicts, row=0):
    """The weights of the steps by full attention matrices in float64, of the tokens of one row that predict."""
    texts = []
    layers = model.model.language_model.layers
    handles = [
        layer.input_layernorm.register_forward_hook(lambda *args: texts.append(args[-1][row].double()))
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=text, cache=cache.fork(), use_cache=False)
    for handle in handles:
        handle.remove()
    steps = cache.steps_of(video).num_tokens
    total = torch.zeros(len(steps), dtype=torch.float64)
    for layer, hidden_states, video_layer in zip(layers, texts, cache.videos[video], strict=True):
        attention = layer.cross_attn
        weight, bias = attention.q_proj.weight.double(), attention.q_proj.bias.double()
        query = (hidden_states[predicts] @ weight.T + bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        keys = video_layer.keys[0].double().repeat_interleave(attention.num_heads // attention.num_key_value_heads, 0)
        weights = (query @ keys.transpose(1, 2) / math.sqrt(attention.head_dim)).softmax(-1)
        of_steps = torch.stack([piece.sum(-1) for piece in weights.split(steps.tolist(), dim=-1)], dim=-1)
        divergence = (of_steps * (of_steps / (steps / steps.sum())).log()).sum(-1, keepdim=True)
        total += (divergence * of_steps).sum((0, 1))
    return (total / total.sum()).float()


@pytest.fixture(params=(2**24, 60), ids=("at once", "in chunks"))
def chunks(request, monkeypatch):
    monkeypatch.setattr(locate, "WEIGHTS_AT_ONCE", request.param)
    monkeypatch.setattr(time_steps, "SCORES_AT_ONCE", request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_attention_by_step(model, chunks, implementation):
    cache = model.encode_video(**VIDEO, video_timestamps_ms=TIMES, video_cache_implementation=implementation)
    text, mask = make_text(), torch.arange(12)[None] >= 9
    (reading,) = model.locate(text, cache, token_mask=mask)
    torch.testing.assert_close(reading.weights, reference(model, text, cache, 0, [8, 9, 10]), atol=1e-5, rtol=1e-4)
    assert reading.seconds.tolist() == [0, 0.5, 1.25, 1.5, 2]
    (everything,) = model.locate(text, cache)
    expected = reference(model, text, cache, 0, list(range(11)))
    torch.testing.assert_close(everything.weights, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(everything.weights, reading.weights, atol=1e-4)


def test_steps_of_several_sizes(model, chunks):
    """Two videos and an image in one conversation; their steps have 4, 6, 8 and 1 tokens."""
    cache = model.encode_video(**make_media("video", (2, 4, 4), (3, 4, 6)), video_timestamps_ms=TIMES)
    model.encode_video(**make_media("video", (1, 8, 4), (1, 2, 2)), cache=cache)
    text = make_text()
    (reading,) = model.locate(text, cache)
    expected = reference(model, text, cache, 0, list(range(11)))
    torch.testing.assert_close(reading.weights, expected, atol=1e-5, rtol=1e-4)
    assert len(reading.weights) == 7 and reading.seconds[5:].isnan().all()


def test_a_batch_of_questions_and_of_videos(model):
    texts = torch.cat([make_text(seed=1), make_text(seed=2)])
    shared = model.encode_video(**VIDEO)
    own = model.encode_video(**make_media("video", (5, 4, 6), (3, 4, 4)), video_sample_ids=torch.tensor([0, 1]))
    for cache, videos in ((shared, (0, 0)), (own, (0, 1))):
        for row, reading in enumerate(model.locate(texts, cache)):
            expected = reference(model, texts, cache, videos[row], list(range(11)), row)
            torch.testing.assert_close(reading.weights, expected, atol=1e-5, rtol=1e-4)
            alone = VambaCache(model.config)
            alone.videos, alone.steps = [cache.videos[videos[row]]], {0: cache.steps_of(videos[row])}
            torch.testing.assert_close(model.locate(texts[row : row + 1], alone)[0].weights, reading.weights)


def test_padding_on_either_side(model):
    cache, text = model.encode_video(**VIDEO), make_text()
    (expected,) = model.locate(text, cache)
    padding, is_padding = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    for order in (1, -1):
        padded, mask = (torch.cat(pair[::order], 1) for pair in ((padding, text), (is_padding, torch.ones_like(text))))
        (reading,) = model.locate(padded, cache, attention_mask=mask)
        torch.testing.assert_close(reading.weights, expected.weights)


def test_after_an_answer_and_nothing_changes(model):
    cache = model.encode_video(**VIDEO, video_timestamps_ms=TIMES)
    text = make_text()
    outputs = model.generate(text, cache=cache.fork(), max_new_tokens=4, return_dict_in_generate=True)
    tokens, spent = outputs.sequences, cache_of(outputs)
    length = spent.get_seq_length()
    (reading,) = model.locate(tokens, cache)
    torch.testing.assert_close(model.locate(tokens, past_key_values=spent)[0].weights, reading.weights)
    assert cache.get_seq_length() == 0 and cache.rows is None and spent.get_seq_length() == length
    again = model.generate(text, cache=cache.fork(), max_new_tokens=4)
    assert torch.equal(again, tokens)
    assert not any(layer.cross_attn._forward_pre_hooks for layer in model.model.language_model.layers)


def test_a_planted_moment_is_found(model):
    """Keys that a query likes better than all others, at one step only."""
    query = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    keys = torch.randn(1, 2, 60, 16, generator=torch.Generator().manual_seed(1))
    keys[0, :, 24:30] += 4 * query[:, :1]
    num_tokens = torch.tensor([6] * 4 + [0] + [6] * 6)  # a step may have lost all its tokens
    for states in (keys, quantize(keys, keys.mean(2, keepdim=True))):
        weights = log_weights_of_steps(query, states, num_tokens, 0.25).exp()
        assert (weights[:, 0].argmax(-1) == 5).all() and (weights[..., 4] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


def test_long_videos_do_not_lose_small_steps():
    """Scores of which most underflow next to the largest."""
    query, keys = torch.ones(1, 1, 4), torch.zeros(1, 1, 1000, 4)
    keys[:, :, 500:502] = 100.0
    keys[:, :, 10:12] = 99.0
    log_weights = log_weights_of_steps(query, keys, torch.full((500,), 2), 1.0)[0, 0]
    expected = (keys[0, 0].sum(-1).double()).log_softmax(0).view(500, 2).logsumexp(1)
    assert log_weights.argmax() == 250 and not log_weights.isnan().any()
    torch.testing.assert_close(log_weights.exp(), expected.exp().float())


def test_moments():
    seconds = torch.tensor([0.0, 1.0, 2.5, 3.0, 0.0, 1.0], dtype=torch.float64)
    reading = VideoReading(torch.tensor([0.05, 0.3, 0.1, 0.2, 0.3, 0.05]), seconds)
    moments = reading.moments(least=0.5)
    assert [(each.first, each.last, each.start, each.stop) for each in moments] == [
        (1, 1, 1.0, 2.5),
        (3, 3, 3.0, 4.0),
        (4, 4, 0.0, 1.0),
    ]
    assert [each.weight for each in moments] == pytest.approx([0.3, 0.2, 0.3])
    assert [(each.first, each.last) for each in reading.moments(least=0.3)] == [(1, 3), (4, 4)]
    unknown = VideoReading(reading.weights, torch.full((6,), math.nan, dtype=torch.float64)).moments(0.5)
    assert [each.first for each in unknown] == [1, 3] and math.isnan(unknown[0].start) and math.isnan(unknown[1].stop)
    with pytest.raises(ValueError, match="`least` must lie above 0 and be at most 1, got 0"):
        reading.moments(least=0)


def test_no_moment_reaches_across_what_was_dropped():
    """A step of no weight begins each gap."""
    seconds = torch.tensor([0, 1, 10, 11, 12, 600], dtype=torch.float64)
    reading = VideoReading(torch.tensor([0.2, 0.0, 0.2, 0.2, 0.0, 0.4]), seconds)
    moments = [(each.first, each.last, each.start, each.stop) for each in reading.moments()]
    assert moments == [(0, 0, 0.0, 1.0), (2, 3, 10.0, 12.0), (5, 5, 600.0, 601.0)]


def test_one_step_is_all_there_is(model, tmp_path):
    """Of a folder that was saved before steps were kept, too."""
    cache = model.encode_video(**VIDEO)
    cache.save_pretrained(tmp_path)
    (tmp_path / "steps.safetensors").unlink()
    (reading,) = model.locate(make_text(), VambaCache.from_pretrained(tmp_path))
    assert reading.weights.tolist() == [1.0] and math.isnan(reading.moments()[0].start)


def test_what_cannot_be_located(model):
    cache, text = model.encode_video(**VIDEO), make_text()
    with pytest.raises(ValueError, match="`cache` holds no video to be read"):
        model.locate(text, VambaCache(model.config))
    with pytest.raises(TypeError, match="`token_mask` must be a torch.Tensor, got list"):
        model.locate(text, cache, token_mask=[[True] * 12])
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(1, 12\), got \(1, 1, 12, 12\)"):
        model.locate(text, cache, attention_mask=torch.ones(1, 1, 12, 12))
    with pytest.raises(ValueError, match="`token_mask` marks no token in row 0, or only the first one"):
        model.locate(text, cache, token_mask=torch.arange(12)[None] == 0)
    with pytest.raises(ValueError, match=r"`token_mask` must have shape \(1, 12\), got \(1, 3\)"):
        model.locate(text, cache, token_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="`input_ids` must not be empty"):
        model.locate(text[:, :0], cache)
    some = model.encode_video(**VIDEO, video_sample_ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="Row 0 reads no video of the cache"):
        model.locate(text.repeat(2, 1), some)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_the_gpu_as_on_the_cpu(model, chunks, implementation):
    options = {"video_timestamps_ms": TIMES, "video_cache_implementation": implementation}
    (expected,) = model.locate(make_text(), model.encode_video(**VIDEO, **options))
    device = tiny_model().to("cuda")
    (reading,) = device.locate(make_text().to("cuda"), device.encode_video(**VIDEO, **options))
    torch.testing.assert_close(reading.weights, expected.weights, atol=1e-3, rtol=1e-2)
    assert torch.equal(reading.seconds, expected.seconds)
