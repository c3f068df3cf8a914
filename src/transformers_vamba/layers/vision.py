# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's vision tower, with the frames of one size as a batch of the attention instead of one call each."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import QuickGELUActivation
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    PatchEmbed,
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    VisionMlp,
    eager_attention_forward,
)

from ..inputs.media import Medium, split_into_segments
from ..ops.activation import quick_gelu
from ..ops.rotary import rotate_patches
from ..parallel.devices import execution_device
from ..parallel.ranks import count_missing_runs, smallest_medium


SEGMENT_FRAMES = 64  # that go through the vision tower at once


class VambaPatchEmbed(PatchEmbed):
    """The convolution's windows are the patches, which do not overlap: it is a matrix product."""

    @force_accelerate_hooks(["proj"])  # its weight is read past its forward
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))


class VambaVisionMlp(VisionMlp):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        is_quick_gelu = isinstance(self.act, QuickGELUActivation)
        return self.fc2(quick_gelu(hidden_states) if is_quick_gelu else self.act(hidden_states))


class VambaVisionAttention(VisionAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int | None = None,
        frame_length: int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Attention of the patches of each frame among themselves.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_patches, embed_dim)`): The frames, one after another.
            cu_seqlens (`torch.IntTensor` of shape `(num_frames + 1,)`): Where each frame begins and ends.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines, `(num_patches, head_dim)`.
            max_seqlen (`int`, *optional*): Patches of the largest frame.
            frame_length (`int`, *optional*): Patches per frame, if all have the same number.
        """
        if frame_length is None:
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen=max_seqlen, **kwargs)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        states = rotate_patches(qkv, *position_embeddings)
        query, key, value = (each.unflatten(0, (-1, frame_length)).transpose(1, 2) for each in states)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, _ = attention_interface(
            self, query, key, value, attention_mask=None, scaling=self.scaling, is_causal=False, **kwargs
        )
        return self.proj(attn_output.reshape(hidden_states.shape))


class VambaVisionModel(Qwen2VisionTransformerPretrainedModel):
    """[`Qwen2VisionTransformerPretrainedModel`], which takes `frame_length` as well (see [`VambaVisionAttention`])."""

    def __init__(self, config: Qwen2VLVisionConfig):
        super().__init__(config)
        self.patch_embed = VambaPatchEmbed(
            config.patch_size, config.temporal_patch_size, config.in_channels, config.embed_dim
        )
        for block in self.blocks:
            block.attn = VambaVisionAttention(config)
            block.mlp = VambaVisionMlp(config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_act)
        self.post_init()

    def encode_media(self, media: list[Medium]) -> BaseModelOutputWithPooling:
        """The outputs for images and videos in order, on the device of the tower."""
        device = execution_device(self)
        # To the device first: a copy from pinned memory does not wait, and the conversion is quicker there.
        pixel_values = [medium.pixel_values.to(device, non_blocking=True) for medium in media]
        pixel_values = pixel_values[0] if len(media) == 1 else torch.cat(pixel_values)
        # The tower sees single frames: consecutive media of one size might as well be one.
        grids = [
            (sum(t for t, _, _ in run), *size)
            for size, run in itertools.groupby((medium.grid for medium in media), key=lambda grid: grid[1:])
        ]
        return self(
            pixel_values.to(self.dtype),
            grid_thw=torch.tensor(grids, device=device),
            frame_length=math.prod(grids[0][1:]) if len(grids) == 1 else None,
        )

    def encode_with_gradient(self, media: list[Medium]) -> torch.Tensor:
        """
        The merged tokens, `(num_tokens, hidden_size)`, with a gradient for the pixels that take one and for the parts
        of the tower that train. What is frozen keeps no activations: it runs one segment at a time, even if something
        asks its input for a gradient (`enable_input_require_grads` does).
        """
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        takes_gradient = any(medium.pixel_values.requires_grad for medium in media)
        if torch.is_grad_enabled() and (takes_gradient or not all(name.startswith("merger.") for name in trained)):
            return self.encode_media(media).pooler_output
        segments = list(split_into_segments(media, SEGMENT_FRAMES // self.config.temporal_patch_size))
        num_segments = len(segments)
        segments += [[smallest_medium(self.config)]] * count_missing_runs(self, num_segments, execution_device(self))
        embeds = [self._encode_frozen(segment) for segment in segments]
        # Nothing is read of those beyond the own segments, but the merger's backward pass runs for them as well.
        embeds[num_segments:] = [unread[:0] for unread in embeds[num_segments:]]
        return torch.cat(embeds)

    def _encode_frozen(self, media: list[Medium]) -> torch.Tensor:
        """The merged tokens, with a gradient for the merger alone, if it trains."""
        with torch.no_grad():
            outputs = self.encode_media(media)
        if not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.merger.parameters())):
            return outputs.pooler_output
        if not (self.gradient_checkpointing and self.training):
            return self.merger(outputs.last_hidden_state)
        # A reentrant checkpoint has a gradient only if its input has one.
        return self._gradient_checkpointing_func(self.merger, outputs.last_hidden_state.requires_grad_())
