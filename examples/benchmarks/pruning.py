# SPDX-License-Identifier: Apache-2.0
"""What pruning saves: Vamba-7B's shapes with random weights, bfloat16, a video of 640x360.

    python examples/benchmarks/pruning.py --output results

On a CPU the shapes are tiny. The pixels are random: how much a rate or a budget drops does not depend on them. In the
last rows every time step comes four times, as where little moves, and three of four are dropped. A table of seconds
and GiB is written and printed.
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
    generate,
    load,
    make_config,
    make_pixels,
    make_text,
    milliseconds_a_token,
    peak_gib,
    reset_peak,
    synchronize,
    write_results,
)
from transformers.video_utils import VideoMetadata

from transformers_vamba import VambaVideoProcessor, forecast_memory


SEGMENT_FRAMES = 64
WAYS = (
    {},
    {"video_pruning_rate": 0.5},
    {"video_pruning_rate": 0.75},
    {"video_pruning_rate": 0.9},
    {"max_video_tokens": 32_768},
    {"video_pruning_rate": 0.5, "video_cache_implementation": "quantized"},
    {"max_video_tokens": 32_768, "video_cache_implementation": "offloaded"},
)
# Of a video whose time steps come so many times each; the budget is never reached.
REPEATS = 4
WAYS_OF_REPEATS = ({}, {"max_video_tokens": 10**6}, {"video_pruning_rate": 0.5})
COLUMNS = {
    "way": ("way", "{}"),
    "repeats": ("each step comes", "{}x"),
    "frames": ("frames", "{:,}"),
    "video_tokens": ("video tokens", "{:,}"),
    "encode_s": ("encoding, s", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
    "forecast_gib": ("forecast", "{:.1f}"),
    "cache_gib": ("of which cache", "{:.2f}"),
    "question_s": ("first token of a question, s", "{:.3f}"),
    "decode_ms": ("ms per token", "{:.1f}"),
    "note": ("", "{}"),
}


def encode(model, video: dict[str, torch.Tensor], options: dict):
    """The cache of a video that comes a segment at a time, and the seconds that it took."""
    (num_steps, *size), pixels = video["video_grid_thw"][0].tolist(), video["pixel_values_videos"]
    steps = SEGMENT_FRAMES // model.config.vision_config.temporal_patch_size
    tokens_per_step = size[0] * size[1] // model.config.vision_config.spatial_merge_size**2
    synchronize(model)
    start, cache, num_remaining = time.perf_counter(), None, num_steps
    for piece in pixels.unflatten(0, (num_steps, -1)).split(steps):
        num_remaining -= len(piece)
        cache = model.encode_video(
            piece.flatten(0, 1),
            torch.tensor([[len(piece), *size]]),
            cache=cache,
            num_remaining_tokens=num_remaining * tokens_per_step,
            **options,
        )
    synchronize(model)
    return cache, time.perf_counter() - start


def repeat_steps(video: dict[str, torch.Tensor], times: int) -> None:
    """Lets the first of so many time steps stand for all of them, in place."""
    num_steps = int(video["video_grid_thw"][0, 0])
    steps = video["pixel_values_videos"].unflatten(0, (num_steps, -1))
    for step in range(num_steps):
        steps[step] = steps[step - step % times]


def measure(model, num_frames: int, patches: tuple[int, int], options: dict, repeats: int = 1) -> dict:
    """One way to keep a video: seconds and GiB of encoding it and of a question."""
    warm_video, video = (make_pixels(model, n, patches, "cpu") for n in (3 * SEGMENT_FRAMES, num_frames))
    repeat_steps(warm_video, repeats)
    repeat_steps(video, repeats)
    warm_cache, _ = encode(model, warm_video, options)
    generate(model, make_text(model), 3, cache=warm_cache)
    del warm_cache
    reset_peak(model)
    cache, seconds = encode(model, video, options)
    times = [generate(model, make_text(model), cache=cache.fork()) for _ in range(3)]
    size = {"height": patches[0] * 14, "width": patches[1] * 14}
    forecast = forecast_memory(
        model,
        VambaVideoProcessor(),
        VideoMetadata(total_num_frames=num_frames, fps=1, **size),
        do_sample_frames=False,
        do_resize=False,
        num_text_tokens=NUM_TEXT_TOKENS,
        max_new_tokens=NUM_NEW_TOKENS,
        **options,
    )
    return {
        "model": "vamba",
        "attention": "sdpa",
        "way": ", ".join(f"{name} {value}" for name, value in options.items()) or "as it is",
        "repeats": repeats,
        "frames": num_frames,
        "video_tokens": cache.video_lengths[0],
        "encode_s": seconds,
        "peak_gib": peak_gib(model),
        "forecast_gib": forecast.peak / 2**30 if model.device.type == "cuda" else None,
        "cache_gib": sum(layer.nbytes for layer in cache.videos[0]) / 2**30,
        "question_s": statistics.median(each[0] for each in times),
        "decode_ms": statistics.median(milliseconds_a_token(each) for each in times),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", default="1024,3600", help="lengths of the video")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="tiny shapes on a CPU"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args(arguments)

    device = torch.device(args.device)
    config, patches = make_config("vamba", tiny=device.type == "cpu")
    model = load(config, "sdpa", device)
    rows = []
    for num_frames in map(int, args.frames.split(",")):
        for options, repeats in [(way, 1) for way in WAYS] + [(way, REPEATS) for way in WAYS_OF_REPEATS]:
            rows.append(measure(model, num_frames, patches, options, repeats))
            write_results(args.output, describe_machine(device), rows, "pruning", COLUMNS)
    print((args.output / "pruning.md").read_text())


if __name__ == "__main__":
    main()
