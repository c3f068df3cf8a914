# SPDX-License-Identifier: Apache-2.0
"""Multiple choice as in the published evaluation: the words of its prompts, and how it reads an answer."""

import string
from collections.abc import Iterable


SELECT = "Select the best answer to the following multiple-choice question based on the video."

# What announces an answer, and where the response is cut for it: the last one with a space, in the published scripts.
ANNOUNCEMENTS = {"the answer is": "the answer is", "answer:": "answer:", "the option is": "the option is "}


def respond_with(num_letters: int) -> str:
    """The instruction to answer with one of the first letters, such as `"(A, B, C, or D)"`."""
    *letters, last = list(string.ascii_uppercase[:num_letters])
    return f"Respond with only the letter ({', '.join(letters)}, or {last}) of the correct option."


def letter_lines(options: Iterable[str]) -> list[str]:
    """`"A. ..."`, `"B. ..."`: one line for each option."""
    return [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]


def letter_of(response: str) -> str:
    """
    The letter that a response chooses: the first one after a phrase that announces it, or else of all.

    Returns:
        `str`: upper-case, or `""` for a response without letters.
    """
    response = response.lower()
    for phrase, separator in ANNOUNCEMENTS.items():
        if phrase in response:
            response = response.split(separator)[-1]
            break
    return next((character.upper() for character in response if character.isalpha()), "")


def accuracy_of(response: str, answer: str) -> dict[str, float]:
    """The metric of one question: whether the response chooses the right letter."""
    return {"accuracy": float(letter_of(response) == answer.upper())}
