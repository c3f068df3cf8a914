# SPDX-License-Identifier: Apache-2.0
"""
What of a video the tokens of an answer read, if they read a share of it (`video_read_share`).

The cross-attention has neither mask nor positions, so any part of a video can be read. The prompt reads all of it, and
the tokens after it read the time steps that it has read most.
"""

import math

import torch


LEAST_STEPS = 32  # so many are read at least: of a short video less would save nothing, and answers suffer


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


def num_read(num_tokens: int, largest_step: int, video_read_share: float) -> int:
    """How many of a video's tokens are read: the share, but at least as many as some time steps have, or all."""
    least = LEAST_STEPS * largest_step
    return min(num_tokens, max(least, math.ceil(round(num_tokens * video_read_share, 6))))


def choose(weights: torch.Tensor, steps: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    The indices, in order, of the tokens to read: the most of what was read that so many tokens can have. Time steps
    are taken by what was read of each of their tokens, and the last one is cut to what is left.

    Args:
        weights (`torch.Tensor` of shape `(num_steps,)`): How much of each time step was read.
        steps (`torch.LongTensor` of shape `(num_steps,)`): Tokens of each time step, on the same device.
        num_tokens (`int`): How many tokens to take, at most all.
    """
    order = (weights / steps.clamp(min=1)).argsort(descending=True, stable=True)
    taken = torch.zeros_like(steps)
    taken[order] = (num_tokens - steps[order].cumsum(0) + steps[order]).clamp(min=0).minimum(steps[order])
    dropped_before = (steps - taken).cumsum(0) - (steps - taken)
    # With its size, which the host would wait for otherwise.
    dropped_before = dropped_before.repeat_interleave(taken, output_size=num_tokens)
    return torch.arange(num_tokens, device=steps.device) + dropped_before
