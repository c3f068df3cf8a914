# SPDX-License-Identifier: Apache-2.0
"""One layer of the decoder: Qwen2-VL's, beside which a video is read by cross-attention and updated by a mixer."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
    eager_attention_forward,
)

from ..cache.cache import VambaCache
from ..cache.layers import VambaVideoLayer
from ..configuration_vamba import VambaTextConfig
from ..inputs.checks import video_dtype_error
from ..ops.quantized_attention import QuantizedStates, attend_quantized
from ..parallel.sequence import attend_across_ranks, state_of_earlier_ranks
from .mixer import VambaVisionMixer


# A run of text tokens, through the rows of a batch: how many they are, and the keys and values of the videos that they
# read, of shape `(num_videos, num_key_value_heads, num_tokens, head_dim)`: as many text tokens each. `None` where they
# read nothing.
VideoStates = torch.Tensor | QuantizedStates
VideoRead = tuple[int, VideoStates | None, VideoStates | None]


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
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )

        def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            if sequence_parallel_group is not None:
                output = attend_across_ranks(query, keys, values, self.scaling, sequence_parallel_group)
                return output.transpose(1, 2)
            attn_output, _ = attention_interface(
                self,
                query,
                keys,
                values,
                None,
                dropout=0.0 if not self.training else self.attention_dropout,
                scaling=self.scaling,
                is_causal=False,
            )
            return attn_output

        outputs = []
        for query, (_, keys, values) in zip(query_states.split([num_tokens for num_tokens, *_ in reads]), reads):
            if keys is None:
                outputs.append(torch.zeros_like(query))
                continue
            if keys.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
                raise video_dtype_error(keys.dtype, query.dtype, "read")
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


class VambaDecoderLayer(Qwen2VLDecoderLayer):
    """
    One layer of both streams (`α` is `alpha`, kept in [0, 1]):

        text:  h += α * self_attn(n) + (1 - α) * cross_attn(n, v),  n = input_layernorm(h)
               h += mlp(post_attention_layernorm(h))
        video: v += vision_mixer(v)

    The keys and values are of `v` as it enters the layer. The last layer's mixer has weights in the checkpoint, but
    nobody reads what it would give, so it does not run.
    """

    def __init__(self, config: VambaTextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        # One kernel instead of Qwen2-VL's eight: a decoding step is made of little else than launching kernels.
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = VambaCrossAttention(config, layer_idx)
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

    def forward(
        self,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None = None,
        video_lengths: list[int] | None = None,
        sequence_parallel_group: ProcessGroup | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The text.
            video_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`, *optional*):
                The videos, one behind the other, where they go through the decoder together with the text.
            video_lengths (`list[int]`, *optional*): Number of tokens of each video in `video_states`.
            sequence_parallel_group (`ProcessGroup`, *optional*):
                The processes whose `video_states` are consecutive stretches of one video.
            kwargs: See `update_text`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Text and video for the next layer.
        """
        # Whole layers that are checkpointed, by `use_reentrant=True` for one, come here within their checkpoint.
        checkpoint = self.checkpoint_part if self.training and torch.is_grad_enabled() else None
        update_text = partial(
            self.update_text, video_lengths=video_lengths, sequence_parallel_group=sequence_parallel_group, **kwargs
        )
        run = update_text if checkpoint is None else partial(checkpoint, update_text)
        hidden_states = run(hidden_states, video_states)
        if video_states is not None and self.updates_video:
            state = None
            if sequence_parallel_group is not None:
                state = state_of_earlier_ranks(self.vision_mixer, video_states, sequence_parallel_group, checkpoint)
            video_states, _ = self.vision_mixer(video_states, video_lengths, state, checkpoint)
        return hidden_states, video_states

    def update_text(
        self,
        hidden_states: torch.Tensor,
        video_states: torch.Tensor | None,
        video_lengths: list[int] | None,
        video_cache: VambaCache | None = None,
        rows: list[int | None] | None = None,
        text_lengths: list[int] | None = None,
        has_video: torch.Tensor | None = None,
        sequence_parallel_group: ProcessGroup | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The text's half.

        Args:
            hidden_states, video_states, video_lengths, sequence_parallel_group: As in `forward`.
            video_cache ([`VambaCache`], *optional*): The cache of the videos, where they have been encoded before.
            rows (`list[int | None]`, *optional*):
                The video that each row, or sample of a packed row, reads; `None` where none reads any.
            text_lengths (`list[int]`, *optional*): Number of text tokens of each row, or sample of a packed row.
            has_video (`torch.BoolTensor` of shape `(batch_size, 1, 1)` or `(1, sequence_length, 1)`, *optional*):
                Which rows, or tokens of a packed row, read a video; `None` where all do.
            kwargs: For the self-attention, as in [`Qwen2VLAttention`].
        """
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        if rows is not None:
            if video_states is not None:
                reads = self._read_stream(video_states, video_lengths, rows, text_lengths)
            else:
                reads = _read_videos(video_cache.read_videos(self.layer_idx, rows), rows, text_lengths)
            cross_output = self.cross_attn(hidden_states, reads, sequence_parallel_group)
            alpha = self.alpha.clamp(0, 1)
            if torch.is_grad_enabled():
                # Straight-through: the clamped value forwards, the gradient as if there were no clamp.
                alpha = self.alpha + (alpha - self.alpha).detach()
            if has_video is not None:
                alpha = torch.where(has_video, alpha, torch.ones_like(alpha))
            attn_output = torch.lerp(cross_output, attn_output, alpha.to(attn_output.dtype))
        hidden_states = residual + attn_output

        residual = hidden_states
        return residual + self.mlp(self.post_attention_layernorm(hidden_states))

    def _read_stream(
        self, video_states: torch.Tensor, video_lengths: list[int], rows: list[int | None], text_lengths: list[int]
    ) -> list[VideoRead]:
        """What the rows read of videos that come with them, `(1, num_tokens, hidden_size)`."""
        keys, values = self.cross_attn.project_video(video_states)
        if rows == list(range(len(video_lengths))) and len(set(video_lengths)) == len(set(text_lengths)) == 1:
            # As many videos as rows, all of one length: a batch, by a change of view.
            keys, values = (x[0].unflatten(1, (len(rows), -1)).transpose(0, 1) for x in (keys, values))
            return [(sum(text_lengths), keys, values)]
        videos = list(zip(keys.split(video_lengths, dim=2), values.split(video_lengths, dim=2)))
        return _read_videos(videos, rows, text_lengths)


def _read_videos(
    videos: list[tuple[VideoStates, VideoStates] | None], rows: list[int | None], text_lengths: list[int]
) -> list[VideoRead]:
    """What the rows read of videos held one by one: a read for consecutive rows of one video."""
    return [
        (sum(length for _, length in run), *((None, None) if video is None else videos[video]))
        for video, run in itertools.groupby(zip(rows, text_lengths), key=lambda row: row[0])
    ]
