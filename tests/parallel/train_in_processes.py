# SPDX-License-Identifier: Apache-2.0
"""
Trains a tiny model with Transformers' Trainer, in one process or several: a program for test_ranks.py.

It does several runs, one after another, with `--then` between their arguments.
"""

import argparse
import json
import os
import sys
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from tiny_vamba import make_media, make_text
from transformers import Trainer, TrainingArguments

from transformers_vamba import VambaForConditionalGeneration
from transformers_vamba.layers import loss as loss_module
from transformers_vamba.layers import mixer as mixer_module


# Videos of one, none, three and five segments of the vision tower, and of one image.
SAMPLES = [
    make_media("video", (20, 4, 6), seed=1),
    {},
    {},
    make_media("video", (70, 4, 4), seed=2),
    make_media("video", (130, 2, 4), seed=3),
    make_media("image", (1, 4, 4), seed=4),
    {},
    {},
]


def collate(indices: list[int]) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.cat([make_text(seed=index) for index in indices])}
    batch["labels"] = batch["input_ids"]
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        owners = [row for row, index in enumerate(indices) if pixels in SAMPLES[index]]
        if owners:
            batch[f"{kind}_sample_ids"] = torch.tensor(owners)
            for name in (pixels, f"{kind}_grid_thw"):
                batch[name] = torch.cat([SAMPLES[indices[row]][name] for row in owners])
    return batch


def pass_for_gpus() -> None:
    """Accelerate shards for processes with GPUs alone, though PyTorch and DeepSpeed do it for CPUs as well."""
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def train(*arguments: str) -> None:
    """One run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="with the model, as `initial`")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="samples of all processes together")
    parser.add_argument("--tower", choices=("trained", "merger", "frozen"), default="trained")
    parser.add_argument("--skip-logits", action="store_true", help="the loss comes in chunks")
    parser.add_argument("--checkpointing", type=json.loads, help="gradient_checkpointing_kwargs")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument("--optim", default="sgd", help="the optimizer")
    parser.add_argument(
        "--resume", action="store_true", help="from the checkpoint of the run before, which must exist"
    )
    args = parser.parse_args(arguments)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    is_sharded = "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ
    if is_sharded and not torch.cuda.is_available():
        pass_for_gpus()
    training_args = TrainingArguments(
        args.folder,
        per_device_train_batch_size=args.batch // num_processes,
        per_device_eval_batch_size=args.batch // num_processes,
        max_steps=args.steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.1 if args.optim == "sgd" else 1e-2,
        optim=args.optim,
        weight_decay=0.0 if args.optim == "sgd" else 0.1,
        adam_epsilon=1e-2,  # what is nothing but rounding does not grow
        gradient_accumulation_steps=args.accumulate,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        gradient_checkpointing=args.checkpointing is not None,
        gradient_checkpointing_kwargs=args.checkpointing,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=not is_sharded,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        disable_tqdm=True,
    )
    # After the arguments, as users do it: from then on ZeRO-3 loads every model in parts.
    model = VambaForConditionalGeneration.from_pretrained(args.folder / "initial")
    model.model.visual.requires_grad_(args.tower == "trained")
    model.model.visual.merger.requires_grad_(args.tower != "frozen")
    if args.skip_logits:
        model.forward = partial(model.forward, skip_logits=True)
    trainer = Trainer(
        model, training_args, train_dataset=list(range(8)), eval_dataset=list(range(8)), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=args.resume)
    evaluation = trainer.evaluate()
    if trainer.is_fsdp_enabled:
        # As sharded ones the trainer would not save them.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.folder / "final")
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (args.folder / "losses.json").write_text(json.dumps({"train": losses, "eval": evaluation["eval_loss"]}))


def main():
    # Another number of parts and chunks in each process.
    mixer_module.MAX_TOKENS_PER_PART = 16
    loss_module.CHUNK_SIZE = 4 * (1 + int(os.environ.get("RANK", 0)))
    torch.backends.cudnn.allow_tf32 = False
    for is_run, arguments in groupby(sys.argv[1:], lambda argument: argument != "--then"):
        if is_run:
            train(*arguments)
    if torch.distributed.is_initialized():
        # All leave together, without Python's clearing up: now and then Gloo's threads abort or block there.
        torch.distributed.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
