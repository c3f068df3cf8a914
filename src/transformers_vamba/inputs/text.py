# SPDX-License-Identifier: Apache-2.0
"""Positions and attention masks of the text."""

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..compat import CACHE_NAME
from ..configuration_vamba import VambaTextConfig


def resolve_positions(
    position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, text_cache: Cache | None
) -> torch.Tensor:
    """Text positions of shape `(batch_size, sequence_length)`."""
    if position_ids is None:
        past_length = text_cache.get_seq_length() if text_cache is not None else 0
        position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        return position_ids.expand(inputs_embeds.shape[0], -1)
    # Qwen2-VL's three axes (or four, with the text positions in front) are all equal here.
    return position_ids[0] if position_ids.ndim == 3 else position_ids


def make_masks(
    config: VambaTextConfig,
    attention_mask: torch.Tensor | dict | None,
    inputs_embeds: torch.Tensor,
    text_cache: Cache | None,
    position_ids: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """The mask of each type of layer, unless they are made already."""
    if isinstance(attention_mask, dict):
        return attention_mask
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        CACHE_NAME: text_cache,
        "position_ids": position_ids,
    }
    masks = {"full_attention": create_causal_mask(**arguments)}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks
