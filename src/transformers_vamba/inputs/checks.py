# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: an error that names the argument, what was given and what was expected."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


def check_tensor(name: str, value: Any, floating: bool, shape: tuple[int | str, ...]) -> None:
    """
    Checks that an argument is a tensor of the right kind and shape.

    Args:
        name (`str`): Name of the argument.
        value (`Any`): The argument.
        floating (`bool`): Whether it holds floating point numbers; integers otherwise.
        shape (`tuple[int | str, ...]`): The size of each dimension, or the name of one that may have any size.

    Raises:
        TypeError: for anything but a tensor of this kind.
        ValueError: for another shape.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if floating else is_integer):
        kind = "floating point numbers" if floating else "integers"
        raise TypeError(f"`{name}` must hold {kind}, got {value.dtype}.")
    fits = value.ndim == len(shape) and all(
        isinstance(expected, str) or size == expected for size, expected in zip(value.shape, shape)
    )
    if not fits:
        raise ValueError(f"`{name}` must have shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}.")


def check_text(
    hidden_size: int,
    input_ids: Any,
    inputs_embeds: Any,
    attention_mask: Any,
    position_ids: Any,
    cache: Any,
) -> None:
    """Checks the types and shapes of the text's arguments of `forward`; `input_ids` or `inputs_embeds` is `None`."""
    if input_ids is not None:
        name, text = "input_ids", input_ids
        check_tensor(name, text, False, ("batch_size", "sequence_length"))
    else:
        name, text = "inputs_embeds", inputs_embeds
        check_tensor(name, text, True, ("batch_size", "sequence_length", hidden_size))
    batch_size, sequence_length = text.shape[:2]
    if batch_size == 0 or sequence_length == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(text.shape)}.")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"`cache` must be a Cache, got {type(cache).__name__}.")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 4:  # 4: prepared before
        length = attention_mask.shape[-1] if attention_mask.ndim else 0
        is_long_enough = length == sequence_length if cache is None else length >= sequence_length
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size or not is_long_enough:
            raise ValueError(
                f"`attention_mask` must have shape ({batch_size}, past length + {sequence_length}), got "
                f"{tuple(attention_mask.shape)}."
            )
    if position_ids is not None:
        axes = ("axes",) if getattr(position_ids, "ndim", 2) == 3 else ()
        check_tensor("position_ids", position_ids, False, (*axes, "batch_size", sequence_length))
        if position_ids.shape[-2] not in (1, batch_size):
            raise ValueError(
                f"`position_ids` must have one row, or one for each of the {batch_size} of `{name}`, got "
                f"{position_ids.shape[-2]} rows."
            )


def check_no_media_expected(config: PreTrainedConfig, input_ids: Any, mm_token_type_ids: Any) -> None:
    """
    For a prompt that came without images or videos: a `ValueError` if its marks, or without marks its text, say that
    it has some. Trainers drop what they do not know without a word.

    Args:
        config ([`VambaConfig`]): Says which tokens stand around a medium.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The text to look at.
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The marks.
    """
    hint = (
        "images or videos, but none are given. Check that the data collator returns the processor's `pixel_values` or "
        "`pixel_values_videos`, and that the trainer passes them on."
    )
    if mm_token_type_ids is not None:
        if num_places := int(mm_token_type_ids.count_nonzero()):
            raise ValueError(f"The prompt has {num_places} places (`mm_token_type_ids`) for {hint}")
    elif input_ids is not None:
        starts = input_ids[:, :-1] == config.vision_start_token_id
        if (starts & (input_ids[:, 1:] == config.vision_end_token_id)).any():
            raise ValueError(
                f"The text has places (`<|vision_start|><|vision_end|>`) for {hint} TRL's own preparation keeps "
                "images alone: for videos pass `VambaDataCollator` to `SFTTrainer`, `VambaPreferenceCollator` to "
                "`DPOTrainer`; `GRPOTrainer` and `RLOOTrainer` cannot train on videos. For text that is about these "
                "tokens pass `mm_token_type_ids` of zeros, as `VambaDataCollator` does."
            )


@contextmanager
def adapter_names_explained() -> Iterator[None]:
    """Explains PEFT's error for several adapters: it counts one per row, but the layers also see videos."""
    try:
        yield
    except ValueError as error:
        if "adapter_names" not in str(error):
            raise
        raise ValueError(
            "PEFT cannot mix adapters in a batch with images or videos, whose tokens go through the text's layers "
            "and belong to no row. Leave `adapter_names` out and use one adapter at a time, by `set_adapter`. "
            f"({error})"
        ) from error


def check_virtual_tokens(prepare: Callable, past_length: int, length: int, chunk_size: int | None) -> None:
    """
    Raises a `ValueError` for a prompt that PEFT would cut: if `prepare`, which prepares the inputs of a pass, puts
    virtual tokens before the prompt, it leaves of every pass after them the last token.
    """
    config = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return
    if past_length:
        raise ValueError(
            f"The cache holds {past_length} tokens of text, and PEFT's prompt tuning cannot go on from them: it would "
            "read the last token of the prompt alone. Give the whole prompt with a fork of the cache from before it."
        )
    if chunk_size is not None and chunk_size < length:
        raise ValueError(
            f"`prefill_chunk_size` is {chunk_size}, and PEFT's prompt tuning reads a prompt, here of {length} tokens, "
            "at once: of every further chunk it would read the last token alone. Leave the argument out."
        )


def check_prompt_goes_on(past_length: int, length: int | None) -> None:
    """
    Raises a `ValueError` if a prompt of `length` tokens, including the `past_length` that the cache holds, brings
    nothing new, and so does not continue the cached text.
    """
    if past_length and length is not None and length <= past_length:
        raise ValueError(
            f"The cache holds {past_length} tokens of text, and a prompt that goes on from them is longer; got one of "
            f"{length}. To ask several questions about one video, give each a fork of the cache from before the "
            "first: `generate(..., cache=cache.fork())`."
        )


def check_prompt_repeats(text_ids: torch.Tensor | None, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """
    Raises a `ValueError` unless a prompt begins with the tokens that the cache has read.

    Args:
        text_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*): What the cache has read.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The whole prompt.
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 0 for padding, which may differ.
    """
    if text_ids is None or len(text_ids) != len(input_ids):
        return
    length = min(text_ids.shape[1], input_ids.shape[1])
    differs = text_ids[:, :length].to(input_ids.device) != input_ids[:, :length]
    if mask is not None:
        differs &= mask[:, :length].to(differs.device).bool()
    if differs.any():
        row, place = differs.nonzero()[0].tolist()
        raise ValueError(
            f"The prompt does not go on from the text that the cache has read: token {place} of row {row} is "
            f"{int(input_ids[row, place])}, and the cache has read {int(text_ids[row, place])}. To ask several "
            "questions about one video, give each a fork of the cache from before the first: "
            "`generate(..., cache=cache.fork())`."
        )


def video_dtype_error(held: torch.dtype, other: torch.dtype, use: str) -> ValueError:
    """What to raise for a video in the dtype `held` whose `use`, "read" say, is in another."""
    return ValueError(
        f"The cache holds a video in {held}, and is {use} in {other}. Load the model with `dtype={held}`, or encode "
        "the video anew."
    )


def video_device_error(held: torch.device, other: torch.device, use: str) -> ValueError:
    """What to raise for a video on the device `held` whose `use`, "read" say, is on another."""
    return ValueError(
        f"The cache holds a video on {held}, and is {use} on {other}. Move it with `cache.to(model.device)`, or load "
        "it there: `VambaCache.from_pretrained(folder, device=model.device)`."
    )
