# SPDX-License-Identifier: Apache-2.0
"""What a Vamba model still knows of a video if its answers read a share of it (`video_read_share`).

    python examples/evaluate_read_share.py --model PATH_OR_NAME --output results --processes 4

The videos are those of `evaluate_pruning.py`, in which nothing else moves: one event (needle), the order of two, and
videos with all of their questions, where an answer counts if it is exact. These are asked one by one (exact), and all
about a video at once (at once), which then share one choice of what is read.

At least 32 time steps, of two frames each, are read of every video (`LEAST_STEPS`). To see where reading less begins
to hurt, the last columns do without: so many time steps are read, whatever the length.

`read_share.md`, `.json` and `.png` have the right answers by question, length and share.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from ask_video import TINY_MODEL, load
from evaluate_needle import heat
from evaluate_pruning import gather, is_answer, segments_of, tell

from transformers_vamba.cache import excerpts


SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)
STEPS = (16, 8, 4, 2)
# The name of each column, the share, and how many time steps are read at least.
WAYS = [(f"{share:.0%}", share, excerpts.LEAST_STEPS) for share in SHARES]
WAYS += [(f"{steps} steps", 1e-9, steps) for steps in STEPS]
COLUMNS = [name for name, *_ in WAYS]
ASKED = {"needle": ("needle",), "order": ("order",), "exact": ("exact", "at once")}  # about the videos of each kind
ORDER = [asked for each in ASKED.values() for asked in each]


def prepare(path) -> None:
    """Loads the model in a process of its own."""
    global model, processor
    torch.set_num_threads(1)
    model, processor = load(path, "cpu")


def answer(cache, questions: list[str], share: float) -> list[str]:
    """The answers to questions that are asked at once."""
    inputs = processor.prepare_question(questions)
    options = {"max_new_tokens": 32, "do_sample": False, "video_read_share": share}
    tokens = model.generate(**inputs, cache=cache.fork(), **options)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(task: tuple[str, int, int]) -> list[dict]:
    """All shares for one video: right answers."""
    kind, num_frames, sample = task
    video, questions = tell(kind, num_frames, sample)
    texts, expected = zip(*questions)
    cache = None
    for segment in segments_of(processor, video, "still", num_frames):
        cache = model.encode_video(**segment, cache=cache)
    rows = []
    for (name, share, least), asked in itertools.product(WAYS, ASKED[kind]):
        groups = [list(texts)] if asked == "at once" else [[text] for text in texts]
        with patch.object(excerpts, "LEAST_STEPS", least):
            replies = [reply for group in groups for reply in answer(cache, group, share)]
        right = sum(is_answer(kind, video, reply, each) for reply, each in zip(replies, expected))
        row = {"kind": asked, "frames": num_frames, "read": name}
        rows.append(row | {"right": right, "questions": len(questions)})
    return rows


def write_table(path: Path, results: dict) -> None:
    """Markdown: questions and lengths by shares."""
    lines = ["| question | frames | " + " | ".join(COLUMNS) + " |"]
    lines.append("| --- " * (2 + len(COLUMNS)) + "|")
    recall = {(row["kind"], row["frames"], row["read"]): row["right"] / row["questions"] for row in results["rows"]}
    for kind, frames in sorted({key[:2] for key in recall}, key=lambda key: (ORDER.index(key[0]), key[1])):
        cells = [f"{100 * recall[kind, frames, column]:.0f}" for column in COLUMNS]
        lines.append(f"| {kind} | {frames:,} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def draw(path: Path, results: dict) -> None:
    """Heat maps: lengths by shares, for each kind of question."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = results["rows"]
    kinds = [kind for kind in ORDER if any(row["kind"] == kind for row in rows)]
    lengths = sorted({row["frames"] for row in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 2.6), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        recall = np.full((len(lengths), len(COLUMNS)), np.nan)
        for row in rows:
            if row["kind"] == kind:
                recall[lengths.index(row["frames"]), COLUMNS.index(row["read"])] = row["right"] / row["questions"]
        names = [name.replace(" ", "\n") for name in COLUMNS]
        heat(axis, recall, [f"{length:,}" for length in lengths], names)
        axis.axvline(len(SHARES) - 0.5, color="black", linewidth=1)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("of the video read for each token", fontsize=8)
    axes[0, 0].set_ylabel("frames", fontsize=8)
    figure.suptitle(f"{results['model']}: right answers, {results['samples']} videos a cell", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--frames", default="240,960,2048", help="lengths of the videos")
    parser.add_argument("--kinds", default=",".join(ASKED), help=f"of {', '.join(ASKED)}")
    parser.add_argument("--samples", type=int, default=10, help="videos a cell")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("read_share"))
    args = parser.parse_args(arguments)

    lengths, kinds = [int(number) for number in args.frames.split(",")], args.kinds.split(",")
    if unknown := {*kinds} - {*ASKED}:
        raise SystemExit(f"There are no {', '.join(sorted(unknown))} among {', '.join(ASKED)}.")
    tasks = [
        (kind, num_frames, sample)
        for num_frames in sorted(lengths, reverse=True)
        for kind in kinds
        for sample in range(args.samples)
    ]
    with ProcessPoolExecutor(args.processes, get_context("spawn"), prepare, (args.model,)) as pool:
        rows = [row for each in pool.map(measure, tasks) for row in each]
    results = {"model": Path(args.model).name, "samples": args.samples}
    results["rows"] = gather(rows, ("kind", "frames", "read"))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "read_share.json").write_text(json.dumps(results, indent=1) + "\n")
    write_table(args.output / "read_share.md", results)
    draw(args.output / "read_share.png", results)
    print((args.output / "read_share.md").read_text())


if __name__ == "__main__":
    main()
