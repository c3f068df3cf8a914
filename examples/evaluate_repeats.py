# SPDX-License-Identifier: Apache-2.0
"""How much of a pruned video the vision tower need not see, since nothing has changed, and that nothing is lost by it.

    python examples/evaluate_repeats.py --model PATH_OR_NAME --output results

With `video_pruning_rate` a time step whose pixels are equal, to the bit, to those of the step before does not go
through the vision tower. Whether a scene that stands still is equal to the bit is up to what has compressed it, so the
videos of `evaluate_pruning.py` are written as H.264 files first, and two kinds of their own beside them:

- slides: still, but the whole picture changes every 20 seconds.
- screen: still, but a pointer moves for 3 of every 12 seconds.

`repeats.json` and a table, `repeats.md`, have for each scene the share of the steps that are seen, seconds of one core
for encoding with every step seen and with repeats left out, and right answers both ways.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import av
import torch
from ask_video import TINY_MODEL, answer, load
from evaluate_pruning import KINDS, SCENES, gather, is_answer, show, tell
from synthetic_videos import FRAME_RATE, FRAME_SIZE, SyntheticVideo


OWN_SCENES = ("slides", "screen")
SLIDE_FRAMES = round(20 * FRAME_RATE)
POINTER_FRAMES = (round(3 * FRAME_RATE), round(12 * FRAME_RATE))  # it moves for so many of so many
RATE = 0.5
GOP = "250"  # frames from one keyframe to the next, as x264 has it by default


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
        stream = container.add_stream("libx264", rate=round(FRAME_RATE), options={"crf": "23", "g": GOP})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        for start in range(0, video.num_frames, 64):
            for frame in draw(video, scene, start, min(start + 64, video.num_frames)):
                picture = frame.permute(1, 2, 0).contiguous().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def encode(model, segments: list, embed_distinct):
    """The cache of a video, whose segments are embedded in this way, and the seconds that it took of one core."""
    cache, start = None, time.process_time()
    with patch.object(model.model, "embed_distinct", embed_distinct):
        for segment in segments:
            cache = model.encode_video(**segment, cache=cache, video_pruning_rate=RATE)
    return cache, time.process_time() - start


def count_right(model, processor, cache, kind: str, video: SyntheticVideo, questions: list) -> int:
    replies = [answer(model, processor, cache, text, max_new_tokens=32) for text, _ in questions]
    return sum(is_answer(kind, video, reply, expected) for reply, (_, expected) in zip(replies, questions))


def measure(model, processor, path: Path, scene: str, kind: str, num_frames: int, sample: int) -> dict:
    """One video both ways."""
    video, questions = tell(kind, num_frames, sample)
    write_file(path, video, scene)
    segments = list(processor.iter_video_segments(str(path), do_sample_frames=False, progress=False))
    num_seen = []

    def count_seen(media):
        num_seen.append(sum(medium.grid[0] for medium in media))
        return embed_media(media)

    embed_media, embed_distinct = model.model.embed_media, model.model.embed_distinct
    with patch.object(model.model, "embed_media", count_seen):
        cache, seconds = encode(model, segments, embed_distinct)
    whole, seconds_of_whole = encode(model, segments, embed_media)
    return {
        "scene": scene,
        "frames": num_frames,
        "seen": sum(num_seen) / (num_frames // 2),
        "seconds": seconds,
        "seconds_every_step": seconds_of_whole,
        "right": count_right(model, processor, cache, kind, video, questions),
        "right_every_step": count_right(model, processor, whole, kind, video, questions),
        "questions": len(questions),
    }


def write_table(path: Path, results: dict) -> None:
    lines = [f"{results['model']}, rate {RATE}, {results['videos']} videos a row, H.264; seconds of one core", ""]
    lines += ["| scene | frames | steps seen | every step, s | repeats left out, s | right, every step | right |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in results["rows"]:
        lines.append(
            f"| {row['scene']} | {row['frames']:,} | {row['seen']:.0%} | {row['seconds_every_step']:.2f} | "
            f"{row['seconds']:.2f} | {row['right_every_step']} of {row['questions']} | "
            f"{row['right']} of {row['questions']} |"
        )
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
        for num_frames in map(int, args.frames.split(",")):
            for scene in args.scenes.split(","):
                for kind in kinds:
                    for sample in range(args.samples):
                        path = Path(folder) / "video.mp4"
                        rows.append(measure(model, processor, path, scene, kind, num_frames, sample))
                results["rows"] = gather(rows, ("scene", "frames"))
                (args.output / "repeats.json").write_text(json.dumps(results, indent=1) + "\n")
                write_table(args.output / "repeats.md", results)
    print((args.output / "repeats.md").read_text())


if __name__ == "__main__":
    main()
