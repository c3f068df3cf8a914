# SPDX-License-Identifier: Apache-2.0
"""What the tokens of an answer read of a video, if that is a share of it: what the prompt has read most."""

import torch

from ..cache.cache import VambaCache
from ..cache.excerpts import choose, num_read
from ..cache.layers import VambaVideoLayer, VideoStates
from ..layers.decoder import VambaCrossAttention, VideoRead
from ..parallel.devices import copy_aside
from .locate import read_in_layer, select_tokens, videos_by_row


TOKENS_WATCHED = 32  # the last ones of a prompt


class StepChooser:
    """
    Watches the prompt read the videos of a cache, and puts what the answer will read of them into `cache.excerpts`:
    one choice for each video and layer, for all rows that read it.

    Args:
        cache ([`VambaCache`]): The cache, with its videos and rows.
        video_read_share (`float`): The share of each video that is read.
        prompt_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`): 0 for padding.
        num_copies (`int`): Rows that begin with the same prompt, as beams do.
    """

    def __init__(self, cache: VambaCache, video_read_share: float, prompt_mask: torch.Tensor, num_copies: int):
        is_text = prompt_mask.bool().cpu()
        self._is_watched = is_text & (is_text.flip(1).cumsum(1).flip(1) <= TOKENS_WATCHED)
        self._rows, self._num_copies = list(cache.rows or ()), num_copies
        self._steps: dict[int, torch.Tensor] = {}  # by video
        self._num_tokens: dict[int, int] = {}
        for video in {row for row in self._rows if row is not None}:
            steps = cache.steps_of(video).num_tokens
            num_tokens = num_read(int(steps.sum()), int(steps.max()), video_read_share)
            if num_tokens < cache.video_lengths[video]:
                self._steps[video], self._num_tokens[video] = steps, num_tokens
                cache.excerpts[video] = []
        # By layer and row, where the layer is: the host waits for none of them.
        self._weights: dict[tuple[int, int], torch.Tensor] = {}
        self._start, self._stop = 0, cache.get_seq_length()  # of what the last pass has brought of the prompt

    def expect(self, num_tokens: int) -> None:
        """Says how many tokens of text the next pass brings. Virtual ones, of prompt tuning, come before them."""
        self._start, self._stop = self._stop, self._stop + num_tokens

    @property
    def has_ended(self) -> bool:
        """Whether the last pass has brought the end of the prompt."""
        return self._stop >= self._is_watched.shape[1]

    def __call__(
        self, cache: VambaCache, layer: VambaCrossAttention, hidden_states: torch.Tensor, reads: list[VideoRead]
    ) -> None:
        """The watcher, see [`VambaCache`]."""
        is_watched = self._is_watched[:, self._start : self._stop]
        first = hidden_states.shape[1] - (self._stop - self._start)
        videos = dict(zip(self._rows, videos_by_row(hidden_states, reads)))
        for row in range(0, len(self._rows), self._num_copies):
            video = self._rows[row]
            if video is None or video not in self._steps:
                continue
            steps = self._steps[video]
            weights = hidden_states.new_zeros(len(steps), dtype=torch.float32)
            weights = self._weights.setdefault((layer.layer_idx, row), weights)
            if is_watched[row].any():
                # A pass may bring more than the prompt, such as candidates for the tokens after it.
                texts = hidden_states[row, first : first + is_watched.shape[1]]
                texts = select_tokens(texts, is_watched[row])
                for log_weights in read_in_layer(layer, texts, videos[video][0], steps):
                    weights += log_weights.exp().sum((0, 1))
        if self.has_ended:
            for video in self._steps:
                cache.excerpts[video].append(self._excerpt(cache, layer.layer_idx, video, videos[video]))

    def _excerpt(
        self, cache: VambaCache, layer_idx: int, video: int, states: tuple[VideoStates, VideoStates]
    ) -> VambaVideoLayer:
        """What is read of a video in a layer after the prompt: what any of the rows has read most."""
        rows = [row for row in range(0, len(self._rows), self._num_copies) if self._rows[row] == video]
        weights = [self._weights.pop((layer_idx, row)) for row in rows]
        weights = torch.stack([each / each.sum().clamp(min=1e-6) for each in weights]).amax(0)
        indices = choose(weights, copy_aside(self._steps[video], weights.device), self._num_tokens[video])
        return cache.videos[video][layer_idx].excerpt(states, indices)
