# SPDX-License-Identifier: Apache-2.0
"""One training step of the tiny model, the video in stretches on several ranks: a program for test_sequence.py."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_vamba import make_media, make_text, tiny_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from transformers_vamba.layers import mixer as mixer_module
from transformers_vamba.parallel import sequence as sequence_parallel
from transformers_vamba.parallel.sequence import take_stretch


# Seven steps of frames, which no number of ranks divides evenly.
GRID = (7, 8, 6)

# Shares of the frames by the number of ranks, one as long as a stretch of the scan is here.
UNEVEN = {2: (1, 6), 3: (1, 5, 1), 4: (1, 3, 1, 2)}

CASES = {  # and the arguments of the checkpointing
    "plain": None,
    "checkpointing": {"use_reentrant": False},
    "two layers a checkpoint": {"layers_per_checkpoint": 2},
    "reentrant": {"use_reentrant": True},
    "frozen tower": None,
    "lora": {"use_reentrant": False},
    "uneven": None,
    "fsdp2": {"use_reentrant": False},
    "text alone": None,
}


def prepare(case: str, device: str = "cpu"):
    """The model in training; on a CPU in float64 but for the scan, on a GPU in float32."""
    model = tiny_model(dtype=torch.float64 if device == "cpu" else torch.float32).to(device).train()
    if case == "frozen tower":
        model.model.visual.requires_grad_(False)
    if case == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if CASES[case] is not None:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(CASES[case])
    return model


def make_sample(case: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    input_ids = make_text(length=9)
    sample = {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids % 3 == 0, -100),
        **({} if case == "text alone" else make_media("video", GRID)),
    }
    return {name: tensor.to(device) for name, tensor in sample.items()}


def make_stretch(case: str, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    sample, group = make_sample(case, mesh.device_type), mesh.get_group()
    if case == "text alone":
        return sample
    if case != "uneven":
        return take_stretch(sample, group)
    pixel_values = sample["pixel_values_videos"].unflatten(0, (GRID[0], -1)).split(UNEVEN[group.size()])[group.rank()]
    grid = sample["video_grid_thw"].new_tensor([(len(pixel_values), *GRID[1:])])
    return {**sample, "pixel_values_videos": pixel_values.flatten(0, 1), "video_grid_thw": grid}


def run_step(case: str, mesh: DeviceMesh) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients, as DDP or FSDP2 average them."""
    model, group = prepare(case, mesh.device_type), mesh.get_group()
    model.set_sequence_parallel_group(group)
    if case == "fsdp2":
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    else:
        run = DistributedDataParallel(model, process_group=group)
    loss = run(**make_stretch(case, mesh)).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    grads = {name: grad.full_tensor() if case == "fsdp2" else grad for name, grad in grads.items()}
    return loss.item(), {name: grad.cpu() for name, grad in grads.items()}


@torch.no_grad()
def evaluate(mesh: DeviceMesh) -> float:
    model = prepare("plain", mesh.device_type).eval()
    model.set_sequence_parallel_group(mesh.get_group())
    return model(**make_stretch("plain", mesh)).loss.item()


def error_of(model, **inputs) -> str:
    try:
        model(**inputs)
    except ValueError as error:
        return str(error)
    return "no error"


def collect_errors(mesh: DeviceMesh) -> list[str]:
    """The messages about inputs that do not fit together."""
    group = mesh.get_group()
    model, rank, stretch = prepare("plain", mesh.device_type), group.rank(), make_stretch("plain", mesh)
    model.set_sequence_parallel_group(group)
    text = {name: stretch[name] for name in ("input_ids", "labels")}
    longer = {name: ids if rank else ids.repeat(1, 2) for name, ids in text.items()}
    rows = {name: ids.repeat(2, 1) for name, ids in text.items()}
    twice = {**stretch, "video_grid_thw": stretch["video_grid_thw"].repeat(2, 1)}
    errors = [
        error_of(model, **(text if rank else stretch)),
        error_of(model, **{**stretch, **longer}),
        error_of(model, **rows),
        error_of(model, **stretch, use_cache=True),
    ]
    try:
        take_stretch(twice, group)
    except ValueError as error:
        errors.append(str(error))
    return errors


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", required=True, help="how many take part, one after another")
    args = parser.parse_args()
    # Several stretches a rank for the mixers, and several parts of the attention's scores.
    mixer_module.MAX_TOKENS_PER_PART = 16
    sequence_parallel.MAX_SCORES = 1000
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
    for num_ranks in args.ranks:
        mesh = DeviceMesh(args.device, range(num_ranks))  # every process has to make it
        if dist.get_rank() < num_ranks:
            results = {case: run_step(case, mesh) for case in CASES}
            results["eval_loss"] = evaluate(mesh)
            results["errors"] = collect_errors(mesh)
            torch.save(results, args.folder / f"{num_ranks}-{mesh.get_rank()}.pt")
        dist.barrier()
    os._exit(0)  # without Python's clearing up: now and then Gloo's threads abort or block there


if __name__ == "__main__":
    main()
