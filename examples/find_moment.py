# SPDX-License-Identifier: Apache-2.0
"""Ask a question about a video, and see when the answer happened.

    python examples/find_moment.py movie.mp4 "What appeared?" --model PATH_OR_NAME --output moment.png

Prints the answer and the moments of the video that were read most for it. The picture has a frame of each of them and
a timeline: how much of each time step was read.
"""

import argparse
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from ask_video import TINY_MODEL, VIDEO_CACHES, encode, load


def answer_with_reading(model, processor, cache, question, max_new_tokens=128, streamer=None):
    """
    The answer to a question about the video in a cache, how much of each time step was read for it, the tokens of
    question and answer, and which of them are the answer. A streamer of Transformers is given the tokens as they come.
    """
    inputs = processor.prepare_question(question).to(model.device)
    tokens = model.generate(
        **inputs, cache=cache.fork(), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
    )
    is_answer = (torch.arange(tokens.shape[1]) >= inputs["input_ids"].shape[1])[None]
    (reading,) = model.locate(tokens, cache, token_mask=is_answer)
    return processor.decode(tokens[is_answer], skip_special_tokens=True), reading, tokens, is_answer


def clock(seconds):
    """Seconds as `h:mm:ss.s`; a question mark if they are not known."""
    if np.isnan(seconds):
        return "?"
    tenths = round(10 * seconds)
    hours, minutes, seconds = tenths // 36000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"


def frames_at(processor, video, seconds):
    """The frames of a video, uint8 arrays of shape (height, width, 3), that are shown at these times."""

    def choose(metadata, **kwargs):
        times = getattr(metadata, "frame_times", None)
        if times is None:
            times = np.arange(metadata.total_num_frames) / metadata.fps
        return np.unique(np.searchsorted(times, seconds + 1e-3, side="right") - 1).clip(min=0)

    frames, _ = processor.video_processor.fetch_videos(str(video), sample_indices_fn=choose)
    return frames


def strongest_moments(reading, most):
    """The `most` moments that were read most, in the order in which they happened."""
    return sorted(sorted(reading.moments(), key=lambda moment: -moment.weight)[:most])


def frames_of(processor, video, reading, moments):
    """One frame of each moment: the step that was read most stands for it."""
    best = [moment.first + int(reading.weights[moment.first : moment.last + 1].argmax()) for moment in moments]
    return frames_at(processor, video, reading.seconds[best].numpy())


def draw(path, question, reply, reading, moments, frames, size=(10, 4.2)):
    """Writes the picture: a strip of frames, one for each moment, above the timeline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, max(len(moments), 1), height_ratios=(3, 2))
    for column, (moment, frame) in enumerate(zip(moments, frames)):
        axis = figure.add_subplot(grid[0, column])
        axis.imshow(frame)
        axis.set_title(f"{clock(moment.start)}  ({moment.weight:.0%})", fontsize=9)
        axis.set_axis_off()
    timeline = figure.add_subplot(grid[1, :])
    timeline.fill_between(reading.seconds, reading.weights, step="post", alpha=0.8)
    for moment in moments:
        timeline.axvspan(moment.start, moment.stop, color="tab:orange", alpha=0.25)
    timeline.set_xlabel("seconds")
    timeline.set_ylabel("share that was read")
    timeline.margins(x=0)
    figure.suptitle(shorten(f"{question}  {reply}", int(13 * size[0])), fontsize=10, parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Ask a question about a video and see when the answer happened.")
    parser.add_argument("video", help="path of a video file")
    parser.add_argument("question")
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub name of a checkpoint (default: the tiny one)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-frames", type=int, help="how many frames to look at (default: the processor's)")
    parser.add_argument("--fps", type=float, help="or how many per second")
    parser.add_argument("--video-cache", choices=VIDEO_CACHES, help="8 bits, or the host's memory, or both")
    parser.add_argument("--moments", type=int, default=6, help="how many moments to show at most")
    parser.add_argument("--output", type=Path, default=Path("moment.png"), help="the picture")
    args = parser.parse_args(arguments)

    model, processor = load(args.model, args.device)
    cache = encode(model, processor, args.video, args.video_cache, num_frames=args.num_frames, fps=args.fps)
    reply, reading, *_ = answer_with_reading(model, processor, cache, args.question)
    print(f"Question: {args.question}\nAnswer:   {reply}")
    moments = strongest_moments(reading, args.moments)
    for moment in moments:
        print(f"    {clock(moment.start)} to {clock(moment.stop)}: {moment.weight:.0%} of what was read")
    frames = frames_of(processor, args.video, reading, moments)
    draw(args.output, args.question, reply, reading, moments, frames)
    print(f"{args.output} shows them.")


if __name__ == "__main__":
    main()
