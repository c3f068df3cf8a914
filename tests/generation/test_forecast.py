# SPDX-License-Identifier: Apache-2.0
"""The forecast of tokens and memory, against the processor's tokens, a real cache, and the bytes of living tensors."""

import gc
import sys
import weakref

import ask_video
import pytest
import torch
from tiny_vamba import TEXT_CONFIG, cache_of, make_text, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.video_utils import VideoMetadata

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaProcessor, forecast_memory
from transformers_vamba.cache.storage import HostStorage
from transformers_vamba.generation import forecast as forecast_module
from transformers_vamba.layers import vision as vision_module
from transformers_vamba.layers.mixer import VambaMixer, Zamba2RMSNormGated


IMPLEMENTATIONS = ("dynamic", "quantized", "offloaded", "offloaded_quantized")
VIDEO = VideoMetadata(total_num_frames=30, fps=10.0, height=64, width=96)


@pytest.fixture
def in_seven_billion():
    """An hour of 640x360 at a frame a second, for the shapes of Vamba-7B."""
    return VambaConfig(), VideoMetadata(total_num_frames=3600, fps=1.0, height=360, width=640)


FILES = (
    {"num_frames": 24, "height": 64, "width": 96, "fps": 8},
    {"num_frames": 31, "height": 96, "width": 64, "fps": 30},
    {"num_frames": 7, "height": 34, "width": 202, "fps": 5},
    {"num_frames": 1, "height": 128, "width": 128, "fps": 24},
)
SAMPLINGS = (
    {},
    {"num_frames": 5},
    {"num_frames": 100},
    {"fps": 2.0},
    {"fps": 7.3, "min_frames": 3},
    {"do_sample_frames": False},
    {"num_frames": 6, "size": {"shortest_edge": 56, "longest_edge": 112}, "max_pixels": 28 * 56},
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: "{width}x{height}".format(**file))
def test_tokens_are_the_processors(processor, write_video, file):
    path = write_video("{width}x{height}.mp4".format(**file), **file)
    num_frames, height, width, fps = file.values()
    described = VideoMetadata(total_num_frames=num_frames, fps=fps, height=height, width=width)
    for sampling in SAMPLINGS:
        inputs = processor(videos=[path], return_tensors="pt", return_metadata=True, **sampling)
        grid = inputs["video_grid_thw"][0]
        for processing in (processor, processor.video_processor):
            for video in (path, described):
                found = forecast_memory(tiny_config(), processing, video, **sampling)
                assert found.video_grid_thw == tuple(grid.tolist())
                assert found.num_video_tokens == len(inputs["pixel_values_videos"]) // 4
        if sampling.get("do_sample_frames", True):
            sampled = len(inputs["video_metadata"][0].frames_indices)
            assert found.num_frames == sampled


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cache_and_weights_are_exact(processor, write_video, implementation, dtype):
    model = tiny_model(dtype=dtype)
    path = write_video()
    options = {"video_cache_implementation": implementation}
    found = forecast_memory(model, processor, path, **options, batch_size=2, num_text_tokens=12, max_new_tokens=5)
    cache = None
    for segment in processor.iter_video_segments(path):
        cache = model.encode_video(**segment, cache=cache, **options)
    layers = cache.videos[0]
    assert found.video_cache == sum(layer.nbytes for layer in layers)
    assert found.host_memory == (found.video_cache if "offloaded" in implementation else 0)
    states = sum(state.nbytes for layer in layers[:-1] for state in layer.mixer_state)
    assert forecast_module.mixer_state_bytes(model.config.text_config, torch.float32) >= states
    if dtype == torch.float32:
        assert forecast_module.mixer_state_bytes(model.config.text_config, dtype) == states
    assert found.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    # The last token that is generated is not read.
    output = model.generate(input_ids=make_text(2), cache=cache, max_new_tokens=6, return_dict_in_generate=True)
    text = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_of(output).layers)
    assert found.text_cache == text


def test_nothing_is_loaded_for_a_forecast(processor, in_seven_billion):
    config, video = in_seven_billion
    with torch.device("meta"):
        model = VambaForConditionalGeneration(config).to(torch.bfloat16)
    found = forecast_memory(config, processor, video)
    assert found == forecast_memory(model, processor, video)
    assert found.weights == 2 * model.num_parameters()
    assert forecast_memory(config, processor, video, dtype=torch.float32).weights == 2 * found.weights

    quantized = {bits: forecast_memory(model, processor, video, weight_bits=bits).weights for bits in (4, 8)}
    # All but embeddings, head, norms and convolutions lie in linear layers.
    rest = 2 * 2 * config.text_config.vocab_size * config.text_config.hidden_size
    assert quantized[8] == pytest.approx(rest + (found.weights - rest) / 2, rel=0.01)
    assert quantized[4] == pytest.approx(rest + (found.weights - rest) * 0.5625 / 2, rel=0.01)


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, as they come and go, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if not self.paused:
            self.count(outputs)
        return outputs

    def count(self, outputs, counts=True):
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage._cdata not in self.known:
                    size = storage.nbytes() if counts else 0
                    self.known.add(storage._cdata)
                    self.now += size
                    weakref.finalize(storage, self.forget, storage._cdata, size)
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size

    def as_one_kernel(self, function, counts=True):
        """Of a call of this function only what it returns is counted, or not even that."""

        def call(*args, **kwargs):
            before, self.paused = self.paused, True
            try:
                outputs = function(*args, **kwargs)
            finally:
                self.paused = before
            if not self.paused:
                self.count(outputs, counts)
            return outputs

        return call


# Proportions of Vamba-7B in a smaller model: the vision tower's blocks take the most, the mixers somewhat less.
SMALL_7B = {
    "hidden_size": 224,
    "intermediate_size": 1184,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
}


def small_model() -> VambaForConditionalGeneration:
    torch.manual_seed(0)
    config = VambaConfig(
        text_config={**TEXT_CONFIG, **SMALL_7B},
        vision_config={"depth": 3, "embed_dim": 80, "num_heads": 4, "hidden_size": 224},
    )
    return VambaForConditionalGeneration._from_config(config).eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "num_segments, kept",
    (
        (1, {}),
        (4, {}),
        (4, {"video_pruning_rate": 0.75}),
        (6, {"max_video_tokens": 1000}),
        (6, {"video_pruning_rate": 0.5, "max_video_tokens": 1000}),
        (6, {"video_read_share": 0.25}),
        (6, {"video_pruning_rate": 0.5, "video_read_share": 0.1}),
    ),
    ids=str,
)
def test_peak_is_that_of_living_tensors(processor, monkeypatch, num_segments, kept, implementation):
    """
    What lives beside the weights, while a video is encoded and while questions are answered. What runs as one kernel
    on a CUDA device counts as that here.
    """
    model, living = small_model(), LivingBytes()
    for name in ("quick_gelu", "rotate_patches"):
        monkeypatch.setattr(vision_module, name, living.as_one_kernel(getattr(vision_module, name)))
    for module, name in ((VambaMixer, "_scan"), (Zamba2RMSNormGated, "forward")):
        monkeypatch.setattr(module, name, living.as_one_kernel(getattr(module, name)))
    monkeypatch.setattr(HostStorage, "_new_block", living.as_one_kernel(HostStorage._new_block, counts=False))
    monkeypatch.setattr("transformers_vamba.generation.forecast.LIBRARY_WORKSPACE", 0)
    steps, height, width = 8, 16, 16
    video = VideoMetadata(total_num_frames=2 * steps * num_segments, height=224, width=224)
    options = {"video_cache_implementation": implementation, **kept}
    batch = {"batch_size": 8, "num_text_tokens": 48, "max_new_tokens": 8}
    sampling = {"do_sample_frames": False, "do_resize": False}
    found = forecast_memory(model, processor, video, segment_frames=2 * steps, **options, **batch, **sampling)

    living.count(list(model.state_dict().values()))
    weights = living.now
    with living, torch.no_grad():
        cache = None
        for num_to_come in range(num_segments - 1, -1, -1):
            pixels = torch.randn(steps * height * width, 3 * 2 * 14 * 14)
            step = {"cache": cache, "num_remaining_tokens": num_to_come * steps * 64, **options}
            cache = model.encode_video(pixels, torch.tensor([[steps, height, width]]), **step)
            del pixels, step
        measured = {"encoding": living.peak - weights}
        living.peak = living.now
        model.generate(input_ids=make_text(8, 48), cache=cache, max_new_tokens=8, do_sample=False)
        measured["answering"] = living.peak - weights
    for name, size in measured.items():
        print(f"{name}: forecast {getattr(found, name)}, measured {size}: {getattr(found, name) / size - 1:+.1%}")
    assert found.num_video_tokens == cache.video_lengths[0]
    assert found.encoding == pytest.approx(measured["encoding"], rel=0.05)
    assert found.answering == pytest.approx(measured["answering"], rel=0.05)
    assert found.peak == pytest.approx(weights + max(measured.values()), rel=0.05)


def test_errors(processor, video_file, tmp_path):
    config = tiny_config()
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        forecast_memory(config, processor, "nowhere.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(ValueError, match="Could not read .*text.mp4"):
        forecast_memory(config, processor, text)
    with pytest.raises(ValueError, match="`total_num_frames`, `height` and `width`; got"):
        forecast_memory(config, processor, VideoMetadata(total_num_frames=8))
    with pytest.raises(ValueError, match="needs the frame rate"):
        forecast_memory(config, processor, VideoMetadata(total_num_frames=8, height=64, width=64), fps=1.0)
    for name, value, message in (
        ("video_cache_implementation", "int8", "one of 'dynamic', .*, got 'int8'"),
        ("weight_bits", 3, "must be 4 or 8, got 3"),
        ("video_pruning_rate", 1, "at least 0 and below 1, got 1"),
        ("max_video_tokens", 0, "at least 1, or None for all, got 0"),
        ("video_read_share", 0, "above 0 and at most 1, or None for all, got 0"),
        ("segment_frames", 0, "at least 1, got 0"),
        ("batch_size", 1.5, "at least 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            forecast_memory(config, processor, video_file, **{name: value})
    with pytest.raises(ValueError, match="yet to be loaded"):
        forecast_memory(tiny_model(), processor, video_file, weight_bits=8)
    with pytest.raises(TypeError, match="must be a VambaConfig or a Vamba model, got str"):
        forecast_memory("tiny", processor, video_file)
    with pytest.raises(TypeError, match="`video` must be a path, .* or a VideoMetadata, .*, got list"):
        forecast_memory(config, processor, [video_file])


def ask(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ask_video.py", *arguments, "What moved?", "--device", "cpu"])
    ask_video.main()


def test_ask_video_says_what_would_fit(monkeypatch, capsys, video_file):
    ask(monkeypatch, video_file)
    config = VambaConfig.from_pretrained(ask_video.TINY_MODEL)
    processor = VambaProcessor.from_pretrained(ask_video.TINY_MODEL)
    whole = ask_video.forecast(config, processor, video_file)
    assert f"Forecast: {whole}." in capsys.readouterr().out

    monkeypatch.setattr(ask_video, "FORECAST_MARGIN", 1.0)
    monkeypatch.setattr(ask_video, "free_memory", lambda device: whole.peak - 1000)
    with pytest.raises(SystemExit, match="It does not fit. What would:") as stopped:
        ask(monkeypatch, video_file)
    ways = [line.rsplit(maxsplit=2)[0].split() for line in str(stopped.value).splitlines()[1:]]
    assert ["--num-frames", "3"] in ways
    monkeypatch.setattr(ask_video, "load", lambda *args: pytest.fail("it fits"))
    for way in ways:
        with pytest.raises(pytest.fail.Exception, match="it fits"):
            ask(monkeypatch, video_file, *way)
    monkeypatch.setattr(ask_video, "free_memory", lambda device: 1000)
    with pytest.raises(SystemExit, match="It does not fit.$"):
        ask(monkeypatch, video_file)


def test_ways_to_fit_an_hour(processor, in_seven_billion):
    """One option where one is enough, two where it takes two."""
    config, video = in_seven_billion
    with torch.device("meta"):
        model = VambaForConditionalGeneration(config).to(torch.bfloat16)
    processor.video_processor.size = {"shortest_edge": 256, "longest_edge": 640}
    options = {"num_frames": 3600}
    assert ask_video.forecast(model, processor, video, **options).num_video_tokens == 538_200
    ways = {gib: dict(ask_video.ways_to_fit(model, processor, video, gib * 2**30, options)) for gib in (40, 25, 14, 5)}
    assert {"--video-cache quantized", "--video-cache offloaded", "--weight-bits 4"} <= set(ways[40])
    assert "--weight-bits 8" not in ways[40]
    assert {"--video-cache offloaded_quantized", "--num-frames 112"} <= set(ways[25])
    assert "--video-cache quantized" not in ways[25]
    assert set(ways[14]) == {
        "--video-cache offloaded_quantized --weight-bits 8",
        "--video-cache offloaded_quantized --weight-bits 4",
        "--video-cache offloaded --weight-bits 4",
    }
    assert ways[5] == {}
    for gib, found in ways.items():
        assert all(forecast.peak * ask_video.FORECAST_MARGIN <= gib * 2**30 for forecast in found.values())


@pytest.mark.parametrize("video_cache", IMPLEMENTATIONS[1:])
def test_ask_video_with_its_options(monkeypatch, capsys, video_file, video_cache):
    options = ("--num-frames", "12", "--longest-edge", "56", "--segment-frames", "4", "--video-cache", video_cache)
    ask(monkeypatch, video_file, *options)
    printed = capsys.readouterr().out
    assert "Forecast: 12 frames, 24 video tokens" in printed and "Question: What moved?\nAnswer: " in printed


@pytest.mark.gpu
@pytest.mark.parametrize("num_frames", (64, 1024))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_peak_on_a_gpu(processor, implementation, num_frames):
    """Vamba-7B's shapes in four layers, 640x360: the forecast is no less than what is allocated, and little more."""
    config = VambaConfig(text_config={"num_hidden_layers": 4}, vision_config={"depth": 4})
    torch.manual_seed(0)
    gc.collect()
    of_other_tests = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = VambaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    video = VideoMetadata(total_num_frames=num_frames, height=364, width=644)
    options = {"video_cache_implementation": implementation}
    sampling = {"do_sample_frames": False, "do_resize": False}
    found = forecast_memory(model, processor, video, **options, **sampling, num_text_tokens=66, max_new_tokens=8)
    num_steps = num_frames // 2

    def run(num_steps):
        cache = None
        for remaining in range(num_steps - 32, -1, -32):
            pixels = torch.randn(32 * 26 * 46, 3 * 2 * 14 * 14)
            step = {"cache": cache, "num_remaining_tokens": remaining * 299, **options}
            cache = model.encode_video(pixels, torch.tensor([[32, 26, 46]]), **step)
        text = make_text(length=66).cuda()
        model.generate(input_ids=text, cache=cache, max_new_tokens=8, do_sample=False)

    run(32)  # compiles the kernels
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(num_steps)
    measured = torch.cuda.max_memory_allocated() - of_other_tests
    print(f"forecast {found.peak / 2**30:.2f} GiB, measured {measured / 2**30:.2f}: {found.peak / measured - 1:+.1%}")
    # Little more is 0.4 GiB, of any number of layers, for GPUs that keep the input of the tower's activation.
    assert 0.99 * measured < found.peak < 1.07 * measured
