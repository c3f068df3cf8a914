# SPDX-License-Identifier: Apache-2.0
"""Vamba by its definition, in float64: one row at a time, one token after the other, no padding, no cache."""

import copy

import torch
from torch.nn.functional import conv1d, pad, silu, softplus

from transformers_vamba import VambaForConditionalGeneration
from transformers_vamba.layers.mixer import VambaVisionMixer


def reference_mixer(block: VambaVisionMixer, video_states: torch.Tensor) -> torch.Tensor:
    """`v + mixer(norm(v))` of one sequence `(num_tokens, hidden_size)`, by the definition of Mamba-2, in float64."""
    block = copy.deepcopy(block).cpu().double()
    mixer, residual = block.mixer, video_states.cpu().double()
    normed = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-5) * block.norm.weight
    gate, conv_inputs, dt = mixer.in_proj(normed).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
    conv_inputs = pad(conv_inputs.T, (mixer.conv_kernel_size - 1, 0))
    mixed = silu(conv1d(conv_inputs, mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.conv_dim)).T
    groups_size = mixer.n_groups * mixer.state_size
    x, B, C = mixed.split([mixer.intermediate_size, groups_size, groups_size], -1)
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    B, C = (y.unflatten(-1, (mixer.n_groups, -1)) for y in (B, C))
    y, _ = reference_scan(x, softplus(dt + mixer.dt_bias), -mixer.A_log.exp(), B, C, mixer.D)
    y = (y.flatten(1) * silu(gate)).unflatten(-1, (mixer.n_groups, -1))
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * mixer.norm.weight
    return residual + mixer.out_proj(y)


def reference_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The recurrence of one sequence, in the dtype of `x`: outputs, and the state after it. Shapes as in
    `transformers_vamba.ops.scan.scan`; `dt` comes after its bias and softplus.
    """
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (y.repeat_interleave(heads_per_group, 1) for y in (B, C))
    state = x.new_zeros(*x.shape[1:], B.shape[-1]) if state is None else state
    outputs = []
    # `x[t]` of each token would have a gradient of the size of all tokens.
    for x_t, dt_t, B_t, C_t in zip(x, dt, B, C):
        state = state * (dt_t * A).exp()[:, None, None] + torch.einsum("h,hp,hn->hpn", dt_t, x_t, B_t)
        outputs.append(torch.einsum("hpn,hn->hp", state, C_t) + D[:, None] * x_t)
    return torch.stack(outputs), state


def rms_norm(norm, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0, 1, ... of queries or keys `(num_heads, num_tokens, head_dim)`: each pair (i, i + half)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    x1, x2 = x.split(half, dim=-1)
    return torch.cat([x1 * angles.cos() - x2 * angles.sin(), x2 * angles.cos() + x1 * angles.sin()], dim=-1)


def attend(attn, x: torch.Tensor, source: torch.Tensor, theta: float | None = None) -> torch.Tensor:
    """
    Attention of the tokens `x` to those of `source`, `(num_tokens, hidden_size)` both: causal and with rotary
    positions where `theta` is given, else to all and without positions.
    """
    query, key, value = (
        proj(y).unflatten(-1, (-1, attn.head_dim)).transpose(0, 1)
        for proj, y in ((attn.q_proj, x), (attn.k_proj, source), (attn.v_proj, source))
    )
    key, value = (y.repeat_interleave(len(query) // len(key), dim=0) for y in (key, value))
    if theta is not None:
        query, key = rotate(query, theta), rotate(key, theta)
    scores = query @ key.transpose(1, 2) / attn.head_dim**0.5
    if theta is not None:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return attn.o_proj((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))


@torch.no_grad()
def reference_logits(
    model: VambaForConditionalGeneration,
    input_ids: torch.Tensor,
    media: list[tuple[torch.Tensor, tuple[int, int, int]]],
) -> torch.Tensor:
    """
    Logits `(num_tokens, vocab_size)` of one row: `input_ids` of shape `(num_tokens,)`, without padding, and the pixels
    and grid of each image and video in order. The vision tower is Qwen2-VL's, one image or video at a time.
    """
    model = copy.deepcopy(model).double()
    decoder = model.model.language_model
    theta = model.config.text_config.rope_parameters["rope_theta"]
    video = None
    if media:
        towers = [model.model.visual(pixels.double(), grid_thw=torch.tensor([grid])) for pixels, grid, *_ in media]
        video = torch.cat([tower.pooler_output for tower in towers])

    text = decoder.embed_tokens.weight[input_ids]
    for layer in decoder.layers:
        normed = rms_norm(layer.input_layernorm, text)
        mixed = attend(layer.self_attn, normed, normed, theta)
        if video is not None:
            alpha = layer.alpha.clamp(0, 1)
            mixed = alpha * mixed + (1 - alpha) * attend(layer.cross_attn, normed, video)
            video = reference_mixer(layer.vision_mixer, video)
        text = text + mixed
        normed = rms_norm(layer.post_attention_layernorm, text)
        text = text + layer.mlp.down_proj(silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
    return model.lm_head(rms_norm(decoder.norm, text))
