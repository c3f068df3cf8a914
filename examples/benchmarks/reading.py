# SPDX-License-Identifier: Apache-2.0
"""
From a file to patches: seconds, CPU seconds and peak memory of each reader, each in a process of its own.

python examples/benchmarks/reading.py --minutes 10 --output examples/benchmarks/reading
python examples/benchmarks/reading.py --minutes 60 --codecs libx264 --readers PyAV iter_video_segments --output hour
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np


SIZE = (360, 640)  # height and width
RATE = 30
OPTIONS = {
    "libx264": {"preset": "veryfast", "g": "250"},
    "libx265": {"preset": "ultrafast", "g": "250", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "g": "250"},
    "libsvtav1": {"preset": "12", "g": "250"},
}


def write_minute(path: Path, codec: str):
    """A picture that moves over a textured ground, with noise, and is cut every ten seconds."""
    height, width = SIZE
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 12, (16, height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=OPTIONS[codec])
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_type = "AUTO"
        for number in range(60 * RATE):
            if number % (10 * RATE) == 0:
                ground = rng.integers(0, 240, (height // 4, width // 4 + 10 * RATE, 3), dtype=np.uint8)
                ground = ground.repeat(4, axis=0).repeat(4, axis=1)
            shift = 2 * (number % (10 * RATE))
            picture = ground[:, shift : shift + width] + noise[number % len(noise)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_video(path: Path, codec: str, minutes: int):
    """The same minute, again and again."""
    minute = path.with_name(f"minute-{path.name}")
    write_minute(minute, codec)
    with av.open(str(path), "w") as container:
        output = None
        for number in range(minutes):
            with av.open(str(minute)) as source:
                stream = source.streams.video[0]
                output = output or container.add_stream_from_template(stream, opaque=True)  # AV1 too
                for packet in source.demux(stream):
                    if packet.size:
                        shift = round(60 * number / packet.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, output
                        container.mux(packet)


def decode_plainly(path):
    """Every frame, by FFmpeg's own threads; no pixels are looked at."""
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in container.decode(video=0))


def read_segments(path):
    from transformers_vamba import VambaVideoProcessor
    from transformers_vamba.video.segments import iter_video_segments

    segments = iter_video_segments(VambaVideoProcessor(), path, progress=False, fps=1.0)
    return sum(2 * int(segment["video_grid_thw"][0, 0]) for segment in segments)


def read_1024_frames(path):
    from transformers_vamba import VambaVideoProcessor

    return 2 * int(VambaVideoProcessor()(path, num_frames=1024)["video_grid_thw"][0, 0])


def load_video_with_transformers(path):
    """`load_video` and the video processor of Qwen2-VL, at a frame a second and the same size of frames."""
    from transformers import Qwen2VLVideoProcessor
    from transformers.video_utils import load_video

    frames, _ = load_video(path, fps=1, backend="pyav")
    size = {"shortest_edge": 56 * 56, "longest_edge": 364 * 644}
    outputs = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)(frames, size=size, return_tensors="pt")
    return 2 * int(outputs["video_grid_thw"][0, 0])


def decode_with_torchcodec(path):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=0)
    return len(decoder.get_frames_at(list(range(RATE // 2, len(decoder), RATE))))


def decode_with_decord(path):
    from decord import VideoReader

    reader = VideoReader(path)
    return len(reader.get_batch(list(range(RATE // 2, len(reader), RATE))).asnumpy())


READERS = {
    "PyAV, every frame decoded": (decode_plainly, "av"),
    "iter_video_segments(fps=1)": (read_segments, "av"),
    "processor(num_frames=1024)": (read_1024_frames, "av"),
    "Transformers' load_video(fps=1), Qwen2-VL": (load_video_with_transformers, "av"),
    "torchcodec, 1 frame per second, no patches": (decode_with_torchcodec, "torchcodec"),
    "decord, 1 frame per second, no patches": (decode_with_decord, "decord"),
}


def run_one(name: str, path: str):
    """Prints what one reader takes, beyond importing what it needs."""
    reader, package = READERS[name]
    import transformers_vamba  # noqa: F401

    importlib.import_module(package)
    start, cpu, memory = time.perf_counter(), time.process_time(), peak_memory()
    num_frames = reader(path)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"frames": num_frames, "seconds": seconds, "cpu_seconds": cpu, "memory": peak_memory() - memory}))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def measure(name: str, path: Path, repeats: int) -> dict:
    """The fastest of some runs, nothing if the reader fails."""
    command, runs = [sys.executable, __file__, "--one", name, str(path)], []
    for _ in range(repeats):
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            return {}
        runs.append(json.loads(process.stdout.splitlines()[-1]))
    return min(runs, key=lambda run: run["seconds"])


def write_table(rows: list[dict], description: str, output: Path):
    lines = [description, "", "| codec | reader | frames | seconds | CPU seconds | peak memory, MB |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        figures = "fails | | | "
        if "seconds" in row:
            figures = (
                f"{row['frames']:,} | {row['seconds']:.2f} | {row['cpu_seconds']:.1f} | {row['memory'] / 1e6:,.0f} "
            )
        lines.append(f"| {row['codec']} | {row['reader']} | {figures}|")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    output.with_suffix(".json").write_text(json.dumps({"description": description, "rows": rows}, indent=2) + "\n")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def describe(minutes: int, repeats: int, readers: list[str]) -> str:
    """What has been read, by what, and on what."""
    packages = {"PyAV": "av", "PyTorch": "torch", "Transformers": "transformers"}
    others = sorted({READERS[name][1] for name in readers} - {"av"})
    packages |= {name: name for name in others if is_installed(name)}
    versions = ", ".join(f"{title} {importlib.metadata.version(name)}" for title, name in packages.items())
    return (
        f"{minutes} minutes of {SIZE[1]}x{SIZE[0]}, {RATE} frames per second, keyframes 250 apart; {num_cores()} "
        f"cores of {platform.machine()}; {versions}; the fastest of {repeats} runs."
        + "".join(f" Not installed: {name}." for name in others if not is_installed(name))
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--codecs", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--readers", nargs="+", default=[""], help="words of the readers' names; default: all readers")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--note", default="", help="put after the description, such as what else the machine did")
    parser.add_argument("--output", type=Path, required=True, help="name of the table and the figures, without ending")
    if sys.argv[1:2] == ["--one"]:
        run_one(*sys.argv[2:])
        return
    args = parser.parse_args()

    readers = [name for name in READERS if any(word in name for word in args.readers)]
    if not readers:
        parser.error(f"no reader is named so; there are {', '.join(READERS)}")
    description, rows = f"{describe(args.minutes, args.repeats, readers)} {args.note}".rstrip(), []
    with tempfile.TemporaryDirectory() as folder:
        for codec in args.codecs:
            path = Path(folder) / f"{codec}.mp4"
            write_video(path, codec, args.minutes)
            for name in readers:
                if is_installed(READERS[name][1]):
                    rows.append({"codec": codec, "reader": name, **measure(name, path, args.repeats)})
                    write_table(rows, description, args.output)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
