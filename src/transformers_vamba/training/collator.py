# SPDX-License-Identifier: Apache-2.0
"""Batches for training from conversations with images and videos: decoded, sampled, masked, padded or packed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ..processing_vamba import VambaProcessor


logger = logging.get_logger(__name__)

# Where `apply_chat_template` finds an image or a video in the part of a message that stands for it.
SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
PART_TYPES = ("text", "image", "image_url", "video")


@dataclass
class VambaDataCollator:
    """
    Makes a training batch of conversations. For `Trainer` with `remove_unused_columns=False`, for TRL's `SFTTrainer`
    with `dataset_kwargs={"skip_prepare_dataset": True}` as well, and for data sets that are streamed with
    `accelerator_config={"dispatch_batches": False}`: Accelerate would cut their batches by row, and pixels have none.

    A row is a dictionary with `messages`, in the form that `apply_chat_template` takes. The images and videos stand in
    the messages (`{"type": "video", "path": "movie.mp4"}`), or in the columns `images` and `videos`, lists, from which
    the parts without one (`{"type": "video"}`) take theirs in order. Files are read here, so with
    `dataloader_num_workers` in the background. Only what the assistant says becomes `labels`: what the chat template
    writes between the prompt of a turn of the assistant and the end of that turn.

    Args:
        processor ([`VambaProcessor`]):
            Reads, samples and tokenizes.
        packing (`bool`, *optional*, defaults to `False`):
            Put the rows of a batch into one, behind one another and kept apart, instead of padding them.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be prepared: a file is missing or is no image or video, or the assistant
            says nothing. `"raise"` stops the run, `"skip"` leaves the row out, with a warning. A batch that is left
            without any row takes the last good row of an earlier batch once more, so that no process waits for it.
        processor_kwargs (`dict`, *optional*):
            Arguments of the processor, such as `{"videos_kwargs": {"num_frames": 64}}`, evenly spread, or
            `{"videos_kwargs": {"fps": 1.0, "max_frames": 512}}`.

    A batch has these entries, the last ones where there are any media:

    - **input_ids**, **labels**, **mm_token_type_ids** -- int64 of shape (rows, tokens), with `packing` (1, tokens of
      all rows). Labels are -100 where there is nothing to learn, and at the first token of each row.
    - **attention_mask** -- int64 of shape (rows, tokens), padded on the right. Not with `packing`.
    - **position_ids** -- int64 of shape (1, tokens of all rows), starting at 0 with each row. With `packing` only.
    - **pixel_values**, **image_grid_thw**, **pixel_values_videos**, **video_grid_thw** -- as the processor gives them.
    - **image_sample_ids**, **video_sample_ids** -- int64 of shape (images,) and (videos,): the row that each belongs
      to. With `packing`, its place among the rows that were put into one.
    - **top_k_values**, **top_k_indices** -- of shape (labels of all rows, k), where the rows have these columns, each
      of shape (labels of the row, k): a teacher's logits, for [`~training.distillation.VambaDistillationTrainer`].

    Raises:
        `ValueError`: for a row that cannot be prepared, and for a batch without a row while there is no earlier one.
    """

    processor: VambaProcessor
    packing: bool = False
    on_error: str = "raise"
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    _last_row: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be 'raise' or 'skip', got {self.on_error!r}.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        samples, last_error = self._prepare_rows(rows)
        if not samples:
            if self._last_row is None:
                raise ValueError(
                    f"None of the {len(rows)} rows of the first batch of this process can be trained on, so there is "
                    f"no row to take in their place. The last one: {last_error}"
                ) from last_error
            logger.warning("A batch is left without rows, and takes the last good row of an earlier one once more.")
            samples = [self._prepare_row(self._last_row)]
        batch = self._pack(samples) if self.packing else self._pad(samples)
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if media := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(media)
        for medium in ("image", "video"):
            counts = torch.tensor([len(sample.get(f"{medium}_grid_thw", ())) for sample in samples])
            if counts.any():
                batch[f"{medium}_sample_ids"] = torch.arange(len(samples)).repeat_interleave(counts)
        for name in ("top_k_values", "top_k_indices"):
            if stored := [sample[name] for sample in samples if name in sample]:
                if len(stored) < len(samples):
                    raise ValueError(f"{len(stored)} of the {len(samples)} rows of a batch have `{name}`: all must.")
                batch[name] = torch.cat(stored)
        return batch

    def _prepare_rows(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, torch.Tensor]], Exception | None]:
        """The rows that can be trained on, and the last error of those that cannot."""
        samples, last_error = [], None
        for row in rows:
            try:
                samples.append(self._prepare_row(row))
            except Exception as error:  # a broken file raises whatever its decoder does
                message = f"Cannot train on a row with {_describe(row)}: {error}"
                if self.on_error == "raise":
                    raise ValueError(message) from error
                logger.warning(f"{message} The row is left out.")
                last_error = error
            else:
                self._last_row = row
        return samples, last_error

    def _prepare_row(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The inputs of one row, of shape (1, tokens) those of the text."""
        messages = _fill_in_media(row)
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**self.processor_kwargs, "return_offsets_mapping": True},
        )
        begins, ends = inputs["offset_mapping"].unbind(-1)
        is_said = torch.zeros_like(begins, dtype=torch.bool)
        for begin, end in self._find_words_of_assistant(messages):
            is_said |= (begins < end) & (ends > begin)
        is_said[:, 0] = False
        if not is_said.any():
            raise ValueError("the assistant says nothing in it.")
        inputs["labels"] = inputs["input_ids"].masked_fill(~is_said, -100)

        for name in ("top_k_values", "top_k_indices"):
            if row.get(name) is not None:
                inputs[name] = torch.as_tensor(row[name])
                if len(inputs[name]) != is_said.sum():
                    raise ValueError(f"`{name}` has {len(inputs[name])} entries for {is_said.sum()} labels.")
        return inputs

    def _find_words_of_assistant(self, messages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """Begin and end of each turn of the assistant, in characters of the text that is tokenized."""

        def render(messages, **kwargs):
            text = self.processor.apply_chat_template(messages, **kwargs)
            return text.replace(self.processor.image_token, "").replace(self.processor.video_token, "")

        conversation = render(messages)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(messages[:i], add_generation_prompt=True) if i else ""
            until_here = render(messages[: i + 1])
            if not (prompt and until_here.startswith(prompt) and conversation.startswith(until_here)):
                raise ValueError(
                    f"the chat template does not write message {i}, of the assistant, behind the prompt that it makes "
                    "of the messages before it, so what the assistant says cannot be told from the rest."
                )
            yield len(prompt), len(until_here)

    def _pad(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        fillers = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": -100,
            "mm_token_type_ids": 0,
        }
        return {
            name: pad_sequence([sample[name][0] for sample in samples], batch_first=True, padding_value=filler)
            for name, filler in fillers.items()
        }

    def _pack(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "mm_token_type_ids")
        batch = {name: torch.cat([sample[name] for sample in samples], dim=1) for name in names}
        batch["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
        return batch


def _fill_in_media(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, with the media of its columns in their places."""
    if "messages" not in row:
        raise ValueError(f"a row must have `messages`, got {sorted(row)}.")
    columns = {}
    for medium in SOURCES:
        column = [] if row.get(f"{medium}s") is None else row[f"{medium}s"]
        if not isinstance(column, (list, tuple)):
            raise ValueError(f"the column `{medium}s` must be a list of {medium}s, got {type(column).__name__}.")
        columns[medium] = iter(column)
    messages = []
    for message in row["messages"]:
        message = _without_none(message)
        if not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must have `role` and `content`, got {sorted(message)}.")
        if not isinstance(message["content"], str):
            message["content"] = parts = [_without_none(part) for part in message["content"]]
            for part in parts:
                _check_part(part)
                medium = part["type"]
                if medium in columns and not any(source in part for source in SOURCES[medium]):
                    part[medium] = next(columns[medium], None)
                    if part[medium] is None:
                        raise ValueError(f"the messages have more {medium}s than the column `{medium}s`.")
        messages.append(message)
    for medium, left in columns.items():
        if num_left := len(list(left)):
            raise ValueError(f"the column `{medium}s` has {num_left} {medium}s more than the messages.")
    return messages


def _check_part(part: dict[str, Any]) -> None:
    """What is not read would be left out without a word, and the row trained on without it."""
    if part.get("type") not in PART_TYPES:
        raise ValueError(f"the `type` of a part of a message must be one of {PART_TYPES}, got {part.get('type')!r}.")
    if part["type"] in SOURCES:
        # `index` and `text` are what data sets give to all parts.
        if unread := sorted(part.keys() - {"type", "index", "text", *SOURCES[part["type"]]}):
            logger.warning_once(
                f"Nothing reads {unread} of a part of type {part['type']!r}: how files are read and sampled is said "
                "by `processor_kwargs`, for all rows."
            )


def _without_none(entries: dict[str, Any]) -> dict[str, Any]:
    """Arrow tables give every dictionary of a list the keys of all of them, with `None` for those that it lacks."""
    return {name: value for name, value in entries.items() if value is not None}


def _describe(row: dict[str, Any]) -> str:
    """What an error says of a row: its images and videos, or the beginning of its text."""
    try:
        parts = [part for message in _fill_in_media(row) for part in message["content"] if isinstance(part, dict)]
        media = [value for part in parts if part["type"] != "text" for name, value in part.items() if name != "type"]
    except Exception:  # as above: this describes what is wrong already
        media = []
    return ", ".join(repr(medium)[:200] for medium in media) if media else f"the entries {str(row)[:200]}"
