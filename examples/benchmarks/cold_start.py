# SPDX-License-Identifier: Apache-2.0
"""What a user waits for in a fresh process: the first video and question and the second, and the first training steps.

    python examples/benchmarks/cold_start.py --frames 1024 --train-frames 32 --output results
    python examples/benchmarks/cold_start.py --models vamba --scans triton --frames 256 --output results

Each model runs in processes of its own: one that finds no compiled kernel on the disk, as after a plain install, and
one that finds those of the first. Vamba runs with each implementation of its mixers' scan that is installed. Weights
and pixels are random, and nothing is loaded from the network; making them is not timed, everything else is: from the
call that takes the pixels to the first token of the answer. Of Vamba a further question about the video is timed as
well, with an answer of 33 tokens. `cold_start.md` and `.json` in the output folder are
written anew after every process. On a CPU the models are tiny, and the figures say nothing but that the program runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from inference import (
    NAMES,
    describe_machine,
    encode,
    generate,
    load,
    make_config,
    make_pixels,
    make_prompt,
    make_text,
    write_results,
)
from training import enable_checkpointing, make_inputs, prepare, step
from transformers.utils import is_mamba_2_ssm_available


COLUMNS = {
    "scan": ("scan", "{}"),
    "process": ("process", "{}"),
    "frames": ("frames", "{:,}"),
    "first_video_s": ("first video, s", "{:.1f}"),
    "second_video_s": ("second video, s", "{:.1f}"),
    "first_question_s": ("first question, s", "{:.2f}"),
    "second_question_s": ("second question, s", "{:.2f}"),
    "first_step_s": ("first step, s", "{:.1f}"),
    "second_step_s": ("second step, s", "{:.2f}"),
    "note": ("", "{}"),
}


def measure_videos(name: str, scan: str | None, num_frames: int, device: torch.device) -> dict[str, float]:
    """Seconds to the first token about the first video of this process, and about a second; Vamba's for a question."""
    config, patches = make_config(name, tiny=device.type != "cuda")
    if scan is not None:
        config.text_config.mamba_implementation = scan
    model = load(config, "sdpa", device)
    figures = {}
    for which in ("first", "second"):
        video = make_pixels(model, num_frames, patches, "cpu" if name == "vamba" else str(device))
        if name == "vamba":
            cache, seconds = encode(model, video)
            figures[f"{which}_video_s"] = seconds + generate(model, make_text(model), 1, cache=cache.fork())[0]
            figures[f"{which}_question_s"] = generate(model, make_text(model), cache=cache.fork())[-1]
        else:
            video["video_grid_thw"] = video["video_grid_thw"].to(device)
            prompt = make_prompt(model, video["video_grid_thw"])
            figures[f"{which}_video_s"] = generate(model, num_new_tokens=1, **video, **prompt)[0]
    return figures


def measure_steps(name: str, scan: str | None, num_frames: int, device: torch.device) -> dict[str, float]:
    """Seconds for the first loss and gradients of this process, and the second."""
    model, patches = prepare(name, "sdpa", device, lora=False)
    if scan is not None:
        model.config.text_config.mamba_implementation = scan
    enable_checkpointing(model, "parts" if name == "vamba" else "layers")
    inputs = make_inputs(model, num_frames, patches)
    return dict(zip(("first_step_s", "second_step_s"), [step(model, inputs) for _ in range(2)]))


def run_fresh(arguments: list[str], caches: str) -> dict:
    """This program as a process of its own, with compiled kernels kept in the folder `caches`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch"}
    command = [sys.executable, __file__, *arguments]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        return {"note": f"failed with exit code {process.returncode}"}
    return json.loads(process.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--scans", help="default: triton, torch, and mamba_ssm if it is installed")
    parser.add_argument("--frames", type=int, default=1024, help="of a video that is asked about; 0: none")
    parser.add_argument("--train-frames", type=int, default=32, help="of a step, of Vamba alone; 0: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--measure", choices=("videos", "steps"), help="do it once, in this process")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if args.measure:
        measure = {"videos": measure_videos, "steps": measure_steps}[args.measure]
        print(json.dumps(measure(args.models, args.scans, args.frames, device)))
        return

    installed = ["torch"] if device.type == "cpu" else ["triton", "torch"]
    installed += ["mamba_ssm"] * is_mamba_2_ssm_available()
    scans = args.scans.split(",") if args.scans else installed
    models = args.models.split(",")
    runs = [("steps", "vamba", scan, args.train_frames) for scan in scans if "vamba" in models]
    runs += [("videos", name, scan, args.frames) for name in models for scan in (scans if name == "vamba" else [None])]
    machine, rows = describe_machine(device), []
    for measure, name, scan, num_frames in runs:
        if num_frames == 0:
            continue
        options = ["--measure", measure, "--models", name, "--frames", str(num_frames), "--device", args.device]
        with tempfile.TemporaryDirectory() as caches:
            for process in ("first ever", "later"):
                row = {"model": name, "attention": "sdpa", "scan": scan, "process": process, "frames": num_frames}
                rows.append(row | run_fresh(options + (["--scans", scan] if scan else []), caches))
                write_results(args.output, machine, rows, "cold_start", COLUMNS)
    print((args.output / "cold_start.md").read_text())


if __name__ == "__main__":
    main()
