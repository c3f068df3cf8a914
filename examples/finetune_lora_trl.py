"""Teach a Vamba from a folder of videos with questions: LoRA with TRL, from a checkpoint to a merged checkpoint.

    python examples/finetune_lora_trl.py --videos my_videos --model PATH_OR_NAME --output_dir my_vamba --fps 1

The folder holds the videos and a `metadata.jsonl`, a line for each question:

    {"file_name": "party.mp4", "question": "Who sings?", "answer": "Two children."}

All arguments of TRL's `SFTConfig` are arguments of this program as well. Called again with the same `--output_dir`, it
goes on from the last checkpoint there. With `accelerate launch`, several GPUs share the batches, each with the whole
model.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import set_seed
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer, TrlParser

from transformers_vamba import (
    VambaDataCollator,
    VambaForConditionalGeneration,
    VambaProcessor,
    last_whole_checkpoint,
    lora_target_modules,
)
from transformers_vamba.compat import rename_checkpointing
from transformers_vamba.training.model_card import write_model_card
from transformers_vamba.training.peft import VambaPeftModel
from transformers_vamba.training.trainer import VambaTrainerMixin


TINY_MODEL = str(Path(__file__).parent.parent / "checkpoints" / "vamba-tiny")


@dataclass
class FinetuningArguments:
    videos: str = field(metadata={"help": "folder with videos and a metadata.jsonl"})
    model: str = field(default=TINY_MODEL, metadata={"help": "folder or Hub name of a checkpoint"})
    num_frames: int | None = field(default=None, metadata={"help": "frames of a video, evenly spread"})
    fps: float | None = field(default=None, metadata={"help": "or frames per second"})
    max_frames: int | None = field(default=None, metadata={"help": "frames at most, with fps"})
    on_error: str = field(default="raise", metadata={"help": "'skip' goes on without videos that cannot be read"})
    pack_rows: bool = field(default=False, metadata={"help": "rows of a batch behind one another, not padded"})
    lora_rank: int = field(default=32, metadata={"help": "rank of the adapter's matrices"})
    dora: bool = field(default=False, metadata={"help": "weight-decomposed LoRA"})


@dataclass
class AdapterConfig(SFTConfig):
    """TRL's, with what suits an adapter and the machine, and with the rows left as they are for the collator."""

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    per_device_train_batch_size: int = 1
    bf16: bool | None = is_torch_bf16_gpu_available()
    remove_unused_columns: bool = False
    dataset_kwargs: dict | str | None = field(default_factory=lambda: {"skip_prepare_dataset": True})

    def __post_init__(self):
        rename_checkpointing(self)
        super().__post_init__()


class AdapterTrainer(VambaTrainerMixin, SFTTrainer):
    """TRL's, without weight decay where it harms, and with a model card about videos."""


def load_conversations(folder: str) -> Dataset:
    """Rows of `messages`: a question about a video file and its answer."""

    def to_messages(row):
        video = {"type": "video", "path": str(Path(folder) / row["file_name"])}
        question, answer = ({"type": "text", "text": row[name]} for name in ("question", "answer"))
        return {
            "messages": [
                {"role": "user", "content": [video, question]},
                {"role": "assistant", "content": [answer]},
            ]
        }

    rows = load_dataset("json", data_files=str(Path(folder) / "metadata.jsonl"), split="train")
    return rows.map(to_messages, remove_columns=rows.column_names)


def main(args: list[str] | None = None):
    args, training_args = TrlParser((FinetuningArguments, AdapterConfig)).parse_args_and_config(args)
    set_seed(training_args.seed)  # of the adapter, which is made before the trainer
    processor = VambaProcessor.from_pretrained(args.model)
    model = VambaForConditionalGeneration.from_pretrained(args.model, dtype="auto")
    adapter = LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules=lora_target_modules(model.config),
        use_dora=args.dora,
    )
    sampling = {"num_frames": args.num_frames, "fps": args.fps, "max_frames": args.max_frames}
    sampling = {name: value for name, value in sampling.items() if value is not None}

    trainer = AdapterTrainer(
        VambaPeftModel(model, adapter),  # trains alpha beside the adapter
        args=training_args,
        train_dataset=load_conversations(args.videos),
        processing_class=processor,
        data_collator=VambaDataCollator(
            processor,
            packing=args.pack_rows,
            on_error=args.on_error,
            processor_kwargs={"videos_kwargs": sampling},
        ),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training_args.output_dir))

    if trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
        write_model_card(training_args.output_dir, args.model, is_adapter=False, path=training_args.hub_model_id)
    return trainer


if __name__ == "__main__":
    main()
