# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` with a Vamba's handler and options."""

import functools
import inspect
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, server

from ..video.download import SourceLimits
from .app import build_vamba_server
from .chat import ServingOptions, VambaChatCompletionHandler
from .errors import RequestError
from .requests import check_chat_options


MIB, GIB = 2**20, 2**30


def make_options(
    # As text: a `Path` of the empty text, which a variable that is not set gives, is the current folder.
    media_root: Annotated[
        str | None,
        typer.Option(
            help="Folder of images and videos that requests may name by path. Without it they may name none."
        ),
    ] = None,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(
            help="Hosts that URLs may lead to although their addresses are private, such as 'nas.local,10.0.0.7'. "
            "Public hosts are always allowed."
        ),
    ] = None,
    max_media_mib: Annotated[int, typer.Option(help="Greatest size of an image or a video, in MiB.", min=1)] = 4096,
    media_timeout: Annotated[
        float, typer.Option(help="Longest time that a download may take, in seconds.", min=0.1)
    ] = 300.0,
    video_memory_gib: Annotated[
        float | None,
        typer.Option(
            help="Memory for processed videos, in GiB. By default three quarters of the GPU memory that is free once "
            "the model is loaded; on a CPU, 4. A video that takes more is refused.",
            min=0.001,
        ),
    ] = None,
    video_folder: Annotated[
        str | None,
        typer.Option(help="Folder that keeps processed videos over a restart."),
    ] = None,
    video_folder_gib: Annotated[float, typer.Option(help="Greatest size of that folder, in GiB.", min=0.0)] = 100.0,
) -> ServingOptions:
    """What the options of the command line mean."""
    numbers = {
        "media-timeout": media_timeout,
        "video-memory-gib": video_memory_gib,
        "video-folder-gib": video_folder_gib,
    }
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise SystemExit(f"--{name} must be a finite number, got {number}.")
    if media_root is not None and not os.path.isdir(media_root):
        raise SystemExit(f"--media-root must be a folder, got {media_root!r}.")
    hosts = frozenset(host.strip().lower().strip("[]") for host in (allowed_hosts or "").split(",") if host.strip())
    for host in hosts:
        if "/" in host or "*" in host or host.count(":") == 1:
            raise SystemExit(f"--allowed-hosts takes whole hosts without scheme and port, got {host!r}.")
    if video_folder is not None:
        try:
            os.makedirs(video_folder, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--video-folder {video_folder!r} cannot be made: {error.strerror}.") from error
        if not os.access(video_folder, os.W_OK | os.X_OK):
            raise SystemExit(f"--video-folder {video_folder!r} cannot be written to.")
    limits = SourceLimits(
        max_bytes=max_media_mib * MIB,
        max_seconds=media_timeout,
        timeout=min(media_timeout, SourceLimits.timeout),
        allow_local=media_root is not None,
        media_root=media_root,
        allow_private=False,
        private_hosts=hosts,
    )
    memory = None if video_memory_gib is None else int(video_memory_gib * GIB)
    folder = None if video_folder is None else Path(video_folder)
    return ServingOptions(limits, memory, folder, int(video_folder_gib * GIB))


def check_template_options(given: str | None) -> None:
    """Ends the program for `--chat-template-kwargs` that are no object of JSON, or set what is unknown or wrong."""
    try:
        options = json.loads(given) if given else {}
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise SystemExit(f"--chat-template-kwargs must be an object of JSON, got {given!r}.")
    try:
        check_chat_options(options, "--chat-template-kwargs")
    except RequestError as error:
        raise SystemExit(str(error)) from error


def serve(force_model: str | None = None, **arguments: Any) -> Serve:
    """
    Serve a Vamba model with an OpenAI compatible API. A video or an image that was met before is not encoded again.

    \b
    Endpoints:
        POST /v1/chat/completions - answers, streamed or whole
        GET  /v1/models           - the model
        GET  /health              - whether the server runs
    """
    if force_model is None:
        raise SystemExit("Name the model: python -m transformers_vamba serve PATH_OR_NAME")
    names = inspect.signature(make_options).parameters
    options = make_options(**{name: arguments.pop(name) for name in [*arguments] if name in names})
    check_template_options(arguments.get("chat_template_kwargs"))
    # `Serve` takes both from these modules.
    chat_completion.ChatCompletionHandler = functools.partial(VambaChatCompletionHandler, options)
    server.build_server = build_vamba_server
    return Serve(force_model, **arguments)


def _parameters() -> list[inspect.Parameter]:
    theirs = list(inspect.signature(Serve).parameters.values())
    return theirs + list(inspect.signature(make_options).parameters.values())


serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]  # what the command line shows
