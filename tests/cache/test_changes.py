# SPDX-License-Identifier: Apache-2.0
"""`video_pruning_rate` and `max_video_tokens`: which tokens of a video go, against the same choice in float64."""

import itertools
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vamba import cache_of, make_media, make_text

from transformers_vamba import VambaCache
from transformers_vamba.cache.changes import num_kept
from transformers_vamba.inputs.media import Medium


pytestmark = pytest.mark.usefixtures("small_blocks")

IMPLEMENTATIONS = ("dynamic", "quantized", "offloaded", "offloaded_quantized")
GRID = (4, 6)  # in patches: 6 tokens per time step
VIDEO = make_media("video", (17, *GRID))  # 102 tokens
BUDGET = 40  # leaves 35 tokens, 8 of them for their age


def pieces_of(media, num_steps):
    """A video in pieces of so many time steps."""
    (total, *size), pixels = media["video_grid_thw"][0].tolist(), media["pixel_values_videos"]
    for piece in pixels.unflatten(0, (total, -1)).split(num_steps):
        yield {"pixel_values_videos": piece.flatten(0, 1), "video_grid_thw": torch.tensor([[len(piece), *size]])}


def stream(model, media, num_steps, cache=None, **options):
    for piece in pieces_of(media, num_steps):
        cache = model.encode_video(**piece, cache=cache, **options)
    return cache


def tensors_of(cache):
    return [tensor for video in cache.videos for layer in video for tensor in layer.state_dict().values()]


def assert_same(found, expected, tolerance=0.0):
    found, expected = tensors_of(found), tensors_of(expected)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).abs().max() <= tolerance


def read(model, cache):
    with torch.no_grad():
        return model(input_ids=make_text(), cache=cache.fork()).logits


def generate(model, cache=None, **kwargs):
    return model.generate(input_ids=make_text(), cache=cache, max_new_tokens=6, do_sample=False, **kwargs)


def embed(model, media, num_steps):
    """What the vision tower makes of a video, per time step, in the dtype of the model."""
    with torch.no_grad():
        pixels, grid = media["pixel_values_videos"], tuple(media["video_grid_thw"][0].tolist())
        return model.model.embed_media([Medium(pixels, grid)])[0].unflatten(0, (num_steps, -1))


def measure_changes(steps):
    """The distance of each embedding from that one step before, in float64."""
    steps = steps.double()
    changes = torch.full(steps.shape[:2], math.inf, dtype=torch.float64)
    for step, place in itertools.product(range(1, len(steps)), range(steps.shape[1])):
        changes[step, place] = (steps[step, place] - steps[step - 1, place]).square().sum().sqrt()
    return changes


def encode_tokens(model, embeds):
    """A cache with these tokens, `(num_tokens, hidden_size)`, of one video."""
    cache = VambaCache(model.config)
    cache.add_video()
    with torch.no_grad():
        model.model.language_model.encode_video(embeds[None], cache.videos[0])
    return cache


@pytest.fixture
def seen(model, monkeypatch):
    """How many time steps the vision tower sees, call by call."""
    steps, embed_media = [], model.model.embed_media

    def see(media):
        steps.append([medium.grid[0] for medium in media])
        return embed_media(media)

    monkeypatch.setattr(model.model, "embed_media", see)
    return steps


@pytest.mark.parametrize("rate", (0.25, 0.5, 0.8, 0.99))
def test_the_least_changed_of_each_step_go(model, rate):
    steps = embed(model, VIDEO, 17)
    kept = [*steps[0]]
    for step, changes in zip(steps[1:], measure_changes(steps)[1:]):
        num_left = max(1, math.ceil(6 * (1 - rate)))
        places = sorted(range(6), key=lambda place: -changes[place])[:num_left]
        kept += [step[place] for place in sorted(places)]
    cache = model.encode_video(**VIDEO, video_pruning_rate=rate)
    assert cache.video_lengths == [len(kept)] == [6 + 16 * num_left]
    assert_same(cache, encode_tokens(model, torch.stack(kept)), tolerance=1e-5)


def test_rates_drop_what_they_say():
    for num_tokens in (1, 7, 10, 16, 100, 1000):
        for percent in range(100):
            # Without the rounding of floating point numbers.
            assert num_kept(num_tokens, percent / 100) == max(1, num_tokens - num_tokens * percent // 100)


def test_of_tokens_that_changed_alike_the_first_are_kept(model):
    pixels = VIDEO["pixel_values_videos"][:24].repeat(9, 1)
    pixels[::24, 0] = torch.tensor([0, 1e-38, 0, 1e-38, 0, 1e-38, 0, 1e-38, 0])  # which no token tells
    video = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[9, *GRID]])}
    cache = model.encode_video(**video, video_pruning_rate=0.5)
    step = embed(model, video, 9)[0]
    assert_same(cache, encode_tokens(model, torch.cat([step, *[step[:3]] * 8])), tolerance=1e-5)


@pytest.mark.parametrize(
    "options", ({}, {"video_pruning_rate": 0}, {"video_pruning_rate": 0.0, "max_video_tokens": 102})
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_off_is_bit_for_bit_as_before(model, implementation, options):
    options = options | {"video_cache_implementation": implementation}
    cache = model.encode_video(**VIDEO, segment_frames=8, **options)
    expected = VambaCache(model.config, video_cache_implementation=implementation)
    expected.add_video()
    with torch.no_grad():
        for piece in pieces_of(VIDEO, 4):
            grid = tuple(piece["video_grid_thw"][0].tolist())
            embeds = model.model.embed_media([Medium(piece["pixel_values_videos"], grid)])
            model.model.language_model.encode_video(embeds, expected.videos[0])
    assert_same(cache, expected)


@pytest.mark.parametrize(
    "options", ({"video_pruning_rate": 0.5}, {"video_pruning_rate": 0.2, "max_video_tokens": 60}), ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_give_the_same_as_the_whole(model, implementation, options, tmp_path):
    options = {"video_cache_implementation": implementation, **options}
    lengths = []
    for num_steps in (1, 4, 17):
        if "max_video_tokens" in options and num_steps != 4:
            continue  # when a cache is thinned out depends on the segments
        whole = model.encode_video(**VIDEO, segment_frames=2 * num_steps, **options)
        streamed = stream(model, VIDEO, num_steps, **options)
        assert_same(streamed, whole)
        whole.save_pretrained(tmp_path)
        loaded = VambaCache.from_pretrained(tmp_path)
        assert loaded.video_options == whole.video_options
        text = generate(model, whole.fork())
        for cache in (streamed, loaded):
            assert torch.equal(generate(model, cache.fork()), text)
        # What is known of the last time step has been on disk as well.
        more = make_media("video", (6, *GRID), seed=1)
        assert_same(stream(model, more, 3, loaded), stream(model, more, 3, whole))
        lengths.append(whole.video_lengths)
    assert all(length == lengths[0] for length in lengths)


def repeat_steps(media, times):
    """A video whose time steps come so many times each."""
    (_, *size), pixels = media["video_grid_thw"][0].tolist(), media["pixel_values_videos"]
    steps = pixels.unflatten(0, (len(times), -1)).repeat_interleave(torch.tensor(times), dim=0)
    return {"pixel_values_videos": steps.flatten(0, 1), "video_grid_thw": torch.tensor([[len(steps), *size]])}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", ({"video_pruning_rate": 0.5}, {"max_video_tokens": 1000}))
def test_steps_that_repeat_are_dropped_before_the_tower(model, seen, options, implementation):
    """What comes of a video is what comes of it without them, however it is cut."""
    options = {**options, "video_cache_implementation": implementation}
    distinct = make_media("video", (5, *GRID))
    video, times = repeat_steps(distinct, [1, 4, 1, 9, 2]), torch.arange(0, 1700, 100)
    expected = model.encode_video(**distinct, **options)
    assert seen == [[5]]
    for num_steps, expected_calls in ((17, [[5]]), (4, [[2], [2], [1]]), (1, [[1]] * 5)):
        seen.clear()
        cache = None
        for piece, moments in zip(pieces_of(video, num_steps), times.split(num_steps)):
            cache = model.encode_video(**piece, video_timestamps_ms=moments, cache=cache, **options)
        assert seen == expected_calls
        assert cache.video_lengths == expected.video_lengths
        # What 8 bits round to depends on the first tokens that come.
        tolerance = 2e-2 if "quantized" in implementation else 1e-5
        torch.testing.assert_close(read(model, cache), read(model, expected), rtol=0, atol=tolerance)
        # A step lasts until the next one.
        assert cache.steps_of(0).timestamps_ms.tolist() == [0, 100, 500, 600, 1500]
        assert torch.equal(cache.steps_of(0).num_tokens, expected.steps_of(0).num_tokens)


def test_a_moment_lasts_while_nothing_changes(model):
    video, times = repeat_steps(make_media("video", (3, *GRID)), [2, 5, 3]), torch.arange(0, 1000, 100)
    cache = model.encode_video(**video, video_timestamps_ms=times, video_pruning_rate=0.1)
    (reading,) = model.locate(make_text(), cache)
    assert reading.seconds.tolist() == pytest.approx([0, 0.2, 0.7]) and reading.weights.min() > 0
    (moment,) = reading._replace(weights=torch.tensor([0.0, 1, 0])).moments()
    assert (moment.start, moment.stop) == pytest.approx((0.2, 0.7))


def test_without_pruning_no_step_is_dropped(model, seen):
    cache = model.encode_video(**repeat_steps(make_media("video", (2, *GRID)), [4, 4]))
    assert seen == [[8]] and cache.video_lengths == [48]


def test_only_what_goes_on_repeats(model, seen):
    """And only if all of its pixels are equal."""
    still = repeat_steps(make_media("video", (1, *GRID)), [3])
    pixels = torch.cat([still["pixel_values_videos"]] * 3)
    pixels[4 * 24 + 23, -1] += 1e-3  # the last value of the middle step of the second video
    pixels[6 * 24, 0] = math.nan  # equal to nothing
    grids = torch.tensor([[3, *GRID]] * 3)
    cache = model.encode_video(pixels, grids, video_sample_ids=torch.tensor([0] * 3), video_pruning_rate=0.5)
    assert seen == [[1, 3, 2]]
    assert cache.steps_of(0).num_tokens.tolist() == [6, 6, 3, 3, 6, 3]
    # The last one goes on, until its size changes.
    model.encode_video(**still, cache=cache)
    turned = {"pixel_values_videos": still["pixel_values_videos"], "video_grid_thw": torch.tensor([[3, *GRID[::-1]]])}
    model.encode_video(**turned, cache=cache)
    assert seen[1:] == [[1]] and cache.video_lengths == [27 + 6]


def test_a_fork_and_a_loaded_cache_go_on(model, seen, tmp_path):
    """What was last seen is not saved: a loaded cache takes the next step as changed."""
    still = repeat_steps(make_media("video", (1, *GRID)), [3])
    cache = model.encode_video(**still, video_pruning_rate=0.5)
    model.encode_video(**still, cache=cache.fork())
    assert cache.video_lengths == [6] and seen == [[1]]
    cache.save_pretrained(tmp_path)
    loaded = model.encode_video(**still, cache=VambaCache.from_pretrained(tmp_path))
    assert loaded.video_lengths == [6 + 3] and seen == [[1], [1]]


def test_generate_takes_the_options(model):
    for options in ({"video_pruning_rate": 0.5}, {"max_video_tokens": 40}):
        encoded = model.encode_video(**VIDEO, **options)
        kwargs = {**VIDEO, **options, "return_dict_in_generate": True}
        for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            outputs = generate(model, **kwargs, **more)
            assert_same(cache_of(outputs), encoded, tolerance=1e-5)
            assert cache_of(outputs).video_options == encoded.video_options
            assert torch.equal(outputs.sequences, generate(model, encoded.fork(), **more))


def test_what_is_left_can_be_located(model):
    times = torch.arange(0, 1700, 100)
    cache = model.encode_video(
        **VIDEO, video_timestamps_ms=times, segment_frames=8, video_pruning_rate=0.5, max_video_tokens=BUDGET
    )
    (reading,) = model.locate(make_text(), cache)
    steps = cache.steps_of(0)
    assert len(reading.weights) == len(steps.num_tokens) and reading.weights.sum().item() == pytest.approx(1, abs=1e-5)
    assert steps.num_tokens.sum() == cache.video_lengths[0]
    assert torch.equal(reading.weights > 0, steps.num_tokens > 0)
    assert torch.equal(steps.timestamps_ms, steps.timestamps_ms.sort().values)


def test_media_begin_whole(model):
    """Images stay whole, and of each video the first time step, also if it is of the size of what came before."""
    image = make_media("image", (1, *GRID), (1, *GRID))
    videos = make_media("video", (5, *GRID), (3, 4, 4))
    kept = 6 + 6 + (6 + 4 * 3) + (4 + 2 * 2)
    cache = cache_of(generate(model, **image, **videos, video_pruning_rate=0.5, return_dict_in_generate=True))
    assert cache.video_lengths == [kept]
    assert cache.steps_of(0).num_tokens.tolist() == [6, 6, 6, 3, 3, 3, 3, 4, 2, 2]
    # A prompt brings new media, and what is appended goes on.
    ids = torch.cat([cache.text_ids, make_text(seed=1)], dim=1)
    more = make_media("video", (2, 4, 4))
    model.generate(input_ids=ids, cache=cache, max_new_tokens=1, **more)
    assert cache.video_lengths == [kept + 4 + 2]
    model.encode_video(**more, cache=cache)
    assert cache.video_lengths == [kept + 4 + 2 + 2 * 2]
    model.encode_video(**make_media("video", (2, *GRID)), cache=cache)
    assert cache.video_lengths == [kept + 4 + 2 + 2 * 2 + 6 + 3]


def test_several_rows(model):
    """Each row's video is compared with itself."""
    videos = make_media("video", (5, *GRID), (7, *GRID), seed=3)
    rows = torch.tensor([0, 1])
    cache = model.encode_video(**videos, video_sample_ids=rows, video_pruning_rate=0.5, max_video_tokens=20)
    cache = model.encode_video(**videos, video_sample_ids=rows, cache=cache)
    for row, num_steps in enumerate((5, 7)):
        pixels = videos["pixel_values_videos"].split([5 * 24, 7 * 24])[row]
        own = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[num_steps, *GRID]])}
        alone = model.encode_video(**own, video_pruning_rate=0.5, max_video_tokens=20)
        alone = model.encode_video(**own, cache=alone)
        for layer, other in zip(cache.videos[row], alone.videos[0]):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_budget_keeps_the_newest_and_the_most_changed(model, implementation):
    """Segment by segment, as a list of tokens: those over the budget go by their importance in float64."""
    steps = embed(model, VIDEO, 17)
    changes = measure_changes(steps)
    importance = [
        change - changes[step].mean() if step else math.inf for step in range(17) for change in changes[step]
    ]
    full = model.encode_video(**VIDEO, video_cache_implementation=implementation, segment_frames=8)
    kept, lengths = [], []
    for start in range(0, 102, 24):
        kept += range(start, min(start + 24, 102))
        if len(kept) > BUDGET:
            old, new = kept[: len(kept) - 8], kept[len(kept) - 8 :]
            kept = sorted(sorted(old, key=lambda token: (-importance[token], -token))[:27]) + new
        lengths.append(len(kept))
    cache, found = None, []
    for piece, times in zip(pieces_of(VIDEO, 4), torch.arange(0, 1700, 100).split(4)):
        cache = model.encode_video(
            **piece,
            video_timestamps_ms=times,
            cache=cache,
            max_video_tokens=BUDGET,
            video_cache_implementation=implementation,
        )
        found += cache.video_lengths
    assert found == lengths and max(found) <= BUDGET
    # The time steps keep to the tokens. Of those without any the first of each gap tells when the step before ended.
    steps = [token // 6 for token in kept]
    stays = sorted({each for step in steps for each in (step, step + 1) if each < 17})
    assert len(set(steps)) < len(stays)
    assert cache.steps_of(0).num_tokens.tolist() == [steps.count(step) for step in stays]
    assert cache.steps_of(0).timestamps_ms.tolist() == [100 * step for step in stays]
    for layer, other in zip(cache.videos[0], full.videos[0]):
        for name, tensor in layer.state_dict().items():
            # The mixers have gone on as if nothing had been dropped.
            expected = other.state_dict()[name]
            expected = expected[:, :, kept] if name in layer.token_tensors else expected
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forks_keep_their_tokens(model, implementation):
    options = {"max_video_tokens": BUDGET, "video_cache_implementation": implementation}
    first, *others = pieces_of(VIDEO, 6)
    cache = model.encode_video(**first, **options)
    fork, expected = cache.fork(), read(model, cache)
    for piece in others:
        model.encode_video(**piece, cache=cache)
        assert cache.video_lengths[0] <= BUDGET
        assert fork.video_lengths == [36] and torch.equal(read(model, fork), expected)
    before = read(model, cache)
    for piece in others:
        model.encode_video(**piece, cache=fork)
    assert torch.equal(read(model, cache), before) and torch.equal(read(model, fork), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("where", ("update", "select"))
def test_a_call_that_fails_leaves_the_cache_as_it_was(model, implementation, where, monkeypatch):
    options = {"max_video_tokens": BUDGET, "video_cache_implementation": implementation, "video_pruning_rate": 0.1}
    first, second, third = pieces_of(VIDEO, 6)
    cache = model.encode_video(**first, **options)
    lengths, before = cache.video_lengths, read(model, cache)
    layer_class, calls = type(cache.videos[0][0]), itertools.count(1)
    original = getattr(layer_class, where)

    def fail(*args):
        if next(calls) == 5:  # in the second segment, in the second of three layers
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(layer_class, where, fail)
        with pytest.raises(KeyboardInterrupt):
            model.encode_video(**VIDEO, cache=cache, segment_frames=12)
    assert cache.video_lengths == lengths and torch.equal(read(model, cache), before)
    expected = stream(model, VIDEO, 6, **options)
    for piece in (second, third):
        model.encode_video(**piece, cache=cache)
    assert_same(cache, expected)


def test_folders_saved_before_still_load(model, tmp_path):
    cache = model.encode_video(**VIDEO)
    cache.save_pretrained(tmp_path)
    config = tmp_path / "cache_config.json"
    content = json.loads(config.read_text())
    for name in ("video_pruning_rate", "max_video_tokens", "grid_sizes"):
        del content[name]
    config.write_text(json.dumps(content))
    loaded = VambaCache.from_pretrained(tmp_path)
    assert_same(loaded, cache)
    assert loaded.video_options == cache.video_options and not loaded.follows_changes
    # And the file of another save goes.
    model.encode_video(**VIDEO, max_video_tokens=40).save_pretrained(tmp_path)
    assert (tmp_path / "changes.safetensors").exists()
    cache.save_pretrained(tmp_path)
    assert not (tmp_path / "changes.safetensors").exists()
    assert_same(VambaCache.from_pretrained(tmp_path), cache)


def edit_config(folder, **fields):
    content = json.loads((folder / "cache_config.json").read_text()) | fields
    (folder / "cache_config.json").write_text(json.dumps(content))


def edit_changes(folder, **fields):
    path = folder / "changes.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: fields.get(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)


DAMAGES = {
    "no file": lambda folder: (folder / "changes.safetensors").unlink(),
    "no importance": lambda folder: edit_changes(folder, **{"0.importance": None}),
    "importance of fewer tokens": lambda folder: edit_changes(folder, **{"0.importance": torch.zeros(5)}),
    "importance in integers": lambda folder: edit_changes(folder, **{"0.importance": torch.zeros(35).long()}),
    "no last step": lambda folder: edit_changes(folder, **{"0.last_step": None}),
    "a last step of five places": lambda folder: edit_changes(folder, **{"0.last_step": torch.zeros(5, 64)}),
    "a last step of another size": lambda folder: edit_changes(folder, **{"0.last_step": torch.zeros(6, 32)}),
    "a last step without places": lambda folder: edit_changes(folder, **{"0.last_step": torch.zeros(0, 64)}),
    "another save": lambda folder: save_file(
        load_file(folder / "changes.safetensors"), folder / "changes.safetensors"
    ),
    "no sizes": lambda folder: edit_config(folder, grid_sizes=[]),
    "a size in words": lambda folder: edit_config(folder, grid_sizes=[["4", "6"]]),
    "an unknown size": lambda folder: edit_config(folder, grid_sizes=[None]),
    "a size of 0": lambda folder: edit_config(folder, grid_sizes=[[0, 6]]),
    "sizes as a number": lambda folder: edit_config(folder, grid_sizes=4),
    "a rate of 1": lambda folder: edit_config(folder, video_pruning_rate=1),
    "a rate in words": lambda folder: edit_config(folder, video_pruning_rate="0.5"),
    "a budget of 0": lambda folder: edit_config(folder, max_video_tokens=0),
    "half a token": lambda folder: edit_config(folder, max_video_tokens=35.5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_named_at_loading(model, damage, tmp_path):
    stream(model, VIDEO, 17, max_video_tokens=BUDGET).save_pretrained(tmp_path)
    assert VambaCache.from_pretrained(tmp_path).video_lengths == [35]
    DAMAGES[damage](tmp_path)
    with pytest.raises(ValueError, match=f"video is damaged: '{tmp_path}/(cache_config.json|changes.safetensors)"):
        VambaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("rate", (1, 1.0, -0.1, "0.5", True, math.nan, math.inf))
def test_a_rate_that_does_not_exist(model, rate):
    for call in (model.encode_video, lambda **kwargs: generate(model, **kwargs)):
        with pytest.raises(ValueError, match="`video_pruning_rate`.*at least 0 and below 1, got"):
            call(**VIDEO, video_pruning_rate=rate)


@pytest.mark.parametrize("budget", (0, -1, 10.0, "10", True))
def test_a_budget_that_does_not_exist(model, budget):
    for call in (model.encode_video, lambda **kwargs: generate(model, **kwargs)):
        with pytest.raises(ValueError, match="`max_video_tokens`.*integer of at least 1, or None for all, got"):
            call(**VIDEO, max_video_tokens=budget)


def test_a_cache_keeps_to_its_options(model):
    cache = model.encode_video(**VIDEO, video_pruning_rate=0.5)
    model.encode_video(**VIDEO, cache=cache, video_pruning_rate=0.5)
    for options in ({"video_pruning_rate": 0.25}, {"video_pruning_rate": 0}, {"max_video_tokens": 50}):
        name = next(iter(options))
        for call in (model.encode_video, lambda **kwargs: generate(model, **kwargs)):
            with pytest.raises(
                ValueError, match=f"`{name}` is .*, but the cache that was given keeps its videos with {name}="
            ):
                call(**VIDEO, **options, cache=cache)


def test_forward_takes_neither_option(model):
    """Training sees all tokens: there is nothing that would swallow the option."""
    for options in ({"video_pruning_rate": 0.5}, {"max_video_tokens": 50}):
        with pytest.raises(TypeError, match=next(iter(options))):
            model(input_ids=make_text(), **VIDEO, **options)
