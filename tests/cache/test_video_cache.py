# SPDX-License-Identifier: Apache-2.0
"""The ways in which a cache keeps its videos: as computed, in 8 bits, in the host's memory, in 8 bits there."""

import copy

import pytest
import torch
from tiny_vamba import cache_of, make_media, make_text, tiny_model
from transformers import CompileConfig, StaticCache

from transformers_vamba import VambaCache, VambaConfig
from transformers_vamba.cache.layers import VambaQuantizedVideoLayer
from transformers_vamba.cache.storage import DeviceStorage, HostStorage
from transformers_vamba.inputs.media import Medium
from transformers_vamba.layers.decoder import VambaCrossAttention


pytestmark = pytest.mark.usefixtures("small_blocks")

IMPLEMENTATIONS = ("dynamic", "quantized", "offloaded", "offloaded_quantized")
EXACT = ("dynamic", "offloaded")
VIDEO = make_media("video", (17, 4, 6))  # 102 tokens
NEW_TOKENS = 8
# What 8 bits may change of the logits of the tiny model, whose weights are drawn wide: relative error.
QUANTIZED_ERROR = 5e-3


def generate(model, text, **kwargs):
    return model.generate(input_ids=text, max_new_tokens=NEW_TOKENS, **{"do_sample": False, **kwargs})


def read(model, cache):
    """Logits of a text about the video in a cache."""
    with torch.no_grad():
        return model(input_ids=make_text(), cache=cache.fork()).logits


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module")
def expected(model):
    cache = model.encode_video(**VIDEO)
    return read(model, cache), generate(model, make_text(), cache=cache)


@pytest.mark.parametrize("segment_frames", (2, 8, 64, 1000))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_give_the_same_tokens(model, expected, implementation, segment_frames, tmp_path):
    """However the video is cut, by `segment_frames` or streamed, and after it has been on disk."""
    options = {"segment_frames": segment_frames, "video_cache_implementation": implementation}
    whole = model.encode_video(**VIDEO, **options)
    whole.save_pretrained(tmp_path)
    streamed = None
    for piece in VIDEO["pixel_values_videos"].unflatten(0, (17, -1)).split(max(segment_frames // 2, 1)):
        grid = torch.tensor([[len(piece), 4, 6]])
        streamed = model.encode_video(piece.flatten(0, 1), grid, cache=streamed, **options)
    tolerance = 1e-5 if implementation in EXACT else QUANTIZED_ERROR
    for cache in (whole, streamed, VambaCache.from_pretrained(tmp_path)):
        assert cache.video_cache_implementation == implementation and cache.video_lengths == [102]
        assert relative_error(read(model, cache), expected[0]) < tolerance
        assert torch.equal(generate(model, make_text(), cache=cache.fork()), expected[1])


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded_static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "num_beams": 2},
    ),
    ids=str,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_option_of_generate(model, implementation, options):
    if options.get("cache_implementation") == "offloaded_static" and not torch.cuda.is_available():
        pytest.skip("Transformers offloads text to the host from CUDA devices only")
    expected = generate(model, make_text(), **VIDEO, **options)
    found = generate(model, make_text(), **VIDEO, **options, video_cache_implementation=implementation)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_cache_that_generate_returns(model, implementation):
    options = {"video_cache_implementation": implementation, "return_dict_in_generate": True}
    cache = cache_of(generate(model, make_text(), **VIDEO, **options))
    assert cache.video_cache_implementation == implementation
    assert isinstance(cache.videos[0][0], VambaQuantizedVideoLayer) == ("quantized" in implementation)
    # A static text takes over the videos of a cache as they are kept.
    encoded = model.encode_video(**VIDEO, video_cache_implementation=implementation)
    options["cache_implementation"] = "static"
    cache = cache_of(generate(model, make_text(), cache=encoded, **options))
    assert isinstance(cache, StaticCache) and cache.video_cache_implementation == implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_decoding(model, expected, implementation):
    """In one graph; a step that brings videos from the host's memory is not compiled."""
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="default", backend="aot_eager")
    compile_config._compile_all_devices = True
    cache = model.encode_video(**VIDEO, video_cache_implementation=implementation)
    model.__dict__.pop("_compiled_call", None)
    options = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(generate(model, make_text(), cache=cache, **options), expected[1])
    assert hasattr(model, "_compiled_call") == ("offloaded" not in implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fork_and_stream(model, implementation):
    """What is appended to a cache is not seen by a fork, and what a fork appends is not seen by the cache."""
    first, second, third = (make_media("video", (3, 4, 4), seed=seed) for seed in (1, 2, 3))
    joined = {name: torch.cat([video[name] for video in (first, second, third)]) for name in first}
    for num_first in (1, 2):  # 12 tokens fill no block, 24 one and a half
        parts = [first, second, third]
        cache = None
        for part in parts[:num_first]:
            cache = model.encode_video(**part, cache=cache, video_cache_implementation=implementation)
        before = read(model, cache)
        fork, other = cache.fork(), cache.fork()
        for part in parts[num_first:]:
            model.encode_video(**part, cache=fork)
        assert torch.equal(read(model, cache), before) and torch.equal(read(model, other), before)
        for part in parts[num_first:]:
            model.encode_video(**part, cache=cache)
        assert torch.equal(read(model, fork), read(model, cache)) and torch.equal(read(model, other), before)
        tolerance = 1e-5 if implementation in EXACT else QUANTIZED_ERROR
        assert relative_error(read(model, cache), read(model, model.encode_video(**joined))) < tolerance
        assert torch.equal(read(model, copy.deepcopy(cache)), read(model, cache))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_read_their_own_video(model, implementation):
    batch = make_media("video", (5, 4, 4), (3, 4, 6))
    rows = {"video_sample_ids": torch.tensor([0, 2])}
    cache = model.encode_video(**batch, **rows, video_cache_implementation=implementation)
    assert cache.rows == [0, None, 1]
    with torch.no_grad():
        expected = model(input_ids=make_text(3), **batch, **rows).logits
        found = model(input_ids=make_text(3), cache=cache).logits
    assert relative_error(found, expected) < (1e-5 if implementation in EXACT else QUANTIZED_ERROR)


@pytest.mark.parametrize("saved_as", IMPLEMENTATIONS)
@pytest.mark.parametrize("loaded_as", IMPLEMENTATIONS)
def test_saved_in_one_way_and_loaded_in_another(model, tmp_path, monkeypatch, saved_as, loaded_as):
    monkeypatch.setattr("transformers_vamba.cache.layers._CONVERTED_AT_ONCE", 50)
    more = make_media("video", (2, 4, 6), seed=9)
    cache = model.encode_video(**VIDEO, video_cache_implementation=saved_as)
    cache.save_pretrained(tmp_path)
    loaded = VambaCache.from_pretrained(tmp_path, video_cache_implementation=loaded_as)
    assert loaded.video_cache_implementation == loaded_as
    is_quantized = "quantized" in loaded_as
    assert all(isinstance(layer, VambaQuantizedVideoLayer) == is_quantized for layer in loaded.videos[0])
    exact = ("quantized" in saved_as) == is_quantized or not is_quantized
    assert relative_error(read(model, loaded), read(model, cache)) < (1e-5 if exact else QUANTIZED_ERROR)
    found, expected = (
        read(model, model.encode_video(**more, cache=each)) for each in (loaded, model.encode_video(**VIDEO))
    )
    assert relative_error(found, expected) < (1e-5 if {saved_as, loaded_as} <= set(EXACT) else QUANTIZED_ERROR)


def test_eight_bits_are_small(tmp_path):
    """In memory and on disk: 8 bits a number, and a scale of 16 for the 16 numbers of a head."""
    model = tiny_model(dtype=torch.bfloat16)
    sizes = {}
    for implementation in IMPLEMENTATIONS:
        cache = model.encode_video(**VIDEO, video_cache_implementation=implementation)
        cache.save_pretrained(tmp_path / implementation)
        tensors = cache.videos[0][-1].state_dict()
        growing = [tensors[name] for name in cache.videos[0][-1].token_tensors]
        assert cache.videos[0][-1].nbytes == sum(tensor.nbytes for tensor in growing)
        sizes[implementation] = cache.videos[0][-1].nbytes
    assert sizes["dynamic"] == sizes["offloaded"] == 102 * 2 * 2 * 16 * 2
    assert sizes["quantized"] == sizes["offloaded_quantized"] == 102 * 2 * 2 * (16 + 2)
    files = {name: (tmp_path / name / "layer-00002.safetensors").stat().st_size for name in IMPLEMENTATIONS}
    assert files["dynamic"] - files["quantized"] > 0.8 * (sizes["dynamic"] - sizes["quantized"])


# How sharply a query of a Vamba-7B head attends, how much the tokens have in common (as what a bias adds, many times
# what they differ by, in Qwen2's keys), and what 8 bits may change of the attention over them.
DISTRIBUTIONS = {
    "normal": (1.0, 0.0, 1.5e-2),
    "common part": (1.0, 30.0, 1.5e-2),
    "peaked": (6.0, 0.0, 3e-2),
}


@pytest.mark.parametrize("attn_implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_error_of_eight_bits_at_full_size(distribution, attn_implementation):
    """Cross-attention in float32 against float64, relative to what differs from token to token."""
    sharpness, common, tolerance = DISTRIBUTIONS[distribution]
    torch.manual_seed(0)
    config = VambaConfig().text_config  # 28 heads of 128 numbers, 4 of keys and values
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        attention = VambaCrossAttention(config, layer_idx=0).eval()
    attention.q_proj = attention.o_proj = torch.nn.Identity()
    keys, values = torch.randn(2, 1, 4, 5000, 128)
    keys[..., :4] += common * torch.randn(4, 1, 4)
    values[..., :4] += common * torch.randn(4, 1, 4)
    query = sharpness * torch.randn(1, 1, 28 * 128)
    layer = VambaQuantizedVideoLayer()
    for pieces in zip(keys.split(2000, dim=2), values.split(2000, dim=2)):
        layer.update(*pieces)

    weights = (query.double().view(4, 7, 128) @ keys[0].double().mT / 128**0.5).softmax(-1)
    mean = values[0].double().mean(1, keepdim=True)
    expected = weights @ (values[0].double() - mean)
    found = attention(query, [(1, *layer.read())]).double().view(4, 7, 128) - mean
    error = relative_error(found, expected)
    print(f"{distribution}: relative error {error:.1e}")
    assert 1e-3 < error < tolerance


def test_error_of_eight_bits_in_the_model():
    """Logits against float32 without 8 bits: in float32, and next to what bfloat16 alone changes."""
    video = make_media("video", (24, 6, 8))
    model = tiny_model()
    expected = read(model, model.encode_video(**video))
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype)
        for implementation in ("dynamic", "quantized"):
            logits = read(model, model.encode_video(**video, video_cache_implementation=implementation))
            errors[dtype, implementation] = relative_error(logits, expected)
    print(errors)
    assert 0 < errors[torch.float32, "quantized"] < QUANTIZED_ERROR
    assert errors[torch.bfloat16, "quantized"] < 1.2 * errors[torch.bfloat16, "dynamic"]


def test_layers_come_ahead_of_use(model, monkeypatch):
    """Each layer of a video that is read comes once a pass, before the one that reads it has begun."""
    events = []
    fetch, attend = HostStorage._fetch, VambaCrossAttention.forward
    monkeypatch.setattr(HostStorage, "_fetch", lambda self: events.append(("fetch", names[id(self)])) or fetch(self))
    monkeypatch.setattr(
        VambaCrossAttention,
        "forward",
        lambda self, *args: events.append(("attend", self.layer_idx)) or attend(self, *args),
    )
    video = make_media("video", (2, 4, 4), (3, 4, 4))
    cache = model.encode_video(**video, video_sample_ids=torch.tensor([0, 1]), video_cache_implementation="offloaded")
    cache.rows = [1]
    names = {id(layer._storage): (i, j) for i, layers in enumerate(cache.videos) for j, layer in enumerate(layers)}
    with torch.no_grad():
        model(input_ids=make_text(), cache=cache)
        model(input_ids=make_text(length=1), cache=cache)
    one_pass = [
        *(("fetch", (1, 1)), ("attend", 0)),
        *(("fetch", (1, 2)), ("attend", 1)),
        *(("fetch", (1, 0)), ("attend", 2)),
    ]
    assert events == [("fetch", (1, 0)), *one_pass, *one_pass]
    held = [layer._storage._fetched is not None for layer in cache.videos[1]]
    assert held == [True, False, False]


def test_segments_of_known_length_never_grow_the_memory(model, processor, video_file):
    for implementation in ("dynamic", "quantized"):
        cache, addresses = None, set()
        for segment in processor.iter_video_segments(video_file, num_frames=22, segment_frames=4):
            options = {"cache": cache, "video_cache_implementation": implementation}
            cache = model.encode_video(**segment, **options)
            memory = cache.videos[0][0]._storage._memory
            addresses |= {tensor.data_ptr() for tensor in memory}
            assert memory[0].shape[-2] == 66
        assert cache.video_lengths == [66] and len(addresses) == len(memory)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_model_of_another_dtype(model, tmp_path, implementation):
    """A video that a model in bfloat16 has processed, and the same model in float32."""
    cache = tiny_model(dtype=torch.bfloat16).encode_video(**VIDEO, video_cache_implementation=implementation)
    cache.save_pretrained(tmp_path)
    cache = VambaCache.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in torch.bfloat16, and is read in torch.float32.* `dtype=torch.bfloat16`"):
        generate(model, make_text(), cache=cache.fork())
    with pytest.raises(ValueError, match="in torch.bfloat16, and is appended to in torch.float32"):
        model.encode_video(**VIDEO, cache=cache)
    assert cache.video_lengths == [102] and cache.videos[0][0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("error", (torch.OutOfMemoryError, KeyboardInterrupt))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_failure_leaves_the_cache_as_it_was(model, monkeypatch, implementation, error):
    """Whatever happens while a video is appended to, in some of its layers: the call can be made again."""
    first, second = (make_media("video", (4, 4, 6), seed=seed) for seed in (1, 2))
    expected = model.encode_video(**first, video_cache_implementation=implementation)
    cache, fork = expected.fork(), expected.fork()
    model.encode_video(**second, cache=expected)

    layer = model.model.language_model.layers[1]
    calls, encode = [], layer.encode_video

    def fail_at_the_second_call(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return encode(*args)

    monkeypatch.setattr(layer, "encode_video", fail_at_the_second_call)
    with pytest.raises(error):
        model.encode_video(**second, cache=cache, segment_frames=4)
    assert [each.get_seq_length() for each in cache.videos[0]] == [24] * 3
    assert torch.equal(generate(model, make_text(), cache=cache.fork()), generate(model, make_text(), cache=fork))
    model.encode_video(**second, cache=cache)
    for held, whole in zip(cache.videos[0], expected.videos[0]):
        assert torch.equal(held.keys, whole.keys) and torch.equal(held.values, whole.values)

    calls.clear()
    empty = VambaCache(model.config, video_cache_implementation=implementation)
    with pytest.raises(error):
        model.encode_video(**second, cache=empty, segment_frames=4)
    assert not empty.videos and empty.rows is None


@pytest.mark.parametrize("num_allocations", (0, 1))
def test_no_memory_to_grow(monkeypatch, num_allocations):
    """What is held stays, whichever of the tensors finds no room."""
    states = tuple(torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    storage = DeviceStorage()
    storage.append(states)
    allocate = iter([torch.empty] * num_allocations)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: next(allocate)(*args, **kwargs))
        with pytest.raises(StopIteration):
            storage.append(states)
    assert storage.num_tokens == 3 and all(map(torch.equal, storage.read(), states))
    storage.append(states)
    assert all(torch.equal(held, torch.cat([new, new], 2)) for held, new in zip(storage.read(), states))


def test_errors(model):
    with pytest.raises(ValueError, match="one of 'dynamic', 'quantized', 'offloaded', .*, got 'int8'"):
        model.encode_video(**VIDEO, video_cache_implementation="int8")
    with pytest.raises(ValueError, match="one of 'dynamic'.*got 'int8'"):
        generate(model, make_text(), **VIDEO, video_cache_implementation="int8")
    with pytest.raises(ValueError, match="num_remaining_tokens.*at least 0, got -1"):
        model.encode_video(**VIDEO, num_remaining_tokens=-1)
    cache = model.encode_video(**VIDEO)
    with pytest.raises(
        ValueError, match="is 'offloaded', but the cache .* keeps its videos with video_cache_implementation='dynamic'"
    ):
        model.encode_video(**VIDEO, cache=cache, video_cache_implementation="offloaded")
    with pytest.raises(
        ValueError, match="is 'quantized', but the cache .* keeps its videos with video_cache_implementation='dynamic'"
    ):
        generate(model, make_text(), cache=cache, video_cache_implementation="quantized")
    assert cache.video_lengths == [102]
    for implementation in IMPLEMENTATIONS[1:]:
        cache = VambaCache(model.config, video_cache_implementation=implementation)
        with pytest.raises(ValueError, match="takes no gradient: run under `torch.no_grad"):
            model(input_ids=make_text(), cache=cache, **VIDEO)


@pytest.mark.gpu
@pytest.mark.parametrize("attn_implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_a_gpu(implementation, attn_implementation):
    """Where the copies run beside the computation: the same tokens each time, and after moving away and back."""
    model = tiny_model(attn_implementation).to("cuda", torch.bfloat16)
    video = make_media("video", (40, 8, 8))
    options = {"video_cache_implementation": implementation, "segment_frames": 8}
    exact, cache = model.encode_video(**video), model.encode_video(**video, **options)
    text = make_text().cuda()
    with torch.no_grad():
        expected = model(input_ids=text, cache=exact.fork()).logits
        for _ in range(5):
            found = model(input_ids=text, cache=cache.fork()).logits
            assert relative_error(found, expected) < (1e-2 if implementation in EXACT else 2e-2)
    once, again = (generate(model, text, cache=cache.fork()) for _ in range(2))
    assert torch.equal(once, again)
    assert torch.equal(generate(model, text, cache=cache.fork().to("cpu").to("cuda")), once)
    static = generate(model, text, cache=cache.fork(), cache_implementation="static")
    # In bfloat16 a tie may fall the other way: each token is the likeliest after those before it, or nearly.
    logits = model(input_ids=static[:, :-1], cache=cache.fork()).logits[:, text.shape[1] - 1 :].float()
    chosen = logits.gather(-1, static[:, text.shape[1] :, None])
    assert (logits.amax(-1, keepdim=True) - chosen).max() < 2e-2 * logits.abs().max()


@pytest.mark.gpu
def test_an_offloaded_video_takes_two_layers_of_memory():
    torch.manual_seed(0)
    config = VambaConfig(text_config={"num_hidden_layers": 1}).text_config
    config.num_hidden_layers = 8
    cache = VambaCache(config, video_cache_implementation="offloaded")
    cache.add_video()
    num_tokens = 100_000
    for layer in cache.videos[0]:
        for _ in range(4):
            states = torch.randn(1, 4, num_tokens // 4, 128, device="cuda", dtype=torch.bfloat16)
            layer.update(states, states)
    del states
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for layer_idx in [*range(8), *range(8)]:
        keys, values = cache.read_videos(layer_idx, [0])[0]
        assert torch.equal(keys, values)
        del keys, values
    layer_bytes = 2 * 4 * num_tokens * 128 * 2
    taken = torch.cuda.max_memory_allocated() - before
    assert 1.9 * layer_bytes < taken < 2.6 * layer_bytes  # the comparison takes half a layer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_begun_in_inference_mode_goes_on_outside(model, implementation):
    first, second = make_media("video", (5, 4, 6)), make_media("video", (3, 4, 6), seed=1)
    options = {"video_cache_implementation": implementation}
    expected = model.encode_video(**second, cache=model.encode_video(**first, **options))
    with torch.inference_mode():
        cache = model.encode_video(**first, **options)
        fork = cache.fork()
    for each in (cache, fork):
        model.encode_video(**second, cache=each)
        with torch.no_grad():
            logits = [model(input_ids=make_text(), cache=one.fork()).logits for one in (each, expected)]
        assert torch.equal(*logits)
    if implementation == "dynamic":  # the others take no gradient
        with torch.inference_mode():
            cache = model.encode_video(**first)
        model.model.encode_media([[Medium(second["pixel_values_videos"], (3, 4, 6))]], cache)
        model(input_ids=make_text(), labels=make_text(), cache=cache).loss.backward()
        model.zero_grad()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_to_where_it_is_moves_nothing(model, implementation):
    """Accelerate's CPU and disk offload call `.to(None)`."""
    cache = model.encode_video(**make_media("video", (5, 4, 6)), video_cache_implementation=implementation)
    expected = model(input_ids=make_text(), cache=cache.fork()).logits
    storages = [layer._storage for layer in cache.videos[0]]
    memory = [getattr(storage, "_memory", getattr(storage, "_blocks", None)) for storage in storages]
    for device in (None, "cpu", torch.device("cpu")):
        assert cache.to(device) is cache
    assert all(now is before for now, before in zip((layer._storage for layer in cache.videos[0]), storages))
    assert memory == [getattr(storage, "_memory", getattr(storage, "_blocks", None)) for storage in storages]
    assert torch.equal(model(input_ids=make_text(), cache=cache).logits, expected)


def test_a_cache_on_another_device_is_an_error_that_says_what_to_do(model):
    cache = model.encode_video(**make_media("video", (5, 4, 6))).to("meta")
    message = r"video on meta.* on cpu.*cache\.to\(model\.device\)"
    with pytest.raises(ValueError, match=message):
        model.generate(make_text(), cache=cache.fork(), max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.encode_video(**make_media("video", (3, 4, 6)), cache=cache)
