# SPDX-License-Identifier: Apache-2.0
"""One layer of the decoder: Qwen2-VL's, plus cross-attention that reads a video and a mixer that updates it."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    eager_attention_forward,
)

from ..cache.layers import VambaVideoLayer
from ..compat import CACHE_NAME
from ..configuration_vamba import VambaTextConfig
from ..inputs.checks import video_device_error, video_dtype_error
from ..ops.flash_attention import attend_with_flash, prefers_flash
from ..ops.flash_decoding import can_flash_decode, flash_decode
from ..ops.quantized_attention import QuantizedStates, attend_quantized
from ..ops.rotary import rotate_text
from ..ops.step_kernels import can_fuse, gate_and_up, mix_and_norm
from ..ops.triton_support import are_launches_recorded
from ..parallel.gradient_checkpointing import plain_checkpoint, run_in_parts
from ..parallel.sequence import attend_across_ranks, state_of_earlier_ranks
from .mixer import VambaVisionMixer
from .video_context import VideoContext


# A run of text tokens, through the rows of a batch: how many they are, and the keys and values of the videos that they
# read, of shape `(num_videos, num_key_value_heads, num_tokens, head_dim)`: as many text tokens each. Both are tensors,
# both [`QuantizedStates`], or both `None` if the tokens read nothing.
VideoRead = tuple[int, Any, Any]


class VambaMLP(Qwen2MLP):
    """[`Qwen2MLP`], with gate and up as one kernel in a decoding step."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.hidden_act == "silu" and can_fuse(hidden_states, self.gate_proj, self.up_proj):
            return self.down_proj(gate_and_up(hidden_states, self.gate_proj, self.up_proj))
        return super().forward(hidden_states)


class VambaSelfAttention(Qwen2VLAttention):
    """[`Qwen2VLAttention`], with the rotation by positions as one kernel."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Arguments and outputs as in [`Qwen2VLAttention`]."""
        cache = kwargs.pop(CACHE_NAME, None)
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (projection(hidden_states).view(shape) for projection in projections)
        query, key = rotate_text(query, key, *position_embeddings)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        kwargs["sliding_window"] = self.sliding_window
        attn_output, attn_weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(attn_output.reshape(*hidden_states.shape[:2], -1)), attn_weights


class VambaCrossAttention(Qwen2VLAttention):
    """
    Attention of the text over a video: no mask, no positions. The rows of the batch, or samples of a packed row, that
    read one video, and the heads that share a key, are folded into the query dimension, so keys and values are neither
    masked, padded nor repeated.
    """

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        self.num_key_value_groups = 1  # as the attention implementations see it

    def project_video(self, video_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `(1, num_key_value_heads, num_tokens, head_dim)`, of `(1, num_tokens, hidden_size)`."""
        shape = (1, video_states.shape[1], -1, self.head_dim)
        keys = self.k_proj(video_states).view(shape).transpose(1, 2)
        values = self.v_proj(video_states).view(shape).transpose(1, 2)
        return keys, values

    def forward(
        self,
        hidden_states: torch.Tensor,
        reads: list[VideoRead],
        sequence_parallel_group: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The normed text.
            reads (`list[VideoRead]`): What the tokens read, in order; zeros come back for those that read nothing.
            sequence_parallel_group (`ProcessGroup`, *optional*): The processes that hold a part of the video each.
        """
        query_states = self.q_proj(hidden_states).flatten(0, 1)
        attend = partial(self._attend, group=sequence_parallel_group)
        outputs = []
        for query, (_, keys, values) in zip(query_states.split([num_tokens for num_tokens, *_ in reads]), reads):
            if keys is None:
                outputs.append(torch.zeros_like(query))
                continue
            if keys.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
                raise video_dtype_error(keys.dtype, query.dtype, "read")
            if keys.device != query.device:
                raise video_device_error(keys.device, query.device, "read")
            # (num_videos, num_key_value_heads, num_tokens, heads that share a key, head_dim)
            heads_per_key = self.num_heads // self.num_key_value_heads
            query = query.reshape(keys.shape[0], -1, keys.shape[1], heads_per_key, self.head_dim).transpose(1, 2)
            if isinstance(keys, QuantizedStates):
                attn_output = attend_quantized(attend, query.flatten(2, 3), keys, values, self.scaling)
            else:
                attn_output = attend(query.flatten(2, 3), keys, values)
            attn_output = attn_output.transpose(1, 2).unflatten(2, query.shape[2:4]).transpose(1, 2)
            outputs.append(attn_output.reshape(-1, query_states.shape[-1]))
        return self.o_proj(outputs[0] if len(outputs) == 1 else torch.cat(outputs)).view(hidden_states.shape)

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: ProcessGroup | None
    ) -> torch.Tensor:
        """Of a query `(num_videos, num_heads, num_queries, head_dim)`; the output has its middle axes exchanged."""
        if group is not None:
            return attend_across_ranks(query, keys, values, self.scaling, group).transpose(1, 2)
        if self.config._attn_implementation == "sdpa" and prefers_flash(query, keys, values):
            if are_launches_recorded() and can_flash_decode(query):
                return flash_decode(query, keys, values, self.scaling)
            return attend_with_flash(query, keys, values, self.scaling).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        attn_output, _ = attention_interface(
            self, query, keys, values, None, dropout=dropout, scaling=self.scaling, is_causal=False
        )
        return attn_output


class VambaDecoderLayer(Qwen2VLDecoderLayer):
    """
    One layer of both streams (see [`modeling_vamba`] for the formula; its α is `alpha`).

    Keys and values are made of the video as it enters the layer. The last layer's mixer has weights in the checkpoint,
    but nothing reads its output, so it does not run.
    """

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        # One kernel instead of Qwen2-VL's eight: a decoding step is made of little else than launching kernels.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = VambaSelfAttention(config, layer_idx)
        self.cross_attn = VambaCrossAttention(config, layer_idx)
        self.mlp = VambaMLP(config)
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.vision_mixer = VambaVisionMixer(config)
        self.updates_video = layer_idx < config.num_hidden_layers - 1
        self.checkpoint_part: Callable | None = None  # the function that checkpoints its parts in training

    def encode_video(self, video_states: torch.Tensor, layer_cache: VambaVideoLayer) -> torch.Tensor:
        """
        The video's half alone: appends the keys and values of `(1, num_tokens, hidden_size)` to the cache, moves its
        mixer state on, and returns the tokens for the next layer.
        """
        layer_cache.update(*self.cross_attn.project_video(video_states))
        if self.updates_video:
            video_states, layer_cache.mixer_state = self.vision_mixer(
                video_states, [video_states.shape[1]], layer_cache.mixer_state
            )
        return video_states

    def checkpoint_in_parts(self, checkpoint: partial | None, layers_per_checkpoint: int) -> None:
        """
        Lets the layer checkpoint its own parts, instead of being checkpointed as a whole, if `checkpoint` can do that
        (a reentrant one cannot) and this layer is to be checkpointed. `None` ends it.
        """
        self.checkpoint_part = None
        if checkpoint is None or checkpoint.keywords["use_reentrant"] or not self.gradient_checkpointing:
            return
        self._gradient_checkpointing_func = run_in_parts
        # Within a checkpoint of several layers the inputs of each are kept only while they are needed.
        self.checkpoint_part = checkpoint if layers_per_checkpoint == 1 else plain_checkpoint(checkpoint)

    def forward(
        self,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None = None,
        video_context: VideoContext | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The text.
            video_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`, *optional*):
                The videos, one after another, if they go through the decoder together with the text.
            video_context ([`VideoContext`], *optional*): Which rows read which video; `None` if no row reads any.
            kwargs: For the self-attention, as in [`Qwen2VLAttention`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Text and video for the next layer.
        """
        # Whole layers that are checkpointed (with `use_reentrant=True`, say) come here within their checkpoint.
        checkpoint = self.checkpoint_part if self.training and torch.is_grad_enabled() else None
        update_text: Callable = partial(self.update_text, video_context=video_context, **kwargs)
        run = update_text if checkpoint is None else partial(checkpoint, update_text)
        hidden_states = run(hidden_states, video_states)
        if video_states is not None and video_context is not None and self.updates_video:
            group, state = video_context.group, None
            if group is not None:
                state = state_of_earlier_ranks(self.vision_mixer, video_states, group, checkpoint)
            video_states, _ = self.vision_mixer(video_states, video_context.lengths, state, checkpoint)
        return hidden_states, video_states

    def update_text(
        self,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None,
        video_context: VideoContext | None,
        **kwargs,
    ) -> torch.Tensor:
        """The text's half; arguments as in `forward`."""
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        if video_context is not None:
            reads = self._read_videos(video_states, video_context)
            video_context.watch(self.cross_attn, hidden_states, reads)
            cross_output = self.cross_attn(hidden_states, reads, video_context.group)
            reads_video = video_context.mark_tokens(cross_output.device)
            if reads_video is None and can_fuse(residual, self.post_attention_layernorm):
                norm = self.post_attention_layernorm
                hidden_states, normed = mix_and_norm(residual, attn_output, cross_output, self.alpha, norm)
                return hidden_states + self.mlp(normed)
            attn_output = self._mix(attn_output, cross_output, reads_video)
        hidden_states = residual + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _mix(
        self, attn_output: torch.Tensor, cross_output: torch.Tensor, reads_video: torch.Tensor | None
    ) -> torch.Tensor:
        """`alpha` of the self-attention and the rest of what the tokens read; all of it for tokens that read none."""
        alpha = self.alpha.clamp(0, 1)
        if torch.is_grad_enabled():
            # Straight-through: the clamped value forwards, the gradient as if there were no clamp.
            alpha = self.alpha + (alpha - self.alpha).detach()
        if reads_video is not None:
            alpha = torch.where(reads_video, alpha, torch.ones_like(alpha))
        return torch.lerp(cross_output, attn_output, alpha.to(attn_output.dtype))

    def _read_videos(self, video_states: torch.Tensor | None, context: VideoContext) -> list[VideoRead]:
        """What the rows read, of the cache or of videos that come with them: one read per run of rows on one video."""
        rows, text_lengths = context.rows, context.text_lengths
        if video_states is None:
            assert context.cache is not None  # what is not given is in it
            videos = context.cache.read_videos(self.layer_idx, rows)
        else:
            keys, values = self.cross_attn.project_video(video_states)
            if rows == list(range(len(context.lengths))) and len({*context.lengths}) == len({*text_lengths}) == 1:
                # As many videos as rows, all of one length: a batch, by a change of view.
                keys, values = (x[0].unflatten(1, (len(rows), -1)).transpose(0, 1) for x in (keys, values))
                return [(sum(text_lengths), keys, values)]
            videos = list(zip(keys.split(context.lengths, dim=2), values.split(context.lengths, dim=2)))
        return [
            (sum(length for _, length in run), *((None, None) if video is None else videos[video]))
            for video, run in itertools.groupby(zip(rows, text_lengths), key=lambda row: row[0])
        ]
