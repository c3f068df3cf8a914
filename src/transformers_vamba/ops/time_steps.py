# SPDX-License-Identifier: Apache-2.0
"""How much of each time step of a video the queries of a text read."""

import math

import torch
import torch.nn.functional as F

from ..parallel.devices import copy_aside
from .flash_decoding import can_score, log_sums_of_steps
from .quantized_attention import QuantizedStates


# Scores of keys that are in memory at once, of all heads and queries, in PyTorch: 64 MiB.
SCORES_AT_ONCE = 2**24


def log_weights_of_steps(
    query: torch.Tensor, keys: torch.Tensor | QuantizedStates, num_tokens: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    The logarithm of what each query reads of each step: of the sum of its attention weights, float32 of shape
    `(num_heads, num_queries, num_steps)`, by the log-sum-exp of each step. In 16 bits on a CUDA device the keys are
    read once, as they lie (see `ops.flash_decoding`); elsewhere a chunk of them at a time is converted to float32.

    Args:
        query (`torch.Tensor` of shape `(num_heads, num_queries, head_dim)`): The queries of the heads of the keys.
        keys (`torch.Tensor` or `QuantizedStates` of shape `(1, num_heads, num_keys, head_dim)`): All keys of a video.
        num_tokens (`torch.LongTensor` of shape `(num_steps,)`): Keys of each step, in order, on the CPU.
        scaling (`float`): Factor of the scores.
    """
    bounds = F.pad(num_tokens.cumsum(0), (1, 0))
    if can_score(query) and keys.dtype == query.dtype:
        log_sums = log_sums_of_steps(query, keys, copy_aside(bounds, query.device), scaling)
    else:
        log_sums = _log_sums_in_chunks(query.float() * scaling, keys, bounds)
    return log_sums.log_softmax(-1)


def _log_sums_in_chunks(
    query: torch.Tensor, keys: torch.Tensor | QuantizedStates, bounds: torch.Tensor
) -> torch.Tensor:
    """As `log_sums_of_steps`, of a float32 query that is scaled."""
    num_keys = keys.shape[2]
    sums = query.new_full((*query.shape[:2], len(bounds) - 1), -math.inf)
    length = max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1]))
    for start in range(0, num_keys, length):
        stop = min(start + length, num_keys)
        first, last = torch.searchsorted(bounds[1:], torch.tensor([start, stop - 1]), right=True).tolist()
        places = (bounds[first : last + 2].clamp(start, stop) - start).to(query.device)
        steps = sums[..., first : last + 1]
        torch.logaddexp(steps, _log_sums(query, _read_keys(keys, start, stop), places), out=steps)
    return sums


def _log_sums(query: torch.Tensor, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of the scores of keys, from each of these places to the next; one tensor of scores at a time."""
    scores = query @ keys.transpose(1, 2)
    largest = scores.amax(-1, keepdim=True)
    summed = scores.sub_(largest).exp_().cumsum_(-1)
    before = summed[..., (places - 1).clamp(min=0)] * (places > 0)
    return before.diff().clamp(min=0).log() + largest


def _read_keys(keys: torch.Tensor | QuantizedStates, start: int, stop: int) -> torch.Tensor:
    """Some of the keys, float32 of shape `(num_heads, stop - start, head_dim)`; without the centre of 8-bit keys."""
    if isinstance(keys, QuantizedStates):
        # What all keys have in common adds the same to all scores of a query, and changes no weight.
        return keys.codes[0, :, start:stop].float() * keys.scales[0, :, start:stop].float()
    return keys[0, :, start:stop].float()
