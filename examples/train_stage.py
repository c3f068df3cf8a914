r"""Train a Vamba as published: stage 1 on captions from a Qwen2-VL checkpoint, then stage 2 on instructions.

    python examples/train_stage.py --config examples/train_stage1.yaml --model Qwen2-VL-7B-Instruct \
        --data captions.jsonl --media_folder cc12m --output_dir stage1
    python examples/train_stage.py --config examples/train_stage2.yaml --model stage1 \
        --data llava_video.json llava_onevision/*.parquet --media_folder media --output_dir stage2

Data files are `.json`, `.jsonl` or `.parquet`, with rows of one of these layouts:

- LLaVA's: `conversations` of `{"from": "human" | "gpt", "value": "<image>\nWhat ..."}`, with `image` or `video`: a
  path in the media folder, a list of these, or, for images, what a parquet file embeds. Each `<image>` or `<video>` in
  the text is the next of them.
- Captions: `image` or `video`, and `caption` or PixelProse's `vlm_caption`.

Either may bring a teacher's logits as `top_k_values` and `top_k_indices`, of shape (labels, k), for `--distill`.

All arguments of Transformers' `TrainingArguments` are arguments of this program as well, in the YAML file or behind
it. Called again with the same `--output_dir`, it goes on from the last checkpoint there. On several GPUs, start it
with `accelerate launch` or `torchrun`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features, Image, List, Value, concatenate_datasets, load_dataset
from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments
from transformers.utils import logging
from trl import TrlParser

from transformers_vamba import (
    STAGE_PARTS,
    VambaConfig,
    VambaDataCollator,
    VambaForConditionalGeneration,
    VambaProcessor,
    last_whole_checkpoint,
    train_parts,
)
from transformers_vamba.training.distillation import VambaDistillationTrainer


logger = logging.get_logger(__name__)

CAPTION_QUESTION = "Describe the {medium} in detail."
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
PART = {name: Value("string") for name in ("type", "text", "path")}
FEATURES = Features(
    messages=List({"role": Value("string"), "content": List(PART)}),
    images=List(Image()),
    top_k_values=List(List(Value("float32"))),
    top_k_indices=List(List(Value("int64"))),
)


@dataclass
class StageArguments:
    stage: int = field(metadata={"help": "1 or 2: which parts are trained"})
    model: str = field(metadata={"help": "a Qwen2-VL checkpoint to begin with, or a Vamba checkpoint to go on with"})
    data: list[str] = field(metadata={"help": "data files"})
    media_folder: str = field(default="", metadata={"help": "what the paths of images and videos are relative to"})
    streaming: bool = field(default=False, metadata={"help": "read the data files as the run goes; needs max_steps"})
    num_frames: int | None = field(default=None, metadata={"help": "frames of a video, evenly spread; 0 for `fps`"})
    fps: float | None = field(default=None, metadata={"help": "or frames a second"})
    max_frames: int | None = field(default=None, metadata={"help": "frames at most, with fps"})
    shortest_edge: int | None = field(default=None, metadata={"help": "of a frame, in pixels"})
    longest_edge: int | None = field(default=None, metadata={"help": "of a frame, in pixels"})
    pack_rows: bool = field(default=False, metadata={"help": "rows of a batch behind one another, not padded"})
    on_error: str = field(default="raise", metadata={"help": "'skip' goes on without rows that cannot be read"})
    distill: bool = field(default=False, metadata={"help": "distil from the teacher, or from the logits in the data"})
    teacher: str | None = field(default=None, metadata={"help": "a Qwen2-VL checkpoint"})
    distill_coeff: float = field(default=1.0, metadata={"help": "weight of the distillation loss"})
    dtype: str = field(default="float32", metadata={"help": "of the weights; `bf16` says in which the model computes"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager"})


def to_messages(row: dict, media_folder: str) -> dict:
    """A row of one of the published layouts as `messages`, with the images that it embeds in `images`."""
    media = {
        medium: list(given) if isinstance(given := row.get(medium) or [], (list, tuple)) else [given]
        for medium in ("image", "video")
    }
    if row.get("conversations"):
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    else:
        medium = "video" if media["video"] else "image"
        question = f"<{medium}>" + CAPTION_QUESTION.format(medium=medium)
        turns = [("user", question), ("assistant", row.get("caption") or row["vlm_caption"])]

    messages, images = [], []
    for role, text in turns:
        parts = []
        for piece in re.split("(<image>|<video>)", text):
            if piece in ("<image>", "<video>"):
                # LLaVA-Video's mark of a video is `<image>`.
                medium = "image" if piece == "<image>" and media["image"] else "video"
                if not media[medium]:
                    raise ValueError(f"more {piece} in the text than images and videos.")
                source = media[medium].pop(0)
                if isinstance(source, str):
                    parts.append({"type": medium, "text": None, "path": str(Path(media_folder) / source)})
                else:
                    parts.append({"type": medium, "text": None, "path": None})
                    images.append(source)
            elif piece.strip():
                parts.append({"type": "text", "text": piece.strip("\n"), "path": None})
        messages.append({"role": role, "content": parts})
    if media["image"] or media["video"]:
        raise ValueError("more images and videos than <image> or <video> in the text.")
    stored = {name: row.get(name) for name in ("top_k_values", "top_k_indices")}
    return {"messages": messages, "images": images, **stored}


def load_conversations(files: list[str], media_folder: str, streaming: bool, seed: int, on_error: str):
    """All files as one data set; shuffled here if it is streamed, and by the trainer otherwise."""

    def convert(row):
        try:
            return to_messages(row, media_folder)
        except (KeyError, TypeError, ValueError) as error:
            if on_error == "raise":
                raise ValueError(f"Cannot train on {row}: {error}") from error
            logger.warning(f"Cannot train on {row}: {error} The row is left out.")
            return dict.fromkeys(FEATURES)

    datasets = []
    for file in files:
        layout = "parquet" if file.endswith(".parquet") else "json"
        rows = load_dataset(layout, data_files=file, split="train", streaming=streaming)
        rows = rows.map(convert, remove_columns=rows.column_names, features=FEATURES)
        datasets.append(rows.filter(lambda messages: messages is not None, input_columns="messages"))
    dataset = concatenate_datasets(datasets)
    return dataset.shuffle(seed, buffer_size=1000) if streaming else dataset


def load_model(path: str, **kwargs) -> VambaForConditionalGeneration:
    """A Vamba, or a new one from a Qwen2-VL checkpoint."""
    config, _ = VambaConfig.get_config_dict(path)
    if config["model_type"] == "qwen2_vl":
        return VambaForConditionalGeneration.from_qwen2_vl(path, **kwargs)
    return VambaForConditionalGeneration.from_pretrained(path, **kwargs)


def main(args: list[str] | None = None) -> Trainer:
    args, training_args = TrlParser((StageArguments, TrainingArguments)).parse_args_and_config(args)
    if args.num_frames and args.fps:  # with `on_error: skip` every video would be left out for it
        raise ValueError(
            f"`num_frames` and `fps` exclude one another, got {args.num_frames} and {args.fps}: where the YAML file "
            "has the one, pass 0 for it."
        )
    training_args.remove_unused_columns = False  # the collator reads them
    # Each process makes its batches itself: Accelerate would cut those of a stream by row, and pixels have no rows.
    training_args.accelerator_config.dispatch_batches = False
    model_kwargs = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    model = load_model(args.model, **model_kwargs)
    trained = train_parts(model, STAGE_PARTS[args.stage])
    print(f"Stage {args.stage} trains {len(trained)} of {len(list(model.parameters()))} parameters.")
    processor = VambaProcessor.from_pretrained(args.model)

    videos_kwargs = {name: getattr(args, name) for name in ("num_frames", "fps", "max_frames") if getattr(args, name)}
    edges = {name: getattr(args, name) for name in ("shortest_edge", "longest_edge") if getattr(args, name)}
    if edges:
        videos_kwargs["size"] = dict(processor.video_processor.size) | edges
    trainer_class, options = Trainer, {}
    if args.distill:
        trainer_class, options = VambaDistillationTrainer, {"distill_coeff": args.distill_coeff}
        if args.teacher:
            options["teacher"] = Qwen2VLForConditionalGeneration.from_pretrained(args.teacher, **model_kwargs)
    trainer = trainer_class(
        model,
        args=training_args,
        train_dataset=load_conversations(
            args.data, args.media_folder, args.streaming, training_args.seed, args.on_error
        ),
        data_collator=VambaDataCollator(
            processor,
            packing=args.pack_rows,
            on_error=args.on_error,
            processor_kwargs={"videos_kwargs": videos_kwargs},
        ),
        processing_class=processor,
        **options,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training_args.output_dir))
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
