# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a video in a cache belong to which moment of it."""

from dataclasses import dataclass, field

import torch


UNKNOWN_TIME = -1


def _empty() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(eq=False)
class VideoSteps:
    """
    The time steps of one video in a cache, in the order of its tokens. A step is `temporal_patch_size` frames, or one
    image. Nothing is changed in place: appending gives a new record.

    Args:
        num_tokens (`torch.Tensor` of shape `(num_steps,)`):
            Tokens of each step, on the CPU. A step of none stands for all that was dropped from where it begins to
            the next step.
        timestamps_ms (`torch.Tensor` of shape `(num_steps,)`):
            When each step begins, in milliseconds after the first frame; -1 if that is not known. They start anew with
            each video of a conversation.
    """

    num_tokens: torch.Tensor = field(default_factory=_empty)
    timestamps_ms: torch.Tensor = field(default_factory=_empty)

    def append(
        self, num_steps: int, tokens_per_step: int | torch.Tensor, timestamps_ms: torch.Tensor | None = None
    ) -> "VideoSteps":
        """
        The record with further steps, of as many tokens each, or as `tokens_per_step` says of shape `(num_steps,)`.
        Without `timestamps_ms` their times are not known.
        """
        if timestamps_ms is None:
            timestamps_ms = torch.full((num_steps,), UNKNOWN_TIME)
        return VideoSteps(
            torch.cat([self.num_tokens, torch.zeros(num_steps, dtype=torch.long) + tokens_per_step]),
            torch.cat([self.timestamps_ms, timestamps_ms.to("cpu", torch.long)]),
        )

    def select(self, indices: torch.Tensor) -> "VideoSteps":
        """
        The record with some of the tokens: the steps that have any left, and the first step of each gap after them,
        which tells when the step before ended.
        """
        steps = torch.arange(len(self.num_tokens)).repeat_interleave(self.num_tokens)
        num_tokens = steps[indices.cpu()].bincount(minlength=len(self.num_tokens))
        stays = num_tokens > 0
        stays[1:] |= stays[:-1].clone()
        return VideoSteps(num_tokens[stays], self.timestamps_ms[stays])

    @property
    def seconds(self) -> torch.Tensor:
        """When each step begins, float64 of shape `(num_steps,)`, NaN if that is not known."""
        return (self.timestamps_ms / 1000).double().masked_fill(self.timestamps_ms == UNKNOWN_TIME, float("nan"))
