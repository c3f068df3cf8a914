r"""Train a Vamba as published: stage 1 on captions from a Qwen2-VL checkpoint, then stage 2 on instructions.

    python examples/train_stage.py --config examples/train_stage1.yaml --model Qwen2-VL-7B-Instruct \
        --data captions.jsonl --media_folder cc12m --output_dir stage1
    python examples/train_stage.py --config examples/train_stage2.yaml --model stage1 \
        --data llava_video.json 'llava_onevision/*.parquet' --media_folder media --output_dir stage2

Each of `--data` is a data set: a `.json`, `.jsonl` or `.parquet` file, or a pattern of such files in quotes, with rows
of one of these layouts:

- LLaVA's: `conversations` of `{"from": "human" | "gpt", "value": "<image>\nWhat ..."}`, with `image` or `video`: a
  path in the media folder, a list of these, or, for images, what a parquet file embeds. Each `<image>` or `<video>` in
  the text is the next of them.
- Captions: `image` or `video`, and `caption` or PixelProse's `vlm_caption`.

With `--samples_per_row` a row that is trained on holds several of these: so many that have images or text alone, or
all questions about one video of a data set. `--balance` mixes the data sets by the square roots of their sizes.

Either layout may bring a teacher's logits for `--distill`: `top_k_values` and `top_k_indices`, of shape (labels, k).

All arguments of Transformers' `TrainingArguments` are arguments of this program as well, in the YAML file or behind
it. Called again with the same `--output_dir`, it goes on from the last checkpoint there. On several GPUs, start it
with `accelerate launch` or `torchrun`.
"""

import random
import re
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset
from transformers import Qwen2VLForConditionalGeneration, TrainingArguments
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
from transformers_vamba.compat import rename_checkpointing
from transformers_vamba.training.distillation import VambaDistillationTrainer
from transformers_vamba.training.trainer import VambaTrainer


logger = logging.get_logger(__name__)

# One of these is asked for a caption, as in the published training, which has as many, in words of its own.
CAPTION_QUESTIONS = [
    "Describe the {medium} in detail.",
    "Give a detailed description of this {medium}.",
    "What does the {medium} show?",
    "What can be seen in this {medium}?",
    "Tell me everything that you see in the {medium}.",
    "Write a caption for this {medium}.",
    "Write a long caption that leaves nothing of the {medium} out.",
    "Explain what the {medium} is about.",
    "Put the content of this {medium} into words.",
    "How would you describe the {medium} to someone who cannot see it?",
    "Describe the main things in the {medium} and what surrounds them.",
    "Summarize what this {medium} shows.",
    "Please describe this {medium}.",
    "Look at the {medium} and describe it carefully.",
    "Which objects, people and places does the {medium} show?",
    "Give me a full account of the {medium}.",
    "Report what is visible in this {medium}.",
    "What is going on in the {medium}?",
    "Characterize the {medium} with as many details as you can.",
    "Could you describe what this {medium} contains?",
]
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
    data: list[str] = field(metadata={"help": "data sets: a file each, or a pattern of files in quotes"})
    media_folder: str = field(default="", metadata={"help": "what the paths of images and videos are relative to"})
    streaming: bool = field(default=False, metadata={"help": "read the data files as the run goes; needs max_steps"})
    balance: bool = field(default=False, metadata={"help": "mix data sets by the square roots of their sizes"})
    samples_per_row: int = field(default=1, metadata={"help": "of images or text; of a video all, if this is above 1"})
    num_frames: int | None = field(default=None, metadata={"help": "frames of a video, evenly spread; 0 for `fps`"})
    fps: float | None = field(default=None, metadata={"help": "or frames per second"})
    max_frames: int | None = field(default=None, metadata={"help": "frames at most, with fps"})
    max_patches: int | None = field(
        default=None, metadata={"help": "patches of a video at most: frames by their size"}
    )
    shortest_edge: int | None = field(default=None, metadata={"help": "of a frame, in pixels"})
    longest_edge: int | None = field(default=None, metadata={"help": "of a frame, in pixels"})
    image_edges: list[int] | None = field(default=None, metadata={"help": "shortest and longest, in pixels"})
    pack_rows: bool = field(default=False, metadata={"help": "rows of a batch behind one another, not padded"})
    on_error: str = field(default="raise", metadata={"help": "'skip' goes on without rows that cannot be read"})
    published_labels: bool = field(default=False, metadata={"help": "learn the header of an answer as well"})
    rows_weigh_equally: bool = field(default=False, metadata={"help": "mean loss per row; by default, per token"})
    distill: bool = field(default=False, metadata={"help": "distil from the teacher, or from the logits in the data"})
    teacher: str | None = field(default=None, metadata={"help": "a Qwen2-VL checkpoint"})
    distill_coeff: float = field(default=1.0, metadata={"help": "weight of the distillation loss"})
    dtype: str = field(default="float32", metadata={"help": "of the weights; `bf16` says in which the model computes"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager"})


@dataclass
class StageTrainingArguments(TrainingArguments):
    """Transformers', with either name of what it calls checkpointing."""

    def __post_init__(self):
        rename_checkpointing(self)
        super().__post_init__()


def to_messages(row: dict, media_folder: str, seed: int = 0) -> dict:
    """A row of one of the published layouts as `messages`, with the images that it embeds in `images`."""
    media = {
        medium: list(given) if isinstance(given := row.get(medium) or [], (list, tuple)) else [given]
        for medium in ("image", "video")
    }
    if row.get("conversations"):
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    else:
        medium = "video" if media["video"] else "image"
        caption = row.get("caption") or row["vlm_caption"]
        # The same for a row in every run and process of one seed.
        question = random.Random(f"{seed} {media} {caption}").choice(CAPTION_QUESTIONS)
        turns = [("user", f"<{medium}>" + question.format(medium=medium)), ("assistant", caption)]

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


class Rows(torch.utils.data.Dataset):
    """
    What is trained on: each row the `samples` of a group.

    Args:
        samples (`datasets.Dataset`): With `messages`.
        groups (`list[list[int]]`): The samples of each row, by number.
    """

    def __init__(self, samples: Dataset, groups: list[list[int]]):
        self.samples, self.groups = samples, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict:
        return {"samples": [self.samples[i] for i in self.groups[index]]}


def group_samples(samples: Dataset, samples_per_row: int) -> list[list[int]]:
    """Above one sample a row: all about one video of the data set, or so many of the others."""
    if samples_per_row == 1:
        return [[i] for i in range(len(samples))]
    by_video, others = {}, []
    for i, messages in enumerate(samples["messages"]):
        media = [part for message in messages for part in message["content"] if part["type"] != "text"]
        is_of_a_video = [part["type"] for part in media] == ["video"]
        (by_video.setdefault(media[0]["path"], []) if is_of_a_video else others).append(i)
    starts = range(0, len(others), samples_per_row)
    return [*by_video.values(), *(others[start : start + samples_per_row] for start in starts)]


def balance(groups: list[list]) -> list[list]:
    """
    As much of each data set as the square root of its size asks for, and a tenth more: 1.1 * total * share. Small ones
    are gone through several times, of large ones a part is left out.
    """
    total, roots = sum(map(len, groups)), [len(own) ** 0.5 for own in groups]
    sizes = [int(total * min(1.1 * root / sum(roots), 1)) for root in roots]
    return [[own[i % len(own)] for i in range(size)] for own, size in zip(groups, sizes)]


def load_conversations(args: StageArguments, seed: int):
    """All data sets as one; shuffled here if it is streamed, and by the trainer otherwise."""
    if args.streaming and (args.balance or args.samples_per_row > 1):
        raise ValueError(
            "`balance` and `samples_per_row` go through the data sets first, and cannot be combined with `streaming`. "
            "Leave it out, or pass `--balance False --samples_per_row 1`."
        )

    def convert(row):
        try:
            return to_messages(row, args.media_folder, seed)
        except (KeyError, TypeError, ValueError) as error:
            if args.on_error == "raise":
                raise ValueError(f"Cannot train on {row}: {error}") from error
            logger.warning(f"Cannot train on {row}: {error} The row is left out.")
            return dict.fromkeys(FEATURES)

    datasets = []
    for files in args.data:
        layout = "parquet" if files.endswith(".parquet") else "json"
        samples = load_dataset(layout, data_files=files, split="train", streaming=args.streaming)
        samples = samples.map(convert, remove_columns=samples.column_names, features=FEATURES)
        datasets.append(samples.filter(lambda messages: messages is not None, input_columns="messages"))
    samples = concatenate_datasets(datasets)
    if args.streaming:
        return samples.shuffle(seed, buffer_size=1000)
    groups, start = [], 0
    for dataset in datasets:
        own = group_samples(dataset, args.samples_per_row)
        groups.append([[start + i for i in group] for group in own])
        start += len(dataset)
    if args.balance and len(groups) > 1:
        groups = balance(groups)
    return Rows(samples, list(chain(*groups)))


def load_model(path: str, **kwargs) -> VambaForConditionalGeneration:
    """A Vamba, or a new one from a Qwen2-VL checkpoint."""
    config, _ = VambaConfig.get_config_dict(path)
    if config["model_type"] == "qwen2_vl":
        return VambaForConditionalGeneration.from_qwen2_vl(path, **kwargs)
    return VambaForConditionalGeneration.from_pretrained(path, **kwargs)


def main(args: list[str] | None = None) -> VambaTrainer:
    args, training_args = TrlParser((StageArguments, StageTrainingArguments)).parse_args_and_config(args)
    training_args.remove_unused_columns = False  # the collator reads them
    # Each process makes its batches itself: Accelerate would cut those of a stream by row, and pixels have no rows.
    training_args.accelerator_config.dispatch_batches = False
    model_kwargs = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    model = load_model(args.model, **model_kwargs)
    trained = train_parts(model, STAGE_PARTS[args.stage])
    print(f"Stage {args.stage} trains {len(trained)} of {len(list(model.parameters()))} parameters.")
    processor = VambaProcessor.from_pretrained(args.model)

    names = ("num_frames", "fps", "max_frames", "max_patches")
    videos_kwargs = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.max_patches:
        videos_kwargs.setdefault("num_frames", None)  # as many as they allow
    edges = {name: getattr(args, name) for name in ("shortest_edge", "longest_edge") if getattr(args, name)}
    if edges:
        videos_kwargs["size"] = dict(processor.video_processor.size) | edges
    trainer_class, options = VambaTrainer, {}
    if args.distill:
        trainer_class, options = VambaDistillationTrainer, {"distill_coeff": args.distill_coeff}
        if args.teacher:
            options["teacher"] = Qwen2VLForConditionalGeneration.from_pretrained(args.teacher, **model_kwargs)
    trainer = trainer_class(
        model,
        args=training_args,
        train_dataset=load_conversations(args, training_args.seed),
        data_collator=VambaDataCollator(
            processor,
            packing=args.pack_rows,
            on_error=args.on_error,
            processor_kwargs={"videos_kwargs": videos_kwargs},
            published_labels=args.published_labels,
            image_edges=tuple(args.image_edges) if args.image_edges else None,
        ),
        processing_class=processor,
        rows_weigh_equally=args.rows_weigh_equally,
        **options,
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(training_args.output_dir))
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
