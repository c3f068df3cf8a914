# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Trains the tiny model with Transformers' Trainer, in one process or several: a program for test_distributed.py."""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed.checkpoint
import yaml
from tiny_vamba import make_media, make_text, tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments


FSDP2_CONFIG = Path(__file__).parent.parent / "examples" / "accelerate" / "fsdp2.yaml"

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


def train_with_fsdp2(model, args) -> None:
    """The same run without Trainer, since Accelerate has no FSDP for processes on a CPU."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if args.checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(args.checkpointing)
    units = yaml.safe_load(FSDP2_CONFIG.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    for module in model.modules():
        if type(module).__name__ in units:
            fully_shard(module)
    fully_shard(model)

    def mean(loss: torch.Tensor) -> float:
        torch.distributed.all_reduce(loss := loss.detach().clone())
        return loss.item() / torch.distributed.get_world_size()

    losses, checkpoint = {}, args.folder / "checkpoint-2"
    first_step = 0
    if checkpoint.is_dir():
        state_dict = get_model_state_dict(model)
        torch.distributed.checkpoint.load(state_dict, checkpoint_id=checkpoint)
        set_model_state_dict(model, state_dict)
        first_step, losses = 2, json.loads((args.folder / "losses.json").read_text())["train"]
    for step in range(first_step, args.steps):
        loss = model.train()(**collate([2 * step + rank])).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()
        losses[str(step + 1)] = mean(loss)
        if step == 1:
            torch.distributed.checkpoint.save(get_model_state_dict(model), checkpoint_id=checkpoint)
    with torch.no_grad():
        eval_losses = [mean(model.eval()(**batch).loss) for batch in (collate([2 * n + rank]) for n in range(4))]
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        (args.folder / "losses.json").write_text(json.dumps({"train": losses, "eval": sum(eval_losses) / 4}))
        whole = tiny_model()
        whole.load_state_dict(state_dict)
        whole.save_pretrained(args.folder / "final")
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frozen-tower", action="store_true")
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--checkpointing", type=json.loads, help="gradient_checkpointing_kwargs")
    args = parser.parse_args()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    model = tiny_model()
    if args.frozen_tower:
        model.model.visual.requires_grad_(False)
    if args.fsdp2:
        train_with_fsdp2(model, args)
        return
    arguments = TrainingArguments(
        args.folder,
        per_device_train_batch_size=2 // num_processes,
        per_device_eval_batch_size=2 // num_processes,
        max_steps=args.steps,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        gradient_checkpointing=args.checkpointing is not None,
        gradient_checkpointing_kwargs=args.checkpointing,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=list(range(8)), eval_dataset=list(range(8)), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=any(args.folder.glob("checkpoint-*")))
    evaluation = trainer.evaluate()
    trainer.save_model(args.folder / "final")
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        (args.folder / "losses.json").write_text(json.dumps({"train": losses, "eval": evaluation["eval_loss"]}))
    if torch.distributed.is_initialized():
        # All leave together, without Python's clearing up: now and then Gloo's threads abort or block there.
        torch.distributed.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
