# SPDX-License-Identifier: Apache-2.0
"""What a Vamba model still knows of a video whose tokens are dropped: a share of each time step, or all over a budget.

    python examples/evaluate_pruning.py --model PATH_OR_NAME --output results --processes 4

The videos are those of `evaluate_needle.py` (one event, the order of two) and of `synthetic_videos.py` with all of
their questions, where an answer counts if it is exact. Each is shown in four scenes:

- still: nothing moves but what the story tells; two time steps without an event are equal to the bit.
- noise: every pixel of every frame has a noise of its own, as of a camera at night.
- waves: the background moves all the time, behind the shapes.
- pan: the camera moves, and the whole picture with it.

`pruning.json` and `pruning.png` have the share of right answers by scene, question, length, rate and budget. With
`--stream-frames`, `stream.json` has what is known of the first hour of a stream that goes on under a budget, and how
much memory that takes. For that alone:

    python examples/evaluate_pruning.py --frames "" --stream-frames 100000 --samples 2 --output results
"""

import argparse
import json
import math
import resource
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from ask_video import TINY_MODEL, answer, load
from evaluate_needle import SEGMENT_FRAMES, TESTS, heat, is_right, make_needle
from synthetic_videos import FRAME_SIZE, QUESTIONS, SyntheticVideo, pack_videos, render_frames, sample_video


SEED = 2030  # the first number of every seed: no training video has it
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # depths of the event, distances of the two
KINDS = (*TESTS, "exact", "count")  # the last one asks for the flashes alone, about the videos of the one before
STREAM = 3  # in the seeds of the streams
SCENES = ("still", "noise", "waves", "pan")
RATES = (0.0, 0.25, 0.5, 0.75, 0.9)
BUDGETS = (2048, 1024, 512, 256)
STREAM_EVENT = 3600  # the event of a stream is in its first frames: an hour, at one a second
STREAM_SEEN = (3600, 10_000, 20_000, 36_000, 60_000, 100_000)  # when a question is asked


def show(video: SyntheticVideo, scene: str, start: int, stop: int) -> torch.Tensor:
    """The frames `start` to `stop` of a video in a scene, uint8 of shape `(frames, 3, 112, 112)`."""
    frames = render_frames(pack_videos([video]), start, stop)[0]
    times = torch.arange(start, stop)
    if scene == "noise":
        generator = torch.Generator().manual_seed(video.texture_seed + start)
        noise = torch.randint(-8, 9, frames.shape, generator=generator)
        return (frames + noise).clamp(0, 255).to(torch.uint8)
    if scene == "waves":
        phase = (torch.arange(FRAME_SIZE) - 4 * times[:, None]) * 2 * math.pi / (FRAME_SIZE / 2)
        waves = 20 * torch.sin(phase)[:, None, None, :]
        background = torch.tensor(video.background).view(3, 1, 1)
        is_background = (frames - background).abs().amax(1, keepdim=True) < 10
        return torch.where(is_background, frames + waves, frames).clamp(0, 255).to(torch.uint8)
    if scene == "pan":
        return torch.stack([frame.roll(3 * time, -1) for frame, time in zip(frames, times.tolist())])
    return frames


def tell(kind: str, num_frames: int, sample: int) -> tuple[SyntheticVideo, list[tuple[str, str | None]]]:
    """A video, and the questions about it, with their exact answers if that is how they are judged."""
    seed = [SEED, KINDS.index("exact" if kind == "count" else kind), num_frames, sample]
    if kind in ("exact", "count"):
        video = sample_video(seed, num_frames)
        asked = [question for question in video.questions if kind == "exact" or question.kind == "flashes"]
        return video, [(question.text, question.answer) for question in asked]
    make, question, _ = TESTS[kind]
    wordings = QUESTIONS[question]
    return make(seed, num_frames, SHARES[sample % len(SHARES)]), [(wordings[sample % len(wordings)], None)]


def is_answer(kind: str, video: SyntheticVideo, reply: str, expected: str | None) -> bool:
    if expected is None:
        return is_right(kind, video, reply)
    return reply.strip().lower() == expected.lower()


def segments_of(processor, video: SyntheticVideo, scene: str, stop: int):
    """What the model takes of the video up to a frame, a segment at a time."""
    for start in range(0, stop, SEGMENT_FRAMES):
        frames = show(video, scene, start, min(start + SEGMENT_FRAMES, stop))
        yield processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")


def prepare(path) -> None:
    """Loads the model in a process of its own."""
    global model, processor
    torch.set_num_threads(1)
    model, processor = load(path, "cpu")


def see_once(embed_media):
    """The vision tower, which runs once for pixels that come several times in a row."""
    last = {"pixels": None}

    def see(media):
        pixels = [medium.pixel_values.data_ptr() for medium in media]
        if last["pixels"] != pixels:
            # The media are held, so that nothing else comes to lie where they do.
            last.update(pixels=pixels, media=media, embeds=embed_media(media))
        return last["embeds"]

    return see


def measure(task: tuple[str, str, int, int]) -> list[dict]:
    """All rates and budgets for one video: right answers, and tokens that are kept."""
    scene, kind, num_frames, sample = task
    video, questions = tell(kind, num_frames, sample)
    ways = [{"video_pruning_rate": rate} for rate in RATES] + [{"max_video_tokens": budget} for budget in BUDGETS]
    caches = [None] * len(ways)
    with patch.object(model.model, "embed_media", see_once(model.model.embed_media)):
        for segment in segments_of(processor, video, scene, num_frames):
            caches = [model.encode_video(**segment, cache=cache, **way) for cache, way in zip(caches, ways)]
    rows = []
    for way, cache in zip(ways, caches):
        replies = [answer(model, processor, cache, text, max_new_tokens=32) for text, _ in questions]
        right = sum(is_answer(kind, video, reply, expected) for reply, (_, expected) in zip(replies, questions))
        row = {"scene": scene, "kind": kind, "frames": num_frames, **way, "tokens": cache.video_lengths[0]}
        rows.append(row | {"right": right, "questions": len(questions)})
    return rows


def measure_stream(task: tuple[str, int, int, int]) -> list[dict]:
    """A stream whose one event is in its first frames: whether that is known later on, and the memory by then."""
    scene, num_frames, budget, sample = task
    seed = [SEED, STREAM, num_frames, sample]
    video = make_needle(seed, num_frames, SHARES[2 * sample % len(SHARES)] * STREAM_EVENT / num_frames)
    cache, seen, rows, start = None, 0, [], time.perf_counter()
    for segment in segments_of(processor, video, scene, num_frames):
        cache = model.encode_video(**segment, cache=cache, max_video_tokens=budget)
        before, seen = seen, seen + 2 * int(segment["video_grid_thw"][0, 0])
        if any(before < moment <= seen for moment in STREAM_SEEN) or seen == num_frames:
            text = QUESTIONS["appeared"][sample % len(QUESTIONS["appeared"])]
            reply = answer(model, processor, cache, text, max_new_tokens=32)
            rows.append(
                {"scene": scene, "frames": seen, "right": int(is_right("needle", video, reply)), "questions": 1}
                | {
                    "tokens": cache.video_lengths[0],
                    "cache_mib": sum(layer.nbytes for layer in cache.videos[0]) / 2**20,
                }
                | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
                | {"seconds": time.perf_counter() - start}
            )
    return rows


def gather(rows: list[dict], names: tuple[str, ...]) -> list[dict]:
    """One row for those that have these fields in common: right answers and questions as sums, all else as means."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(name) for name in names)].append(row)
    gathered = []
    for key, group in groups.items():
        total = {name: value for name, value in zip(names, key) if value is not None}
        for name in {name for row in group for name in row} - set(names):
            values = [row[name] for row in group if name in row]
            total[name] = sum(values) if name in ("right", "questions") else round(sum(values) / len(values), 2)
        gathered.append(dict(sorted(total.items())))
    return gathered


def draw(path: Path, results: dict) -> None:
    """Heat maps: lengths by rates and budgets, for each scene and kind of question."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    scenes, kinds = ([each for each in all_ if any(each in row.values() for row in rows)] for all_ in (SCENES, KINDS))
    lengths = sorted({row["frames"] for row in rows})
    columns = [("video_pruning_rate", rate, f"{rate:.0%}") for rate in RATES]
    columns += [("max_video_tokens", budget, f"{budget:,}") for budget in BUDGETS]
    size = (4.4 * len(kinds), 0.9 + 2.1 * len(scenes))
    figure, axes = plt.subplots(len(scenes), len(kinds), figsize=size, layout="constrained", squeeze=False)
    for axis, (scene, kind) in zip(axes.flat, ((scene, kind) for scene in scenes for kind in kinds)):
        recall = np.full((len(lengths), len(columns)), np.nan)
        for row in rows:
            if (row["scene"], row["kind"]) == (scene, kind):
                column = next(i for i, (name, value, _) in enumerate(columns) if row.get(name) == value)
                recall[lengths.index(row["frames"]), column] = row["right"] / row["questions"]
        heat(axis, recall, [f"{length:,}" for length in lengths], [label for *_, label in columns], fontsize=7)
        axis.axvline(len(RATES) - 0.5, color="black", linewidth=1)
        axis.set_title(f"{scene}: {kind}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("frames", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("dropped of each time step  |  budget in tokens", fontsize=8)
    figure.suptitle(f"{results['model']}: right answers, {results['samples']} videos a cell", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--frames", default="60,240,960", help='lengths of the videos, "" for none')
    parser.add_argument("--scenes", default=",".join(SCENES))
    parser.add_argument("--kinds", default=",".join(KINDS[:-1]), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--samples", type=int, default=10, help="videos a cell")
    parser.add_argument("--stream-frames", type=int, default=0, help="length of the streams; 0 for none")
    parser.add_argument("--stream-budget", type=int, default=1024, help="their budget, in tokens")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("pruning"))
    args = parser.parse_args(arguments)

    lengths, scenes = [int(number) for number in args.frames.split(",") if number], args.scenes.split(",")
    if unknown := {*scenes} - {*SCENES} | {*args.kinds.split(",")} - {*KINDS}:
        raise SystemExit(f"There are no {', '.join(sorted(unknown))} among {SCENES} and {KINDS}.")
    tasks = [
        (scene, kind, num_frames, sample)
        for num_frames in sorted(lengths, reverse=True)
        for scene in scenes
        for kind in args.kinds.split(",")
        for sample in range(args.samples)
    ]
    streams = [
        (scene, args.stream_frames, args.stream_budget, sample)
        for scene in scenes
        for sample in range(args.samples)
        if args.stream_frames
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    results = {"model": Path(args.model).name, "samples": args.samples}
    with ProcessPoolExecutor(args.processes, get_context("spawn"), prepare, (args.model,)) as pool:
        if streams:
            rows = [row for each in pool.map(measure_stream, streams) for row in each]
            rows = gather(rows, ("scene", "frames"))
            stream = results | {"budget": args.stream_budget, "rows": rows}
            (args.output / "stream.json").write_text(json.dumps(stream, indent=1) + "\n")
            for row in rows:
                print(row, flush=True)
        rows = [row for each in pool.map(measure, tasks) for row in each]
    if rows:
        results["rows"] = gather(rows, ("scene", "kind", "frames", "video_pruning_rate", "max_video_tokens"))
        (args.output / "pruning.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(args.output / "pruning.png", results)
        for row in results["rows"]:
            print(row, flush=True)


if __name__ == "__main__":
    main()
