# SPDX-License-Identifier: Apache-2.0
"""What a pass through the decoder knows of its videos."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ..cache.cache import VambaCache


@dataclass
class VideoContext:
    """
    What every layer has to know of the videos. They are in a cache, or go through the decoder together with the text.

    Args:
        rows (`list[int | None]`):
            The video that each row of the batch reads, or each sample of a packed row; `None` for one without.
        text_lengths (`list[int]`): Number of text tokens of each row, or sample of a packed row.
        is_packed (`bool`, *optional*, defaults to `False`): Whether the samples share one row.
        cache ([`VambaCache`], *optional*): Holds the videos, if they were encoded before.
        lengths (`list[int]`, *optional*): Number of tokens of each video in `video_states`, if they were not.
        group (`ProcessGroup`, *optional*): The processes that hold consecutive stretches of one video.
        is_read (`bool`, *optional*, defaults to `True`):
            Whether what the rows read counts. If not, every parameter still runs, and has a gradient of zero.
    """

    rows: list[int | None]
    text_lengths: list[int]
    is_packed: bool = False
    cache: VambaCache | None = None
    lengths: list[int] = field(default_factory=list)
    group: ProcessGroup | None = None
    is_read: bool = True

    def watch(self, cross_attn: nn.Module, hidden_states: torch.Tensor, reads: list) -> None:
        """Tells whoever watches the cache what the cross-attention of a layer is about to read."""
        if self.cache is not None and self.cache.watcher is not None:
            self.cache.watcher(self.cache, cross_attn, hidden_states, reads)

    def mark_tokens(self, device: torch.device) -> torch.Tensor | None:
        """
        Which tokens read a video: of shape `(batch_size, 1, 1)`, or `(1, sequence_length, 1)` for a packed row. `None`
        if all do.
        """
        if not self.is_read:
            return torch.zeros(1, 1, 1, dtype=torch.bool, device=device)
        if None not in self.rows:
            return None
        if self.cache is not None:
            return self.cache.mark_rows(self.rows, device)
        marks = torch.tensor([row is not None for row in self.rows], device=device)
        if not self.is_packed:
            return marks.view(-1, 1, 1)
        repeats = torch.tensor(self.text_lengths, device=device)
        return marks.repeat_interleave(repeats, output_size=sum(self.text_lengths)).view(1, -1, 1)
