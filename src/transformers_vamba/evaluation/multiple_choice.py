# SPDX-License-Identifier: Apache-2.0
"""Multiple choice as in the published evaluation: its prompt, and how it reads an answer."""

import string
from collections.abc import Sequence


PHRASES = ("the answer is", "answer:", "the option is")


def letter_of(response: str) -> str:
    """
    The letter that a response chooses: the first one behind a phrase that announces it, or else of all.

    Returns:
        `str`: upper-case, or `""` for a response without letters.
    """
    response = response.lower()
    for phrase in PHRASES:
        if phrase in response:
            response = response.split(phrase)[-1]
            break
    return next((character.upper() for character in response if character.isalpha()), "")


def accuracy_of(response: str, answer: str, options: Sequence[str] | str | None) -> dict[str, float]:
    """The metric of one question: whether the response chooses the right letter. Without options it cannot."""
    return {"accuracy": float(bool(options) and letter_of(response) == answer.upper())}


def list_letters(count: int) -> str:
    """`"A, B, or C"`, of some number of options."""
    *letters, last = string.ascii_uppercase[:count]
    return f"{', '.join(letters)}, or {last}"
