# SPDX-License-Identifier: Apache-2.0
"""Batches for training from conversations with images and videos: decoded, sampled, masked, padded or packed."""

import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import load_image
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..processing_vamba import VambaProcessor, check_modality_kwargs
from ..video_processing_vamba import VambaVideoProcessor


logger = logging.get_logger(__name__)

# Where `apply_chat_template` finds an image or a video in the part of a message that stands for it.
SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
# What a part of each type may hold; `index` and `text` are what data sets give to all parts.
READ = {"text": {"text"}} | {medium: {"index", "text", *sources} for medium, sources in SOURCES.items()}

# What stands for a medium that is prepared already, while the text around it is.
STAND_INS = {"image": Image.new("RGB", (56, 56)), "video": np.zeros((2, 56, 56, 3), np.uint8)}

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Rows in errors: what they hold, but no whole file.
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 8, 200, 100


@dataclass
class VambaDataCollator:
    """
    Makes a training batch of conversations. For `Trainer` with `remove_unused_columns=False`, for TRL's `SFTTrainer`
    with `dataset_kwargs={"skip_prepare_dataset": True}` as well, and for data sets that are streamed with
    `accelerator_config={"dispatch_batches": False}`: Accelerate would cut their batches by row, and pixels have none.

    A row is a dictionary with `messages`, in the form that `apply_chat_template` takes, or with `samples`, a list of
    such rows. The images and videos stand in the messages (`{"type": "video", "path": "movie.mp4"}`), or in the
    columns `images` and `videos`, lists, from which the parts without one (`{"type": "video"}`) take theirs in order.
    Files are read here, so with `dataloader_num_workers` in the background. Images and videos that consecutive rows
    have in common are read, and encoded by the model, once.

    Only what the assistant says becomes `labels`: what a chat template marks by `{% generation %}`, or, without such
    marks, what it writes between the prompt of a turn of the assistant and the end of that turn. Of a row with
    `learn_from`, a number, the answers before that message are not learned, and marks are not looked at.

    Args:
        processor ([`VambaProcessor`]):
            Reads, samples and tokenizes.
        packing (`bool`, *optional*, defaults to `False`):
            Put the rows of a batch into one, one after another and kept apart, instead of padding them.
        on_error (`str`, *optional*, defaults to `"raise"`):
            What to do with a row that cannot be prepared: a file is missing or is no image or video, or the assistant
            says nothing. `"raise"` stops the run. `"skip"` warns, and puts a row of one token without a label in its
            place, so that predictions keep to the data; with `packing` it leaves the row out.
        processor_kwargs (`dict`, *optional*):
            Arguments of the processor, such as `{"videos_kwargs": {"num_frames": 64}}`, evenly spread, or
            `{"videos_kwargs": {"fps": 1.0, "max_frames": 512}}`.
        published_labels (`bool`, *optional*, defaults to `False`):
            Labels as the published code has them: the header before an answer too, and no newline after it, so
            `\\n<|im_start|>assistant\\n...<|im_end|>`. Teacher's logits that it has stored are at these tokens. By
            default the header is left out: every prompt brings it, so the model need not learn to write it, and its
            four tokens would outweigh an answer of one word.
        image_edges (`tuple[int, int]`, *optional*):
            Least shorter edge and greatest longer edge of an image, in pixels, as `size` is for the frames of a video.

    A batch has these entries, the last ones where there are any media:

    - **input_ids**, **labels**, **mm_token_type_ids** -- int64 of shape (rows, tokens), with `packing` (1, tokens of
      all rows). Labels are -100 where there is nothing to learn, and at the first token of each row.
    - **attention_mask** -- int64 of shape (rows, tokens), padded on the right. Not with `packing`.
    - **position_ids** -- int64 of shape (1, tokens of all rows), starting at 0 with each row. With `packing` only.
    - **pixel_values**, **image_grid_thw**, **pixel_values_videos**, **video_grid_thw** -- as the processor gives them.
    - **image_sample_ids**, **video_sample_ids** -- int64 of shape (images,) and (videos,): the row that each belongs
      to. With `packing`, its place among the rows that were put into one. Where rows share one, of shape (..., 2): the
      first and the last row that it belongs to.
    - **top_k_values**, **top_k_indices** -- of shape (labels of all rows, k), where the rows have these columns, each
      of shape (labels of the row, k): a teacher's logits, for [`~training.distillation.VambaDistillationTrainer`].

    Raises:
        `ValueError`: for a row that cannot be prepared; with `on_error="skip"` only as long as there has been none
            that can be, as nothing would be learned from data that are all wrong.
    """

    processor: VambaProcessor
    packing: bool = False
    on_error: str = "raise"
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    published_labels: bool = False
    image_edges: tuple[int, int] | None = None
    _has_read_a_row: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be 'raise' or 'skip', got {self.on_error!r}.")
        check_modality_kwargs(self.processor_kwargs)
        # What is wrong for every row is no matter of a row. The processor takes the arguments of a modality outside of
        # its dictionary as well.
        VambaVideoProcessor.choose_sampling(
            {**self.processor_kwargs, **self.processor_kwargs.get("videos_kwargs", {})}
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [sample for row in rows for sample in row.get("samples") or [row]]
        samples, last_error = self._prepare_rows(rows)
        if any(samples):
            self._has_read_a_row = True
        elif not self._has_read_a_row:
            raise ValueError(
                f"None of the {len(rows)} rows of the first batch of this process can be trained on. The last one: "
                f"{last_error}"
            ) from last_error
        if self.packing:
            samples = [sample for sample in samples if sample] or [self._blank_row()]
        return self._collate([sample or self._blank_row() for sample in samples])

    def _prepare_rows(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any] | None], Exception | None]:
        """What is made of each row, `None` where that fails, and the last error of these."""
        samples: list[dict[str, Any] | None] = []
        last_error = None
        first: dict[str, Any] | None = None
        first_media: list = []  # the row whose images and videos those after it may share
        for row in rows:
            try:
                messages = _fill_in_media(row)
                media = _list_media(messages)
                is_sharing = first is not None and _are_same(media, first_media)
                samples.append(self._prepare_row(row, messages, is_sharing))
            except Exception as error:  # a broken file raises whatever its decoder does
                message = f"Cannot train on a row with {_short.repr(row)}: {error}"
                if self.on_error == "raise":
                    raise ValueError(message) from error
                logger.warning(f"{message} The row is left out.")
                samples.append(None)
                first, last_error = None, error
            else:
                if is_sharing and first is not None:
                    first["num_sharing"] = first.get("num_sharing", 0) + 1
                elif media:
                    first, first_media = samples[-1], media
                else:
                    first = None
        return samples, last_error

    def _prepare_row(self, row: dict[str, Any], messages: list[dict[str, Any]], is_sharing: bool) -> dict[str, Any]:
        """
        The inputs of one row, of shape (1, tokens) those of the text; without pixels if it shares those of the row
        before it.
        """
        learn_from = row.get("learn_from") or 0
        processor_kwargs = self.processor_kwargs
        if is_sharing:
            sampling = ("num_frames", "fps", "min_frames", "max_frames", "videos_kwargs")
            processor_kwargs = {name: value for name, value in processor_kwargs.items() if name not in sampling}
            processor_kwargs["videos_kwargs"] = {"do_sample_frames": False}
        for part in _media_parts(messages):
            if is_sharing:
                _replace_source(part, STAND_INS[part["type"]])
            elif part["type"] == "image" and self.image_edges is not None:
                _replace_source(part, self._bring_within(self.image_edges, load_image(_source(part))))
        inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={**processor_kwargs, "return_offsets_mapping": True},
        )
        if is_sharing:
            for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
                inputs.pop(name, None)
        is_said = self._mark_what_is_learned(inputs, messages, learn_from)
        inputs["labels"] = inputs["input_ids"].masked_fill(~is_said, -100)

        for name in ("top_k_values", "top_k_indices"):
            if row.get(name) is not None:
                inputs[name] = torch.as_tensor(row[name])
                if len(inputs[name]) != is_said.sum():
                    raise ValueError(
                        f"`{name}` has {len(inputs[name])} entries for {is_said.sum()} labels. The published code "
                        "stores those of other labels: `published_labels=True` makes them."
                    )
        return inputs

    def _mark_what_is_learned(
        self, inputs: dict[str, torch.Tensor], messages: list[dict[str, Any]], learn_from: int
    ) -> torch.Tensor:
        """The tokens of one row that are learned, bool of shape (1, tokens)."""
        begins, ends = inputs["offset_mapping"].unbind(-1)
        is_said = torch.zeros_like(begins, dtype=torch.bool)
        has_marks = GENERATION_MARK.search(str(self.processor.chat_template)) is not None
        if has_marks and not self.published_labels and not learn_from:
            spans = self._find_marks(messages)
        else:
            spans = self._find_words_of_assistant(messages, learn_from)
        for begin, end in spans:
            is_said |= (begins < end) & (ends > begin)
        is_said[:, 0] = False
        if is_said.any():
            return is_said
        max_length = (self.processor_kwargs | self.processor_kwargs.get("text_kwargs", {})).get("max_length")
        if is_said.shape[1] == max_length:
            raise ValueError(
                f"`max_length={max_length}` cuts all off that the assistant says in it. Raise it in the "
                "`processor_kwargs`, or shorten the prompt."
            )
        raise ValueError("the assistant says nothing in it.")

    def _bring_within(self, edges: tuple[int, int], image: Image.Image) -> Image.Image:
        size = dict(zip(("shortest_edge", "longest_edge"), edges))
        height, width = self.processor.video_processor.get_resized_sizes(image.height, image.width, size=size)[0]
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _find_marks(self, messages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """
        Begin and end of what the chat template marks, in characters of the text that is tokenized. (In Transformers
        5.17 the processor's own `return_assistant_tokens_mask` does not see that the placeholders are gone.)
        """
        template = self.processor.chat_template
        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=template["default"] if isinstance(template, dict) else template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        for begin, end in spans:
            before, with_it = (self.processor.remove_placeholders(text[:place]) for place in (begin, end))
            yield len(before), len(with_it)

    def _find_words_of_assistant(self, messages: list[dict[str, Any]], learn_from: int) -> Iterator[tuple[int, int]]:
        """Begin and end of what is learned of each turn, in characters of the text that is tokenized."""

        def render(messages, **kwargs):
            return self.processor.remove_placeholders(self.processor.apply_chat_template(messages, **kwargs))

        conversation = render(messages)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < learn_from:
                continue
            prompt = render(messages[:i], add_generation_prompt=True) if i else ""
            until_here = render(messages[: i + 1])
            if not (prompt and until_here.startswith(prompt) and conversation.startswith(until_here)):
                raise ValueError(
                    f"the chat template does not write message {i}, of the assistant, after the prompt that it makes "
                    "of the messages before it, so what the assistant says cannot be told from the rest."
                )
            if not self.published_labels:
                yield len(prompt), len(until_here)
                continue
            end_of_turn = self.processor.tokenizer.eos_token
            begin, end = (text.rfind(end_of_turn) + len(end_of_turn) for text in (prompt, until_here))
            if not len(end_of_turn) <= begin < len(prompt) < end:
                raise ValueError(
                    f"`published_labels` needs a chat template that ends every turn by {end_of_turn!r}, and message "
                    f"{i} or the one before it does not."
                )
            yield begin, end

    def _blank_row(self) -> dict[str, torch.Tensor]:
        """A row that nothing is learned from."""
        input_ids = torch.tensor([[self.processor.tokenizer.pad_token_id]])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.full_like(input_ids, -100),
            "mm_token_type_ids": torch.zeros_like(input_ids),
        }

    def _collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The batch of what the rows have become."""
        batch = self._pack(samples) if self.packing else self._pad(samples)
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if media := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(media)
        for medium in SOURCES:
            owners = [
                (i, i + sample.get("num_sharing", 0))
                for i, sample in enumerate(samples)
                for _ in sample.get(f"{medium}_grid_thw", ())
            ]
            if owners:
                is_shared = any(first != last for first, last in owners)
                batch[f"{medium}_sample_ids"] = torch.tensor(owners if is_shared else [first for first, _ in owners])
        labelled = [sample for sample in samples if (sample["labels"] != -100).any()]
        for name in ("top_k_values", "top_k_indices"):
            if stored := [sample[name] for sample in labelled if name in sample]:
                if len(stored) < len(labelled):
                    raise ValueError(f"{len(stored)} of the {len(labelled)} rows of a batch have `{name}`: all must.")
                batch[name] = torch.cat(stored)
        return batch

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
            message["content"] = [_fill_in_part(_without_none(part), columns) for part in message["content"]]
        messages.append(message)
    for medium, left in columns.items():
        if num_left := len(list(left)):
            raise ValueError(f"the column `{medium}s` has {num_left} {medium}s more than the messages.")
    return messages


def _fill_in_part(part: dict[str, Any], columns: dict[str, Iterator]) -> dict[str, Any]:
    """One part of a message. What nobody would read of it is an error: it would be trained on without that."""
    if part.get("type") == "image_url" and part.keys() == {"type", "image_url"}:  # OpenAI's
        url = part["image_url"]
        part = {"type": "image", "url": url["url"] if isinstance(url, dict) else url}
    medium = part.get("type")
    if medium not in READ:
        raise ValueError(f"the `type` of a part of a message must be one of {tuple(READ)}, got {medium!r}.")
    if unread := sorted(part.keys() - READ[medium] - {"type"}):
        raise ValueError(
            f"nothing reads {unread} of a part of type {medium!r}. How files are read and sampled is said by "
            "`processor_kwargs`, for all rows."
        )
    if medium == "text":
        return part
    if not any(name in part for name in SOURCES[medium]):
        part[medium] = next(columns[medium], None)
        if part[medium] is None:
            raise ValueError(f"the messages have more {medium}s than the column `{medium}s`.")
    if isinstance(source := _source(part), dict):
        raise ValueError(
            f"{'an' if medium == 'image' else 'a'} {medium} is a dictionary of {sorted(source)}, as a data set has it "
            f"that does not decode. Cast its column to `datasets.{medium.capitalize()}()`, with `decode=True`"
            f"{'' if medium == 'image' else ', or give the path'}."
        )
    return part


def _without_none(entries: dict[str, Any]) -> dict[str, Any]:
    """Arrow tables give every dictionary of a list the keys of all of them, with `None` for those that it lacks."""
    return {name: value for name, value in entries.items() if value is not None}


def _media_parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parts that stand for an image or a video, in order."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from (part for part in message["content"] if part["type"] in SOURCES)


def _source(part: dict[str, Any]):
    return next(part[name] for name in SOURCES[part["type"]] if name in part)


def _replace_source(part: dict[str, Any], source) -> None:
    for name in SOURCES[part["type"]]:
        part.pop(name, None)
    part[part["type"]] = source


def _list_media(messages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Type and source of each image and video."""
    return [(part["type"], _source(part)) for part in _media_parts(messages)]


def _are_same(media: list[tuple[str, Any]], others: list[tuple[str, Any]]) -> bool:
    """Whether two rows have the same files, or objects, in the same order."""
    return len(media) == len(others) and all(
        medium == other and (source is other_source or (isinstance(source, str) and source == other_source))
        for (medium, source), (other, other_source) in zip(media, others)
    )
