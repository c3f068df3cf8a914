# SPDX-License-Identifier: Apache-2.0
"""How well `model.locate` says when: in videos of a minute to three hours, beside chance and other ways to combine.

    python examples/evaluate_moments.py --model PATH_OR_NAME --output results

The videos are those of `evaluate_needle.py`, in which almost nothing happens. Each test asks a question and knows the
events that its answer is about:

- needle: what appeared? One shape.
- order: in which order did the colours come? Both shapes.
- flashes: how often did it flash? All flashes, 2 to 5, among which shapes appear as well.
- first, last: what came first, what came last? Two questions about one video: one shape each, and not the other.
- first alike, last alike: the same, of two shapes that look alike.

Of the moments that `locate` gives: `peak`, how often the step that was read most lies in an event or one step beside
it; `found`, the share of the events that a moment touches; `right`, the share of the moments that touch an event;
`overlap`, the steps that moments and events have in common, of the steps of either. `chance` is `peak` for a step
drawn at random, `answered` how often the answer was right. Average precision, of all steps in the order in which they
were read, compares the ways to combine layers, heads and tokens.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from ask_video import TINY_MODEL, load
from evaluate_needle import encode, heat, make_needle, make_order
from find_moment import answer_with_reading
from synthetic_videos import QUESTIONS, SyntheticVideo, sample_video

from transformers_vamba.generation import locate


SEED = 2029
FRAMES_PER_STEP = 2
SHOWN = {"peak": "the most read step lies in an event", "found": "events found", "overlap": "overlap with the events"}
MEASURES = ("peak", "chance", "found", "right", "overlap", "answered")


def make_flashes(seed, num_frames: int, share: float) -> SyntheticVideo:
    """A video with at least two flashes."""
    rng = np.random.default_rng(seed)
    while True:
        video = sample_video(rng.integers(2**31), num_frames, "sequence")
        if len(video.flashes) > 1:
            return video


def make_alike(seed, num_frames: int, share: float) -> SyntheticVideo:
    """Two shapes of one kind, colour and size, at two places."""
    video = make_order(seed, num_frames, share)
    first, second = video.shapes
    second.kind, second.colour, second.radius = first.kind, first.colour, first.radius
    return video


def spans(shapes) -> list[tuple[int, int]]:
    return [(shape.start, shape.stop) for shape in shapes]


# The videos of each group, and of each test its question and the frames of the events that it is about.
GROUPS = {
    "needle": (make_needle, {"needle": ("appeared", lambda video: spans(video.shapes))}),
    "two": (
        make_order,
        {
            "order": ("order", lambda video: spans(video.shapes)),
            "first": ("first", lambda video: spans(video.shapes[:1])),
            "last": ("last", lambda video: spans(video.shapes[1:])),
        },
    ),
    "flashes": (make_flashes, {"flashes": ("flashes", lambda video: video.flashes)}),
    "alike": (
        make_alike,
        {
            "first alike": ("first", lambda video: spans(video.shapes[:1])),
            "last alike": ("last", lambda video: spans(video.shapes[1:])),
        },
    ),
}
TESTS = [test for _, tests in GROUPS.values() for test in tests]


def is_answered(test: str, video: SyntheticVideo, reply: str) -> bool:
    """Whether the answer names what there is to name."""
    reply = reply.lower()
    if test == "flashes":
        return reply.strip() == str(len(video.flashes))
    if test == "order":
        first, second = (reply.find(shape.colour) for shape in video.shapes)
        return 0 <= first < second
    shape = video.shapes[-1 if test.startswith("last") else 0]
    return shape.colour in reply and shape.kind in reply


def steps_of(events, num_steps: int, margin: int = 0) -> np.ndarray:
    """Which steps lie in an event, or at most `margin` beside it: bool of shape (events, steps)."""
    steps = np.arange(num_steps)
    starts, stops = np.array(events).T[..., None]
    first, last = starts // FRAMES_PER_STEP, (stops - 1) // FRAMES_PER_STEP
    return (first - margin <= steps) & (steps <= last + margin)


def judge(reading, events) -> dict[str, float]:
    """How well the moments of a reading are the events."""
    num_steps = len(reading.weights)
    near, inside = steps_of(events, num_steps, margin=1), steps_of(events, num_steps).any(0)
    moments = [np.arange(moment.first, moment.last + 1) for moment in reading.moments()]
    chosen = np.isin(np.arange(num_steps), np.concatenate(moments))
    return {
        "peak": float(near.any(0)[int(reading.weights.argmax())]),
        "chance": float(near.any(0).mean()),
        "found": float((near & chosen).any(1).mean()),
        "right": float(np.mean([near.any(0)[moment].any() for moment in moments])),
        "overlap": float((inside & chosen).sum() / (inside | chosen).sum()),
    }


def average_precision(weights: np.ndarray, events) -> float:
    """The mean, over the steps of the events, of the share of such steps among those that were read as much."""
    hits = steps_of(events, len(weights)).any(0)[np.argsort(-weights, kind="stable")]
    return float((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())


class Ways(locate.Reader):
    """Adds up what is read in every way that is compared."""

    def __init__(self, steps):
        super().__init__(steps)
        self.layers: dict[int, np.ndarray] = {}

    def receive(self, layer_idx, row, log_weights):
        super().receive(layer_idx, row, log_weights)
        self.layers[layer_idx] = self.layers.get(layer_idx, 0) + log_weights.exp().sum((0, 1)).cpu().numpy()

    def compared(self) -> dict[str, np.ndarray]:
        ways = {"locate": self.readings()[0].weights.numpy(), "plain mean": np.mean(list(self.layers.values()), 0)}
        return ways | {f"layer {layer_idx}": weights for layer_idx, weights in self.layers.items()}


def compare(model, cache, tokens: torch.Tensor, is_answer: torch.Tensor) -> dict[str, np.ndarray]:
    """The weights of the steps in each way, of the tokens that predict the answer."""
    predicts = is_answer.roll(-1, dims=1)
    predicts[:, -1] = False
    videos = cache.fork()
    ways = Ways([cache.steps_of(0)])
    videos.watcher = locate.watch_steps(ways.receive, ways.steps, predicts)
    with torch.no_grad():
        model.model(input_ids=tokens, cache=videos, use_cache=False)
    return ways.compared()


def measure(model, processor, num_frames: int, num_samples: int) -> tuple[dict, dict]:
    """Of each test the mean of each measure, and the average precision of each way."""
    judged = {test: [] for test in TESTS}
    precisions = {test: [] for test in TESTS}
    for group, (make, tests) in GROUPS.items():
        for sample in range(num_samples):
            seed = [SEED, list(GROUPS).index(group), num_frames, sample]
            video = make(seed, num_frames, (sample + 0.5) / num_samples)
            cache = encode(model, processor, video)
            for test, (kind, choose_events) in tests.items():
                question, events = QUESTIONS[kind][sample % len(QUESTIONS[kind])], choose_events(video)
                reply, reading, tokens, is_answer = answer_with_reading(model, processor, cache, question, 32)
                judged[test].append(judge(reading, events) | {"answered": is_answered(test, video, reply)})
                ways = compare(model, cache, tokens, is_answer)
                precisions[test].append({way: average_precision(weights, events) for way, weights in ways.items()})
    return averages(judged), averages(precisions)


def averages(tests: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """The mean of each number, of each test."""
    return {
        test: {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
        for test, rows in tests.items()
    }


def write_results(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "moments.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = results["lengths"]
    frames = [f"{length['frames']:,}" for length in lengths]
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for axis, (name, title) in zip(axes, SHOWN.items()):
        table = [[length["tests"][test][name] for length in lengths] for test in TESTS]
        heat(axis, np.array(table), TESTS, frames)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("frames")
    chance = [np.mean([length["tests"][test]["chance"] for test in TESTS]) for length in lengths]
    axes[0].set_xlabel("frames; by chance " + ", ".join(f"{each:.1%}" for each in chance), fontsize=9)
    precisions = [length["average_precision"] for length in lengths]
    ways = list(precisions[0][TESTS[0]])
    table = [[np.mean([each[test][way] for each in precisions]) for test in TESTS] for way in ways]
    heat(axes[3], np.array(table), ways, [test.replace(" ", "\n") for test in TESTS])
    axes[3].set_title("average precision, mean of all lengths", fontsize=10)
    figure.suptitle(f"{results['model']}, videos of each kind by length: {results['samples']}", fontsize=9)
    figure.savefig(folder / "moments.png", dpi=90)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--frames", default="60,240,960,2048,10800", help="lengths of the videos, 1 frame per second")
    parser.add_argument("--samples", default="12", help="videos of each kind: a number, or one for each length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("moments"))
    args = parser.parse_args(arguments)

    lengths = [int(length) for length in args.frames.split(",")]
    samples = [int(number) for number in args.samples.split(",")]
    samples = samples * len(lengths) if len(samples) == 1 else samples
    if len(samples) != len(lengths) or min(lengths) < 24:
        raise SystemExit(f"Give lengths of at least 24 frames, and as many --samples: got {lengths} and {samples}.")
    model, processor = load(args.model, args.device)
    results = {"model": Path(args.model).name, "samples": samples, "lengths": []}
    for num_frames, num_samples in zip(lengths, samples):
        start = time.perf_counter()
        tests, precisions = measure(model, processor, num_frames, num_samples)
        results["lengths"].append({"frames": num_frames, "tests": tests, "average_precision": precisions})
        seconds = time.perf_counter() - start
        print(f"{num_frames:,} frames, {num_samples} videos of each kind, {seconds:.0f} s", flush=True)
        for test in TESTS:
            print(f"  {test:12s}" + "".join(f"  {name} {tests[test][name]:.1%}" for name in MEASURES), flush=True)
        write_results(args.output, results)


if __name__ == "__main__":
    main()
