# SPDX-License-Identifier: Apache-2.0
"""
Sequence parallelism of the video: each process ("rank") of a group has a stretch of its frames, and all of the text.

A mixer's recurrence is linear in its state, so no rank waits for the one before it. Each first makes, from an empty
state, the state that its stretch leaves behind and what decay an earlier state suffers there; from those of the ranks
before it, it has the state in which the video reaches it, and runs its stretch for the outputs. The cross-attention of
the text over the parts of the video is combined by the logarithms of their sums of exponentials.

The objective of the backward pass is the sum of the losses of all ranks, which are equal: what a rank gets from the
others takes the sum of their gradients back, and the mean of the ranks' parameter gradients is that of one loss.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from ..ops.state import MambaState


MAX_SCORES = 2**26  # attention scores that are held at once: 256 MiB in float32


class _Gather(torch.autograd.Function):
    """The ranks' tensors, of one shape, as `(num_ranks, *shape)`."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """In float32 at least, in which the gradients are summed."""
    return _Gather.apply(tensor.to(torch.promote_types(tensor.dtype, torch.float32)).contiguous(), group)


def state_of_earlier_ranks(
    vision_mixer: Any,
    video_states: torch.Tensor,
    group: dist.ProcessGroup,
    checkpoint: Callable | None = None,
) -> MambaState:
    """
    The state of a mixer in front of this rank's stretch.

    Args:
        vision_mixer ([`VambaVisionMixer`]): The mixer.
        video_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`):
            This rank's stretch of the video, at least as long as the convolution looks back.
        group (`ProcessGroup`): The ranks, in the order of the video.
        checkpoint (`Callable`, *optional*): Runs a part and computes it again in the backward pass.
    """
    mixer, rank = vision_mixer.mixer, group.rank()
    num_inputs = mixer.conv_kernel_size - 1
    conv_inputs = mixer.conv_inputs(vision_mixer.norm(video_states[:, video_states.shape[1] - num_inputs :]))
    # The first rank multiplies by zero, for it has to take part in the backward pass of what was gathered.
    history = (_gather(conv_inputs, group)[rank - 1] * (rank > 0)).to(conv_inputs.dtype)

    empty = torch.zeros(1, mixer.num_heads, mixer.head_dim, mixer.state_size, device=video_states.device)
    left_behind, log_decay = vision_mixer.summarize(video_states, MambaState(history, empty), checkpoint)
    states, log_decays = _gather(torch.cat([left_behind.ssm[0].flatten(1), log_decay[:, None]], dim=1), group).split(
        [mixer.head_dim * mixer.state_size, 1], dim=-1
    )
    ssm = 0 * states[0]
    for earlier in range(rank):
        ssm = ssm * log_decays[earlier].exp() + states[earlier]
    return MambaState(history, ssm.view_as(empty).to(left_behind.ssm.dtype))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scaled_query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        with torch.autocast(scaled_query.device.type, enabled=False):
            output, log_sum = 0, torch.tensor(-torch.inf, device=scaled_query.device)
            for scores, _, value_part in _parts(scaled_query, keys, values):
                new_log_sum = torch.logaddexp(log_sum, scores.logsumexp(-1, keepdim=True))
                output = output * (log_sum - new_log_sum).exp() + (scores - new_log_sum).exp() @ value_part
                log_sum = new_log_sum
            largest = log_sum.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            weight = (log_sum - largest).exp()
            sums = torch.cat([output * weight, weight], dim=-1)
            dist.all_reduce(sums, group=group)
            output, weight = sums[..., :-1] / sums[..., -1:], sums[..., -1:]
            ctx.save_for_backward(scaled_query, keys, values, output, largest + weight.log())
        ctx.group = group
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled_query, keys, values, output, log_sum = ctx.saved_tensors
        with torch.autocast(scaled_query.device.type, enabled=False):
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
            grad_of_query, grads_of_keys, grads_of_values = torch.zeros_like(scaled_query), [], []
            mean = (grad * output).sum(-1, keepdim=True)
            for scores, key_part, value_part in _parts(scaled_query, keys, values):
                probabilities = (scores - log_sum).exp()
                grad_of_scores = probabilities * (grad @ value_part.mT - mean)
                grad_of_query = grad_of_query + grad_of_scores @ key_part
                grads_of_keys.append((grad_of_scores.mT @ scaled_query).to(keys.dtype))
                grads_of_values.append((probabilities.mT @ grad).to(values.dtype))
        return grad_of_query, torch.cat(grads_of_keys, 2), torch.cat(grads_of_values, 2), None


def _parts(
    scaled_query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The scores of some of the keys at a time, those keys and their values, in the query's dtype."""
    num_tokens = max(1, MAX_SCORES // scaled_query[..., 0].numel())
    for key_part, value_part in zip(keys.split(num_tokens, 2), values.split(num_tokens, 2)):
        key_part = key_part.to(scaled_query.dtype)
        yield scaled_query @ key_part.mT, key_part, value_part.to(scaled_query.dtype)


def attend_across_ranks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, group: dist.ProcessGroup
) -> torch.Tensor:
    """
    Attention, without a mask, of a query that is the same on every rank over keys and values that are not.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, num_queries, head_dim)`): The query.
        keys, values (`torch.Tensor` of shape `(1, num_heads, num_tokens, head_dim)`): This rank's.
        scaling (`float`): Of the scores.
        group (`ProcessGroup`): The ranks.

    Returns:
        `torch.Tensor` of the query's shape and dtype, the same on every rank; computed in float32 at least.
    """
    scaled_query = query.to(torch.promote_types(query.dtype, torch.float32)) * scaling
    return _Attention.apply(scaled_query, keys, values, group).to(query.dtype)


def check_no_dropout(model: PreTrainedModel) -> None:
    """Raises a `ValueError` for a model with dropout, which would draw differently for the text of every rank."""
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    dropouts["attention_dropout"] = model.config.get_text_config().attention_dropout
    dropouts = [f"{name} ({p})" for name, p in dropouts.items() if p]
    if dropouts:
        raise ValueError(f"Sequence parallelism needs a model without dropout, got {', '.join(dropouts[:8])}.")


def check_stretches(
    num_tokens: list[int], inputs_embeds: torch.Tensor, has_cache: bool, min_tokens: int, group: dist.ProcessGroup
) -> None:
    """
    Raises a `ValueError`, the same on every rank, if the ranks' inputs are not those of one sample. Waits for all.

    Args:
        num_tokens (`list[int]`): This rank's video tokens, of each row or packed sample.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): This rank's text.
        has_cache (`bool`): Whether a cache is given or asked for.
        min_tokens (`int`): The fewest tokens of a stretch.
        group (`ProcessGroup`): The ranks.
    """
    if has_cache:
        raise ValueError(
            "Sequence parallelism keeps no cache: call `forward` without `cache` and `use_cache`, or end it with "
            "`set_sequence_parallel_group(None)`."
        )
    inputs = [len(num_tokens), inputs_embeds.shape[1], sum(num_tokens)]
    gathered = _Gather.apply(torch.tensor(inputs, device=inputs_embeds.device), group).tolist()
    samples, text_lengths, video_lengths = (list(numbers) for numbers in zip(*gathered))
    if set(samples) != {1}:
        raise ValueError(f"Sequence parallelism takes one sample at a time, the ranks have {samples}.")
    if len(set(text_lengths)) > 1:
        raise ValueError(f"The ranks of one sample must have the same text, got {text_lengths} tokens.")
    if any(video_lengths) and min(video_lengths) < min_tokens:
        raise ValueError(
            f"Each rank must have a stretch of at least {min_tokens} tokens of the video, or none of them any, got "
            f"{video_lengths} tokens. Use fewer ranks for a short video."
        )


def take_stretch(inputs: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """
    The inputs of this rank, from those of a sample with a single video: the frames are divided evenly, and the rest is
    what it was.

    Args:
        inputs (`dict[str, torch.Tensor]`): What the processor or collator has given, on every rank the same.
        group (`ProcessGroup`): The ranks.

    Raises:
        ValueError: for another number of videos, or a video of fewer temporal patches than ranks.
    """
    grid = inputs["video_grid_thw"]
    if len(grid) != 1 or grid[0, 0] < group.size():
        raise ValueError(
            f"Expected one video of at least {group.size()} temporal patches, for as many ranks, got "
            f"`video_grid_thw={grid.tolist()}`."
        )
    pixel_values = inputs["pixel_values_videos"].unflatten(0, (int(grid[0, 0]), -1))
    pixel_values = pixel_values.tensor_split(group.size())[group.rank()]
    grid = grid.clone()
    grid[0, 0] = len(pixel_values)
    return {**inputs, "pixel_values_videos": pixel_values.flatten(0, 1), "video_grid_thw": grid}
