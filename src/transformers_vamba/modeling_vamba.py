# SPDX-License-Identifier: Apache-2.0
"""
PyTorch Vamba model: Qwen2-VL, except that the video never enters the text.

In each layer the text tokens `h` attend causally to one another and read the video tokens `v` by cross-attention,
which has neither mask nor positions. The video tokens are updated by a Mamba-2 mixer, at linear cost, and never see
the text (`α` is one learned number per layer, kept in [0, 1]):

    text:  h += α * self_attn(n) + (1 - α) * cross_attn(n, v),  n = input_layernorm(h)
           h += mlp(post_attention_layernorm(h))
    video: v += vision_mixer(v)

So everything that the decoder needs of a video, each layer's keys and values, can be computed once and before any
question is known, one stretch of frames after another:

    frames ─► visual ─► mixers, layer by layer ─► VambaCache (keys and values per layer, mixer states)
                                                      │
    text ─► embed_tokens ─► decoder layers ◄──────────┘ ─► lm_head

If no cache is kept (training), both streams go through the decoder together, layer by layer.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache.cache import VambaCache
from .cache.layers import VambaVideoLayer
from .compat import CACHE_NAME, CACHE_NAMES, checked_forward
from .configuration_vamba import VambaConfig, VambaTextConfig
from .conversion_mapping import (
    check_complete,
    check_qwen2_vl_filled,
    read_qwen2_vl_config,
    register_conversion_mapping,
    rename_published,
)
from .generation.generate import VambaGenerationMixin
from .inputs.checks import adapter_names_explained, check_no_media_expected, check_tensor, check_text
from .inputs.media import Medium, count_tokens, distinct_videos, group_media_by_row, split_into_segments
from .inputs.packing import lengths_of_samples, split_marks, starts_of_samples
from .inputs.text import make_masks, resolve_positions
from .layers.compile_ahead import Purpose, start_compiling
from .layers.decoder import VambaDecoderLayer
from .layers.loss import count_items, loss_without_logits
from .layers.mixer import VambaHubScan, VambaMixer
from .layers.video_context import VideoContext
from .layers.vision import SEGMENT_FRAMES, VambaVisionModel
from .parallel.devices import execution_device
from .parallel.gradient_checkpointing import CheckpointingMixin
from .parallel.ranks import (
    copy_parameters,
    forget_zero_gradients,
    is_distributed,
    is_sharded,
    smallest_medium,
    zero_of_parameters,
)
from .parallel.sequence import check_no_dropout, check_stretches


logger = logging.get_logger(__name__)


class VambaPreTrainedModel(CheckpointingMixin, Qwen2VLPreTrainedModel):
    config: VambaConfig
    _no_split_modules = ["VambaDecoderLayer", "VambaVisionBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)

    def set_sequence_parallel_group(self, group: ProcessGroup | None) -> None:
        """
        From now on each process of the group brings a stretch of the frames of one video, the first process the first
        frames (see [`~parallel.sequence.take_stretch`]), and the text and labels of that sample, the same in
        all. Text and loss come out the same in all as well. Each process has a part of the gradients: their mean over
        the group, which DDP and FSDP take, is the gradient of the sample.

        It is for `forward` without a cache, one sample at a time.

        Args:
            group (`ProcessGroup` or `None`): The processes, in the order of the video; `None` ends it.

        Raises:
            ValueError: for a model with dropout, which would not draw the same for the text of every process.
        """
        if group is not None:
            check_no_dropout(self)
        for module in self.modules():
            if isinstance(module, VambaModel):
                module.sequence_parallel_group = group

    def set_use_kernels(self, *args, **kwargs):
        """
        Like [`PreTrainedModel.set_use_kernels`]: the mixers scan with the Hub's kernel from now on, for tensors on the
        type of device that the model is on now, unless `mamba_implementation` asks for another.
        """
        super().set_use_kernels(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, VambaHubScan):
                module.device_type = self.device.type

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VambaDecoderLayer):
            init.constant_(module.alpha, 0.5)
        elif isinstance(module, VambaMixer):
            text_config = self.config.get_text_config()
            module.reset_parameters(text_config.initializer_range / math.sqrt(text_config.num_hidden_layers))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Like [`PreTrainedModel.from_pretrained`], also for checkpoints of the published research code. Unless
        `output_loading_info=True` or a `state_dict` is given, a checkpoint that lacks parameters is an error.

        Raises:
            ValueError: naming the missing parameters.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if hasattr(model, "_weight_conversions"):
            # For ZeRO-3, Transformers keeps those that it has not used as well, and would save by their reverse.
            model._weight_conversions = [each for each in model._weight_conversions if each.was_used()]
        if output_loading_info:
            return model, info
        if kwargs.get("state_dict") is None:
            check_complete(cls, pretrained_model_name_or_path, info["missing_keys"])
        return model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Reading the weights takes longer than compiling what the first video needs.
        devices = [torch.device(place) for place in (load_config.device_map or {}).values() if place != "disk"]
        if isinstance(model.base_model, VambaModel) and any(device.type == "cuda" for device in devices):
            model.base_model.compile_ahead(next(each for each in devices if each.type == "cuda"), waits=False)
        return Qwen2VLPreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


class VambaTextModel(VambaPreTrainedModel):
    """The decoder. On its own a causal text model; videos come in a [`VambaCache`] or as `video_states`."""

    config: VambaTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": VambaDecoderLayer,
        "attentions": OutputRecorder(Qwen2VLAttention, index=1, layer_name="self_attn"),
    }

    def __init__(self, config: VambaTextConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers: Any = nn.ModuleList(
            [VambaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2VLRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.layers_per_checkpoint = 1
        self.post_init()

    def encode_video(self, video_states: torch.Tensor, video_cache: list[VambaVideoLayer]) -> None:
        """Appends video tokens of shape `(1, num_tokens, hidden_size)` to one video of a cache, in every layer."""
        for decoder_layer, layer_cache in zip(self.layers, video_cache):
            # Accelerate brings to the device of a layer what its forward is given, and no more.
            video_states = decoder_layer.encode_video(video_states.to(execution_device(decoder_layer)), layer_cache)

    @checked_forward
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        video_states: torch.FloatTensor | None = None,
        video_context: VideoContext | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids, inputs_embeds, use_cache: As in [`VambaForConditionalGeneration.forward`].
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for text tokens to attend to, 0 for padding; or masks already prepared.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text positions. Restarting at 0 within a row, they keep packed sequences apart in the self-attention.
            cache ([`Cache`], *optional*): A [`VambaCache`], or any cache for text alone.
            video_states (`torch.FloatTensor` of shape `(1, num_tokens, hidden_size)`, *optional*):
                Outputs of the vision tower for videos that are not in the cache, one after another.
            video_context ([`VideoContext`], *optional*): What is to be known of them; needed with `video_states`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, sequence_length, _ = inputs_embeds.shape

        if use_cache and cache is None:
            cache = VambaCache(self.config)
        if isinstance(cache, VambaCache) and video_context is None:
            video_context = self._context_of_cache(cache, [sequence_length] * batch_size, use_cache)
        # A cache may serve for its videos alone.
        is_for_videos_alone = not use_cache and cache is not None and cache.get_seq_length() == 0
        text_cache = None if is_for_videos_alone else cache

        position_ids = resolve_positions(position_ids, inputs_embeds, text_cache)
        layer_kwargs: dict[str, Any] = {CACHE_NAME: text_cache, **kwargs}
        run_layers: Callable = partial(
            self._run_layers,
            make_masks(self.config, attention_mask, inputs_embeds, text_cache, position_ids),
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(inputs_embeds, position_ids.expand(3, batch_size, -1)),
            video_context=video_context,
            **layer_kwargs,
        )
        hidden_states = inputs_embeds
        if self.layers_per_checkpoint > 1 and self.training and text_cache is None:
            for start in range(0, len(self.layers), self.layers_per_checkpoint):
                run = partial(run_layers, slice(start, start + self.layers_per_checkpoint))
                hidden_states, video_states = self._gradient_checkpointing_func(run, hidden_states, video_states)
        else:
            hidden_states, video_states = run_layers(slice(None), hidden_states, video_states)
        if video_states is not None and self.training and torch.is_grad_enabled() and is_distributed():
            # DDP waits for the gradient of every parameter, also of the last mixer, whose output nothing reads.
            hidden_states = hidden_states + zero_of_parameters(self.layers[-1].vision_mixer)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache if use_cache else text_cache},
        )

    def _context_of_cache(
        self, cache: VambaCache, text_lengths: list[int], use_cache: bool | None
    ) -> VideoContext | None:
        """What the layers have to know of the videos in a cache; `None` if no row reads any."""
        cache.check_fits(self.config)
        rows = cache.resolve_rows(len(text_lengths))
        if use_cache:
            cache.rows = rows
        if all(row is None for row in rows):
            return None
        return VideoContext(rows, text_lengths, cache=cache)

    def _run_layers(
        self,
        masks: dict[str, torch.Tensor | None],
        layers: slice,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both streams through some of the layers."""
        for decoder_layer, layer_type in list(zip(self.layers, self.config.layer_types))[layers]:
            hidden_states, video_states = decoder_layer(
                hidden_states, video_states, attention_mask=masks[layer_type], **kwargs
            )
        return hidden_states, video_states


class VambaModel(VambaPreTrainedModel):
    """Vision tower and decoder."""

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.visual = VambaVisionModel._from_config(config.vision_config)
        self.language_model = VambaTextModel._from_config(config.text_config)
        self.sequence_parallel_group: ProcessGroup | None = None
        self._purposes: set[Purpose] = set()  # that kernels have been compiled for
        self.post_init()

    get_image_features = Qwen2VLModel.get_image_features
    get_video_features = Qwen2VLModel.get_video_features

    def embed_media(self, media: list[Medium]) -> torch.Tensor:
        """The vision tower's output, `(1, num_tokens, hidden_size)`, for images and videos in order."""
        return self._hand_to_decoder(self.visual.encode_media(media).pooler_output)

    def _hand_to_decoder(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.to(execution_device(self.language_model), self.language_model.dtype)[None]

    def compile_ahead(self, device: torch.device, waits: bool = True, **purpose: bool) -> None:
        """
        Starts to compile the kernels for a [`Purpose`] in the background, unless that has been done. With `waits` it
        returns when it is known which these are, so that nobody compiles one of them a second time.
        """
        dtype = self.dtype
        wanted = Purpose(dtype, device, **purpose)
        is_mixed = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") != dtype
        if device.type != "cuda" or is_mixed or wanted in self._purposes:
            return
        self._purposes.add(wanted)
        planning = start_compiling(self.config, wanted)
        if waits:
            planning.join()

    def encode_media(
        self,
        media: list[list[Medium]],
        cache: VambaCache,
        segment_frames: int = SEGMENT_FRAMES,
        num_remaining_tokens: int = 0,
    ) -> None:
        """
        Encodes each row's images and videos, in order, after what the cache holds for that row, `segment_frames`
        frames at a time: vision tower, mixers, keys and values. Sets `cache.rows`. Memory is sized for
        `num_remaining_tokens` more, which later calls bring. Should it fail, the cache is as it was.
        """
        cache.check_fits(self.config.text_config)
        rows = list(cache.resolve_rows(len(media)))
        is_quantized = cache.video_cache_implementation.endswith("quantized")
        self.compile_ahead(execution_device(self.visual), is_quantized=is_quantized)
        max_steps = max(1, segment_frames // self.config.vision_config.temporal_patch_size)
        with cache.keeping_videos():
            for row, row_media in enumerate(media):
                if row_media:
                    rows[row] = video = cache.video_to_append_to(rows, row)
                    self._append_media(row_media, cache, video, max_steps, num_remaining_tokens)
        cache.rows = rows

    def _append_media(
        self, media: list[Medium], cache: VambaCache, video: int, max_steps: int, num_remaining_tokens: int
    ) -> None:
        """As [`~VambaModel.encode_media`], of one row: its media go to the video of this index in the cache."""
        merge_size = self.config.vision_config.spatial_merge_size
        largest_step = max(math.prod(each.grid[1:]) for each in media) // merge_size**2
        steps_at_once = min(max_steps, sum(each.grid[0] for each in media))
        num_tokens = count_tokens(media, merge_size) + num_remaining_tokens
        cache.reserve(video, num_tokens, largest_step, steps_at_once)
        for segment in split_into_segments(media, max_steps):
            steps, embeds = cache.steps_of(video), self.embed_media(segment)
            tokens_per_step = [math.prod(each.grid[1:]) // merge_size**2 for each in segment]
            if cache.follows_changes:
                changes, rate = cache.changes_of(video), cache.video_pruning_rate
                embeds, tokens_per_step, cache.changes[video] = changes.prune(embeds, segment, rate)
            self.language_model.encode_video(embeds, cache.videos[video])
            for each, num_tokens in zip(segment, tokens_per_step):
                steps = steps.append(each.grid[0], num_tokens, each.timestamps_ms)
            cache.steps[video] = steps
            cache.thin_out(video)

    @checked_forward
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        image_sample_ids: torch.LongTensor | None = None,
        video_sample_ids: torch.LongTensor | None = None,
        video_timestamps_ms: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPast:
        """See [`VambaForConditionalGeneration.forward`]."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden_size = self.config.text_config.hidden_size
        check_text(hidden_size, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        batch_size, sequence_length, _ = inputs_embeds.shape
        starts = starts_of_samples(position_ids, batch_size, attention_mask, cache, use_cache)
        sample_lengths = lengths_of_samples(starts)
        if sample_lengths is not None and mm_token_type_ids is not None:
            mm_token_type_ids = split_marks(mm_token_type_ids, sample_lengths)
        text_lengths = sample_lengths or [sequence_length] * batch_size
        media = group_media_by_row(
            len(text_lengths),
            self.config.vision_config,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_sample_ids=image_sample_ids,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_sample_ids=video_sample_ids,
            video_timestamps_ms=video_timestamps_ms,
            mm_token_type_ids=mm_token_type_ids,
        )
        if self.sequence_parallel_group is not None:
            num_tokens = [count_tokens(row, self.config.vision_config.spatial_merge_size) for row in media]
            has_cache = cache is not None or bool(use_cache)
            num_inputs = self.config.text_config.mamba_d_conv - 1
            check_stretches(num_tokens, inputs_embeds, has_cache, num_inputs, self.sequence_parallel_group)
        is_packed = sample_lengths is not None
        runs_together, use_cache = self._choose_way(is_packed, cache, use_cache)
        if any(media) and not runs_together:
            if not isinstance(cache, VambaCache):
                cache = VambaCache.around(self.config, cache)
            with adapter_names_explained():
                self.encode_media(media, cache)
        elif any(media):
            with adapter_names_explained():
                kwargs |= self._video_stream(media, text_lengths, is_packed)
        elif cache is None:
            check_no_media_expected(self.config, input_ids if self.training else None, mm_token_type_ids)
            if is_sharded(self) or (self.training and torch.is_grad_enabled() and is_distributed()):
                stand_in = [smallest_medium(self.config.vision_config)]
                kwargs |= self._video_stream([stand_in] * len(text_lengths), text_lengths, is_packed, is_read=False)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if "video_states" in kwargs and self.training and is_distributed():
            forget_zero_gradients(outputs.last_hidden_state, self.visual, self.language_model.layers)
        return outputs

    def _choose_way(self, is_packed: bool, cache: Cache | None, use_cache: bool | None) -> tuple[bool, bool]:
        """Whether new videos go through the decoder together with the text, and whether a cache is returned."""
        has_no_cache = cache is None and not use_cache
        must_run_together = (
            is_packed or self.sequence_parallel_group is not None or (has_no_cache and is_sharded(self))
        )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training and not must_run_together
        elif use_cache and self.training and self.language_model.gradient_checkpointing:
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing; no cache is kept.")
            use_cache = False
        return must_run_together or (cache is None and torch.is_grad_enabled() and not use_cache), use_cache

    def _video_stream(
        self, media: list[list[Medium]], text_lengths: list[int], is_packed: bool, is_read: bool = True
    ) -> dict:
        """The videos of a batch, one after another, for a pass through the decoder together with the text."""
        videos, rows = distinct_videos(media)
        lengths = [count_tokens(video, self.config.vision_config.spatial_merge_size) for video in videos]
        group = self.sequence_parallel_group if is_read else None
        self.compile_ahead(execution_device(self.visual), is_training=torch.is_grad_enabled())
        embeds = self.visual.encode_with_gradient(list(itertools.chain(*videos)))
        context = VideoContext(rows, text_lengths, is_packed, lengths=lengths, group=group, is_read=is_read)
        return {"video_states": self._hand_to_decoder(embeds), "video_context": context}


class VambaForConditionalGeneration(VambaPreTrainedModel, VambaGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.model = VambaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(rename_published)
        self.post_init()

    @classmethod
    def from_qwen2_vl(cls, pretrained_model_name_or_path, text_config: dict | None = None, **kwargs):
        """
        A new Vamba from a Qwen2-VL checkpoint, as published: cross-attention starts as a copy of self-attention, α at
        0.5, and the mixers from their own initialisation.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A Qwen2-VL checkpoint of any size.
            text_config (`dict`, *optional*): Fields of [`VambaTextConfig`] to set, such as `mamba_d_state`.
            kwargs: As for [`PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: for a checkpoint of another architecture, or one that does not fill all of Qwen2-VL's part.
        """
        config = VambaConfig(**read_qwen2_vl_config(pretrained_model_name_or_path, text_config or {}))
        model, info = cls.from_pretrained(
            pretrained_model_name_or_path, config=config, output_loading_info=True, **kwargs
        )
        check_qwen2_vl_filled(pretrained_model_name_or_path, info)
        for layer in model.model.language_model.layers:
            copy_parameters(layer.self_attn, layer.cross_attn)
        return model

    get_image_features = Qwen2VLForConditionalGeneration.get_image_features
    get_video_features = Qwen2VLForConditionalGeneration.get_video_features

    @checked_forward
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        image_sample_ids: torch.LongTensor | None = None,
        video_sample_ids: torch.LongTensor | None = None,
        video_timestamps_ms: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids of the text. An image or video takes no tokens beyond those that stand around it.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for text tokens to attend to, 0 for padding on either side.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text positions. In a single row that comes without `attention_mask` and cache, positions that start
                anew tell packed samples apart: neither text nor media of one are seen by another.
            cache ([`Cache`], *optional*):
                A [`VambaCache`], with videos encoded before or text read before; or any cache for text alone.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded tokens instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 for none; shifted inside. The first token of a packed sample is
                never predicted.
            use_cache (`bool`, *optional*):
                Whether to return a [`VambaCache`]. By default as the configuration says, and not in training.
            pixel_values (`torch.Tensor` of shape `(num_image_patches, patch_dim)`, *optional*): Patches of all images.
            pixel_values_videos (`torch.Tensor` of shape `(num_video_patches, patch_dim)`, *optional*): And all videos.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                Time, height and width of each image in patches.
            video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`, *optional*): And of each video.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for an image's place in the prompt, 2 for a video's, else 0: their order within a row. Without
                it a row's images come before its videos.
            image_sample_ids (`torch.LongTensor` of shape `(num_images,)` or `(num_images, 2)`, *optional*):
                The row that each image belongs to, or the sample of a packed row, from 0; or the first and the last
                of those that share it. By default all media are of the only row, or one of each.
            video_sample_ids (`torch.LongTensor` of shape `(num_videos,)`, *optional*): And each video.
            video_timestamps_ms (`torch.LongTensor` of shape `(num_steps,)`, *optional*):
                When each step of `video_grid_thw` begins, one video after another, in milliseconds after the first
                frame; -1 if that is not known. Changes nothing but the times that the cache keeps, for `locate`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last `logits_to_keep` positions only (0: all), or for those that a 1-D tensor
                lists.
            skip_logits (`bool`, *optional*, defaults to `False`):
                Return the loss alone. Logits are computed for labelled positions only, chunk by chunk: the same loss
                with less memory, for long texts.

        Raises:
            ValueError: if media, grids, rows and prompt do not match, naming both sides.

        Example:

        ```python
        >>> import transformers_vamba
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained(path)
        >>> processor = AutoProcessor.from_pretrained(path)
        >>> content = [{"type": "video", "path": "movie.mp4"}, {"type": "text", "text": "What happens?"}]
        >>> messages = [{"role": "user", "content": content}]
        >>> options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        >>> inputs = processor.apply_chat_template(messages, tokenize=True, **options)
        >>> generated = model.generate(**inputs, max_new_tokens=64)
        >>> processor.batch_decode(generated[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        ```"""
        others = (inputs_embeds, labels, pixel_values, pixel_values_videos, mm_token_type_ids, *kwargs.values())
        plan = getattr(cache, "step_plan", None)
        if plan is not None and plan.takes(input_ids, others):
            logits = plan.run(cache, input_ids, position_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            image_sample_ids=image_sample_ids,
            video_sample_ids=video_sample_ids,
            video_timestamps_ms=video_timestamps_ms,
            **kwargs,
        )
        if isinstance(logits_to_keep, torch.Tensor):
            check_tensor("logits_to_keep", logits_to_keep, False, ("number of positions",))
        elif not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be at least 0 or a 1-D tensor, got {logits_to_keep!r}.")
        if skip_logits and labels is None:
            raise ValueError("`skip_logits=True` leaves the loss alone, and needs `labels` for it.")
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, slice_indices, :]
        logits = None if skip_logits else self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            check_tensor("labels", labels, False, tuple(hidden_states.shape[:2]))
            starts = starts_of_samples(position_ids, len(labels), attention_mask, cache, use_cache)
            if starts is not None:
                labels = labels.masked_fill(starts[:, slice_indices].to(labels.device), -100)
            kwargs["vocab_size"] = self.config.text_config.vocab_size
            kwargs["num_items_in_batch"] = count_items(labels, **kwargs)
            if skip_logits:
                loss = loss_without_logits(self.lm_head, self.loss_function, hidden_states, labels, **kwargs)
            else:
                loss = self.loss_function(logits=logits, labels=labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


register_conversion_mapping()
