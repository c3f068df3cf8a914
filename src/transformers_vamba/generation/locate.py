# SPDX-License-Identifier: Apache-2.0
"""When something happened: how much of each moment of a video the cross-attention of a text has read."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..cache.cache import VambaCache
from ..cache.layers import VideoStates
from ..cache.steps import VideoSteps
from ..layers.decoder import VambaCrossAttention, VideoRead
from ..ops.quantized_attention import QuantizedStates


# Scores of keys, and weights of steps, that are in memory at once, of all heads and queries: 64 MiB.
SCORES_AT_ONCE = 2**24
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
        num_tokens = self.steps[row].num_tokens.to(log_weights.device)
        evenly = (num_tokens / num_tokens.sum()).log()
        weights = log_weights.exp()
        divergence = (weights * (log_weights - evenly)).nan_to_num(0.0).sum(-1, keepdim=True)
        self.sums[row] = self.sums[row] + (divergence.clamp(min=1e-6) * weights).sum((0, 1)).cpu()

    def readings(self) -> list[VideoReading]:
        """Of each row."""
        return [VideoReading(sums / sums.sum(), steps.seconds) for sums, steps in zip(self.sums, self.steps)]


def log_weights_of_steps(
    query: torch.Tensor, keys: VideoStates, num_tokens: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    The logarithm of what each query reads of each step: of the sum of its attention weights, float32 of shape
    `(num_heads, num_queries, num_steps)`. A chunk of keys at a time, by the log-sum-exp of each step.

    Args:
        query (`torch.Tensor` of shape `(num_heads, num_queries, head_dim)`): The queries of the heads of the keys.
        keys (`torch.Tensor` or `QuantizedStates` of shape `(1, num_heads, num_keys, head_dim)`): All keys of a video.
        num_tokens (`torch.LongTensor` of shape `(num_steps,)`): Keys of each step, in order.
        scaling (`float`): Factor of the scores.
    """
    num_keys = keys.shape[2]
    query = query.float() * scaling
    ends = num_tokens.cumsum(0)
    bounds = F.pad(ends, (1, 0))
    sums = query.new_full((*query.shape[:2], len(num_tokens)), -math.inf)
    length = max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1]))
    for start in range(0, num_keys, length):
        stop = min(start + length, num_keys)
        first, last = torch.searchsorted(ends, torch.tensor([start, stop - 1]), right=True).tolist()
        places = (bounds[first : last + 2].clamp(start, stop) - start).to(query.device)
        steps = sums[..., first : last + 1]
        torch.logaddexp(steps, _log_sums(query, _read_keys(keys, start, stop), places), out=steps)
    return sums.log_softmax(-1)


def _log_sums(query: torch.Tensor, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of the scores of keys, from each of these places to the next; one tensor of scores at a time."""
    scores = query @ keys.transpose(1, 2)
    largest = scores.amax(-1, keepdim=True)
    summed = scores.sub_(largest).exp_().cumsum_(-1)
    before = summed[..., (places - 1).clamp(min=0)] * (places > 0)
    return before.diff().clamp(min=0).log() + largest


def _read_keys(keys: VideoStates, start: int, stop: int) -> torch.Tensor:
    """Some of the keys, float32 of shape `(num_heads, stop - start, head_dim)`; without the centre of 8-bit keys."""
    if isinstance(keys, QuantizedStates):
        # What all keys have in common adds the same to all scores of a query, and changes no weight.
        return keys.codes[0, :, start:stop].float() * keys.scales[0, :, start:stop].float()
    return keys[0, :, start:stop].float()


def read_in_layer(
    layer: VambaCrossAttention, texts: torch.Tensor, keys: VideoStates, num_tokens: torch.Tensor
) -> Iterator[torch.Tensor]:
    """
    What some tokens of a row read of each step of its video, as [`log_weights_of_steps`] of shape `(num_heads,
    num_queries, num_steps)`, a few tokens at a time. `texts`, `(num_queries, hidden_size)`, is what enters the layer's
    cross-attention.
    """
    tokens_at_once = max(1, SCORES_AT_ONCE // (layer.num_heads * len(num_tokens)))
    for tokens in texts.split(tokens_at_once):
        query = layer.q_proj(tokens).view(len(tokens), keys.shape[1], -1, layer.head_dim).transpose(0, 1)
        log_weights = log_weights_of_steps(query.flatten(1, 2), keys, num_tokens, layer.scaling)
        # (num_key_value_heads, num_tokens, heads that share a key, num_steps)
        yield log_weights.unflatten(1, query.shape[1:3]).transpose(1, 2).flatten(0, 1)


def videos_by_row(hidden_states: torch.Tensor, reads: list[VideoRead]) -> list[tuple[VideoStates, VideoStates]]:
    """Keys and values of the video that each row of a batch reads; `(None, None)` for a row that reads none."""
    return [(keys, values) for length, keys, values in reads for _ in range(length // hidden_states.shape[1])]


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
            texts = hidden_states[row, token_mask[row].to(hidden_states.device)]
            for log_weights in read_in_layer(layer, texts, keys, steps[row].num_tokens):
                receive(layer.layer_idx, row, log_weights)

    return watch
