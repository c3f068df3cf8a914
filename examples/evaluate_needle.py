# SPDX-License-Identifier: Apache-2.0
"""How far a Vamba model remembers: one event, and the order of two, in videos of a minute to three hours.

    python examples/evaluate_needle.py --model PATH_OR_NAME --output results --processes 4

The videos are those of `synthetic_videos.py`, stretched: for almost all of their time nothing but a few white flashes
happens. Two questions are asked, each of videos of its own:

- needle: one shape shows for 3 to 8 frames at some depth of the video. What appeared?
- order: two shapes show, some share of the video apart. In which order did the colours come?

An answer is right if it names colour and shape, or both colours in order. `needle.json` and `needle.png`, two heat
maps over the length of the video, are written anew after every length.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ask_video import TINY_MODEL, answer, load
from synthetic_videos import MIN_GAP, QUESTIONS, SyntheticVideo, pack_videos, render_frames, sample_video


SEED = 2028  # the first number of every seed: no training video has it
SEGMENT_FRAMES = 64


def stretch_story(seed, num_frames: int, num_shapes: int) -> tuple[SyntheticVideo, list[int]]:
    """A random video of at least `num_shapes` shapes, cut to as many, and for how many frames each of them shows."""
    rng = np.random.default_rng(seed)
    while True:
        video = sample_video(rng.integers(2**31), num_frames, "sequence")
        if len(video.shapes) >= num_shapes:
            video.shapes = video.shapes[:num_shapes]
            return video, [shape.stop - shape.start for shape in video.shapes]


def place(video: SyntheticVideo, starts: list[int], durations: list[int]) -> None:
    """Moves the shapes to their times, and drops the flashes that would be in their way."""
    for shape, start, duration in zip(video.shapes, starts, durations, strict=True):
        shape.start, shape.stop = start, start + duration
        video.flashes = [
            (first, last)
            for first, last in video.flashes
            if last + MIN_GAP <= shape.start or first >= shape.stop + MIN_GAP
        ]


def make_needle(seed, num_frames: int, depth: float) -> SyntheticVideo:
    """One shape, which begins at `depth` of the time that it could: 0 is the start of the video, 1 its end."""
    video, durations = stretch_story(seed, num_frames, 1)
    place(video, [round(depth * (num_frames - durations[0]))], durations)
    return video


def make_order(seed, num_frames: int, distance: float) -> SyntheticVideo:
    """Two shapes, apart by `distance` of the most that the video has room for: at 1, one is its start, one its end."""
    video, durations = stretch_story(seed, num_frames, 2)
    room = num_frames - sum(durations) - MIN_GAP
    gap = round(distance * room)
    start = int(np.random.default_rng(seed).integers(room - gap + 1))
    place(video, [start, start + durations[0] + MIN_GAP + gap], durations)
    return video


def is_right(kind: str, video: SyntheticVideo, reply: str) -> bool:
    """Whether a reply names colour and shape of the one shape, or the colours of both in order."""
    reply = reply.lower()
    if kind == "needle":
        return video.shapes[0].colour in reply and video.shapes[0].kind in reply
    first, second = (reply.find(shape.colour) for shape in video.shapes)
    return 0 <= first < second


TESTS = {
    "needle": (make_needle, "appeared", "depth of the event"),
    "order": (make_order, "order", "distance of the two events"),
}


def encode(model, processor, video: SyntheticVideo):
    """Draws and encodes the video, a segment at a time, on the model's device."""
    scene = {name: numbers.to(model.device) for name, numbers in pack_videos([video]).items()}
    cache = None
    for start in range(0, video.num_frames, SEGMENT_FRAMES):
        frames = render_frames(scene, start, min(start + SEGMENT_FRAMES, video.num_frames))
        inputs = processor.video_processor([frames[0]], do_sample_frames=False, return_tensors="pt")
        cache = model.encode_video(**inputs, cache=cache)
    return cache


def prepare(path, device) -> None:
    """Loads the model in a process of its own."""
    global model, processor
    torch.set_num_threads(1)
    model, processor = load(path, device)


def measure(task: tuple[str, int, float, int]) -> bool:
    """Whether the question of a test about one video is answered right."""
    kind, num_frames, share, sample = task
    make, question, _ = TESTS[kind]
    video = make([SEED, list(TESTS).index(kind), num_frames, round(1000 * share), sample], num_frames, share)
    text = QUESTIONS[question][sample % len(QUESTIONS[question])]
    cache = encode(model, processor, video)
    return is_right(kind, video, answer(model, processor, cache, text, max_new_tokens=32))


def heat(axis, table: np.ndarray, rows: list[str], columns: list[str], fontsize: int = 8):
    """Draws a table of shares in colours, without those that are NaN, and returns the image."""
    image = axis.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=fontsize)
    axis.set_xticks(range(len(columns)), columns, fontsize=fontsize)
    axis.set_yticks(range(len(rows)), rows, fontsize=fontsize)
    return image


def write_results(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "needle.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TESTS), figsize=(10, 3.6), layout="constrained")
    for axis, (kind, (_, _, label)) in zip(axes, TESTS.items(), strict=True):
        lengths, recall = results["frames"][: len(results[kind])], np.array(results[kind]).T
        minutes = [f"{frames / results['fps'] / 60:.3g} min\n{frames:,}" for frames in lengths]
        image = heat(axis, recall, [f"{share:.0%}" for share in results["shares"]], minutes)
        axis.set_xlabel("length of the video, in frames")
        axis.set_ylabel(label)
        axis.set_title(f"{kind}: {recall.mean():.0%} right")
    figure.colorbar(image, ax=axes, label="right answers")
    figure.suptitle(f"{results['model']}, {results['samples']} videos a cell", fontsize=9)
    figure.savefig(folder / "needle.png", dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--minutes", default="1,4,16,60,180", help="lengths of the videos")
    parser.add_argument("--fps", type=float, default=1.0, help="frames for each second of them")
    parser.add_argument("--shares", default="0,0.25,0.5,0.75,1", help="depths of the event, distances of the two")
    parser.add_argument("--samples", type=int, default=8, help="videos a cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("needle"))
    args = parser.parse_args(arguments)

    shares = [float(share) for share in args.shares.split(",")]
    frames = [2 * round(30 * float(minutes) * args.fps) for minutes in args.minutes.split(",")]
    if min(frames) < 24:
        raise SystemExit(f"The stories need at least 24 frames, got lengths of {frames}: raise --minutes or --fps.")
    results = {"model": Path(args.model).name, "fps": args.fps, "samples": args.samples}
    results |= {"frames": frames, "shares": shares, **{kind: [] for kind in TESTS}}
    cells = (len(shares), args.samples)
    with ProcessPoolExecutor(args.processes, get_context("spawn"), prepare, (args.model, args.device)) as pool:
        for num_frames in frames:
            for kind in TESTS:
                start = time.perf_counter()
                tasks = [(kind, num_frames, share, sample) for share in shares for sample in range(args.samples)]
                recall = np.reshape([*pool.map(measure, tasks)], cells).mean(1).round(4).tolist()
                results[kind].append(recall)
                seconds = time.perf_counter() - start
                print(f"{kind}, {num_frames:,} frames: {recall} ({seconds:.0f} s)", flush=True)
            write_results(args.output, results)


if __name__ == "__main__":
    main()
