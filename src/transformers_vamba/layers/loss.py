# SPDX-License-Identifier: Apache-2.0
"""The loss of the positions that have a label, without the logits of the others."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..parallel.ranks import count_missing_runs


CHUNK_SIZE = 1024  # positions whose logits are held at once


def count_items(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    What the sum of the losses is divided by: `num_items_in_batch` if it is given, otherwise the number of labels. At
    least 1, so that the loss of nothing is zero and not `0 / 0`, which a step would spread over all parameters.
    """
    if num_items_in_batch is None:
        num_items_in_batch = ((labels[:, 1:] if shift_labels is None else shift_labels) != -100).sum()
    return torch.as_tensor(num_items_in_batch).clamp(min=1)


def loss_without_logits(
    lm_head: nn.Module,
    loss_function: Callable,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    What `loss_function` makes of all logits, from those of the labelled positions, a chunk at a time, each computed
    again in the backward pass.

    Args:
        lm_head (`nn.Module`): Makes logits of hidden states.
        loss_function (`Callable`): A loss of Transformers for next tokens, with `logits` and `shift_labels`.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): The decoder's output.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Ids, -100 where there is nothing to
            predict; not shifted.
        num_items_in_batch (`torch.Tensor` or `int`): Divides the sum of the losses.
        shift_labels (`torch.LongTensor`, *optional*): `labels`, shifted before.
        kwargs: For `loss_function`.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    labelled = shift_labels != -100
    hidden_states, shift_labels = hidden_states[labelled], shift_labels[labelled]

    def chunk_loss(hidden_states: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
        return loss_function(
            logits=lm_head(hidden_states),
            labels=None,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )

    chunks = list(zip(hidden_states.split(CHUNK_SIZE), shift_labels.split(CHUNK_SIZE)))
    num_missing = count_missing_runs(lm_head, len(chunks), hidden_states.device)
    chunks += [(hidden_states[:0], shift_labels[:0])] * num_missing
    losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()
