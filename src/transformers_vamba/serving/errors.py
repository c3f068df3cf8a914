# SPDX-License-Identifier: Apache-2.0
"""Errors in the form in which OpenAI's clients read them."""

import torch


class RequestError(ValueError):
    """
    What is wrong with a request, for the one who sent it.

    Args:
        message (`str`): What was given, what was expected, and what to do.
        field (`str`, *optional*): The field of the request that is wrong.
        code (`str`, *optional*): A short name of what is wrong.
    """

    def __init__(self, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.field, self.code = field, code


def describe_failure(error: Exception) -> tuple[int, dict]:
    """The HTTP status of an error and the JSON that tells it. Of a fault of the server nothing is told."""
    if isinstance(error, RequestError):
        return 400, error_body(str(error), "invalid_request_error", error.field, error.code)
    if isinstance(error, torch.OutOfMemoryError):
        message = "The server's memory does not suffice for this request now. Ask for fewer frames, or later."
        return 503, error_body(message, "server_error", None, "out_of_memory")
    return 500, error_body("The server failed. Its log says why.", "server_error")


def error_body(message: str, kind: str, field: str | None = None, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
