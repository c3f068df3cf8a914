# SPDX-License-Identifier: Apache-2.0
"""
Which stretches of a video the tokens of an answer read, if they read a share of it (`video_read_share`).

The cross-attention has neither mask nor positions, so any part of a video can be read. The prompt reads all of it, and
the tokens after it read what it has read most.
"""

import math

import torch

from .steps import VideoSteps


STEPS_PER_STRETCH = 4  # 8 frames of a video
LEAST_STRETCHES = 8  # so many are read at least: of a short video less would save nothing, and answers suffer


def check_read_share(video_read_share: float | None) -> None:
    """Raises a `ValueError` for a share that does not exist."""
    if video_read_share is None:
        return
    is_number = isinstance(video_read_share, (int, float)) and not isinstance(video_read_share, bool)
    if not is_number or not 0 < video_read_share <= 1:
        raise ValueError(
            "`video_read_share`, the share of a video's tokens that is read for each token of an answer, must be a "
            f"number above 0 and at most 1, or None for all, got {video_read_share!r}."
        )


def stretches_of(steps: VideoSteps) -> torch.Tensor:
    """The number of tokens of each stretch of a video, `(num_stretches,)`, on the CPU."""
    return torch.stack([stretch.sum() for stretch in steps.num_tokens.split(STEPS_PER_STRETCH)])


def num_read(num_tokens: int, longest_stretch: int, video_read_share: float) -> int:
    """How many of a video's tokens are read: the share, but at least as many as some stretches have, or all."""
    least = LEAST_STRETCHES * longest_stretch
    return min(num_tokens, max(least, math.ceil(round(num_tokens * video_read_share, 6))))


def choose(weights: torch.Tensor, stretches: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    The indices, in order, of the tokens to read: the most of what was read that so many tokens can have. Stretches are
    taken by what was read of each of their tokens, and the last one is cut to what is left.

    Args:
        weights (`torch.Tensor` of shape `(num_stretches,)`): How much of each stretch was read, on the CPU.
        stretches (`torch.LongTensor` of shape `(num_stretches,)`): Tokens of each stretch.
        num_tokens (`int`): How many tokens to take, at most all.
    """
    order = (weights / stretches.clamp(min=1)).argsort(descending=True, stable=True)
    taken = torch.zeros_like(stretches)
    taken[order] = (num_tokens - stretches[order].cumsum(0) + stretches[order]).clamp(min=0).minimum(stretches[order])
    starts = stretches.cumsum(0) - stretches
    return torch.cat([torch.arange(start, start + length) for start, length in zip(starts.tolist(), taken.tolist())])
