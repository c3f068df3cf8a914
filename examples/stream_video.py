# SPDX-License-Identifier: Apache-2.0
"""Watch a video while it plays, and answer a question about what has been seen so far every few seconds.

python examples/stream_video.py movie.mp4 "What happened last?" --every 10 --speed 4 --model PATH_OR_NAME

A file plays at its own speed, or `--speed` times faster. With `-` for the file, a live source comes in by a pipe:

ffmpeg -i rtsp://camera -c copy -f matroska - | python examples/stream_video.py - "Is somebody at the door?"

Each stretch of frames is appended to the cache when it has been played. Nothing that came before is computed again.
The cache holds `--max-video-tokens` and no more, however long the stream goes on: its newest tokens, and of what is
older those that changed most.
"""

import argparse
import sys
import time

import torch
from ask_video import TINY_MODEL, answer, load


def watch(model, processor, video, question, fps, every, speed=None, max_video_tokens=None):
    """
    Plays a video and answers the question after every `every` seconds of it, and at its end.

    `video` is a path at `speed` times its own speed, or with `speed=None` a source that comes at its own. Yields the
    seconds seen so far, the answer, and by how many seconds it is late.
    """
    step = processor.video_processor.temporal_patch_size
    stretch = max(min(int(every * fps), 64) // step * step, step)  # frames that are appended at a time
    cache, num_frames, next_question, answered = None, 0, every, 0.0
    start = time.perf_counter()
    for segment in processor.iter_video_segments(
        video, fps=fps, segment_frames=stretch, progress=False, live=speed is None
    ):
        num_frames += int(segment["video_grid_thw"][0, 0]) * step
        seen = num_frames / fps
        if speed is not None:
            time.sleep(max(start + seen / speed - time.perf_counter(), 0))
        shown = time.perf_counter()
        cache = model.encode_video(**segment, cache=cache, max_video_tokens=max_video_tokens)
        if seen >= next_question:
            next_question, answered = next_question + every, seen
            yield seen, answer(model, processor, cache, question), time.perf_counter() - shown
    if num_frames / fps > answered:
        shown = time.perf_counter()
        yield num_frames / fps, answer(model, processor, cache, question), time.perf_counter() - shown


def main():
    parser = argparse.ArgumentParser(description="Watch a video while it plays and answer a question about it.")
    parser.add_argument("video", help="path of a video file, or - for a live source on the standard input")
    parser.add_argument("question")
    parser.add_argument("--every", type=float, default=10.0, help="seconds of video between two answers")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="how many times faster than its own speed a file plays"
    )
    parser.add_argument("--fps", type=float, help="frames per second to look at (default: the processor's, or 1)")
    parser.add_argument("--max-video-tokens", type=int, default=32_768, help="that are kept of the video")
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub name of a checkpoint (default: the tiny one)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = load(args.model, args.device)
    is_live = args.video == "-"
    source, speed = (sys.stdin.buffer, None) if is_live else (args.video, args.speed)
    fps = args.fps or processor.video_processor.fps or 1.0
    print(f"Question: {args.question}")
    for seen, reply, delay in watch(
        model, processor, source, args.question, fps, args.every, speed, args.max_video_tokens
    ):
        print(f"{seen:8.1f} s: {reply}   ({delay:.2f} s later)", flush=True)


if __name__ == "__main__":
    main()
