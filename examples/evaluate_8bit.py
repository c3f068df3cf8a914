# SPDX-License-Identifier: Apache-2.0
"""What a Vamba model still knows of a video that it encoded with matrix products in 8 bits.

    python examples/evaluate_8bit.py --model PATH_OR_NAME --output results

Weights and inputs of the linear layers are rounded to int8 or float8, one scale per row, by torchao's dynamic
configurations: those of the vision tower, of the mixers, or of both. The rest stays in bfloat16. The videos are those
of `evaluate_needle.py` (one event, the order of two) and of `synthetic_videos.py` with all of their questions, where
an answer counts if it is exact. `8bit.json` and `8bit.md` have the right answers, and the relative error of the keys
and of the values of each layer against the model in float32.

torchao refuses float8 products without a GPU for them, though PyTorch computes them on a CPU as well. This program
takes them there.
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from ask_video import TINY_MODEL, answer
from evaluate_needle import SEGMENT_FRAMES, TESTS, is_right
from synthetic_videos import QUESTIONS, pack_videos, render_frames, sample_video
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
)
from transformers import TorchAoConfig

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor


SEED = 2032  # the first number of every seed: no training video has it
KINDS = (*TESTS, "exact")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # depths of the event, distances of the two
FORMATS = {
    "int8": Int8DynamicActivationInt8WeightConfig,
    "float8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
}
# Names of parameters. The biases of these layers stay as they are, hence the last word.
PARTS = {
    "tower": [r"re:.*visual\.blocks\..*\.(qkv|proj|fc1|fc2)\.weight"],
    "mixers": [r"re:.*\.vision_mixer\.mixer\.(in_proj|out_proj)\.weight"],
}
PARTS["both"] = PARTS["tower"] + PARTS["mixers"]
WAYS = ["float32", "bfloat16", *(f"{name}, {part}" for name in FORMATS for part in PARTS)]


def load(path, device: str, way: str) -> VambaForConditionalGeneration:
    options = {"device_map": {"": device}}
    if way in ("float32", "bfloat16"):
        return VambaForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, way), **options).eval()
    name, part = way.split(", ")
    config = TorchAoConfig(FqnToConfig({pattern: FORMATS[name]() for pattern in PARTS[part]}))
    with ExitStack() as stack:
        if device == "cpu":
            # The second one leaves out layers whose sizes are no multiples of 16, which a GPU wants.
            for check in ("_check_hardware_support", "_fp8_mm_compat"):
                stack.enter_context(patch(f"torchao.quantization.quant_api.{check}", return_value=True))
        options |= {"dtype": torch.bfloat16, "quantization_config": config}
        model = VambaForConditionalGeneration.from_pretrained(path, **options).eval()
    count = sum(is_quantized(module) for module in model.modules())
    print(f"{way}: {count} linear layers in 8 bits", flush=True)
    return model


def is_quantized(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter


def tell(kind: str, num_frames: int, sample: int) -> tuple:
    """A video, and the questions about it, with their exact answers if that is how they are judged."""
    seed = [SEED, KINDS.index(kind), num_frames, sample]
    if kind == "exact":
        video = sample_video(seed, num_frames)
        return video, [(question.text, question.answer) for question in video.questions]
    make, question, _ = TESTS[kind]
    wordings = QUESTIONS[question]
    return make(seed, num_frames, SHARES[sample % len(SHARES)]), [(wordings[sample % len(wordings)], None)]


def errors(cache, expected) -> list[list[float]]:
    """Relative errors of the keys and of the values, layer by layer."""
    layers = list(zip(cache.videos[0], expected.videos[0]))
    return [
        [
            ((getattr(ours, name).float() - getattr(full, name)).norm() / getattr(full, name).norm()).item()
            for ours, full in layers
        ]
        for name in ("keys", "values")
    ]


def measure(models: dict, processor, kind: str, num_frames: int, sample: int, rows: dict) -> None:
    """Adds the right answers, and the errors, of all models for one video."""
    video, questions = tell(kind, num_frames, sample)
    scene, caches = pack_videos([video]), dict.fromkeys(models)
    for start in range(0, num_frames, SEGMENT_FRAMES):
        frames = render_frames(scene, start, min(start + SEGMENT_FRAMES, num_frames))
        inputs = processor.video_processor([frames[0]], do_sample_frames=False, return_tensors="pt")
        caches = {way: model.encode_video(**inputs, cache=caches[way]) for way, model in models.items()}
    for way, model in models.items():
        rows[way]["errors"].append(errors(caches[way], caches["float32"]))
        for text, expected in questions:
            reply = answer(model, processor, caches[way], text, max_new_tokens=32)
            is_exact = expected is not None and reply.strip().lower() == expected.lower()
            rows[way]["right"][kind] += is_exact or (expected is None and is_right(kind, video, reply))
            rows[way]["questions"][kind] += 1


def write_results(folder: Path, results: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "8bit.json").write_text(json.dumps(results, indent=1) + "\n")
    about = f"{results['model']}, videos of {', '.join(map(str, results['frames']))} frames, {results['device']}"
    titles = ["products", *KINDS, "error of keys, layer by layer", "of values"]
    lines = [about, "", f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for way, row in results["ways"].items():
        cells = [way, *(f"{row['right'][kind]} of {row['questions'][kind]}" for kind in KINDS)]
        cells += [" / ".join(f"{100 * error:.1f}" for error in layers) + " %" for layers in row["errors"]]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (folder / "8bit.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=TINY_MODEL, help="folder or Hub name (default: the tiny one)")
    parser.add_argument("--frames", default="32,96,240", help="lengths of the videos")
    parser.add_argument("--samples", type=int, default=20, help="videos of each length for each kind of question")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("8bit"))
    args = parser.parse_args(arguments)

    lengths = [int(number) for number in args.frames.split(",")]
    models = {way: load(args.model, args.device, way) for way in WAYS}
    processor = VambaProcessor.from_pretrained(args.model)
    rows = {way: {"right": Counter(), "questions": Counter(), "errors": []} for way in WAYS}
    for num_frames in lengths:
        for kind in KINDS:
            for sample in range(args.samples):
                measure(models, processor, kind, num_frames, sample, rows)
            print(num_frames, kind, {way: row["right"][kind] for way, row in rows.items()}, flush=True)
    for row in rows.values():
        row["errors"] = torch.tensor(row["errors"]).mean(0).tolist()
    results = {"model": Path(args.model).name, "frames": lengths, "samples": args.samples, "device": args.device}
    print(write_results(args.output, results | {"ways": rows}))


if __name__ == "__main__":
    main()
