# SPDX-License-Identifier: Apache-2.0
"""
Which tokens of a video are worth keeping: those that changed most since the time step before.

The cross-attention has neither mask nor positions, so any subset of a video's tokens can be read. Two options go by
this. `video_pruning_rate` drops a share of each time step between vision tower and mixers, whose work falls with it.
`max_video_tokens` bounds what the cache holds of a video, whose older tokens are thinned out as it goes on. With
either of them a time step that repeats the one before, to the bit, is dropped before the vision tower.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..inputs.media import Medium
from ..parallel.devices import copy_aside


KEPT_FOR_AGE = 4  # one in so many tokens of a full cache, the newest, is kept whatever its importance
FREED_AT_ONCE = 8  # a cache that is over its budget is thinned out to leave one in so many tokens free


def num_kept(num_tokens: int, rate: float) -> int:
    """How many of the tokens of a time step pruning at this rate keeps, at least one."""
    return max(1, num_tokens - math.floor(round(num_tokens * rate, 6)))


def num_left(max_video_tokens: int) -> int:
    """How many tokens a cache with this budget has left after it has been thinned out."""
    return max_video_tokens - max_video_tokens // FREED_AT_ONCE


def check_pruning(video_pruning_rate: float, max_video_tokens: int | None) -> None:
    """Raises a `ValueError` for a rate or a budget that does not exist."""
    is_number = isinstance(video_pruning_rate, (int, float)) and not isinstance(video_pruning_rate, bool)
    if not is_number or not 0 <= video_pruning_rate < 1:
        raise ValueError(
            "`video_pruning_rate`, the share of a video's tokens to drop, must be a number of at least 0 and below 1, "
            f"got {video_pruning_rate!r}."
        )
    if max_video_tokens is not None and (type(max_video_tokens) is not int or max_video_tokens < 1):
        raise ValueError(
            "`max_video_tokens`, the most tokens to keep of a video, must be an integer of at least 1, or None for "
            f"all, got {max_video_tokens!r}."
        )


@dataclass
class VideoChanges:
    """
    What is known of the changes in one video of a cache. Never changed in place: forks share it.

    Args:
        last_step (`torch.Tensor` of shape `(tokens_per_step, hidden_size)`, *optional*):
            The vision tower's output for the last time step, with which the next one is compared.
        size (`tuple[int, int]`, *optional*): Its height and width, in patches.
        importance (`torch.FloatTensor` of shape `(num_tokens,)`, *optional*):
            Of each token in the cache, in order: the distance of its embedding from the one at the same place a time
            step before, less the mean distance in its time step. So a cut or a flash, which changes all places alike,
            does not outweigh what happens at one. Infinite in the first time step of a medium.
        last_pixels (`torch.Tensor` of shape `(patches_per_step, patch_dim)`, *optional*):
            The last time step itself. It is not saved: the first step that comes to a loaded cache counts as changed.
    """

    last_step: torch.Tensor | None = None
    size: tuple[int, ...] | None = None
    importance: torch.Tensor | None = None
    last_pixels: torch.Tensor | None = None

    def drop_repeats(self, media: list[Medium], device: torch.device) -> tuple[list[Medium], "VideoChanges"]:
        """
        Drops the time steps whose pixels are equal to those of the step before. The first one of a medium stays,
        unless the medium goes on from what came before and is of its size.

        Args:
            media (`list[Medium]`): The images and videos of a segment.
            device (`torch.device`): Where they are compared.

        Returns:
            `tuple[list[Medium], VideoChanges]`: What is left of the media, on this device, without those of which
            nothing is; and the changes with the last time step.
        """
        left, last, last_size = [], self.last_pixels, self.size
        for pixel_values, (num_steps, height, width), timestamps_ms, goes_on in media:
            steps = copy_aside(pixel_values, device).unflatten(0, (num_steps, -1))
            is_new = torch.ones(num_steps, dtype=torch.bool)
            is_new[1:] = (steps[1:] != steps[:-1]).flatten(1).any(1)
            if goes_on and last is not None and last_size == (height, width):
                is_new[0] = not torch.equal(steps[0], last.to(steps))
            last, last_size = steps[-1], (height, width)
            if not is_new.all():
                steps = steps[is_new.to(device)]
                timestamps_ms = None if timestamps_ms is None else timestamps_ms[is_new.to(timestamps_ms.device)]
            if len(steps):
                left.append(Medium(steps.flatten(0, 1), (len(steps), height, width), timestamps_ms, goes_on))
        assert last is not None  # a segment has a medium
        return left, replace(self, last_pixels=last.detach().clone())

    def prune(
        self, embeds: torch.Tensor, media: list[Medium], rate: float
    ) -> tuple[torch.Tensor, list[torch.Tensor], "VideoChanges"]:
        """
        Drops of each time step the tokens that changed least.

        Args:
            embeds (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`): The vision tower's output for a segment.
            media (`list[Medium]`):
                The images and videos of the segment. The first time step of one stays whole, unless it goes on from
                what came before and is of its size.
            rate (`float`): The share to drop, at least 0 and below 1.

        Returns:
            `tuple[torch.Tensor, list[torch.Tensor], VideoChanges]`: What is kept, in order; of each medium the
            number of tokens of its time steps, on the CPU; and the changes with these tokens.
        """
        pieces, counts = [], []
        importances = [] if self.importance is None else [self.importance]
        last_step, last_size = self.last_step, self.size
        num_patches = [math.prod(each.grid) for each in media]
        lengths = [embeds.shape[1] * patches // sum(num_patches) for patches in num_patches]
        for steps, (_, (num_steps, *size), _, goes_on) in zip(embeds[0].split(lengths), media):
            steps = steps.unflatten(0, (num_steps, -1))
            num_left = num_kept(steps.shape[1], rate)
            counts.append(torch.full((num_steps,), num_left))
            if not goes_on or last_size != tuple(size):
                counts[-1][0] = steps.shape[1]
                pieces.append(steps[0])
                importances.append(steps.new_full(steps.shape[1:2], math.inf, dtype=torch.float32))
                last_step, steps = steps[0].detach(), steps[1:]
            assert last_step is not None  # without one, the medium has just begun
            seen = torch.cat([last_step[None], steps.detach()])
            changes = torch.linalg.vector_norm(seen[1:].float() - seen[:-1].float(), dim=-1)
            importance = changes - changes.mean(dim=1, keepdim=True)
            # Of those that changed alike, as where nothing moves, the first.
            kept = changes.sort(dim=1, descending=True, stable=True).indices[:, :num_left].sort(dim=1).values
            pieces.append(steps.gather(1, kept[..., None].expand(-1, -1, steps.shape[-1])).flatten(0, 1))
            importances.append(importance.gather(1, kept).flatten())
            last_step, last_size = seen[-1], tuple(size)
        assert last_step is not None  # a segment has a medium
        changes = replace(self, last_step=last_step.clone(), size=last_size, importance=torch.cat(importances))
        return torch.cat(pieces)[None], counts, changes

    def choose(self, max_video_tokens: int) -> torch.Tensor:
        """
        The indices, in order, of the tokens that a cache over this budget keeps, seven eighths of it: as a quarter of
        them the newest, and of what is older the most important; of equally important ones the newer.
        """
        assert self.importance is not None  # of a video that is over its budget
        num_tokens = num_left(max_video_tokens)
        num_new = num_tokens // KEPT_FOR_AGE
        num_old = len(self.importance) - num_new
        newest_first = self.importance[:num_old].flip(0)
        order = newest_first.sort(descending=True, stable=True).indices[: num_tokens - num_new]
        old = (num_old - 1 - order).sort().values
        return torch.cat([old, torch.arange(num_old, len(self.importance), device=old.device)])

    def select(self, indices: torch.Tensor) -> "VideoChanges":
        """The changes with some of the tokens."""
        assert self.importance is not None  # of a video that has tokens
        return replace(self, importance=self.importance[indices])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that are saved, by name, if there are any."""
        tensors = {"last_step": self.last_step, "importance": self.importance}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def to(self, device: torch.device) -> "VideoChanges":
        """The changes on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.state_dict().items()}
        return VideoChanges(size=self.size, last_pixels=self.last_pixels, **tensors)
