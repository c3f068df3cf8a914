# SPDX-License-Identifier: Apache-2.0
"""Processor class for Vamba."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.video_utils import VideoInput

from .messages import plain_conversation
from .video.reading import check_frame_files, flatten_videos, normalize_videos
from .video.segments import iter_video_segments
from .video_processing_vamba import VambaVideoProcessor


MEDIUM_TYPE_IDS = {"image": 1, "video": 2}

# Qwen2-VL's, in which Vamba was trained: for a folder that has none, as older versions of Transformers saved it.
CHAT_TEMPLATE = """\
{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}\
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}\
{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
{% set image_count.value = image_count.value + 1 %}\
{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}\
{% set video_count.value = video_count.value + 1 %}\
{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}\
{% endfor %}<|im_end|>
{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


MODALITY_KWARGS = ("text_kwargs", "images_kwargs", "videos_kwargs")


def check_modality_kwargs(kwargs: dict) -> None:
    """Raises a `TypeError` unless the arguments of each modality, if they are given, are a dictionary."""
    for name in MODALITY_KWARGS:
        if name in kwargs and not isinstance(kwargs[name], dict):
            raise TypeError(
                f"`{name}` must be a dictionary of arguments, got {kwargs[name]!r}. Leave it out, or pass {{}}, where "
                "there are none."
            )


class VambaProcessor(Qwen2VLProcessor):
    r"""
    Constructs a Vamba processor: Qwen2-VL's, except that no token stands for the pixels of an image or a video.

    Vamba reads images and videos by cross-attention, so the placeholder of each, `<|image_pad|>` or `<|video_pad|>`,
    is taken out of the text and `<|vision_start|><|vision_end|>` remains. Which row and which place an image or a
    video has is returned with the text. Without a chat template of its own it takes the tokenizer's, or Qwen2-VL's.
    """

    vision_start_token = "<|vision_start|>"
    vision_end_token = "<|vision_end|>"

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        if video_processor is None or isinstance(video_processor, Qwen2VLVideoProcessor):
            # The published checkpoint and Qwen2-VL's describe only an image processor, and Transformers makes
            # Qwen2-VL's video processor from that: it samples no frames and takes `size` for numbers of pixels.
            shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
            video_processor = VambaVideoProcessor(
                **{name: getattr(image_processor, name) for name in shared},
                min_pixels=image_processor.size["shortest_edge"],
                max_pixels=image_processor.size["longest_edge"],
            )
        if tokenizer is not None:
            # Pipelines pad by themselves, and ask the tokenizer for the side.
            tokenizer.padding_side = "left"
        chat_template = chat_template or getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Prepares text, images and videos for the model.

        Args:
            images (*optional*):
                One image, a list of images in the order of the placeholders, or a list of images for each row.
            text (`str` or `list[str]`, *optional*):
                The prompts, with a placeholder for each image and video. Without it, only the pixels are returned.
            videos (*optional*):
                One video, a list of videos in the order of the placeholders, or a list of videos for each row. See
                [`~video.reading.normalize_video`] for the forms of a video.
            **kwargs:
                Arguments of the tokenizer, the image processor and the video processor. `padding_side` is `"left"`,
                for generation, unless given here: the tokenizer's own is not read, as saving keeps the last one used.

        Returns:
            `BatchFeature`:

            - **input_ids**, **attention_mask** -- int64 of shape (rows, tokens), padded on the left by default.
            - **mm_token_type_ids** -- int64 of shape (rows, tokens), unless `return_mm_token_type_ids=False`: 1 at the
              `<|vision_start|>` of each image, 2 at that of each video, 0 elsewhere. A row in which an image or a
              video has no `<|vision_start|><|vision_end|>` of its own is 0 everywhere.
            - **pixel_values**, **image_grid_thw**, **pixel_values_videos**, **video_grid_thw** -- if there are
              images or videos, as Qwen2-VL's.
            - **video_timestamps_ms** -- int64 of shape (temporal patches of all videos,), with
              `return_video_timestamps=True`: when each is shown, see [`VambaVideoProcessor.preprocess`].
            - **image_sample_ids**, **video_sample_ids** -- int64 of shape (images,) and (videos,): the row that each
              belongs to, if `mm_token_type_ids` does not say it.

        Raises:
            `ValueError`: when the images or videos do not match the placeholders, when truncation cut one off, or when
                a row has a video before an image and their order cannot be marked.
        """
        check_modality_kwargs(kwargs)
        text_kwargs = dict(kwargs.pop("text_kwargs", None) or {})

        def pop_text_kwarg(name, default):
            return kwargs.pop(name, text_kwargs.pop(name, default))

        return_mm_token_type_ids = pop_text_kwarg("return_mm_token_type_ids", True)
        return_text_replacement_offsets = pop_text_kwarg("return_text_replacement_offsets", False)
        padding_side = pop_text_kwarg("padding_side", "left")
        if text_kwargs:
            kwargs["text_kwargs"] = text_kwargs
        text = [text] if isinstance(text, str) else text
        do_sample_frames = kwargs.get("do_sample_frames", (kwargs.get("videos_kwargs") or {}).get("do_sample_frames"))
        check_frame_files(videos, do_sample_frames)
        outputs = super().__call__(
            images=images,
            text=text,
            videos=videos,
            return_mm_token_type_ids=False,
            return_text_replacement_offsets=True,
            padding_side=padding_side,
            **kwargs,
        )
        if text is None:
            return outputs

        offsets = outputs["text_replacement_offsets"]
        if not return_text_replacement_offsets:
            del outputs["text_replacement_offsets"]
        media = [[replacement["type"] for replacement in row] for row in offsets]
        is_marked = False
        if return_mm_token_type_ids:
            marks = outputs["mm_token_type_ids"] = self._mark_media(text, outputs["input_ids"], media)
            is_marked = sum(np.count_nonzero(row) for row in marks) == sum(map(len, media))
        for medium in MEDIUM_TYPE_IDS:
            sample_ids = [row for row, row_media in enumerate(media) for kind in row_media if kind == medium]
            # Left out if the marks say the same: trainers hand on what they know of Qwen2-VL.
            if sample_ids and not is_marked:
                sample_ids = torch.tensor(sample_ids)
                as_numpy = isinstance(outputs["input_ids"], np.ndarray)
                outputs[f"{medium}_sample_ids"] = sample_ids.numpy() if as_numpy else sample_ids
        return outputs

    def prepare_question(self, question: str | list) -> BatchFeature:
        """
        Prepares questions about videos that are in a cache already: the text says where each video stands, and brings
        no pixels.

            inputs = processor.prepare_question("What happens first?").to(model.device)
            model.generate(**inputs, cache=cache.fork())

        Args:
            question (`str`, a conversation, or a `list` of these):
                A question about one video; or messages with a part `{"type": "video"}` where each video stands. What
                such a part names is not opened.

        Returns:
            `BatchFeature`: **input_ids**, **attention_mask** and **mm_token_type_ids**, int64 of shape (rows, tokens),
            padded on the left.

        Raises:
            `TypeError`: for what is neither a string nor a list.
            `ValueError`: for no question, and for a conversation without an image or a video.
        """
        if not isinstance(question, (str, list, tuple)):
            raise TypeError(f"`question` must be a string, a conversation, or a list of these, got {question!r}.")
        is_conversation = isinstance(question, (list, tuple)) and question and isinstance(question[0], Mapping)
        questions = [question] if isinstance(question, str) or is_conversation else list(question)
        if not questions:
            raise ValueError("Expected a question, a conversation, or a list of these, got an empty list.")
        conversations = [
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": each}]}]
            if isinstance(each, str)
            else each
            for each in questions
        ]
        prompts = self.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        texts = [self.remove_placeholders(prompt) for prompt in prompts]
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            if text == prompt:
                raise ValueError(
                    f"Question {row} is a conversation without an image or a video. Put a part {{'type': 'video'}} "
                    "where the video of the cache stands."
                )
        return self(text=texts, padding=True, return_tensors="pt")

    def remove_placeholders(self, text: str) -> str:
        """What of a prompt is tokenized: without what stands for the pixels of images and videos."""
        return text.replace(self.image_token, "").replace(self.video_token, "")

    def iter_video_segments(
        self,
        video,
        num_frames: int | None = None,
        fps: float | None = None,
        segment_frames: int = 64,
        progress: bool | None = None,
        live: bool = False,
        **videos_kwargs,
    ) -> Iterator[BatchFeature]:
        """
        Prepares one video, however long, a segment at a time, for [`~VambaForConditionalGeneration.encode_video`]:

            cache = None
            for segment in processor.iter_video_segments("movie.mp4", fps=1.0):
                cache = model.encode_video(**segment, cache=cache)

        The segments, one after another, are what `processor(videos=[video])` gives at once. A background thread
        decodes two of them ahead; no more than four are in memory at a time, whatever the length.

        Args:
            video:
                A video in any form that [`~video.reading.normalize_video`] takes. A pipe, and what else cannot be
                sought, is brought to a temporary file first, unless it is `live`.
            num_frames (`int`, *optional*), fps (`float`, *optional*):
                How many frames to sample, or how many a second. By default as the video processor is set.
            segment_frames (`int`, *optional*, defaults to 64):
                Greatest number of sampled frames in a segment, a multiple of `temporal_patch_size`.
            progress (`bool`, *optional*):
                Whether to show a progress bar. By default only if stderr is a terminal.
            live (`bool`, *optional*, defaults to `False`):
                Whether to read a file, pipe or URL as it comes, such as a camera's, sampled by `fps`. The frames are
                those of the whole file if frames come at a constant rate, and otherwise if the container says
                their times without rounding.
            **videos_kwargs:
                Further arguments of the video processor.

        Yields:
            `BatchFeature`: `pixel_values_videos`, `video_grid_thw` and `video_timestamps_ms` of the segment; and
            `num_remaining_tokens`, the tokens of the segments to come, unless the source is live. `encode_video` sizes
            its cache by it. Leaving off early waits for the frame in progress, but no longer than a second, as a live
            source may have stalled.

        Raises:
            `FileNotFoundError`: for a path without a file.
            `ValueError`: for what cannot be read as a video, is truncated (after the segments that are there), or is
                sampled in a way that it does not allow.
        """
        sampling = {"num_frames": num_frames, "fps": fps}
        videos_kwargs |= {name: value for name, value in sampling.items() if value is not None}
        return iter_video_segments(self.video_processor, video, segment_frames, progress, live, **videos_kwargs)

    def _mark_media(self, text: list[str], input_ids, media: list[list[str]]):
        """
        Marks the `<|vision_start|>` of each image and video.

        Args:
            text (`list[str]`):
                The prompts with their placeholders.
            input_ids (`list[list[int]]`, `torch.Tensor` or `np.ndarray` of shape (rows, tokens)):
                The tokens of the prompts without their placeholders.
            media (`list[list[str]]`):
                For each row `"image"` or `"video"` for each placeholder.

        Returns:
            The marks, of the type and shape of `input_ids`.
        """
        start, end, image, video = map(
            re.escape, (self.vision_start_token, self.vision_end_token, self.image_token, self.video_token)
        )
        # Each match is one `<|vision_start|><|vision_end|>` in the tokens: of a medium, if it holds one placeholder.
        wrapper = re.compile(f"{start}((?:{image}|{video})*){end}")
        type_ids = {"": 0, self.image_token: MEDIUM_TYPE_IDS["image"], self.video_token: MEDIUM_TYPE_IDS["video"]}
        start_id, end_id = self.tokenizer.convert_tokens_to_ids([self.vision_start_token, self.vision_end_token])

        rows = input_ids if isinstance(input_ids, list) else input_ids.tolist()
        marks = []
        for row, (sample, ids, row_media) in enumerate(zip(text, rows, media, strict=True)):
            starts = [i for i in range(len(ids) - 1) if ids[i] == start_id and ids[i + 1] == end_id]
            kinds = [type_ids.get(placeholders, 0) for placeholders in wrapper.findall(sample)]
            if len(starts) != len(kinds):
                raise ValueError(
                    f"Row {row} has {len(kinds)} {self.vision_start_token}{self.vision_end_token} in its text but "
                    f"{len(starts)} in its tokens. Do not truncate text with images or videos, or raise `max_length`."
                )
            row_marks = [0] * len(ids)
            if sum(kind > 0 for kind in kinds) == len(row_media):
                for position, kind in zip(starts, kinds, strict=True):
                    row_marks[position] = kind
            elif row_media != sorted(row_media):
                raise ValueError(
                    f"Row {row} has a video before an image, so each placeholder must stand between "
                    f"{self.vision_start_token} and {self.vision_end_token} to mark their order."
                )
            marks.append(row_marks)

        if isinstance(input_ids, torch.Tensor):
            return torch.tensor(marks)
        return np.array(marks) if isinstance(input_ids, np.ndarray) else marks

    def prepare_inputs_layout(self, images=None, text=None, videos=None, **kwargs):
        if videos is not None:
            videos = normalize_videos(videos)
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)

    def apply_chat_template(self, conversation, *args, processor_kwargs: dict[str, Any] | None = None, **kwargs):
        """
        See [`~transformers.ProcessorMixin.apply_chat_template`]. A part of a message may also be OpenAI's `video_url`,
        `input_video`, `image_url`, `input_image` or `input_text`; and a video may bring `fps`, `num_frames` (or
        `nframes`), `min_frames`, `max_frames`, `min_pixels`, `max_pixels`, `size` and `on_damage` for itself.
        """
        named = inspect.signature(super().apply_chat_template).parameters
        if processor_kwargs and not kwargs.keys() <= named.keys():
            # Together, for in Transformers 5.17 loose arguments take the place of `processor_kwargs`.
            kwargs = processor_kwargs | kwargs
        return super().apply_chat_template(
            plain_conversation(conversation), *args, processor_kwargs=processor_kwargs, **kwargs
        )

    def _process_videos(self, videos, **kwargs):
        processed = self.video_processor(videos, **kwargs)
        count = len(flatten_videos(videos))
        return processed, [self.replace_video_token(processed, video_idx=index, **kwargs) for index in range(count)]

    def validate_inputs(self, images=None, text=None, videos=None, **kwargs):
        if text is not None:
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError(f"`text` must be a string or a list of strings, got {text!r}.")
            self._check_counts("image", text, self.image_token, images, make_flat_list_of_images)
            self._check_counts("video", text, self.video_token, videos, flatten_videos)
        # The base class counts videos of the forms that it knows.
        counted = None if videos is None else ["video"] * len(flatten_videos(videos))
        super().validate_inputs(images=images, text=text, videos=counted, **kwargs)

    @staticmethod
    def _check_counts(medium: str, text: list[str], token: str, media, flatten):
        """Raises a `ValueError` unless there are as many media as placeholders, in each row if given by row."""
        counts = [sample.count(token) for sample in text]
        num_media = len(flatten(media)) if media is not None else 0
        if sum(counts) != num_media:
            raise ValueError(
                f"The number of {token} tokens in the prompts should be the same as the number of {medium}s: there "
                f"are {sum(counts)} and {num_media}."
            )
        if isinstance(media, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in media):
            row_counts = [len(row) for row in media]
            if row_counts != counts:
                raise ValueError(
                    f"The rows of the text have {counts} {token} placeholder(s) but {row_counts} {medium}(s) were "
                    "given for them."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return ""

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return ""

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """
        Number of placeholder tokens that images and videos take in the text, which is none, and of their patches.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image.
            video_sizes (`list[list[int]]`, *optional*):
                Number of frames, height and width of each video.
        """
        vision_data = {}
        if image_sizes is not None:
            vision_data["num_image_tokens"] = [0] * len(image_sizes)
            vision_data["num_image_patches"] = [
                self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes
            ]
        if video_sizes is not None:
            vision_data["num_video_tokens"] = [0] * len(video_sizes)
        return MultiModalData(**vision_data)

    @property
    def model_input_names(self) -> list[str]:
        return super().model_input_names + ["image_sample_ids", "video_sample_ids"]
