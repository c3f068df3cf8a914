# SPDX-License-Identifier: Apache-2.0
"""
From a video file to the first token of an answer, against encoding the same number of frames that are in memory.

    python examples/benchmarks/first_answer.py --minutes 60 --output results

A file of 640x360 is read a frame a second by `iter_video_segments`, and each segment is encoded as it comes. Weights
are random, the shapes those of the 7B model, and the pixels of the encoding alone are random, in pinned memory. The
whole file is read, encoded and asked about once before anything is timed, so kernels are compiled and the file is in
the system's cache. `first_answer.md` and `.json` are written into the output folder. On a CPU the model and the frames
are tiny, and the figures say nothing but that the program runs.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from evaluation import load_model_and_processor
from inference import describe_machine, encode, generate, make_pixels, make_text, peak_gib, reset_peak, write_results
from reading import OPTIONS, num_cores, peak_memory, write_video


SIZE = {"shortest_edge": 256, "longest_edge": 640}
TINY_SIZE = {"shortest_edge": 56, "longest_edge": 84}
COLUMNS = {
    "frames": ("frames", "{:,}"),
    "codec": ("codec", "{}"),
    "file_s": ("file to first token, s", "{:.2f}"),
    "encode_s": ("encoding alone, s", "{:.2f}"),
    "ratio": ("ratio", "{:.2f}"),
    "read_s": ("reading alone, s", "{:.2f}"),
    "peak_gib": ("peak GiB of the GPU", "{:.1f}"),
    "host_before_gib": ("peak GiB of the host before the file", "{:.1f}"),
    "host_gib": ("peak GiB of the host", "{:.1f}"),
    "note": ("", "{}"),
}


def read(processor, path: Path, size: dict):
    return processor.iter_video_segments(str(path), fps=1.0, size=size, progress=False)


def answer(model, processor, path: Path, size: dict) -> float:
    """Seconds from the file to the first token."""
    start, cache = time.perf_counter(), None
    for segment in read(processor, path, size):
        cache = model.encode_video(**segment, cache=cache)
    generate(model, make_text(model), 1, cache=cache)
    return time.perf_counter() - start


def measure(model, processor, path: Path, size: dict, repeats: int) -> dict[str, float]:
    """The figures of one file, times of the fastest of some runs."""
    row = {"host_before_gib": peak_memory() / 2**30}
    answer(model, processor, path, size)
    reset_peak(model)
    row["file_s"] = min(answer(model, processor, path, size) for _ in range(repeats))
    row |= {"peak_gib": peak_gib(model), "host_gib": peak_memory() / 2**30}

    start = time.perf_counter()
    grids = torch.cat([segment["video_grid_thw"] for segment in read(processor, path, size)])
    row["read_s"] = time.perf_counter() - start
    row["frames"] = int(grids[:, 0].sum()) * model.config.vision_config.temporal_patch_size
    video = make_pixels(model, row["frames"], tuple(grids[0, 1:].tolist()), "cpu")
    row["encode_s"] = min(encode(model, video)[1] for _ in range(repeats))
    return row | {"ratio": row["file_s"] / row["encode_s"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--codecs", nargs="+", choices=OPTIONS, default=["libx264"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(0)
    model, processor = load_model_and_processor(device, args.attn)
    size = SIZE if device.type == "cuda" else TINY_SIZE
    machine, rows = f"{describe_machine(device)}; {num_cores()} cores; {args.minutes} minutes of video", []
    with tempfile.TemporaryDirectory() as folder:
        for codec in args.codecs:
            path = Path(folder) / f"{codec}.mp4"
            write_video(path, codec, args.minutes)
            row = {"model": "vamba", "attention": args.attn, "codec": codec}
            rows.append(row | measure(model, processor, path, size, args.repeats))
            write_results(args.output, machine, rows, "first_answer", COLUMNS)
    print((args.output / "first_answer.md").read_text())


if __name__ == "__main__":
    main()
