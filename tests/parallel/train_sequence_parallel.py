# SPDX-License-Identifier: Apache-2.0
"""One training step of the tiny model, the video in stretches on several ranks: for test_sequence_parallel.py."""

import os
import sys
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


# Seven steps of frames, which neither two nor three ranks divide evenly.
GRID = (7, 8, 6)

# Shares of the frames of two ranks and of three, one as long as a stretch of the scan is here.
UNEVEN = {2: (1, 6), 3: (1, 5, 1)}

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


def prepare(case: str):
    """The model in training, in float64 but for the scan."""
    model = tiny_model(dtype=torch.float64).train()
    if case == "frozen tower":
        model.model.visual.requires_grad_(False)
    if case == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if CASES[case] is not None:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(CASES[case])
    return model


def make_sample(case: str) -> dict[str, torch.Tensor]:
    input_ids = make_text(length=9)
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids % 3 == 0, -100),
        **({} if case == "text alone" else make_media("video", GRID)),
    }


def make_stretch(case: str, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    sample = make_sample(case)
    if case == "text alone":
        return sample
    if case != "uneven":
        return take_stretch(sample, group)
    pixel_values = sample["pixel_values_videos"].unflatten(0, (GRID[0], -1)).split(UNEVEN[group.size()])[group.rank()]
    grid = torch.tensor([(len(pixel_values), *GRID[1:])])
    return {**sample, "pixel_values_videos": pixel_values.flatten(0, 1), "video_grid_thw": grid}


def run_step(case: str, mesh: DeviceMesh) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients, as DDP or FSDP2 average them."""
    model, group = prepare(case), mesh.get_group()
    model.set_sequence_parallel_group(group)
    if case == "fsdp2":
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    else:
        run = DistributedDataParallel(model, process_group=group)
    loss = run(**make_stretch(case, group)).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.item(), {name: grad.full_tensor() if case == "fsdp2" else grad for name, grad in grads.items()}


@torch.no_grad()
def evaluate(group: dist.ProcessGroup) -> float:
    model = prepare("plain").eval()
    model.set_sequence_parallel_group(group)
    return model(**make_stretch("plain", group)).loss.item()


def error_of(model, **inputs) -> str:
    try:
        model(**inputs)
    except ValueError as error:
        return str(error)
    return "no error"


def collect_errors(group: dist.ProcessGroup) -> list[str]:
    """The messages about inputs that do not fit together."""
    model, rank, stretch = prepare("plain"), group.rank(), make_stretch("plain", group)
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
    folder = Path(sys.argv[1])
    # Several stretches a rank for the mixers, and several parts of the attention's scores.
    mixer_module.MAX_TOKENS_PER_PART = 16
    sequence_parallel.MAX_SCORES = 1000
    dist.init_process_group("gloo")
    for num_ranks in (2, 3):
        mesh = DeviceMesh("cpu", range(num_ranks))  # every process has to make it
        if dist.get_rank() < num_ranks:
            results = {case: run_step(case, mesh) for case in CASES}
            results["eval_loss"] = evaluate(mesh.get_group())
            results["errors"] = collect_errors(mesh.get_group())
            torch.save(results, folder / f"{num_ranks}-{mesh.get_rank()}.pt")
        dist.barrier()
    os._exit(0)  # without Python's clearing up: now and then Gloo's threads abort or block there


if __name__ == "__main__":
    main()
