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
"""`generate` for a model whose videos are encoded once, into the cache, before anything is repeated."""

from transformers.generation import GenerationMixin

from .cache_vamba import VambaCache
from .checks_vamba import check_prompt_goes_on
from .media_vamba import group_media_by_row, pop_media


class VambaGenerationMixin(GenerationMixin):
    def _expand_inputs_for_generation(self, *args, **model_kwargs):
        # Beams and samples share their images and videos, which go into the cache before anything is repeated.
        media = pop_media(model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **model_kwargs)
        return input_ids, model_kwargs | media

    def _validate_model_kwargs(self, model_kwargs):
        model_kwargs.pop("video_cache_implementation", None)  # for the cache, not for `forward`
        super()._validate_model_kwargs(model_kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # Bringing videos from the host's memory cannot be part of a CUDA graph, and takes longer than one would save.
        cache = model_kwargs.get("past_key_values")
        is_offloaded = isinstance(cache, VambaCache) and cache.is_video_offloaded
        return not is_offloaded and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        encoded = model_kwargs.get("past_key_values")
        implementation = model_kwargs.pop("video_cache_implementation", None)
        # Where the mask is all ones, Transformers drops it and notes its length.
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        past_length = 0
        if isinstance(encoded, VambaCache):
            past_length = encoded.get_seq_length()
            check_prompt_goes_on(past_length, length)
            encoded.check_video_cache_implementation(implementation)
            implementation = encoded.video_cache_implementation
            if past_length == 0 and generation_config.cache_implementation is not None:
                # A cache with videos alone leaves open which kind of cache the text gets.
                del model_kwargs["past_key_values"]
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        media_inputs = pop_media(model_kwargs)
        media = group_media_by_row(batch_size, self.config.vision_config, **media_inputs)
        marks = media_inputs.get("mm_token_type_ids")
        if past_length and marks is not None:
            # The prompt of a conversation that goes on brings the media of its earlier turns, which the cache holds.
            start = 0 if length is None else length - marks.shape[1]  # it may bring the new tokens alone
            num_held = marks[:, : max(past_length - start, 0)].count_nonzero(dim=1).tolist()
            media = [row_media[num:] for row_media, num in zip(media, num_held)]
        cache = model_kwargs.get("past_key_values")
        if cache is None and not any(media):
            return
        if not isinstance(cache, VambaCache):
            cache = VambaCache(self.config, cache, implementation)
            if isinstance(encoded, VambaCache):
                cache.videos, cache.rows = encoded.videos, encoded.rows
        self.model.encode_media(media, cache)
        num_copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        cache.rows = [row for row in cache.rows for _ in range(num_copies)]
        if cache.is_compileable and not cache.is_video_offloaded:
            cache.mark_static_videos()
        model_kwargs["past_key_values"] = cache


__all__ = ["VambaGenerationMixin"]
