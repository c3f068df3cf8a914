# SPDX-License-Identifier: Apache-2.0
"""
Samples packed in one row, one after another. Positions that start anew tell them apart: Transformers' own convention,
by which its masks and its flash attention separate packed samples as well.
"""

import torch

from .checks import check_tensor


def starts_of_samples(
    position_ids: torch.Tensor | None,
    batch_size: int,
    attention_mask: torch.Tensor | dict | None = None,
    cache: object | None = None,
    use_cache: bool | None = None,
) -> torch.Tensor | None:
    """
    Marks the first token of each sample in a row that may be packed: `(1, sequence_length)`, true if a position does
    not follow the one before it. `None` if nothing can be packed: as in Transformers, packing needs a single row with
    positions, and neither an attention mask nor a cache.

    Args:
        position_ids (`torch.LongTensor` of shape `(1, sequence_length)`, *optional*):
            Positions of the text; of several axes, in front, the first counts.
        batch_size (`int`): Number of rows.
        attention_mask, cache, use_cache: As `forward` gets them.
    """
    if position_ids is None or batch_size != 1:
        return None
    if attention_mask is not None or cache is not None or use_cache:
        return None
    if position_ids.ndim == 3:
        position_ids = position_ids[0]
    return position_ids.diff(prepend=position_ids[:, :1]) != 1


def lengths_of_samples(starts: torch.Tensor | None) -> list[int] | None:
    """
    The number of tokens of each sample that begins in a row, `None` for fewer than two. Fetches `starts` from its
    device, and so waits for it.
    """
    if starts is None:
        return None
    first_tokens = starts[0].nonzero()[:, 0].tolist()
    if len(first_tokens) == 1:
        return None
    return [end - start for start, end in zip(first_tokens, [*first_tokens[1:], starts.shape[-1]])]


def split_marks(mm_token_type_ids: torch.Tensor, sample_lengths: list[int]) -> torch.Tensor:
    """The marks of a packed row, `(1, sequence_length)`, one row per sample, padded with zeros on the right."""
    check_tensor("mm_token_type_ids", mm_token_type_ids, False, (1, sum(sample_lengths)))
    pieces = mm_token_type_ids[0].split(sample_lengths)
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
