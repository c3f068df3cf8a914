# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Checks of arguments: an error that names the argument, what was given and what was expected."""

from typing import Any

import torch


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


__all__ = ["check_tensor"]
