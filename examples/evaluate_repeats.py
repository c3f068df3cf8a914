# SPDX-License-Identifier: Apache-2.0
"""What comes of a video whose time steps are dropped if they repeat the step before.

    python examples/evaluate_repeats.py --model PATH_OR_NAME --output results

With `video_pruning_rate` or `max_video_tokens` a time step whose pixels are equal, to the bit, to those of the step
before goes no further. Whether a scene that stands still is equal to the bit is up to what has compressed it, so the
videos of `evaluate_pruning.py` are written as H.264 files first, and two kinds of their own beside them:

- slides: still, but the whole picture changes every 20 seconds.
- screen: still, but a pointer moves for 3 of every 12 seconds.

Each file is encoded as it is, and with a budget that is never reached, so that nothing but repeats is dropped.
`repeats.json` and a table, `repeats.md`, have for each scene and length the tokens, the seconds of one core, the right
answers, and how well the moments that `locate` finds are the events: their overlap, in time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from ask_video import TINY_MODEL, answer, load
from evaluate_pruning import KINDS, SCENES, gather, is_answer, show, tell
from find_moment import answer_with_reading
from synthetic_videos import FRAME_RATE, FRAME_SIZE, SyntheticVideo


OWN_SCENES = ("slides", "screen")
SLIDE_FRAMES = round(20 * FRAME_RATE)
POINTER_FRAMES = (round(3 * FRAME_RATE), round(12 * FRAME_RATE))  # it moves for so many of so many
WAYS = {"whole": {}, "dropped": {"max_video_tokens": 10**6}}
FIGURES = {"tokens": "{:,.0f}", "seconds": "{:.2f}", "right": "{:.0%}", "overlap": "{:.0%}"}


def draw(video: SyntheticVideo, scene: str, start: int, stop: int) -> torch.Tensor:
    """As [`show`], of all scenes."""
    if scene not in OWN_SCENES:
        return show(video, scene, start, stop)
    frames = show(video, "still", start, stop).clone()
    for frame, time_step in zip(frames, range(start, stop)):
        if scene == "slides":
            shade = 20 * (time_step // SLIDE_FRAMES % 3)
            frame += (frame < 200) * shade
        else:
            moving, period = POINTER_FRAMES
            x = 10 + 5 * min(time_step % period, moving)
            frame[:, 50:56, x : x + 4] = 255
    return frames


def write_file(path: Path, video: SyntheticVideo, scene: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(FRAME_RATE), options={"crf": "23"})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        for start in range(0, video.num_frames, 64):
            for frame in draw(video, scene, start, min(start + 64, video.num_frames)):
                picture = frame.permute(1, 2, 0).contiguous().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def overlap(reading, video: SyntheticVideo) -> float:
    """Of the time in which there is an event or a moment, the share in which there are both."""
    frames = np.arange(video.num_frames)
    inside = np.any([(shape.start <= frames) & (frames < shape.stop) for shape in video.shapes], axis=0)
    times = frames / FRAME_RATE
    read = np.any([(moment.start <= times) & (times < moment.stop) for moment in reading.moments()], axis=0)
    return float((inside & read).sum() / (inside | read).sum())


def measure(model, processor, path: Path, kind: str, video: SyntheticVideo, questions: list) -> Iterator[dict]:
    """The figures of one file, in each way."""
    segments = list(processor.iter_video_segments(str(path), do_sample_frames=False, progress=False))
    for way, options in WAYS.items():
        cache, start = None, time.process_time()
        for segment in segments:
            cache = model.encode_video(**segment, cache=cache, **options)
        seconds = time.process_time() - start
        replies = [answer(model, processor, cache, text, max_new_tokens=32) for text, _ in questions]
        right = [is_answer(kind, video, reply, expected) for reply, (_, expected) in zip(replies, questions)]
        row = {"way": way, "tokens": cache.video_lengths[0], "seconds": seconds, "right": sum(right)}
        if kind != "exact":  # all of the shapes are asked about
            row["overlap"] = overlap(answer_with_reading(model, processor, cache, questions[0][0], 32)[1], video)
        yield row | {"questions": len(questions)}


def write_table(path: Path, results: dict) -> None:
    lines = [f"{results['model']}, H.264, {results['videos']} videos per row: as they are / without repeats", ""]
    lines += ["| scene | frames | video tokens | encoding, s of one core | right answers | overlap of moments |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    rows = {(row["scene"], row["frames"], row["way"]): row for row in results["rows"]}
    for scene, num_frames in dict.fromkeys(key[:2] for key in rows):
        both = [rows[scene, num_frames, way] for way in WAYS]
        both = [row | {"right": row["right"] / row["questions"]} for row in both]
        cells = [" / ".join(form.format(row[name]) for row in both) for name, form in FIGURES.items()]
        lines.append(f"| {scene} | {num_frames:,} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--frames", default="240,960", help="lengths of the videos")
    parser.add_argument("--scenes", default=",".join((*SCENES, *OWN_SCENES)))
    parser.add_argument("--samples", type=int, default=3, help="videos for each scene, length and kind of question")
    parser.add_argument("--output", type=Path, default=Path("repeats"))
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    model, processor = load(args.model, "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    kinds, rows = KINDS[:-1], []
    results = {"model": Path(args.model).name, "videos": args.samples * len(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        for num_frames in map(int, args.frames.split(",")):
            for scene in args.scenes.split(","):
                for kind, sample in ((kind, sample) for kind in kinds for sample in range(args.samples)):
                    video, questions = tell(kind, num_frames, sample)
                    write_file(path, video, scene)
                    measured = measure(model, processor, path, kind, video, questions)
                    rows += [{"scene": scene, "frames": num_frames, **row} for row in measured]
                results["rows"] = gather(rows, ("scene", "frames", "way"))
                (args.output / "repeats.json").write_text(json.dumps(results, indent=1) + "\n")
                write_table(args.output / "repeats.md", results)
    print((args.output / "repeats.md").read_text())


if __name__ == "__main__":
    main()
