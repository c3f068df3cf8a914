# SPDX-License-Identifier: Apache-2.0
"""`generate` for a model whose videos are encoded once, into the cache, before anything is repeated."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from ..cache.cache import VIDEO_OPTIONS, VambaCache
from ..cache.excerpts import check_read_share
from ..compat import CACHE_NAME, NEWEST_TESTED, OLDEST_TESTED, rename_cache, takes_cache
from ..inputs.checks import (
    adapter_names_explained,
    check_prompt_goes_on,
    check_prompt_repeats,
    check_tensor,
    check_text,
    check_virtual_tokens,
)
from ..inputs.media import Medium, drop_grids_without_pixels, group_media_by_row, pop_media
from ..layers.vision import SEGMENT_FRAMES
from .captured_step import plan_step
from .locate import Reader, VideoReading, watch_steps
from .read_share import StepChooser


MAX_ROWS = 2**16  # of a cache that is filled before any text comes: a larger row number is a mistake


# Arguments of `generate` that it reads itself, and hands on with those of `forward`.
_READ_BY_GENERATE = ("tokenizer", "assistant_tokenizer")


@contextmanager
def checkpointing_paused(model: nn.Module) -> Iterator[None]:
    """
    Turns gradient checkpointing off within the block. Before Transformers 5.24 a checkpointed layer drops its cache in
    training mode, also if there is no gradient, and the tokens that are generated would not know what came before.
    """
    paused: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in paused:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in paused:
            module.gradient_checkpointing = True


class VambaGenerationMixin(GenerationMixin):
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        kwargs = rename_cache(kwargs)
        given = kwargs.get(CACHE_NAME)
        try:
            with checkpointing_paused(self), adapter_names_explained():
                outputs = super().generate(*args, **kwargs)
        finally:
            if isinstance(given, VambaCache):
                given.finish_generation()
        is_dict = isinstance(outputs, ModelOutput)
        cache = outputs.get(CACHE_NAME) if is_dict else given
        if not isinstance(cache, VambaCache):
            return outputs
        cache.finish_generation()
        if cache.get_seq_length() > 0:
            cache.text_ids = outputs.sequences if is_dict else outputs
        elif is_dict:
            # With `use_cache=False` it has served for the videos alone.
            return type(outputs)(**{name: value for name, value in outputs.items() if name != CACHE_NAME})
        return outputs

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        kwargs = rename_cache(kwargs)
        cache: Any = kwargs.get(CACHE_NAME)
        chooser = getattr(cache, "watcher", None)
        if isinstance(chooser, StepChooser) and chooser.has_ended:
            cache.watcher = None  # from now on, what it has chosen is read
            if cache.is_compileable and not cache.is_video_offloaded:
                cache.mark_static_videos()
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if isinstance(chooser, StepChooser):
            texts = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            chooser.expect(texts.shape[1])
        for name in _READ_BY_GENERATE:
            inputs.pop(name, None)
        # `forward` takes the cache under either name, and PEFT's prompt learning (0.21) looks for the older one.
        return rename_cache(inputs, "past_key_values")

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get(CACHE_NAME)
        if not isinstance(cache, VambaCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        check_virtual_tokens(
            self.prepare_inputs_for_generation,
            cache.get_seq_length(),
            input_ids.shape[1],
            generation_config.prefill_chunk_size,
        )
        if input_ids.shape[1] == self._prompt_length(generation_config, model_kwargs):
            check_prompt_repeats(cache.read_ids(), input_ids, model_kwargs.get("attention_mask"))
            cache.text_ids = input_ids
        cache.is_read = False
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        # An answer from another cache than this would be nonsense, without a word.
        if not cache.is_read and any(row is not None for row in cache.rows or ()):
            raise RuntimeError(
                f"The decoder has not read the videos of the cache that `generate` has prepared as `{CACHE_NAME}`. "
                "Something has put another cache in its place, as prefix tuning with PEFT does: use another adapter "
                f"(LoRA, prompt tuning). Or Transformers {transformers.__version__} hands it on in another way: "
                f"install version {OLDEST_TESTED} to {NEWEST_TESTED}."
            )
        return outputs

    @staticmethod
    def _prompt_length(generation_config, model_kwargs) -> int | None:
        """Tokens of the prompt, those that the cache holds among them; `None` if that is not known."""
        mask = model_kwargs.get("attention_mask")
        # A mask of ones is dropped by Transformers, which notes its length.
        return getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]

    def _expand_inputs_for_generation(self, *args, **model_kwargs):
        # Beams and samples share their images and videos, which go into the cache before anything is repeated.
        media = pop_media(model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **model_kwargs)
        return input_ids, model_kwargs | media

    def _validate_model_kwargs(self, model_kwargs):
        # The options are for the cache, not for `forward`, and the cache is known, also where PEFT hides by what name.
        for name in (*VIDEO_OPTIONS, CACHE_NAME):
            model_kwargs.pop(name, None)
        super()._validate_model_kwargs(model_kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Bringing videos from the host's memory cannot be part of a CUDA graph, and takes longer than one would save.
        cache = model_kwargs.get(CACHE_NAME)
        is_offloaded = isinstance(cache, VambaCache) and cache.is_video_offloaded
        # Accelerate's hooks, which bring tensors from one device to the next, compile anew for each layer.
        is_spread = len(set(getattr(self, "hf_device_map", {}).values())) > 1
        can_compile = not is_offloaded and not is_spread
        return can_compile and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        encoded = model_kwargs.get(CACHE_NAME)
        video_options = {name: model_kwargs.pop(name, None) for name in VIDEO_OPTIONS}
        read_share = video_options["video_read_share"]
        check_read_share(read_share)
        prompt_length = self._prompt_length(generation_config, model_kwargs)
        if isinstance(encoded, VambaCache):
            check_prompt_goes_on(encoded.get_seq_length(), prompt_length)
            encoded.check_video_options(**{**video_options, "video_read_share": None})  # which is asked for each time
            video_options = encoded.video_options
            if encoded.get_seq_length() == 0 and generation_config.cache_implementation is not None:
                # A cache with videos alone leaves open which kind of cache the text gets.
                del model_kwargs[CACHE_NAME]
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        past_length = encoded.get_seq_length() if isinstance(encoded, VambaCache) else 0
        media = self._take_new_media(model_kwargs, batch_size, past_length, prompt_length)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None and not any(media):
            return
        if not isinstance(cache, VambaCache):
            cache = VambaCache.around(self.config, cache, **video_options)
            if isinstance(encoded, VambaCache):
                cache.videos, cache.rows = encoded.videos, encoded.rows
                cache.steps, cache.changes = encoded.steps, encoded.changes
        read_share = cache.video_read_share if read_share is None else read_share
        if read_share is not None and generation_config.use_cache is False:
            raise ValueError(
                f"`video_read_share` is {read_share!r}, but without a cache of the text (`use_cache=False`) the whole "
                "text is read anew for every token. Leave out one of the two."
            )
        self.model.encode_media(media, cache)
        num_copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache.rows = [row for row in cache.rows or () for _ in range(num_copies)]
        if cache.is_compileable and not cache.is_video_offloaded:
            cache.mark_static_videos()
        if read_share is not None:
            # Lets the prompt choose what the answer reads.
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones(len(cache.rows), prompt_length or 0) if mask is None else mask
            cache.watcher = StepChooser(cache, read_share, mask, num_copies)
        cache.step_plan = plan_step(self, cache, generation_config, generation_mode, prompt_length, max_cache_length)
        model_kwargs[CACHE_NAME] = cache

    def _take_new_media(
        self, model_kwargs: dict, batch_size: int, past_length: int, prompt_length: int | None
    ) -> list[list[Medium]]:
        """
        Takes the images and videos out of the arguments, and returns those of each row that the cache does not hold: a
        prompt that goes on after `past_length` tokens may bring the media of its earlier turns, or their grids alone.
        """
        inputs = pop_media(model_kwargs)
        if past_length:
            inputs = drop_grids_without_pixels(inputs)
        media = group_media_by_row(batch_size, self.config.vision_config, **inputs)
        marks = inputs.get("mm_token_type_ids")
        if not past_length or marks is None or not any(media):
            return media
        start = 0 if prompt_length is None else prompt_length - marks.shape[1]  # it may bring the new tokens alone
        num_held = marks[:, : max(past_length - start, 0)].count_nonzero(dim=1).tolist()
        return [row_media[num:] for row_media, num in zip(media, num_held)]

    @takes_cache
    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        video_sample_ids: torch.LongTensor | None = None,
        video_timestamps_ms: torch.LongTensor | None = None,
        cache: VambaCache | None = None,
        segment_frames: int = SEGMENT_FRAMES,
        num_remaining_tokens: int = 0,
        video_cache_implementation: str | None = None,
        video_pruning_rate: float | None = None,
        max_video_tokens: int | None = None,
        video_read_share: float | None = None,
    ) -> VambaCache:
        r"""
        Encodes videos without any text, or appends to videos encoded before (a live stream, or a long file in pieces).
        Ask questions against the result with `generate(..., cache=cache.fork())`.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_patches, patch_dim)`):
                Patches of the videos, on any device: each segment moves to the model's in its turn.
            video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`):
                Frames (in steps of `temporal_patch_size`), height and width of each video, in patches.
            video_sample_ids (`torch.LongTensor` of shape `(num_videos,)`, *optional*):
                The row that each video belongs to, for a cache of several rows. By default all are of one row, in
                order.
            video_timestamps_ms (`torch.LongTensor` of shape `(num_steps,)`, *optional*):
                When each step of `video_grid_thw` begins, one video after another, in milliseconds after the first
                frame; -1 if that is not known. The processor gives it with `return_video_timestamps=True`.
            cache ([`VambaCache`], *optional*): The cache to append to, in place.
            segment_frames (`int`, *optional*, defaults to 64):
                Frames that go through the model at once. Bounds the memory and changes the result by rounding only.
            num_remaining_tokens (`int`, *optional*, defaults to 0):
                Tokens of the video that further calls will append, as the segments of `iter_video_segments` say: the
                memory of the cache is sized for them as well, and does not have to grow.
            video_cache_implementation (`str`, *optional*):
                How a new cache keeps the video: `"dynamic"` (the default), `"quantized"` in 8 bits, `"offloaded"` to
                the host's memory, or `"offloaded_quantized"`. See [`VambaCache`].
            video_pruning_rate (`float`, *optional*):
                The share of each time step that a new cache drops of the video, of what changed least since the one
                before: 0 (the default) to below 1. A call that appends goes on from the time step before it if the
                size is the same, so a file in pieces gives the same as the whole. With this and the next option, time
                steps that repeat the one before are dropped whole.
            max_video_tokens (`int`, *optional*):
                The most tokens that a new cache keeps of a video, however long it goes on. See [`VambaCache`].
            video_read_share (`float`, *optional*):
                The share of a video that `generate` reads for each token of an answer from a new cache, unless it is
                given another. See [`VambaCache`].

        Returns:
            [`VambaCache`]: The given cache, or a new one. A call that fails or is interrupted leaves a given cache
            unchanged.

        Raises:
            ValueError: if patches, grids and rows do not match, or the cache keeps its videos in another way.
        """
        if not isinstance(num_remaining_tokens, int) or num_remaining_tokens < 0:
            raise ValueError(f"`num_remaining_tokens` must be an integer of at least 0, got {num_remaining_tokens!r}.")
        if not isinstance(segment_frames, int) or segment_frames < 1:
            raise ValueError(f"`segment_frames` must be an integer of at least 1, got {segment_frames!r}.")
        if cache is not None and not isinstance(cache, VambaCache):
            raise TypeError(f"`cache` must be a VambaCache, got {type(cache).__name__}.")
        video_options: dict[str, Any] = {
            "video_cache_implementation": video_cache_implementation,
            "video_pruning_rate": video_pruning_rate,
            "max_video_tokens": max_video_tokens,
            "video_read_share": video_read_share,
        }
        if cache is None:
            cache = VambaCache(self.config, **video_options)
        else:
            cache.check_video_options(**video_options)
        rows_read = cache.rows
        num_rows = max(1, len(cache.videos))
        if video_sample_ids is not None:
            check_tensor("video_sample_ids", video_sample_ids, False, ("number of videos",))
            num_rows = max(num_rows, min(max([0, *video_sample_ids.tolist()]) + 1, MAX_ROWS))
        media = group_media_by_row(
            num_rows if rows_read is None else len(rows_read),
            self.config.vision_config,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_sample_ids=video_sample_ids,
            video_timestamps_ms=video_timestamps_ms,
        )
        media = [[each._replace(goes_on=True) for each in row[:1]] + row[1:] for row in media]
        self.model.encode_media(media, cache, segment_frames, num_remaining_tokens)
        if rows_read is None and cache.rows == list(range(len(cache.videos))):
            cache.rows = None  # no text has been read yet: any number of rows may come to read the video
        return cache

    @takes_cache
    @torch.no_grad()
    def locate(
        self,
        input_ids: torch.LongTensor,
        cache: VambaCache,
        token_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> list[VideoReading]:
        r"""
        When a text happened: how much of each time step of a video the model reads where it predicts the tokens of an
        answer, or of any text about the video.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The whole text from its beginning, prompt and answer: what `generate` returns.
            cache ([`VambaCache`]):
                Holds the videos. Neither they nor its text change, and its text is not read: `input_ids` are.
            token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Which tokens it is about, such as those of the answer, or of one of its words. What counts is what was
                read to predict them, that is by the token before each. By default all.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 for padding.

        Returns:
            `list[VideoReading]`: Of each row the share that each time step has in what was read, and its seconds.

        Raises:
            ValueError: where a row has no video in the cache, or no token that it is about.

        Example:

        ```python
        >>> tokens = model.generate(**inputs, cache=cache.fork())
        >>> is_answer = torch.arange(tokens.shape[1]) >= inputs.input_ids.shape[1]
        >>> (reading,) = model.locate(tokens, cache, token_mask=is_answer[None])
        >>> max(reading.moments(), key=lambda moment: moment.weight).start
        ```"""
        check_text(self.config.text_config.hidden_size, input_ids, None, attention_mask, None, cache)
        if not isinstance(cache, VambaCache) or not cache.videos:
            raise ValueError("`cache` holds no video to be read: encode one with `encode_video`.")
        all_rows = cache.resolve_rows(len(input_ids))
        rows = [row for row in all_rows if row is not None]
        if len(rows) < len(all_rows):
            raise ValueError(f"Row {all_rows.index(None)} reads no video of the cache (`cache.rows` is {all_rows}).")
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        token_mask = is_text if token_mask is None else token_mask
        for name, mask in (("attention_mask", is_text), ("token_mask", token_mask)):
            if not isinstance(mask, torch.Tensor):
                raise TypeError(f"`{name}` must be a torch.Tensor, got {type(mask).__name__}.")
            if mask.shape != input_ids.shape:
                raise ValueError(f"`{name}` must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}.")
        is_text, token_mask = is_text.bool().cpu(), token_mask.bool().cpu()
        predicts = torch.zeros_like(is_text)
        predicts[:, :-1] = is_text[:, :-1] & is_text[:, 1:] & token_mask[:, 1:]
        if not predicts.any(1).all():
            raise ValueError(
                f"`token_mask` marks no token in row {predicts.any(1).tolist().index(False)}, or only the first one, "
                "which nothing predicts."
            )
        videos = VambaCache(self.config, video_cache_implementation=cache.video_cache_implementation)
        videos.videos, videos.rows = cache.videos, all_rows
        reader = Reader([cache.steps_of(row) for row in rows])
        videos.watcher = watch_steps(reader.receive, reader.steps, predicts)
        self.model(input_ids=input_ids, attention_mask=attention_mask, cache=videos, use_cache=False)
        return reader.readings()
