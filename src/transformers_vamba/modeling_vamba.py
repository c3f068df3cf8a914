# SPDX-License-Identifier: Apache-2.0
"""
PyTorch Vamba model: Qwen2-VL, except that the video never enters the text.

Text tokens attend causally to one another and read the video by cross-attention; the video tokens are updated by a
Mamba-2 mixer a layer, at linear cost, and never see the text. So everything that the decoder needs of a video, each
layer's keys and values, can be computed once and ahead of any question, a stretch of frames at a time:

    frames ─► visual ─► mixers, layer by layer ─► VambaCache (keys and values a layer, mixer states)
                                                      │
    text ─► embed_tokens ─► decoder layers ◄──────────┘ ─► lm_head

Where no cache is kept (training), both streams go through the decoder layer by layer instead.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
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
from .compat import CACHE_NAME, CACHE_NAMES, checked_forward, takes_cache
from .configuration_vamba import VambaConfig, VambaTextConfig
from .generation.generate import VambaGenerationMixin
from .inputs.checks import check_no_media_expected, check_tensor, check_text
from .inputs.media import Medium, count_tokens, group_media_by_row, split_into_segments
from .inputs.packing import lengths_of_samples, split_marks, starts_of_samples
from .layers.decoder import VambaDecoderLayer
from .layers.loss import count_items, loss_without_logits
from .layers.mixer import VambaMixer
from .layers.vision import VambaVisionModel
from .parallel.gradient_checkpointing import plain_checkpoint, resolve_checkpointing, run_in_parts
from .parallel.ranks import (
    copy_parameters,
    count_missing_runs,
    forget_zero_gradients,
    is_distributed,
    is_sharded,
    smallest_medium,
    zero_of_parameters,
)
from .parallel.sequence import check_stretches


logger = logging.get_logger(__name__)


MAX_ROWS = 2**16  # of a cache that is filled before any text comes: a larger row number is a mistake

SEGMENT_FRAMES = 64  # that go through the vision tower at once

# PyTorch's attention kernels in order of preference, for a text of at most so many tokens. Flash alone cuts a long
# video up when few queries read it, and keeps the device busy; cuDNN plans anew for every length of a growing text.
FEW_TOKENS = 256
BACKENDS_FOR_FEW_TOKENS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class VambaPreTrainedModel(Qwen2VLPreTrainedModel):
    config: VambaConfig
    _no_split_modules = ["VambaDecoderLayer", "Qwen2VLVisionBlock"]
    _skip_keys_device_placement = [*CACHE_NAMES, "video_cache"]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As of Transformers, which warns of this name since 5.24. PEFT and TRL still ask by it."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = torch_checkpoint,
        every_n_layers: int = 1,
    ):
        checkpoint, layers_per_checkpoint = resolve_checkpointing(gradient_checkpointing_func, every_n_layers)
        super()._set_gradient_checkpointing(enable, checkpoint, every_n_layers)
        in_parts = enable and not checkpoint.keywords["use_reentrant"]
        for module in self.modules():
            if isinstance(module, VambaTextModel):
                module.layers_per_checkpoint = layers_per_checkpoint if enable else 1
            if isinstance(module, VambaDecoderLayer):
                module.checkpoint_part = None
                if in_parts and module.gradient_checkpointing:
                    module._gradient_checkpointing_func = run_in_parts
                    # Within a checkpoint of several layers the inputs of each are kept only while they are needed.
                    module.checkpoint_part = checkpoint if layers_per_checkpoint == 1 else plain_checkpoint(checkpoint)

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
            dropouts = {name: module.p for name, module in self.named_modules() if isinstance(module, nn.Dropout)}
            dropouts["attention_dropout"] = self.config.get_text_config().attention_dropout
            dropouts = [f"{name} ({p})" for name, p in dropouts.items() if p]
            if dropouts:
                raise ValueError(f"Sequence parallelism needs a model without dropout, got {', '.join(dropouts[:8])}.")
        for module in self.modules():
            if isinstance(module, VambaModel):
                module.sequence_parallel_group = group

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VambaDecoderLayer):
            init.constant_(module.alpha, 0.5)
        elif isinstance(module, VambaMixer):
            # Mamba-2's own initialisation: A uniform in [1, 16], the time step log-uniform in [0.001, 0.1] (through
            # the inverse of softplus), and the output scaled down by the square root of the number of layers.
            text_config = self.config.get_text_config()
            init.copy_(module.A_log, torch.empty_like(module.A_log, dtype=torch.float32).uniform_(1, 16).log())
            dt = torch.empty_like(module.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            dt = dt.clamp(min=1e-4)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))
            init.ones_(module.D)
            init.kaiming_uniform_(module.conv1d.weight, a=math.sqrt(5))
            init.normal_(
                module.out_proj.weight,
                std=text_config.initializer_range / math.sqrt(text_config.num_hidden_layers),
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As [`PreTrainedModel.from_pretrained`], for checkpoints of this package and of the published research code,
        whose parameters it renames. Unless `output_loading_info=True` or a `state_dict` is given, a checkpoint that
        lacks parameters is an error instead of a warning and a model with random parts.

        Raises:
            ValueError: naming the missing parameters.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if hasattr(model, "_weight_conversions"):
            # For ZeRO-3, Transformers keeps those that it has not used as well, and would save by their reverse.
            model._weight_conversions = [each for each in model._weight_conversions if each.was_used()]
        if output_loading_info:
            return model, info
        if info["missing_keys"] and kwargs.get("state_dict") is None:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path!r} lacks {len(missing)} parameters of "
                f"{cls.__name__}: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. To start from a "
                "Qwen2-VL checkpoint, use `from_qwen2_vl`; to load it all the same and look at what is missing, pass "
                "`output_loading_info=True`."
            )
        return model


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
        self.layers = nn.ModuleList(
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
        video_lengths: list[int] | None = None,
        rows: list[int | None] | None = None,
        sample_lengths: list[int] | None = None,
        is_read: bool = True,
        sequence_parallel_group: ProcessGroup | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for text tokens to attend to, 0 for padding; or masks already prepared.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Text positions. Restarting at 0 within a row, they keep packed sequences apart in the self-attention.
            cache ([`Cache`], *optional*): A [`VambaCache`], or any cache for text alone.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded tokens instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to keep the text's keys and values.
            video_states (`torch.FloatTensor` of shape `(1, num_tokens, hidden_size)`, *optional*):
                Outputs of the vision tower for videos that are not in the cache, one behind the other.
            video_lengths (`list[int]`, *optional*): Number of tokens of each video in `video_states`.
            rows (`list[int | None]`, *optional*): The video in `video_states` that each row reads.
            sample_lengths (`list[int]`, *optional*):
                Number of text tokens of each sample, where samples are packed in one row; `rows` is theirs then.
            is_read (`bool`, *optional*, defaults to `True`):
                Whether what the rows read counts. Where not, every parameter runs and has a gradient of zero.
            sequence_parallel_group (`ProcessGroup`, *optional*):
                The processes whose `video_states` are consecutive stretches of one video.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch_size, sequence_length, _ = inputs_embeds.shape

        if use_cache and cache is None:
            cache = VambaCache(self.config)
        video_cache = None
        if isinstance(cache, VambaCache) and video_states is None:
            cache.check_fits(self.config)
            video_cache = cache
            rows = cache.resolve_rows(batch_size)
            if use_cache:
                cache.rows = rows
        # A cache may serve for its videos alone.
        text_cache = cache
        if not use_cache and cache is not None and cache.get_seq_length() == 0:
            text_cache = None

        has_video = None
        if rows is None or all(row is None for row in rows):
            rows = None
        elif not is_read:
            has_video = torch.zeros(1, 1, 1, dtype=torch.bool, device=inputs_embeds.device)
        elif any(row is None for row in rows):
            has_video = torch.tensor([row is not None for row in rows], device=inputs_embeds.device).view(-1, 1, 1)
            if sample_lengths is not None:
                repeats = torch.tensor(sample_lengths, device=inputs_embeds.device)
                has_video = has_video.repeat_interleave(repeats, dim=0, output_size=sequence_length).transpose(0, 1)

        if position_ids is None:
            past_seen_tokens = text_cache.get_seq_length() if text_cache is not None else 0
            position_ids = torch.arange(sequence_length, device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.expand(batch_size, -1)
        elif position_ids.ndim == 3:
            # Qwen2-VL's three axes (or four, with the text positions in front): all equal here.
            position_ids = position_ids[0]

        if not isinstance(causal_mask_mapping := attention_mask, dict):
            mask_kwargs = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                CACHE_NAME: text_cache,
                "position_ids": position_ids,
            }
            causal_mask_mapping = {"full_attention": create_causal_mask(**mask_kwargs)}
            if "sliding_attention" in self.config.layer_types:
                causal_mask_mapping["sliding_attention"] = create_sliding_window_causal_mask(**mask_kwargs)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids.expand(3, batch_size, -1))
        run_layers = partial(
            self._run_layers,
            causal_mask_mapping,
            position_ids=position_ids,
            **{CACHE_NAME: text_cache},
            position_embeddings=position_embeddings,
            video_lengths=video_lengths,
            video_cache=video_cache,
            rows=rows,
            text_lengths=sample_lengths or [sequence_length] * batch_size,
            has_video=has_video,
            sequence_parallel_group=sequence_parallel_group,
            **kwargs,
        )
        # Not in training: what a checkpoint computes again has to take the same kernels, and is not in this context.
        few_tokens = batch_size * sequence_length <= FEW_TOKENS and not torch.is_grad_enabled()
        if self.layers_per_checkpoint > 1 and self.training and text_cache is None:
            for start in range(0, len(self.layers), self.layers_per_checkpoint):
                run = partial(run_layers, slice(start, start + self.layers_per_checkpoint))
                hidden_states, video_states = self._gradient_checkpointing_func(run, hidden_states, video_states)
        else:
            with sdpa_kernel(BACKENDS_FOR_FEW_TOKENS, set_priority=True) if few_tokens else contextlib.nullcontext():
                hidden_states, video_states = run_layers(slice(None), hidden_states, video_states)
        if video_states is not None and self.training and torch.is_grad_enabled() and is_distributed():
            # DDP waits for the gradient of every parameter, those of the last mixer that nobody reads among them.
            hidden_states = hidden_states + zero_of_parameters(self.layers[-1].vision_mixer)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache if use_cache else text_cache},
        )

    def _run_layers(
        self,
        causal_mask_mapping: dict[str, torch.Tensor | None],
        layers: slice,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both streams through some of the layers."""
        for decoder_layer, layer_type in list(zip(self.layers, self.config.layer_types))[layers]:
            attention_mask = causal_mask_mapping[layer_type]
            hidden_states, video_states = decoder_layer(
                hidden_states, video_states, attention_mask=attention_mask, **kwargs
            )
        return hidden_states, video_states


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its parameters, or where Accelerate takes them from offload."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))


class VambaModel(VambaPreTrainedModel):
    """Vision tower and decoder."""

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.visual = VambaVisionModel._from_config(config.vision_config)
        self.language_model = VambaTextModel._from_config(config.text_config)
        self.sequence_parallel_group: ProcessGroup | None = None
        self.post_init()

    get_image_features = Qwen2VLModel.get_image_features
    get_video_features = Qwen2VLModel.get_video_features

    def embed_media(self, media: list[Medium]) -> torch.Tensor:
        """The vision tower's output, `(1, num_tokens, hidden_size)`, for images and videos in order."""
        return self._hand_to_decoder(self._run_tower(media).pooler_output)

    def _run_tower(self, media: list[Medium]) -> BaseModelOutputWithPooling:
        device = execution_device(self.visual)
        # To the device first: a copy from pinned memory does not wait, and the conversion is quicker there.
        pixel_values = [pixels.to(device, non_blocking=True) for pixels, _ in media]
        pixel_values = pixel_values[0] if len(media) == 1 else torch.cat(pixel_values)
        # The tower sees single frames: media of one size that follow one another might as well be one.
        grids = [
            (sum(t for t, _, _ in run), *size)
            for size, run in itertools.groupby((grid for _, grid in media), key=lambda grid: grid[1:])
        ]
        return self.visual(
            pixel_values.to(self.visual.dtype),
            grid_thw=torch.tensor(grids, device=device),
            frame_length=math.prod(grids[0][1:]) if len(grids) == 1 else None,
        )

    def _hand_to_decoder(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.to(execution_device(self.language_model), self.language_model.dtype)[None]

    def encode_media(
        self,
        media: list[list[Medium]],
        cache: VambaCache,
        segment_frames: int = SEGMENT_FRAMES,
        num_remaining_tokens: int = 0,
    ) -> None:
        """
        Encodes each row's images and videos, in order, behind what the cache holds for that row, `segment_frames`
        frames at a time: vision tower, mixers, keys and values. Sets `cache.rows`. Memory is sized for
        `num_remaining_tokens` more, which later calls bring. Should it fail, the cache is as it was.
        """
        cache.check_fits(self.config.text_config)
        rows = list(cache.resolve_rows(len(media)))
        vision_config = self.config.vision_config
        max_steps = max(1, segment_frames // vision_config.temporal_patch_size)
        with cache.keeping_videos():
            for row, row_media in enumerate(media):
                if not row_media:
                    continue
                if rows[row] is None:
                    rows[row] = cache.add_video()
                elif rows.count(rows[row]) > 1:
                    raise ValueError(
                        f"Row {row} brings images or videos, but shares its video in the cache with other rows. "
                        "Append to a shared video with `encode_video`, before the batch of questions."
                    )
                video = cache.videos[rows[row]]
                num_tokens = count_tokens(row_media, vision_config.spatial_merge_size)
                for layer_cache in video:
                    layer_cache.reserve(num_tokens + num_remaining_tokens)
                for segment in split_into_segments(row_media, max_steps):
                    self.language_model.encode_video(self.embed_media(segment), video)
        cache.rows = rows

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPast:
        """See [`VambaForConditionalGeneration.forward`]."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden_size = self.config.text_config.hidden_size
        check_text(hidden_size, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        sample_lengths = lengths_of_samples(
            starts_of_samples(position_ids, len(inputs_embeds), attention_mask, cache, use_cache)
        )
        group = self.sequence_parallel_group
        if group is not None and (cache is not None or use_cache):
            raise ValueError(
                "Sequence parallelism keeps no cache: call `forward` without `cache` and `use_cache`, or "
                "end it with `set_sequence_parallel_group(None)`."
            )
        is_kept_together = (
            sample_lengths is not None or group is not None or (cache is None and not use_cache and is_sharded(self))
        )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training and not is_kept_together
        elif use_cache and self.training and self.language_model.gradient_checkpointing:
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing; no cache is kept.")
            use_cache = False

        if sample_lengths is not None and mm_token_type_ids is not None:
            mm_token_type_ids = split_marks(mm_token_type_ids, sample_lengths)
        media = group_media_by_row(
            len(inputs_embeds) if sample_lengths is None else len(sample_lengths),
            self.config.vision_config,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_sample_ids=image_sample_ids,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_sample_ids=video_sample_ids,
            mm_token_type_ids=mm_token_type_ids,
        )
        if group is not None:
            num_tokens = [count_tokens(row, self.config.vision_config.spatial_merge_size) for row in media]
            check_stretches(num_tokens, inputs_embeds, self.config.text_config.mamba_d_conv - 1, group)
        if any(media):
            if is_kept_together or (cache is None and torch.is_grad_enabled() and not use_cache):
                kwargs.update(self._video_stream(media), sample_lengths=sample_lengths, sequence_parallel_group=group)
            else:
                if not isinstance(cache, VambaCache):
                    cache = VambaCache(self.config, cache)
                self.encode_media(media, cache)
        elif cache is None:
            check_no_media_expected(self.config, input_ids if self.training else None, mm_token_type_ids)
            if is_sharded(self) or (self.training and torch.is_grad_enabled() and is_distributed()):
                kwargs.update(self._video_stream([[smallest_medium(self.config.vision_config)]]), is_read=False)
                kwargs["rows"] = [0] * len(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if "video_states" in kwargs and self.training and is_distributed():
            forget_zero_gradients(outputs.last_hidden_state, self._list_parameters_of_media)
        return outputs

    def _list_parameters_of_media(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that images and videos alone run through, and those that nobody reads the results of."""
        layers = self.language_model.layers
        of_media = [layer.alpha for layer in layers] + list(self.visual.parameters())
        for layer in layers:
            of_media += [*layer.cross_attn.parameters(), *layer.vision_mixer.parameters()]
        return of_media, list(layers[-1].vision_mixer.parameters())

    def _video_stream(self, media: list[list[Medium]]) -> dict:
        """The videos of a batch one after another, for a pass through the decoder together with the text."""
        rows, lengths, videos = [], [], []
        for row_media in media:
            if not row_media:
                rows.append(None)
                continue
            # Rows that share their media are given the same objects, and read one video.
            if not (videos and list(map(id, row_media)) == list(map(id, videos[-1]))):
                videos.append(row_media)
                lengths.append(count_tokens(row_media, self.config.vision_config.spatial_merge_size))
            rows.append(len(videos) - 1)
        return {
            "video_states": self._embed_with_gradient(list(itertools.chain(*videos))),
            "video_lengths": lengths,
            "rows": rows,
        }

    def _embed_with_gradient(self, media: list[Medium]) -> torch.Tensor:
        """
        As `embed_media`, with a gradient for the parts of the tower that train. What is frozen keeps no activations:
        it runs a segment at a time, whatever asks its input for a gradient (`enable_input_require_grads` does).
        """
        trained = {
            name
            for name, parameter in self.visual.named_parameters()
            if parameter.requires_grad and torch.is_grad_enabled()
        }
        if not all(name.startswith("merger.") for name in trained):
            return self.embed_media(media)
        max_steps = SEGMENT_FRAMES // self.config.vision_config.temporal_patch_size
        segments = list(split_into_segments(media, max_steps))
        num_segments = len(segments)
        num_missing = count_missing_runs(self, num_segments, execution_device(self.language_model))
        segments += [[smallest_medium(self.config.vision_config)]] * num_missing
        embeds = []
        for segment in segments:
            with torch.no_grad():
                outputs = self._run_tower(segment)
            embeds.append(self._merge(outputs.last_hidden_state) if trained else outputs.pooler_output)
        # Nothing is taken of those beyond the own segments, but the merger's backward pass runs for them as well.
        embeds[num_segments:] = [unread[:0] for unread in embeds[num_segments:]]
        return self._hand_to_decoder(torch.cat(embeds))

    def _merge(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The tower's merger alone, checkpointed where the tower is."""
        if not (self.visual.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return self.visual.merger(hidden_states)
        # A reentrant checkpoint has a gradient only where its input has one.
        return self.visual._gradient_checkpointing_func(self.visual.merger, hidden_states.requires_grad_())


class VambaForConditionalGeneration(VambaPreTrainedModel, VambaGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.model = VambaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_rename_published)
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
        config_dict, _ = Qwen2VLConfig.get_config_dict(pretrained_model_name_or_path)
        if config_dict.get("model_type") != "qwen2_vl" or "vision_mamba_mixer_config" in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} is no Qwen2-VL checkpoint: its config.json says model_type "
                f"{config_dict.get('model_type')!r}, expected 'qwen2_vl' without a Vamba mixer."
            )
        source = Qwen2VLConfig.from_dict(config_dict).to_dict()
        source["text_config"].update(text_config or {})
        for section in (source, source["text_config"], source["vision_config"]):
            section.pop("model_type")
        source.pop("architectures")
        model, info = cls.from_pretrained(
            pretrained_model_name_or_path, config=VambaConfig(**source), output_loading_info=True, **kwargs
        )
        own_parts = (".cross_attn.", ".vision_mixer.", ".alpha")
        missing = [key for key in sorted(info["missing_keys"]) if not any(part in key for part in own_parts)]
        if missing or info["unexpected_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} does not fit Qwen2-VL: missing {missing[:8]}, unexpected "
                f"{sorted(info['unexpected_keys'])[:8]}."
            )
        for layer in model.model.language_model.layers:
            copy_parameters(layer.self_attn, layer.cross_attn)
        return model

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor, **kwargs):
        """See [`Qwen2VLModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor, **kwargs):
        """See [`Qwen2VLModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @takes_cache
    @torch.no_grad()
    def encode_video(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        video_sample_ids: torch.LongTensor | None = None,
        cache: VambaCache | None = None,
        segment_frames: int = SEGMENT_FRAMES,
        num_remaining_tokens: int = 0,
        video_cache_implementation: str | None = None,
    ) -> VambaCache:
        r"""
        Encodes videos without any text, or appends to videos encoded before (a live stream, or a long file in pieces).
        Ask questions against the result with `generate(..., cache=cache.fork())`.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_patches, patch_dim)`):
                Patches of the videos, on any device: a segment at a time moves to the model's.
            video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`):
                Frames (in steps of `temporal_patch_size`), height and width of each video, in patches.
            video_sample_ids (`torch.LongTensor` of shape `(num_videos,)`, *optional*):
                The row that each video belongs to, for a cache of several rows. By default all are of one row, in
                order.
            cache ([`VambaCache`], *optional*): The cache to append to, in place.
            segment_frames (`int`, *optional*, defaults to 64):
                Frames that go through the model at once. Bounds the memory and changes the result by rounding only.
            num_remaining_tokens (`int`, *optional*, defaults to 0):
                Tokens of the video that further calls will append, as the segments of `iter_video_segments` say: the
                memory of the cache is sized for them as well, and does not have to grow.
            video_cache_implementation (`str`, *optional*):
                How a new cache keeps the video: `"dynamic"` (the default), `"quantized"` in 8 bits, `"offloaded"` to
                the host's memory, or `"offloaded_quantized"`. See [`VambaCache`].

        Returns:
            [`VambaCache`]: The cache given, or a new one. A call that fails, for want of memory for one, or that is
            interrupted leaves the cache given as it was.

        Raises:
            ValueError: where patches, grids and rows do not match, or the cache keeps its videos in another way.
        """
        if not isinstance(num_remaining_tokens, int) or num_remaining_tokens < 0:
            raise ValueError(f"`num_remaining_tokens` must be an integer of at least 0, got {num_remaining_tokens!r}.")
        if not isinstance(segment_frames, int) or segment_frames < 1:
            raise ValueError(f"`segment_frames` must be an integer of at least 1, got {segment_frames!r}.")
        if cache is not None and not isinstance(cache, VambaCache):
            raise TypeError(f"`cache` must be a VambaCache, got {type(cache).__name__}.")
        if cache is None:
            cache = VambaCache(self.config, video_cache_implementation=video_cache_implementation)
        else:
            cache.check_video_cache_implementation(video_cache_implementation)
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
        )
        self.model.encode_media(media, cache, segment_frames, num_remaining_tokens)
        if rows_read is None and cache.rows == list(range(len(cache.videos))):
            cache.rows = None  # no text has been read yet: any number of rows may come to read the video
        return cache

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
                Ids to predict, -100 where there is nothing to; shifted inside. The first token of a packed sample is
                never predicted.
            use_cache (`bool`, *optional*):
                Whether to return a [`VambaCache`]. By default as the configuration says, and not in training.
            pixel_values (`torch.Tensor` of shape `(num_image_patches, patch_dim)`, *optional*): Patches of all images.
            pixel_values_videos (`torch.Tensor` of shape `(num_video_patches, patch_dim)`, *optional*): And all videos.
            image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`, *optional*):
                Time, height and width of each image in patches.
            video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`, *optional*): And of each video.
            mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 where an image stands in the prompt, 2 where a video does, else 0: their order within a row. Without
                it a row's images come before its videos.
            image_sample_ids (`torch.LongTensor` of shape `(num_images,)` or `(num_images, 2)`, *optional*):
                The row that each image belongs to, or the sample of a packed row, from 0; or the first and the last
                of those that share it. By default all media are of the only row, or one of each.
            video_sample_ids (`torch.LongTensor` of shape `(num_videos,)`, *optional*): And each video.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last `logits_to_keep` positions only (0: all), or for those that a 1-D tensor
                lists.
            skip_logits (`bool`, *optional*, defaults to `False`):
                Return the loss alone, for which logits are computed where there are labels only, a chunk of positions
                at a time: the same loss with less memory, for long texts.

        Raises:
            ValueError: where media, grids, rows and prompt do not match, naming both sides.

        Example:

        ```python
        >>> import transformers_vamba
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained(path)
        >>> processor = AutoProcessor.from_pretrained(path)
        >>> content = [{"type": "video", "path": "movie.mp4"}, {"type": "text", "text": "What happens?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     tokenize=True,
        ...     add_generation_prompt=True,
        ...     return_dict=True,
        ...     return_tensors="pt",
        ... )
        >>> generated = model.generate(**inputs, max_new_tokens=64)
        >>> processor.batch_decode(generated[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        ```"""
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


# Parameter names of the published research code (which are Qwen2-VL's), for `from_pretrained`.
_RENAME_DECODER = (r"^model(?!\.(language_model|visual))", "model.language_model")
_RENAME_TOWER = (r"^visual", "model.visual")
register_checkpoint_conversion_mapping("VambaModel", [WeightRenaming(*_RENAME_DECODER)], overwrite=True)
register_checkpoint_conversion_mapping(
    "VambaForConditionalGeneration", [WeightRenaming(*_RENAME_TOWER), WeightRenaming(*_RENAME_DECODER)], overwrite=True
)


def _rename_published(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """For `load_state_dict`, by which `Trainer` goes on from what `save_pretrained` has written with these names."""
    for key in list(state_dict):
        if key.startswith(prefix):
            name = key[len(prefix) :]
            for pattern, replacement in (_RENAME_TOWER, _RENAME_DECODER):
                name = re.sub(pattern, replacement, name)
            state_dict[prefix + name] = state_dict.pop(key)
