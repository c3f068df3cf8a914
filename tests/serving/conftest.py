# SPDX-License-Identifier: Apache-2.0
"""A server in this process, on a port of the loopback."""

import socket
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic_videos import sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT
from transformers.utils.import_utils import is_serve_available

from transformers_vamba.__main__ import register


if not is_serve_available():
    pytest.skip("transformers[serving] is not installed", allow_module_level=True)

import openai  # noqa: E402

from transformers_vamba.serving.command import serve  # noqa: E402


def prepare(monkeypatch) -> None:
    """What the command does to Transformers, until the end of the test."""
    import transformers
    from transformers.cli.serving import chat_completion, server
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    places = [(transformers, "AutoConfig"), (transformers, "AutoProcessor")]
    places += [(transformers, "VambaForConditionalGeneration")]
    places += [(chat_completion, "ChatCompletionHandler"), (server, "build_server")]
    for module, name in places:
        monkeypatch.setattr(module, name, getattr(module, name, None), raising=False)
    monkeypatch.setitem(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "vamba", "VambaForConditionalGeneration")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    register()


@contextmanager
def serving(monkeypatch, model=str(TINY_CHECKPOINT), **options):
    """A running server: its `url`, its `handler`, an OpenAI `client`, and what was encoded, by segment."""
    prepare(monkeypatch)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = serve(
        model,
        device="cpu",
        host="127.0.0.1",
        port=port,
        log_level="error",
        non_blocking=True,
        **options,
    )
    try:
        deadline = time.monotonic() + 30
        while not running.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port}"
        handler = running._chat_handler
        encoded, encode_video = [], handler.model.encode_video

        def counted(**inputs):
            encoded.append(inputs["video_grid_thw"].tolist())
            return encode_video(**inputs)

        monkeypatch.setattr(handler.model, "encode_video", counted)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield SimpleNamespace(url=url, handler=handler, client=client, encoded=encoded, model=model, port=port)
    finally:
        running.kill_server()


@pytest.fixture(scope="module")
def media_root(tmp_path_factory):
    """A folder with videos of the tiny model's own, `movement.mp4` and `sequence.mp4`."""
    folder = tmp_path_factory.mktemp("media")
    for story, seed in (("movement", [77, 0]), ("sequence", 8)):
        write_mp4(folder / f"{story}.mp4", sample_video(seed, 16, story))
    return folder


@pytest.fixture(scope="module")
def server(media_root):
    """One server for all tests of a module, with a folder of media; the loopback is a private host that is allowed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        with serving(monkeypatch, media_root=media_root, allowed_hosts="127.0.0.1") as running:
            yield running


@pytest.fixture
def prepared(monkeypatch):
    """For tests that call `serve` themselves."""
    prepare(monkeypatch)


@pytest.fixture
def start(monkeypatch):
    """Starts a server with options of its own."""
    return lambda **options: serving(monkeypatch, **options)
