# SPDX-License-Identifier: Apache-2.0
"""Time and memory of asking about long videos: Vamba-7B's shapes against those of three models of Transformers.

    python examples/benchmarks/inference.py --frames 64,256,1024,2048,3600,10800 --minutes 20 --output results
    python examples/benchmarks/inference.py --models qwen3.5 --frames 1024,2048,3600 --towers pieces --output results
    python examples/benchmarks/inference.py --models qwen3-vl,qwen3.5 --own-pixels --frames 768,3600 --output results

Weights and pixels are random; the shapes, 640x360 frames and 66 tokens of text, are real. `inference.md`, `.json` and
`.png` in the output folder are written anew after every measurement. Rows of other models that were measured on the
same machine and day stay, so the models can be measured one by one. On a CPU the models are tiny, and the figures say
nothing but that the program runs. `--memory-gb 24` asks about an hour as on a card of that size, with the weights in 8
bits by torchao and the video in the host's memory.

Each model answers a short video first, then the same question about two videos of each length. "Length not met before"
is the first of the two, when kernels may tune themselves to it; all other figures are of the second. Making pixels and
loading are not timed.

Vamba's pixel values lie in pinned host memory, from where `encode_video` fetches a segment at a time. The others take
theirs at once, on the GPU, in bfloat16, and these count in their peak. Their vision towers run as they are (`whole`),
and 64 frames at a time (`pieces`), as Vamba's does, which gives the same and saves memory. A further question is
answered on a `deepcopy` of their cache, and copying is timed with it. With `--own-pixels` each model gets as many
pixels of so many frames as its published processor leaves by default; the table is `inference_own_pixels.md`.
Qwen3.5 needs flash-linear-attention: without it Transformers computes its layers by slow PyTorch functions. On a
machine where it never ran, compiling and tuning its kernels takes longer than a minute, before the first figure.
"""

import argparse
import copy
import datetime
import gc
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as resize_frame
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_video
from transformers.utils import is_flash_attn_2_available
from transformers.video_utils import VideoMetadata

from transformers_vamba import VambaCache, VambaConfig, VambaVideoProcessor, forecast_memory
from transformers_vamba.compat import CACHE_NAME


NUM_TEXT_TOKENS = 66
NUM_NEW_TOKENS = 33  # the first and 32 more
NUM_QUESTIONS = 16
NAMES = {"vamba": "Vamba-7B", "qwen2-vl": "Qwen2-VL-7B", "qwen3-vl": "Qwen3-VL-8B", "qwen3.5": "Qwen3.5-9B"}
HEIGHT, WIDTH = 360, 640
PIECE_FRAMES = 64

QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN2_7B |= {"num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_8B |= {"num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 262144}
QWEN35_9B = {"max_position_embeddings": 262144}  # the rest is the default of its configuration
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN35_ROPE = QWEN3_ROPE | {"rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25}
TINY_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_TEXT |= {"num_key_value_heads": 2, "vocab_size": 1100}
TINY_TOKENS = {"image_token_id": 1001, "video_token_id": 1002}
TINY_TOKENS |= {"vision_start_token_id": 1003, "vision_end_token_id": 1004}
TINY_TOWER = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
TINY_QWEN3_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
TINY_QWEN3_TOWER |= {"num_position_embeddings": 64}
TINY_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
TINY_LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 2}


def make_config(name: str, tiny: bool):
    """The model's configuration, and the patches of a 640x360 frame (height and width)."""
    if name == "vamba":
        mixer = {"mamba_d_state": 16, "mamba_d_head": 16}
        config = VambaConfig(text_config=TINY_TEXT | mixer, vision_config=TINY_TOWER, **TINY_TOKENS)
        return (config, (4, 6)) if tiny else (VambaConfig(), (26, 46))
    if name == "qwen2-vl":
        head_dim = 16 if tiny else 128
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head_dim // 8] + [3 * head_dim // 16] * 2}
        text = (TINY_TEXT if tiny else QWEN2_7B) | {"rope_parameters": rope}
        sections = {"text_config": text} | ({"vision_config": TINY_TOWER, **TINY_TOKENS} if tiny else {})
        return AutoConfig.for_model("qwen2_vl", **sections), (4, 6) if tiny else (26, 46)
    model_type, text, rope = {
        "qwen3-vl": ("qwen3_vl", QWEN3_8B, QWEN3_ROPE),
        "qwen3.5": ("qwen3_5", QWEN35_9B, QWEN35_ROPE),
    }[name]
    if not tiny:
        text = text | {"rope_parameters": rope}
        return AutoConfig.for_model(model_type, text_config=text, vision_config={"out_hidden_size": 4096}), (22, 40)
    rope = rope | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
    text = TINY_TEXT | {"head_dim": 16, "rope_parameters": rope} | (TINY_LINEAR if name == "qwen3.5" else {})
    vision = TINY_QWEN3_TOWER | ({"deepstack_visual_indexes": [0]} if name == "qwen3-vl" else {})
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **TINY_TOKENS), (4, 6)


def own_patches(name: str, num_frames: int) -> tuple[int, int]:
    """Patches of a frame, if `num_frames` of 640x360 go through the published processor with its defaults."""
    if name in ("vamba", "qwen2-vl"):  # limits of a frame
        height, width = resize_frame(HEIGHT, WIDTH, 28, max_pixels=768 * 28**2)
        return height // 14, width // 14
    # A limit of the whole video. The class has another default than the `video_preprocessor_config.json` of both.
    height, width = resize_video(num_frames, HEIGHT, WIDTH, factor=32, min_pixels=4096, max_pixels=25165824)
    return height // 16, width // 16


def load(config, attn_implementation: str, device: torch.device):
    """The model with its own random initialisation, drawn on the device in bfloat16 (on a CPU in float32)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.generation_config.eos_token_id = None  # every answer has the same length
    model.generation_config.pad_token_id = 0
    return model.eval()


def run_in_pieces(tower) -> None:
    """Makes a vision tower take 64 frames at a time. Its time steps do not see one another, so the result is equal."""
    run_whole = tower.forward

    def run(hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs):
        ((num_steps, height, width),) = grid_thw.tolist()
        lengths = [len(steps) for steps in torch.arange(num_steps).split(PIECE_FRAMES // 2)]
        pieces = hidden_states.split([length * height * width for length in lengths])
        grids = [grid_thw.new_tensor([[length, height, width]]) for length in lengths]
        outputs = [run_whole(piece, grid_thw=grid, **kwargs) for piece, grid in zip(pieces, grids)]
        return type(outputs[0])(**{name: join([output[name] for output in outputs]) for name in outputs[0]})

    tower.forward = run


def join(parts: list):
    """One tensor, or list of tensors, of those of each piece."""
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [torch.cat(tensors) for tensors in zip(*parts)]


def make_pixels(model, num_frames: int, patches: tuple[int, int], pixels_device: str) -> dict[str, torch.Tensor]:
    """Random pixel values of a video, drawn on the model's device and kept in (pinned) host memory or there."""
    vision_config = model.config.vision_config
    grid = torch.tensor([[num_frames // vision_config.temporal_patch_size, *patches]])
    patch_dim = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    pinned = pixels_device == "cpu" and model.device.type == "cuda"
    pixels = torch.empty(
        int(grid.prod()), patch_dim, dtype=model.dtype, device=torch.device(pixels_device), pin_memory=pinned
    )
    for piece in pixels.split(2**16):
        piece.copy_(torch.randn(piece.shape, dtype=model.dtype, device=model.device))
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def make_text(model, batch_size: int = 1) -> torch.Tensor:
    return torch.randint(0, 1000, (batch_size, NUM_TEXT_TOKENS), device=model.device)


def make_prompt(model, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """The text, and a baseline's placeholders of the video in its middle: in one run, or one for each two frames."""
    config = model.config
    num_steps, height, width = grid[0].tolist()
    num_tokens = height * width // config.vision_config.spatial_merge_size**2
    in_one = config.model_type == "qwen2_vl"
    runs, length = (1, num_steps * num_tokens) if in_one else (num_steps, num_tokens)
    run = [config.vision_start_token_id, *[config.video_token_id] * length, config.vision_end_token_id]
    before, after = make_text(model)[0].split([NUM_TEXT_TOKENS // 2, NUM_TEXT_TOKENS - NUM_TEXT_TOKENS // 2])
    input_ids = torch.cat([before, torch.tensor(run * runs, device=model.device), after])[None]
    return {"input_ids": input_ids, "mm_token_type_ids": (input_ids == config.video_token_id).int() * 2}


class TokenTimes(BaseStreamer):
    """When the prompt and each token came by."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def generate(model, input_ids: torch.Tensor, num_new_tokens: int = NUM_NEW_TOKENS, **inputs) -> list[float]:
    """Seconds from the call to each new token."""
    synchronize(model)
    streamer, start = TokenTimes(), time.perf_counter()
    inputs |= {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "streamer": streamer}
    model.generate(input_ids=input_ids, max_new_tokens=num_new_tokens, **inputs)
    return [token_time - start for token_time in streamer.times[1:]]


def milliseconds_a_token(times: list[float]) -> float:
    return 1e3 * statistics.median(after - before for before, after in zip(times, times[1:]))


def synchronize(model):
    if model.device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)


def peak_gib(model) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else None


def reset_peak(model):
    if model.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def encode(model, video: dict[str, torch.Tensor], video_cache: str | None = None) -> tuple[VambaCache, float]:
    synchronize(model)
    start = time.perf_counter()
    cache = model.encode_video(**video, video_cache_implementation=video_cache)
    synchronize(model)
    return cache, time.perf_counter() - start


def forecast_gib(model, num_frames: int, video_cache: str | None) -> float:
    """What `forecast_memory` expects as the peak of the first question."""
    video = VideoMetadata(total_num_frames=num_frames, fps=1, height=360, width=640)
    options = {"num_frames": num_frames, "video_cache_implementation": video_cache}
    options |= {"num_text_tokens": NUM_TEXT_TOKENS, "max_new_tokens": NUM_NEW_TOKENS}
    return forecast_memory(model, VambaVideoProcessor(), video, **options).peak / 2**30


def measure_vamba(model, num_frames: int, patches: tuple[int, int], row: dict) -> None:
    """Fills the row: one question with the video, a further one, and many at once."""
    video_cache = row.get("video_cache")
    # A segment that begins, one that goes on, and one of the last one's length tune every kernel.
    warm_frames = min(num_frames, 2 * 64 + num_frames % 64)
    warm_cache, _ = encode(model, make_pixels(model, warm_frames, patches, "cpu"), video_cache)
    for batch_size in (1, NUM_QUESTIONS):
        generate(model, make_text(model, batch_size), 3, cache=warm_cache.fork())
    del warm_cache
    video = make_pixels(model, num_frames, patches, "cpu")

    cache, seconds = encode(model, video, video_cache)
    row["new_length_s"] = seconds + generate(model, make_text(model), 1, cache=cache)[0]
    del cache

    reset_peak(model)
    cache, row["encode_s"] = encode(model, video, video_cache)
    del video
    times = generate(model, make_text(model), cache=cache.fork())
    row |= {"first_token_s": row["encode_s"] + times[0], "peak_gib": peak_gib(model)}
    if model.device.type == "cuda" and "weights" not in row:
        row["forecast_gib"] = forecast_gib(model, num_frames, video_cache)
    row["decode_ms"] = milliseconds_a_token(times)
    row["video_tokens"] = cache.video_lengths[0]
    layers = cache.videos[0]
    row["cache_gib"] = sum(layer.nbytes for layer in layers) / 2**30
    last_states = (layers[-1].keys[..., -1, :], layers[-1].values[..., -1, :], layers[0].mixer_state.ssm)
    if not all(state.isfinite().all() for state in last_states):
        row["note"] = "not finite"

    reset_peak(model)
    questions = [generate(model, make_text(model), n, cache=cache.fork()) for n in (1, 1, NUM_NEW_TOKENS)]
    row |= {
        "further_question_s": statistics.median(times[0] for times in questions),
        "further_peak_gib": peak_gib(model),
    }
    row["one_by_one_tokens_s"] = NUM_NEW_TOKENS / questions[-1][-1]
    times = generate(model, make_text(model, NUM_QUESTIONS), cache=cache.fork())
    row["at_once_tokens_s"] = NUM_QUESTIONS * NUM_NEW_TOKENS / times[-1]
    row["at_once_peak_gib"] = peak_gib(model)


def measure_compiled(model, num_frames: int, patches: tuple[int, int], row: dict) -> None:
    """Adds decoding by a compiled step, with a static cache for the text."""
    reset_peak(model)
    cache, _ = encode(model, make_pixels(model, num_frames, patches, "cpu"), row.get("video_cache"))
    torch.compiler.reset()  # a step that fits is taken, whatever it was compiled for
    for _ in range(2):  # the first call compiles and captures
        times = generate(model, make_text(model), cache=cache.fork(), cache_implementation="static")
        row.setdefault("compiled_s", times[-1])
    row["compiled_decode_ms"] = milliseconds_a_token(times)
    row["compiled_peak_gib"] = peak_gib(model)


def measure_baseline(model, num_frames: int, patches: tuple[int, int], row: dict) -> None:
    """Fills the row: one question with the video, and a further one on a copy of the cache."""
    row["context"] = model.config.get_text_config().max_position_embeddings
    for frames in (min(num_frames, PIECE_FRAMES), num_frames):
        inputs = make_pixels(model, frames, patches, str(model.device))
        inputs["video_grid_thw"] = inputs["video_grid_thw"].to(model.device)
        inputs |= make_prompt(model, inputs["video_grid_thw"])
        seconds = generate(model, num_new_tokens=3, **inputs)[0]
        print(f"  {frames:,} frames, first token after {seconds:.2f} s", flush=True)
    row["new_length_s"] = seconds
    row["video_tokens"] = int(inputs["mm_token_type_ids"].count_nonzero())
    reset_peak(model)
    cache = DynamicCache(config=model.config)
    times = generate(model, **inputs, **{CACHE_NAME: cache})
    row |= {"first_token_s": times[0], "decode_ms": milliseconds_a_token(times), "peak_gib": peak_gib(model)}
    row["cache_gib"] = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer)) / 2**30

    # In the place of the answer, whose states the cache holds, any text will do.
    conversation = [inputs.pop("input_ids"), make_text(model)[:, :NUM_NEW_TOKENS], make_text(model)]
    del inputs
    reset_peak(model)
    questions = [ask_on_copy(model, torch.cat(conversation, dim=1), cache, n) for n in (1, 1, NUM_NEW_TOKENS)]
    row["further_question_s"] = statistics.median(times[0] for times in questions)
    row["one_by_one_tokens_s"] = NUM_NEW_TOKENS / questions[-1][-1]
    row["further_peak_gib"] = peak_gib(model)


def ask_on_copy(model, input_ids: torch.Tensor, cache: DynamicCache, num_new_tokens: int) -> list[float]:
    """Seconds from before the cache is copied to each new token."""
    synchronize(model)
    start = time.perf_counter()
    own_cache = copy.deepcopy(cache)
    synchronize(model)
    seconds = time.perf_counter() - start
    return [seconds + after for after in generate(model, input_ids, num_new_tokens, **{CACHE_NAME: own_cache})]


def tensors_of(layer) -> list[torch.Tensor]:
    """What a layer's cache holds: keys and values, or states."""
    parts = [
        part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])
    ]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def profile(model, num_frames: int, patches: tuple[int, int]) -> str:
    """The 25 kernels (on a CPU: operators) that take the most time in encoding `num_frames` frames."""
    is_cuda = model.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_cuda else torch.profiler.ProfilerActivity.CPU
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    video = make_pixels(model, num_frames, patches, "cpu")
    encode(model, video)
    _, seconds = encode(model, video)
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        encode(model, video)
    kernels = [(getattr(kernel, key) / 1e3, kernel.count, kernel.key) for kernel in profiler.key_averages()]
    busy = sum(milliseconds for milliseconds, *_ in kernels)
    lines = [f"Encoding {num_frames} frames: {1e3 * seconds:.0f} ms, of which in kernels {busy:.0f} ms"]
    for milliseconds, count, kernel in sorted(kernels, reverse=True)[:25]:
        lines.append(f"{milliseconds:9.1f} ms {milliseconds / busy:6.1%} {count:6d} x  {kernel[:90]}")
    return "\n".join(lines) + "\n"


COLUMNS = {
    "frames": ("frames", "{:,}"),
    "size": ("of pixels", "{}"),
    "tower": ("tower in", "{}"),
    "video_tokens": ("video tokens", "{:,}"),
    "context": ("limit of context", "{:,}"),
    "new_length_s": ("first token, length not met before, s", "{:.2f}"),
    "first_token_s": ("first token, s", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
    "forecast_gib": ("forecast", "{:.1f}"),
    "cache_gib": ("of which cache", "{:.1f}"),
    "decode_ms": ("ms per token", "{:.1f}"),
    "compiled_decode_ms": ("compiled, ms", "{:.1f}"),
    "further_question_s": ("first token of a further question, s", "{:.3f}"),
    "further_peak_gib": ("peak GiB then", "{:.1f}"),
    "one_by_one_tokens_s": ("one question, tokens/s", "{:.0f}"),
    "at_once_tokens_s": (f"{NUM_QUESTIONS} at once, tokens/s", "{:.0f}"),
    "note": ("", "{}"),
}


def describe_machine(device: torch.device) -> str:
    name = f"{platform.machine()} CPU, tiny shapes"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    versions = []
    for package in ("torch", "transformers", "mamba-ssm", "causal-conv1d", "flash-attn", "flash-linear-attention"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{name}; {', '.join(versions)}; {datetime.date.today()}"


def describe_model(row: dict) -> str:
    options = [row["attention"]]
    options += [f"{row[key]} {name}" for key, name in (("video_cache", "video"), ("weights", "weights")) if key in row]
    return f"{NAMES.get(row['model'], row['model'])}, {', '.join(options)}"


def write_results(
    folder: Path, machine: str, rows: list[dict], name: str = "inference", columns: dict[str, tuple] = COLUMNS
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    lines = [machine, "", "| model | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines += ["| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        cells = ["–" if row.get(key) is None else form.format(row[key]) for key, (_, form) in columns.items()]
        cells[-1] = row.get("note", "")
        lines.append(f"| {describe_model(row)} | " + " | ".join(cells) + " |")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def plot_results(folder: Path, machine: str, rows: list[dict]) -> None:
    """The models with their towers in pieces; other ways to keep the video are in the table."""
    rows = [row for row in rows if "video_cache" not in row and row["tower"] == "pieces"]
    if not rows:
        return
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = (("first_token_s", "seconds to the first token"), ("peak_gib", "peak GPU memory, GiB"))
    for axis, (key, title) in zip(axes, (*panels, ("decode_ms", "ms per token after it"))):
        for model, attention in dict.fromkeys((row["model"], row["attention"]) for row in rows):
            own = [row for row in rows if (row["model"], row["attention"]) == (model, attention)]
            points = [(row["frames"], row[key]) for row in own if row.get(key) is not None]
            colour = f"C{list(NAMES).index(model)}"
            style = "o-" if attention == "sdpa" else "s--"
            axis.plot(*zip(*points) if points else ([], []), style, color=colour, label=f"{NAMES[model]}, {attention}")
            compiled = [(row["frames"], row["compiled_decode_ms"]) for row in own if "compiled_decode_ms" in row]
            for point in compiled if key == "decode_ms" else ():
                axis.plot(*point, "D", color=colour)
                axis.annotate("  compiled", point, va="center")
        frames = sorted({row["frames"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xlim(frames[0] / 1.2, frames[-1] * 1.2)
        axis.set_xticks(frames, [f"{count:,}" for count in frames], fontsize=8)
        axis.set_xlabel("frames of 640x360")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if key != "first_token_s":
            axis.set_ylim(bottom=0)
        elif any(key in row for row in rows):
            axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(machine, fontsize=8)
    figure.savefig(folder / "inference.png", dpi=120)
    plt.close(figure)


def attempt(measure, model, num_frames: int, patches: tuple[int, int], row: dict) -> None:
    """Fills the row as far as memory goes: what fails is an entry of the table, not the end of it."""
    start = time.perf_counter()
    vision_config = model.config.vision_config
    row["size"] = "x".join(str(count * vision_config.patch_size) for count in reversed(patches))
    try:
        measure(model, num_frames, patches, row)
    except Exception as error:
        traceback.print_exc()
        message = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).split("\n")[0][:120]
        row["note"] = message
    row["seconds"] = row.get("seconds", 0) + time.perf_counter() - start
    reset_peak(model)
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def reason_to_skip(row: dict, earlier_rows: list[dict], seconds_left: float) -> str | None:
    """Why a size is not run, if so: a smaller one has failed, or it would take more than half of the time left."""
    if not earlier_rows:
        return None
    last = earlier_rows[-1]
    if "first_token_s" not in last:
        return f"fails at {last['frames']} frames"
    # Vamba's time grows with the length, that of the others faster, up to its square.
    growth = (row["frames"] / last["frames"]) ** (1 if row["model"] == "vamba" else 2)
    expected = last["seconds"] + (growth - 1) * (last["new_length_s"] + last["first_token_s"])
    return f"not run: some {expected:.0f} s" if expected > seconds_left / 2 else None


def measure_sizes(model, options: dict, patches_of: dict, rows: list[dict], deadline: float, write):
    """Adds, and returns, a row for each number of frames."""
    measure = measure_vamba if options["model"] == "vamba" else measure_baseline
    own_rows = []
    for num_frames, patches in patches_of.items():
        row = {**options, "frames": num_frames}
        rows.append(row)
        reason = reason_to_skip(row, own_rows, deadline - time.perf_counter())
        if reason is not None:
            row["note"] = reason
            continue
        own_rows.append(row)
        attempt(measure, model, num_frames, patches, row)
        write()
    return own_rows


def measure_ways(model, patches: tuple[int, int], ways, options: dict, rows: list[dict]) -> list[dict]:
    """Adds, and returns, a row for each way to keep the video, and number of frames."""
    own_rows = []
    for video_cache, num_frames in ways:
        own_rows.append({**options, "video_cache": video_cache, "frames": num_frames})
        rows.append(own_rows[-1])
        attempt(measure_vamba, model, num_frames, patches, own_rows[-1])
    return own_rows


def read_rows(path: Path, machine: str, models: list[str], towers: list[str]) -> list[dict]:
    """What was measured before on this machine and day, of other models, or of the others with another tower."""
    results = json.loads(path.read_text()) if path.exists() else {}
    rows = results["rows"] if results.get("machine") == machine else []
    is_replaced = [row["model"] in models and (row["model"] == "vamba" or row["tower"] in towers) for row in rows]
    return [row for row, replaced in zip(rows, is_replaced) if not replaced]


@contextmanager
def small_card(model, gigabytes: float):
    """Weights in 8 bits, but for embedding and `lm_head`, and a GPU of `gigabytes`."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model, Int8WeightOnlyConfig())
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties().total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--frames", help="default: 64,256,1024,2048,3600,10800, and 8,16 on a CPU")
    parser.add_argument("--compile-frames", help="sizes at which Vamba also decodes compiled; default: 1024 (0: none)")
    parser.add_argument("--video-caches", default="quantized,offloaded", help="other ways to keep Vamba's videos")
    parser.add_argument("--video-cache-frames", help="sizes at which they are measured; default: 1024 (0: none)")
    parser.add_argument("--memory-gb", type=float, help="ask about 3,600 frames as on a GPU with so much memory")
    parser.add_argument("--towers", default="whole,pieces", help="how the others' vision towers take their frames")
    parser.add_argument("--own-pixels", action="store_true", help="each model's own default budget of pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attn", help="default: sdpa, and flash_attention_2 where it is installed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave out what would take over half the rest")
    parser.add_argument("--profile", type=int, metavar="N", help="print where the time goes when N frames are encoded")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    deadline = time.perf_counter() + 60 * args.minutes
    device = torch.device(args.device)
    is_cuda = device.type == "cuda"
    sizes = sorted(map(int, (args.frames or ("64,256,1024,2048,3600,10800" if is_cuda else "8,16")).split(",")))
    compiled_sizes = set(map(int, (args.compile_frames or ("1024" if is_cuda else "8")).split(",")))
    cache_sizes = list(map(int, (args.video_cache_frames or ("1024" if is_cuda else "8")).split(",")))
    has_flash = is_cuda and is_flash_attn_2_available()
    attentions = (args.attn or ("sdpa,flash_attention_2" if has_flash else "sdpa")).split(",")
    models, towers = args.models.split(","), args.towers.split(",")
    if unknown := set(towers) - {"whole", "pieces"}:
        parser.error(f"--towers are `whole` and `pieces`, and got {', '.join(sorted(unknown))}.")
    machine, table = describe_machine(device), "inference_own_pixels" if args.own_pixels else "inference"
    rows = read_rows(args.output / f"{table}.json", machine, models, towers)
    torch.manual_seed(0)

    def write():
        rows.sort(key=lambda row: list(NAMES).index(row["model"]))
        write_results(args.output, machine, rows, table)

    for attention, name in itertools.product(attentions, models):
        if time.perf_counter() > deadline:
            continue
        config, patches = make_config(name, tiny=not is_cuda)
        if is_cuda:
            torch.cuda.empty_cache()
        start = time.perf_counter()
        model = load(config, attention, device)
        print(f"{NAMES[name]}: made in {time.perf_counter() - start:.1f} s", flush=True)
        is_vamba, own_rows = name == "vamba", []
        for tower in ["pieces"] if is_vamba else towers:
            if tower == "pieces" and not is_vamba:
                run_in_pieces(model.model.visual)
            options = {"model": name, "attention": attention, "tower": tower}
            patches_of = {n: own_patches(name, n) if args.own_pixels else patches for n in sizes}
            own_rows += measure_sizes(model, options, patches_of, rows, deadline, write)
            vars(model.model.visual).pop("forward", None)
        if is_vamba and args.profile:
            text = profile(model, args.profile, patches)
            (args.output / f"profile_{attention}.txt").write_text(text)
            print(text, flush=True)
        if is_vamba and time.perf_counter() < deadline:
            ways = itertools.product(args.video_caches.split(","), filter(None, cache_sizes))
            own_rows += measure_ways(model, patches, ways, options, rows)
        for row in own_rows:
            is_compiled = row["frames"] in compiled_sizes and "offloaded" not in row.get("video_cache", "")
            if is_vamba and is_compiled and time.perf_counter() < deadline:
                attempt(measure_compiled, model, row["frames"], patches, row)
        if is_vamba and args.memory_gb and time.perf_counter() < deadline:
            options |= {"weights": "int8", "note": f"capped at {args.memory_gb:g} GB"}
            with small_card(model, args.memory_gb):
                measure_ways(model, patches, [("offloaded", 3600), ("offloaded_quantized", 3600)], options, rows)
        write()
        if not args.own_pixels:
            plot_results(args.output, machine, rows)
        torch.compiler.reset()  # compiled steps and captured graphs hold the model
        del model
        gc.collect()
        if is_cuda and torch.cuda.memory_allocated() > 2**28:
            print(f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB are still held, and count in the next peaks.")
    print((args.output / f"{table}.md").read_text())


if __name__ == "__main__":
    main()
