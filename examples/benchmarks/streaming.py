# SPDX-License-Identifier: Apache-2.0
"""
Whether memory and speed stay level while a stream goes on under a budget: Vamba-7B's shapes, random weights, bfloat16.

    python examples/benchmarks/streaming.py --frames 100000 --output results

The frames are small (252x140), so that a day of them at one per second takes minutes. Their pixels are random: a few
segments of them, in pinned memory, come again and again. At some points a question is asked. `streaming.md` and
`.json` are written anew each time, with the memory of device and host, and the frames per second since the point
before. On a CPU shapes and frames are tiny.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
from inference import (
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
from reading import peak_memory


SEGMENT_FRAMES = 64
NUM_SEGMENTS = 8  # of different pixels
PATCHES = (10, 18)
TINY_PATCHES = (4, 6)
POINTS = (1_000, 3_600, 10_000, 20_000, 36_000, 50_000, 75_000, 100_000)
COLUMNS = {
    "frames": ("frames seen", "{:,}"),
    "seen_tokens": ("tokens seen", "{:,}"),
    "video_tokens": ("tokens kept", "{:,}"),
    "cache_gib": ("cache, GiB", "{:.3f}"),
    "held_gib": ("GiB of the GPU held", "{:.2f}"),
    "peak_gib": ("peak GiB since the point before", "{:.2f}"),
    "host_gib": ("GiB of the host held", "{:.3f}"),
    "host_peak_gib": ("peak GiB of the host", "{:.3f}"),
    "frames_per_s": ("frames per second since the point before", "{:,.0f}"),
    "question_s": ("first token of a question, s", "{:.3f}"),
    "decode_ms": ("ms per token", "{:.1f}"),
    "note": ("", "{}"),
}


def held_by_process() -> int | None:
    """Bytes of the host's memory, as Linux counts them; `None` elsewhere."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def describe_point(model, cache, num_frames: int) -> dict:
    """Memory after so many frames, and the seconds of a question."""
    synchronize(model)
    row = {"frames": num_frames, "video_tokens": cache.video_lengths[0], "peak_gib": peak_gib(model)}
    if model.device.type == "cuda":
        row["held_gib"] = torch.cuda.memory_allocated() / 2**30
    times = generate(model, make_text(model), 9, cache=cache.fork())
    row |= {"question_s": times[0], "decode_ms": milliseconds_a_token(times)}
    held = held_by_process()
    row |= {"host_gib": held and held / 2**30, "host_peak_gib": peak_memory() / 2**30}
    return row | {"cache_gib": sum(layer.nbytes for layer in cache.videos[0]) / 2**30}


def stream(model, num_frames: int, patches: tuple[int, int], options: dict):
    """Encodes so many frames, and describes each of the points, and the end."""
    video = make_pixels(model, NUM_SEGMENTS * SEGMENT_FRAMES, patches, "cpu")
    pieces = video["pixel_values_videos"].chunk(NUM_SEGMENTS)
    grid = torch.tensor([[int(video["video_grid_thw"][0, 0]) // NUM_SEGMENTS, *patches]])
    tokens_per_segment = int(grid.prod()) // model.config.vision_config.spatial_merge_size**2
    cache, points = None, [point for point in POINTS if point < num_frames] + [num_frames]
    reset_peak(model)
    before, start = 0, time.perf_counter()
    for number, piece in enumerate(itertools.cycle(pieces), 1):
        cache = model.encode_video(piece, grid, cache=cache, **options)
        seen = number * SEGMENT_FRAMES
        if seen < points[0]:
            continue
        synchronize(model)
        seconds = time.perf_counter() - start
        row = {"seen_tokens": number * tokens_per_segment, "frames_per_s": (seen - before) / seconds}
        yield row | describe_point(model, cache, seen)
        points = [point for point in points if point > seen]
        if not points:
            return
        reset_peak(model)
        before, start = seen, time.perf_counter()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--budget", type=int, default=32_768, help="tokens that are kept")
    parser.add_argument("--video-cache", default="dynamic", help="how the video is kept")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="tiny shapes on a CPU"
    )
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args(arguments)

    device = torch.device(args.device)
    torch.manual_seed(0)
    config, _ = make_config("vamba", tiny=device.type == "cpu")
    model = load(config, "sdpa", device)
    options = {"max_video_tokens": args.budget, "video_cache_implementation": args.video_cache}
    machine = f"{describe_machine(device)}; a budget of {args.budget:,} tokens, cache {args.video_cache}"
    rows = []
    for row in stream(model, args.frames, TINY_PATCHES if device.type == "cpu" else PATCHES, options):
        rows.append({"model": "vamba", "attention": "sdpa", **row})
        write_results(args.output, machine, rows, "streaming", COLUMNS)
        print({name: round(value, 3) for name, value in row.items() if value is not None}, flush=True)
    print((args.output / "streaming.md").read_text())


if __name__ == "__main__":
    main()
