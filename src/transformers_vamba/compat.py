# SPDX-License-Identifier: Apache-2.0
"""
What differs between the supported versions of Transformers, decided once.

Transformers 5.24 calls a model's cache `cache`; earlier versions call it `past_key_values`. This package says `cache`
everywhere, takes either name from its callers, and hands Transformers the one that it knows.
"""

import functools
import inspect
from collections.abc import Callable

import transformers
from packaging.version import Version
from transformers.masking_utils import create_causal_mask
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)


OLDEST_TESTED, NEWEST_TESTED = "5.17.0", "5.24.0"

if not Version(OLDEST_TESTED) <= Version(transformers.__version__) <= Version(NEWEST_TESTED):
    logger.warning(
        f"Vamba was tested with Transformers {OLDEST_TESTED} to {NEWEST_TESTED}, and this is "
        f"{transformers.__version__}. Should it fail or answer nonsense, install a tested version."
    )

CACHE_NAMES = ("cache", "past_key_values")
_known_names = [name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters]
if not _known_names:
    raise ImportError(
        f"Transformers {transformers.__version__} calls its cache neither {' nor '.join(map(repr, CACHE_NAMES))}, the "
        f"names that Vamba knows. Install Transformers {OLDEST_TESTED} to {NEWEST_TESTED}."
    )
CACHE_NAME = _known_names[0]

# Arguments that Transformers' `forward` methods let through without a parameter of their own.
PASSED_ON = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",  # of generation before Transformers 5.20; PEFT still asks for it
    "return_dict",
    "shift_labels",  # of trainers that have shifted the labels themselves
    "sliding_window",
}


def rename_cache(kwargs: dict, name: str = CACHE_NAME) -> dict:
    """
    The arguments with the cache, if there is one, under one name.

    Raises:
        TypeError: for two different caches.
    """
    given = [kwargs[each] for each in CACHE_NAMES if kwargs.get(each) is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise TypeError("`cache` and `past_key_values` are two names of one argument, and got two different caches.")
    renamed = {key: value for key, value in kwargs.items() if key not in CACHE_NAMES}
    return renamed if len(renamed) == len(kwargs) else renamed | {name: given[0] if given else None}


def rename_checkpointing(args) -> None:
    """
    Brings what was said by `gradient_checkpointing` and `gradient_checkpointing_kwargs` in `TrainingArguments` under
    their names since Transformers 5.24, `activation_checkpointing`, if there are such: it warns of the old ones. To be
    called at the beginning of `__post_init__`, in a class of one's own.
    """
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        if hasattr(args, new) and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)


def takes_cache(function: Callable) -> Callable:
    """Lets a function with a parameter `cache` be called with `past_key_values=` as well."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **rename_cache(kwargs, "cache"))

    return wrapper


def checked_forward(forward: Callable) -> Callable:
    """
    A `forward` that takes the cache under either name and refuses keyword arguments that nobody reads. Those in
    `PASSED_ON` go through to the attention and the loss.
    """
    known = PASSED_ON | set(inspect.signature(forward).parameters)
    forward = takes_cache(forward)

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if unknown := sorted(set(kwargs) - known - set(CACHE_NAMES)):
            raise TypeError(
                f"{type(self).__name__}.forward() got unexpected arguments: {', '.join(unknown)}. It takes "
                f"{', '.join(sorted(known - {'self', 'kwargs'}))}."
            )
        return forward(self, *args, **kwargs)

    return wrapper
