# SPDX-License-Identifier: Apache-2.0
"""Time and memory of `model.locate`, for a cache of Vamba-7B's shapes.

    python examples/benchmarks/locating.py --frames 1024,3600 --output results

The cache is filled with random keys and values of 640x360 frames: what they say changes neither time nor memory. The
text has 66 tokens of a prompt and 33 of an answer. The memory is what `locate` takes beyond model and cache.
`locating.md` and `.json` go to the output folder. On a CPU the model is tiny, and the figures say nothing but that the
program runs.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from inference import (
    NUM_NEW_TOKENS,
    NUM_TEXT_TOKENS,
    describe_machine,
    load,
    make_config,
    peak_gib,
    reset_peak,
    synchronize,
    write_results,
)

from transformers_vamba import VambaCache
from transformers_vamba.cache.steps import VideoSteps


TOKENS_AT_ONCE = 2**16
NUM_RUNS = 3
COLUMNS = {
    "frames": ("frames", "{:,}"),
    "video_tokens": ("video tokens", "{:,}"),
    "cache_gib": ("cache, GiB", "{:.2f}"),
    "seconds": ("locate, s", "{:.2f}"),
    "extra_gib": ("GiB beyond model and cache", "{:.2f}"),
    "note": ("", "{}"),
}


def fill(model, num_steps: int, tokens_per_step: int, video_cache: str) -> VambaCache:
    """A cache with one video of random keys and values."""
    config = model.config.text_config
    cache = VambaCache(model.config, video_cache_implementation=video_cache)
    cache.add_video()
    num_tokens = num_steps * tokens_per_step
    shape = (1, config.num_key_value_heads, num_tokens, config.hidden_size // config.num_attention_heads)
    for layer in cache.videos[0]:
        layer.reserve(num_tokens)
        for start in range(0, num_tokens, TOKENS_AT_ONCE):
            size = (*shape[:2], min(TOKENS_AT_ONCE, num_tokens - start), shape[3])
            layer.update(*(torch.randn(size, dtype=model.dtype, device=model.device) for _ in range(2)))
    cache.steps[0] = VideoSteps().append(num_steps, tokens_per_step)
    return cache


def measure(model, num_frames: int, patches: tuple[int, int], video_cache: str) -> dict:
    """One row of the table."""
    vision_config = model.config.vision_config
    num_steps = num_frames // vision_config.temporal_patch_size
    tokens_per_step = patches[0] * patches[1] // vision_config.spatial_merge_size**2
    cache = fill(model, num_steps, tokens_per_step, video_cache)
    text = torch.randint(0, 1000, (1, NUM_TEXT_TOKENS + NUM_NEW_TOKENS), device=model.device)
    is_answer = torch.arange(text.shape[1])[None] >= NUM_TEXT_TOKENS
    model.locate(text, cache, token_mask=is_answer)
    reset_peak(model)
    before = peak_gib(model)
    times = []
    for _ in range(NUM_RUNS):
        synchronize(model)
        start = time.perf_counter()
        model.locate(text, cache, token_mask=is_answer)
        times.append(time.perf_counter() - start)
    row = {"model": "vamba", "attention": "sdpa", "video_cache": video_cache, "frames": num_frames}
    row |= {"video_tokens": cache.video_lengths[0], "seconds": statistics.median(times)}
    row["cache_gib"] = sum(layer.nbytes for layer in cache.videos[0]) / 2**30
    return row | {"extra_gib": None if before is None else peak_gib(model) - before}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", default="1024,3600", help="lengths of the videos")
    parser.add_argument("--video-caches", default="dynamic,quantized,offloaded,offloaded_quantized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)

    device = torch.device(args.device)
    config, patches = make_config("vamba", tiny=device.type != "cuda")
    model = load(config, "sdpa", device)
    rows = []
    for num_frames in map(int, args.frames.split(",")):
        for video_cache in args.video_caches.split(","):
            rows.append(measure(model, num_frames, patches, video_cache))
            write_results(args.output, describe_machine(device), rows, "locating", COLUMNS)
    print((args.output / "locating.md").read_text())


if __name__ == "__main__":
    main()
