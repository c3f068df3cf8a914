# SPDX-License-Identifier: Apache-2.0
"""What a cache knows of the time steps of its videos."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vamba import cache_of, make_media, make_text

from transformers_vamba import VambaCache
from transformers_vamba.cache.steps import VideoSteps


VIDEO, TIMES = make_media("video", (5, 4, 6)), torch.tensor([0, 500, 1250, 1500, 2000])


def known(cache, video=0):
    """Tokens and times of each step."""
    steps = cache.steps_of(video)
    return steps.num_tokens.tolist(), steps.timestamps_ms.tolist()


def test_steps_are_noted_as_segments_come(model):
    whole = model.encode_video(**VIDEO, video_timestamps_ms=TIMES)
    assert known(whole) == ([6] * 5, TIMES.tolist())
    assert whole.steps_of(0).seconds.tolist() == [0, 0.5, 1.25, 1.5, 2]
    for segment_frames in (1, 4):
        cache = model.encode_video(**VIDEO, video_timestamps_ms=TIMES, segment_frames=segment_frames)
        assert known(cache) == known(whole)
    fork = cache.fork()
    model.encode_video(**make_media("video", (2, 4, 4)), cache=fork)
    assert known(fork) == ([6] * 5 + [4] * 2, [*TIMES.tolist(), -1, -1])
    assert math.isnan(fork.steps_of(0).seconds[-1])
    assert known(cache) == known(whole)
    cache.reset()
    assert cache.steps == {}


def test_steps_that_are_dropped_leave_a_mark():
    """One for each gap, that begins when the step before it ended; also of gaps that grow together."""
    steps = VideoSteps().append(8, 2, 1000 * torch.arange(8)).select(torch.tensor([0, 1, 2, 8, 9, 15]))
    assert (steps.num_tokens.tolist(), steps.seconds.tolist()) == ([2, 1, 0, 2, 0, 1], [0, 1, 2, 4, 5, 7])
    steps = steps.select(torch.tensor([0, 2, 5]))
    assert (steps.num_tokens.tolist(), steps.seconds.tolist()) == ([1, 1, 0, 1], [0, 1, 2, 7])
    steps = steps.append(2, 3).select(torch.tensor([1, 8]))
    assert (steps.num_tokens.tolist(), steps.timestamps_ms.tolist()) == ([1, 0, 1], [1000, 2000, -1])


def test_each_row_has_its_own(model):
    sizes = make_media("video", (1, 4, 4), (2, 4, 6), (1, 8, 4))
    times = torch.tensor([0, 0, 100, 0])
    cache = model.encode_video(**sizes, video_timestamps_ms=times, video_sample_ids=torch.tensor([0, 1, 1]))
    assert known(cache, 0) == ([4], [0]) and known(cache, 1) == ([6, 6, 8], [0, 100, 0])


def test_through_generate_and_forward(model):
    inputs = {"input_ids": make_text(), **VIDEO, "video_timestamps_ms": TIMES}
    outputs = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert known(cache_of(outputs)) == ([6] * 5, TIMES.tolist())
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        assert known(cache_of(outputs)) == ([6] * 5, TIMES.tolist())
        assert torch.equal(outputs.logits, model(input_ids=make_text(), **VIDEO, use_cache=True).logits)
    static = model.generate(
        make_text(),
        cache=model.encode_video(**VIDEO, video_timestamps_ms=TIMES),
        cache_implementation="static",
        max_new_tokens=3,
        return_dict_in_generate=True,
        disable_compile=True,
    )
    assert known(cache_of(static)) == ([6] * 5, TIMES.tolist())


def test_images_are_steps_at_no_time(model):
    images = make_media("image", (1, 4, 4), (1, 4, 6))
    with torch.no_grad():
        cache = cache_of(model(input_ids=make_text(), **images, image_sample_ids=torch.tensor([0, 0]), use_cache=True))
    assert known(cache) == ([4, 6], [-1, -1])


def test_an_append_that_fails_leaves_them(model, monkeypatch):
    cache = model.encode_video(**VIDEO, video_timestamps_ms=TIMES)
    before, encode = known(cache), model.model.language_model.encode_video
    calls = []

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        encode(*args)

    monkeypatch.setattr(model.model.language_model, "encode_video", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        model.encode_video(**VIDEO, video_timestamps_ms=TIMES, cache=cache, segment_frames=4)
    assert known(cache) == before and cache.video_lengths == [30]


def test_wrong_numbers_of_times(model):
    with pytest.raises(ValueError, match="`video_timestamps_ms` has 4 entries for the 5 steps of time"):
        model.encode_video(**VIDEO, video_timestamps_ms=TIMES[:4])
    with pytest.raises(TypeError, match="`video_timestamps_ms` must hold integers, got torch.float32"):
        model.encode_video(**VIDEO, video_timestamps_ms=TIMES.float())


@pytest.mark.parametrize("implementation", ("dynamic", "quantized", "offloaded", "offloaded_quantized"))
def test_saved_and_loaded(model, tmp_path, implementation):
    cache = model.encode_video(**VIDEO, video_timestamps_ms=TIMES)
    cache.save_pretrained(tmp_path)
    loaded = VambaCache.from_pretrained(tmp_path, video_cache_implementation=implementation)
    assert known(loaded) == known(cache)
    model.encode_video(**make_media("video", (1, 4, 6)), video_timestamps_ms=torch.tensor([2500]), cache=loaded)
    assert known(loaded) == ([6] * 6, [*TIMES.tolist(), 2500])


def test_a_folder_saved_before_there_were_steps(model, tmp_path):
    model.encode_video(**VIDEO, video_timestamps_ms=TIMES).save_pretrained(tmp_path)
    (tmp_path / "steps.safetensors").unlink()
    loaded = VambaCache.from_pretrained(tmp_path)
    assert known(loaded) == ([30], [-1])
    model.encode_video(**VIDEO, video_timestamps_ms=TIMES, cache=loaded)
    assert known(loaded) == ([30] + [6] * 5, [-1, *TIMES.tolist()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.num_tokens", torch.tensor([6] * 4)),
        ("0.num_tokens", torch.tensor([6, 6, 6, 6, 7])),
        ("0.num_tokens", torch.tensor([6, 6, 6, 18, -6])),
        ("0.num_tokens", torch.tensor([[6] * 5])),
        ("0.num_tokens", torch.tensor(30)),
        ("0.timestamps_ms", torch.tensor([0, 1, 2, 3, -2])),
        ("0.timestamps_ms", torch.zeros(5)),
        ("1.num_tokens", torch.tensor([6])),
    ],
)
def test_damaged_steps_are_named(model, tmp_path, name, value):
    model.encode_video(**VIDEO, video_timestamps_ms=TIMES).save_pretrained(tmp_path)
    path = tmp_path / "steps.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {name: value}, path, metadata=metadata)
    with pytest.raises(ValueError, match="processed video is damaged: .*steps.safetensors' (holds|does not count)"):
        VambaCache.from_pretrained(tmp_path)
    save_file({"0.num_tokens": TIMES}, path)
    with pytest.raises(ValueError, match="steps.safetensors' is of another save"):
        VambaCache.from_pretrained(tmp_path)
