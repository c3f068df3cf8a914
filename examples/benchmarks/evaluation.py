# SPDX-License-Identifier: Apache-2.0
"""
How much faster an evaluation is when a video is encoded once for all of its questions.

    python examples/benchmarks/evaluation.py --frames 1024 --questions 15 --output results

A file of 640x360 is decoded, prepared with LVBench's settings and asked about: all questions together, one encoding
for them all, and one by one, an encoding for each, as the published scripts do. Weights are random, the shapes those
of the 7B model, and every answer has 16 tokens, the most that lmms-eval's own LVBench task takes. The file has as many
frames as are taken of it: decoding an hour of video again for each question would only add to the difference.
`evaluation.md` and `.json` in the output folder are written anew after every size. On a CPU the model is tiny, and the
figures say nothing but that the program runs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from inference import describe_machine, load, make_config, peak_gib, reset_peak, synchronize

from transformers_vamba import VambaProcessor
from transformers_vamba.evaluation.questions import Prompt, VideoQuestionAnswering, VideoSettings


TINY_MODEL = Path(__file__).parents[2] / "checkpoints" / "vamba-tiny"  # for its processor
HEIGHT, WIDTH = 360, 640
EDGES = (256, 560)  # LVBench's
NUM_NEW_TOKENS = 16
COLUMNS = {
    "frames": ("frames", "{:,}"),
    "questions": ("questions", "{}"),
    "together_s": ("together, s", "{:.2f}"),
    "one_by_one_s": ("one by one, s", "{:.2f}"),
    "ratio": ("ratio", "{:.1f}"),
    "peak_gib": ("peak GiB, together", "{:.1f}"),
}


def write_noise(path: Path, num_frames: int) -> None:
    """A video of coarse noise, one frame per second."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(num_frames):
            blocks = rng.integers(256, size=(HEIGHT // 20, WIDTH // 20, 3), dtype=np.uint8)
            image = blocks.repeat(20, axis=0).repeat(20, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def load_model_and_processor(device: torch.device, attention: str):
    """The model with random weights, and the tiny model's processor, whose special tokens it takes."""
    processor = VambaProcessor.from_pretrained(TINY_MODEL)
    config, _ = make_config("vamba", tiny=device.type != "cuda")
    for name in ("image", "video", "vision_start", "vision_end"):
        token = getattr(processor, f"{name}_token")
        setattr(config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    return load(config, attention, device), processor


def make_prompts(path: Path, num_frames: int, num_questions: int) -> list[Prompt]:
    settings = VideoSettings(num_frames, None, *EDGES)
    prompts = []
    for i in range(num_questions):
        text = (
            f"Question {i}: which colour came first?\n(A) red\n(B) green\n(C) blue\n(D) orange\nAnswer with a letter."
        )
        content = [{"type": "video", "path": str(path)}, {"type": "text", "text": text}]
        prompts.append(Prompt([{"role": "user", "content": content}], settings, {"max_new_tokens": NUM_NEW_TOKENS}))
    return prompts


def timed(model, run) -> float:
    synchronize(model)
    start = time.perf_counter()
    run()
    synchronize(model)
    return time.perf_counter() - start


def measure(model, processor, num_frames: int, num_questions: int, folder: Path) -> dict:
    path = folder / f"{num_frames}.mp4"
    write_noise(path, num_frames)
    prompts = make_prompts(path, num_frames, num_questions)
    answering = VideoQuestionAnswering(model, processor, batch_size=num_questions)
    for warm_up in (prompts, prompts[:1]):  # tunes the kernels
        answering.answer(warm_up)
    reset_peak(model)
    row = {"frames": num_frames, "questions": num_questions}
    row["together_s"] = timed(model, lambda: answering.answer(prompts))
    row["peak_gib"] = peak_gib(model)
    row["one_by_one_s"] = timed(model, lambda: [answering.answer([prompt]) for prompt in prompts])
    return row | {"ratio": row["one_by_one_s"] / row["together_s"]}


def write_results(folder: Path, machine: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    lines = [
        machine,
        "",
        "| " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "| --- " * len(COLUMNS) + "|",
    ]
    for row in rows:
        cells = ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "evaluation.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--frames", help="default: 256,1024, and 8 on a CPU")
    parser.add_argument("--questions", type=int, default=15, help="about each video; LVBench has 15 on average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    sizes = map(int, (args.frames or ("256,1024" if device.type == "cuda" else "8")).split(","))
    torch.manual_seed(0)
    model, processor = load_model_and_processor(device, args.attn)
    machine, rows = f"{describe_machine(device)}; {args.attn}", []
    with tempfile.TemporaryDirectory() as folder:
        for num_frames in sizes:
            rows.append(measure(model, processor, num_frames, args.questions, Path(folder)))
            write_results(args.output, machine, rows)
    print((args.output / "evaluation.md").read_text())


if __name__ == "__main__":
    main()
