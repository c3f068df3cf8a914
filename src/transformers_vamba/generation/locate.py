# SPDX-License-Identifier: Apache-2.0
"""When something happened: how much of each moment of a video the cross-attention of a text has read."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..cache.cache import VambaCache
from ..cache.layers import VideoStates
from ..cache.steps import VideoSteps
from ..layers.decoder import VambaCrossAttention, VideoRead
from ..ops.time_steps import log_weights_of_steps
from ..parallel.devices import copy_aside


# Weights of steps that are in memory at once, of all heads and queries: 64 MiB.
WEIGHTS_AT_ONCE = 2**24
# What a step of a moment is read of at least, as a share of the step that is read most.
LEAST_WEIGHT = 0.15


class Moment(NamedTuple):
    """
    A stretch of a video that was read.

    Args:
        first (`int`), last (`int`): Its first and its last step.
        start (`float`), stop (`float`): In seconds, when it begins and ends; NaN if that is not known.
        weight (`float`): Its share of what was read of the video.
    """

    first: int
    last: int
    start: float
    stop: float
    weight: float


class VideoReading(NamedTuple):
    """
    How much of each time step of a video was read.

    Args:
        weights (`torch.FloatTensor` of shape `(num_steps,)`):
            Shares of the steps, which sum to 1, on the CPU. Of a video that `max_video_tokens` has thinned out a step
            of weight 0 stands for each gap. Steps that were dropped as repeats are part of the one before them.
        seconds (`torch.DoubleTensor` of shape `(num_steps,)`):
            When each step begins, in seconds after the first frame; NaN if that is not known.
    """

    weights: torch.Tensor
    seconds: torch.Tensor

    def moments(self, least: float = LEAST_WEIGHT) -> list[Moment]:
        """
        The moments that were read most, in the order of the video: runs of steps, each of which was read at least
        `least` times as much as the step that was read most.
        """
        if not 0 < least <= 1:
            raise ValueError(f"`least` must lie above 0 and be at most 1, got {least!r}.")
        chosen = (self.weights >= least * self.weights.max()).nonzero().flatten().tolist()
        begins_anew = self.seconds.diff() <= 0  # the next video of a conversation
        runs: list[list[int]] = []
        for step in chosen:
            if runs and runs[-1][-1] == step - 1 and not begins_anew[step - 1]:
                runs[-1].append(step)
            else:
                runs.append([step])
        stops = self._stops().tolist()
        return [
            Moment(run[0], run[-1], float(self.seconds[run[0]]), stops[run[-1]], float(self.weights[run].sum()))
            for run in runs
        ]

    def _stops(self) -> torch.Tensor:
        """When each step ends: when the next begins, or after the usual time if there is none."""
        lengths = self.seconds.diff(append=self.seconds.new_tensor([float("nan")]))
        is_last = ~(lengths > 0)
        usual = lengths[~is_last & (self.weights > 0)].median()  # a gap in what is left of a video has no tokens
        return self.seconds + torch.where(is_last, usual, lengths)


class Reader:
    """
    Adds up what the tokens of each row read of its video, over tokens, heads and layers. Each counts by how much its
    reading tells: the Kullback-Leibler divergence from reading all tokens of the video alike. A head that reads
    everywhere, as many do, says nothing about when.

    Args:
        steps (`list[VideoSteps]`): The time steps of the video that each row reads.
    """

    def __init__(self, steps: list[VideoSteps]):
        self.steps = steps
        self.sums = [torch.zeros(len(each.num_tokens)) for each in steps]

    def receive(self, layer_idx: int, row: int, log_weights: torch.Tensor) -> None:
        """Adds float32 logarithms of weights, `(num_heads, num_tokens, num_steps)`."""
        num_tokens = copy_aside(self.steps[row].num_tokens, log_weights.device)
        evenly = (num_tokens / num_tokens.sum()).log()
        weights = log_weights.exp()
        divergence = (weights * (log_weights - evenly)).nan_to_num(0.0).sum(-1, keepdim=True)
        # Which stays where the layer is: nothing waits for it.
        self.sums[row] = self.sums[row].to(weights.device) + (divergence.clamp(min=1e-6) * weights).sum((0, 1))

    def readings(self) -> list[VideoReading]:
        """Of each row."""
        return [VideoReading((sums / sums.sum()).cpu(), steps.seconds) for sums, steps in zip(self.sums, self.steps)]


def read_in_layer(
    layer: VambaCrossAttention, texts: torch.Tensor, keys: VideoStates, num_tokens: torch.Tensor
) -> Iterator[torch.Tensor]:
    """
    What some tokens of a row read of each step of its video, as [`log_weights_of_steps`] of shape `(num_heads,
    num_queries, num_steps)`, a few tokens at a time. `texts`, `(num_queries, hidden_size)`, is what enters the layer's
    cross-attention.
    """
    tokens_at_once = max(1, WEIGHTS_AT_ONCE // (layer.num_heads * len(num_tokens)))
    for tokens in texts.split(tokens_at_once):
        query = layer.q_proj(tokens).view(len(tokens), keys.shape[1], -1, layer.head_dim).transpose(0, 1)
        log_weights = log_weights_of_steps(query.flatten(1, 2), keys, num_tokens, layer.scaling)
        # (num_key_value_heads, num_tokens, heads that share a key, num_steps)
        yield log_weights.unflatten(1, query.shape[1:3]).transpose(1, 2).flatten(0, 1)


def videos_by_row(hidden_states: torch.Tensor, reads: list[VideoRead]) -> list[tuple[VideoStates, VideoStates]]:
    """Keys and values of the video that each row of a batch reads; `(None, None)` for a row that reads none."""
    return [(keys, values) for length, keys, values in reads for _ in range(length // hidden_states.shape[1])]


def select_tokens(hidden_states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """
    Those of `(sequence_length, hidden_size)` that a mask on the CPU, `(sequence_length,)`, marks. By their indices: to
    count marks on a device, the host would wait for it.
    """
    return hidden_states[copy_aside(token_mask.nonzero().flatten(), hidden_states.device)]


def watch_steps(
    receive: Callable[[int, int, torch.Tensor], None], steps: list[VideoSteps], token_mask: torch.Tensor
) -> Callable:
    """
    A watcher for a cache (see [`VambaCache`]): it calls `receive` with the index of a layer, that of a row, and the
    logarithms of what some of its tokens read, float32 of shape `(num_heads, num_tokens, num_steps)`; until all of
    `token_mask`, of shape `(batch_size, sequence_length)`, have been. `steps` are those of the video of each row.
    """

    def watch(cache: VambaCache, layer: VambaCrossAttention, hidden_states: torch.Tensor, reads: list[VideoRead]):
        for row, (keys, _) in enumerate(videos_by_row(hidden_states, reads)):
            texts = select_tokens(hidden_states[row], token_mask[row])
            for log_weights in read_in_layer(layer, texts, keys, steps[row].num_tokens):
                receive(layer.layer_idx, row, log_weights)

    return watch
