# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's vision tower, with the frames of one size as a batch of the attention instead of one call each."""

import itertools
import math
from collections.abc import Callable
from typing import Any

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
    Qwen2VLVisionBlock,
    VisionAttention,
    VisionMlp,
    eager_attention_forward,
)
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids

from ..inputs.media import Medium, split_into_segments
from ..ops.activation import quick_gelu
from ..ops.branch import can_fuse_branch, close_branch, has_hooks, open_branch
from ..ops.float8 import Rows, apply_linear, round_rows, takes_rows
from ..ops.gelu_linear import can_fuse_gelu, quick_gelu_linear
from ..ops.rotary import rotate_patches
from ..parallel.devices import copy_aside, execution_device
from ..parallel.ranks import count_missing_runs, smallest_medium


SEGMENT_FRAMES = 64  # that go through the vision tower at once


class VambaPatchEmbed(PatchEmbed):
    """The convolution's windows are the patches, which do not overlap: it is a matrix product."""

    @force_accelerate_hooks(["proj"])  # its weight is read past its forward
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight
        return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1))


class VambaVisionMlp(VisionMlp):
    def forward(self, hidden_states: torch.Tensor | Rows, total: torch.Tensor | None = None) -> torch.Tensor:
        """`total` is what the output is added to, see [`ops.branch`]."""
        is_quick_gelu = isinstance(self.act, QuickGELUActivation)
        if is_quick_gelu and not isinstance(hidden_states, Rows) and can_fuse_gelu(hidden_states, self.fc1):
            hidden_states = quick_gelu_linear(hidden_states, self.fc1)
        else:
            hidden_states = apply_linear(self.fc1, hidden_states)
            if is_quick_gelu and takes_rows(self.fc2, hidden_states):
                return apply_linear(self.fc2, round_rows(hidden_states, function="quick_gelu"))
            hidden_states = quick_gelu(hidden_states) if is_quick_gelu else self.act(hidden_states)
        return self.fc2(hidden_states) if total is None else close_branch(total, hidden_states, self.fc2)


class VambaVisionAttention(VisionAttention):
    def forward(
        self,
        hidden_states: torch.Tensor | Rows,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int | None = None,
        frame_length: int | None = None,
        total: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Attention of the patches of each frame among themselves.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_patches, embed_dim)`):
                The frames, one after another; [`Rows`] with `frame_length` alone.
            cu_seqlens (`torch.IntTensor` of shape `(num_frames + 1,)`): Where each frame begins and ends.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): Cosines and sines, `(num_patches, head_dim)`.
            max_seqlen (`int`, *optional*): Patches of the largest frame.
            frame_length (`int`, *optional*): Patches per frame, if all have the same number.
            total (`torch.Tensor` of shape `(num_patches, embed_dim)`, *optional*):
                What the output is added to, see [`ops.branch`]; with `frame_length` alone.
        """
        if frame_length is None:
            return super().forward(hidden_states, cu_seqlens, position_embeddings, max_seqlen=max_seqlen, **kwargs)
        qkv = apply_linear(self.qkv, hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        states = rotate_patches(qkv, *position_embeddings)
        query, key, value = (each.unflatten(0, (-1, frame_length)).transpose(1, 2) for each in states)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, _ = attention_interface(
            self, query, key, value, attention_mask=None, scaling=self.scaling, is_causal=False, **kwargs
        )
        attn_output = attn_output.reshape(-1, self.dim)
        if takes_rows(self.proj, attn_output):
            return apply_linear(self.proj, round_rows(attn_output))
        return self.proj(attn_output) if total is None else close_branch(total, attn_output, self.proj)


class VambaVisionBlock(Qwen2VLVisionBlock):
    """
    [`Qwen2VLVisionBlock`]. On a GPU, if nothing takes a gradient, its sums are part of its matrix products, or its
    norms round the inputs of products in float8.
    """

    def __init__(self, config: Qwen2VLVisionConfig):
        nn.Module.__init__(self)  # the parent's own makes modules that these would replace
        self.norm1, self.norm2 = (nn.LayerNorm(config.embed_dim, eps=1e-6) for _ in range(2))
        self.attn: Any = VambaVisionAttention(config)
        self.mlp: Any = VambaVisionMlp(config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, *, frame_length: int | None = None, **kwargs) -> torch.Tensor:
        """Arguments as in [`VambaVisionAttention`]."""
        if frame_length is None:
            return super().forward(hidden_states, **kwargs)
        kwargs["frame_length"] = frame_length
        hidden_states = self._run(self.attn, hidden_states, self.norm1, self.attn.qkv, self.attn.proj, **kwargs)
        return self._run(self.mlp, hidden_states, self.norm2, self.mlp.fc1, self.mlp.fc2)

    def _run(
        self, branch: Any, hidden_states: torch.Tensor, norm: Any, first: nn.Module, last: Any, **kwargs
    ) -> torch.Tensor:
        """`hidden_states + branch(norm(hidden_states))`, of a branch between two linear layers."""
        if can_fuse_branch(hidden_states, branch, norm, last):
            normed, total = open_branch(hidden_states, norm, last)
            return branch(normed, total=total, **kwargs)
        if type(norm) is nn.LayerNorm and not has_hooks(branch) and takes_rows(first, hidden_states, norm):
            return hidden_states + branch(round_rows(hidden_states, norm), **kwargs)
        return hidden_states + branch(norm(hidden_states), **kwargs)


class VambaVisionModel(Qwen2VisionTransformerPretrainedModel):
    """[`Qwen2VisionTransformerPretrainedModel`], which takes `frame_length` as well (see [`VambaVisionAttention`])."""

    def __init__(self, config: Qwen2VLVisionConfig):
        super().__init__(config)
        self.patch_embed = VambaPatchEmbed(
            config.patch_size, config.temporal_patch_size, config.in_channels, config.embed_dim
        )
        self.blocks = nn.ModuleList([VambaVisionBlock(config) for _ in range(config.depth)])
        self.post_init()

    def encode_media(self, media: list[Medium]) -> BaseModelOutputWithPooling:
        """The outputs for images and videos in order, on the device of the tower."""
        device = execution_device(self)
        # To the device first: the conversion is quicker there.
        pixel_values = [copy_aside(medium.pixel_values, device) for medium in media]
        pixel_values = pixel_values[0] if len(media) == 1 else torch.cat(pixel_values)
        # The tower sees single frames: consecutive media of one size might as well be one.
        grids = [
            (sum(t for t, _, _ in run), *size)
            for size, run in itertools.groupby((medium.grid for medium in media), key=lambda grid: grid[1:])
        ]
        # On the host, where sizes are read without waiting for what the GPU computes: the segment before.
        grid_thw = torch.tensor(grids)
        cu_seqlens, max_seqlen = get_vision_attention_seqlens(grid_thw, self.config)
        return self(
            pixel_values.to(self.dtype),
            grid_thw=grid_thw,
            position_ids=copy_aside(get_vision_position_ids(grid_thw, self.spatial_merge_size), device),
            cu_seqlens=copy_aside(cu_seqlens, device),
            max_seqlen=max_seqlen,
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
