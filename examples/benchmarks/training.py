# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a training step on long videos: Vamba-7B's shapes against Qwen2-VL-7B's.

    python examples/benchmarks/training.py --frames 64,256,512,1024 --output results
    python examples/benchmarks/training.py --lora --frames 512,1024,2048,4096,8192 --checkpointing parts,2,offload-2
    torchrun --nproc-per-node 4 examples/benchmarks/training.py --frames 256
    torchrun --nproc-per-node 4 examples/benchmarks/training.py --frames 1024,4096 --sequence-parallel

One sample a step and a GPU: 640x360 frames and 66 tokens of text, all of which have labels; random weights in
bfloat16, the vision tower frozen, all else trained (or LoRA on every linear layer of the decoder), gradients but no
optimizer. After a first step, which tunes kernels and pins memory, the median of `--steps` is taken. `training.md` and
`.json` in the output folder are written anew after every measurement. On a CPU the models are tiny, and the figures
say nothing but that the program runs.

`--checkpointing` says what Vamba keeps for the backward pass, as `gradient_checkpointing_enable` knows it: `parts`
(the default: each layer's input), a number (one input for so many layers), `offload` or `offload-NUMBER` (the same in
host memory), `reentrant` (whole layers, each computed again at once). Qwen2-VL keeps each layer's input.

Under `torchrun` each process measures on its own first, then all together with FSDP2; `scaling` is the time of the one
by that of the other. With `--sequence-parallel` all share one video, each with a stretch of it; the shortest is
measured on one GPU as well, and `scaling` is the time there by that of all GPUs together.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from inference import (
    attempt,
    describe_machine,
    load,
    make_config,
    make_pixels,
    make_prompt,
    make_text,
    peak_gib,
    reset_peak,
    synchronize,
    write_results,
)
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

from transformers_vamba import lora_target_modules


COLUMNS = {
    "trained": ("trained", "{}"),
    "checkpointing": ("checkpoints", "{}"),
    "gpus": ("GPUs", "{}"),
    "frames": ("frames per sample", "{:,}"),
    "video_tokens": ("video tokens", "{:,}"),
    "step_s": ("s per step", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.1f}"),
    "scaling": ("scaling", "{:.0%}"),
    "note": ("", "{}"),
}


def prepare(name: str, attention: str, device: torch.device, lora: bool):
    """The model, ready to train but for its checkpointing, and the patches of a frame."""
    config, patches = make_config(name, tiny=device.type != "cuda")
    model = load(config, attention, device)
    model.model.visual.requires_grad_(False)
    if lora:
        adapters = LoraConfig(r=16, target_modules=lora_target_modules(config))
        # In one dtype, or FSDP2 does not take them.
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    return model.train(), patches


def enable_checkpointing(model, form: str) -> None:
    """What is kept for the backward pass: see the text at the top."""
    place, _, layers = form.rpartition("-")
    kwargs = {"use_reentrant": form == "reentrant"}
    if layers.isdigit():
        kwargs["layers_per_checkpoint"] = int(layers)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(kwargs, offload="offload" in (place, form))


def make_inputs(model, num_frames: int, patches: tuple[int, int]) -> dict[str, torch.Tensor]:
    """A video and a text about it. Vamba takes its pixels from (pinned) host memory, the others have them at hand."""
    is_vamba = model.config.model_type == "vamba"
    inputs = make_pixels(model, num_frames, patches, "cpu" if is_vamba else str(model.device))
    if is_vamba:
        input_ids = make_text(model)
        return {**inputs, "input_ids": input_ids, "labels": input_ids}
    inputs["video_grid_thw"] = inputs["video_grid_thw"].to(model.device)
    inputs |= make_prompt(model, inputs["video_grid_thw"])
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    return {**inputs, "labels": labels}


def step(model, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds for the loss and every gradient."""
    model.zero_grad()
    synchronize(model)
    start = time.perf_counter()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    synchronize(model)
    if not loss.isfinite():
        raise FloatingPointError("the loss is not finite")
    return time.perf_counter() - start


def measure(
    model, num_frames: int, patches: tuple[int, int], row: dict, num_steps: int, num_stretches: int = 1
) -> None:
    """Fills the row. Of a video in stretches this process has one."""
    inputs = make_inputs(model, num_frames // num_stretches, patches)
    step(model, inputs)
    reset_peak(model)
    row["step_s"] = statistics.median(step(model, inputs) for _ in range(num_steps))
    row["peak_gib"] = peak_gib(model)
    num_patches = num_stretches * int(inputs["video_grid_thw"].prod())
    row["video_tokens"] = num_patches // model.config.vision_config.spatial_merge_size**2


def measure_sizes(
    model, sizes: list[int], patches: tuple[int, int], case: dict, **options
) -> Iterator[dict[str, object]]:
    """A row for each number of frames, `case` and what was measured; after one that fails, larger ones are not run."""
    failed_at = None
    for num_frames in sizes:
        row = {**case, "frames": num_frames}
        if failed_at is not None:
            row["note"] = f"fails at {failed_at} frames"
        else:
            attempt(partial(measure, **options), model, num_frames, patches, row)
            failed_at = num_frames if "note" in row else None
        yield row


def shard(model) -> None:
    """FSDP2 with the units that Accelerate takes by default."""
    units = set(model._no_split_modules)
    for module in model.modules():
        if type(module).__name__ in units:
            fully_shard(module)
    fully_shard(model)


def parse(arguments: list[str] | None, num_processes: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="vamba,qwen2-vl")
    parser.add_argument("--frames", help="default: 64,256,512,1024, and 8,16 on a CPU")
    parser.add_argument("--checkpointing", default="parts,offload", help="what Vamba keeps, see above")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters instead of all but the vision tower")
    parser.add_argument("--sequence-parallel", action="store_true", help="one video on all processes of torchrun")
    parser.add_argument("--steps", type=int, default=3, help="steps to take the median of")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    if args.sequence_parallel and (num_processes == 1 or args.models != "vamba"):
        parser.error("--sequence-parallel is for several processes, started by torchrun, and --models vamba")
    return args


def main(arguments: list[str] | None = None) -> None:
    num_processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    args = parse(arguments, num_processes)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if num_processes > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sizes = sorted(map(int, (args.frames or ("64,256,512,1024" if device.type == "cuda" else "8,16")).split(",")))
    machine, rows, parts = describe_machine(device), [], ["training"]
    parts += ["lora"] * args.lora + ["sequence_parallel"] * args.sequence_parallel
    name = "_".join([*parts, f"{num_processes}_gpus"] if num_processes > 1 else parts)
    torch.manual_seed(0 if args.sequence_parallel else rank)  # the stretches of a video have the same text

    for model_name in args.models.split(","):
        for form in args.checkpointing.split(",") if model_name == "vamba" else ("layers",):
            alone = {}
            for gpus in sorted({1, num_processes}):
                model, patches = prepare(model_name, args.attn, device, args.lora)
                enable_checkpointing(model, form)
                num_stretches = gpus if args.sequence_parallel else 1
                if gpus > 1:
                    shard(model)
                if num_stretches > 1:
                    model.set_sequence_parallel_group(torch.distributed.group.WORLD)
                trained = "LoRA" if args.lora else "text side"
                case = {"model": model_name, "attention": args.attn, "trained": trained}
                case |= {"checkpointing": form, "gpus": gpus}
                to_measure = sizes[:1] if args.sequence_parallel and gpus == 1 else sizes
                options = {"num_steps": args.steps, "num_stretches": num_stretches}
                for row in measure_sizes(model, to_measure, patches, case, **options):
                    rows.append(row)
                    if gpus == 1:
                        alone[row["frames"]] = row.get("step_s")
                    elif "step_s" in row and alone.get(row["frames"]):
                        row["scaling"] = alone[row["frames"]] / row["step_s"] / num_stretches
                    if rank == 0:
                        write_results(args.output, machine, rows, name, COLUMNS)
                del model
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if rank == 0:
        write_results(args.output, machine, rows, name, COLUMNS)
        print((args.output / f"{name}.md").read_text())
    if num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
