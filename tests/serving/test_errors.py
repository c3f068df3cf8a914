# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a request is said, with status 400, and nothing of the machine besides."""

import http.server
import io
import json
import os
import re
import threading
import urllib.error
import urllib.request

import openai
import PIL.Image
import pytest
from asking import QUESTION, answer, ask, data_url, image, text, video
from tiny_vamba import TINY_CHECKPOINT

from transformers_vamba.serving.command import serve


def post(server, body) -> tuple[int, dict]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", content, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refusal(server, *parts, **options) -> str:
    """The message of the error that a question gets."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, *parts, text("What?"), **options)
    assert caught.value.status_code == 400
    assert caught.value.body["type"] == "invalid_request_error"
    return caught.value.body["message"]


@pytest.fixture(scope="module")
def files(media_root):
    """Files that are no videos, in the folder of media, and a folder beside it."""
    content = (media_root / "movement.mp4").read_bytes()
    (media_root / "empty.mp4").write_bytes(b"")
    (media_root / "words.mp4").write_text("These are words. " * 100)
    (media_root / "page.mp4").write_text("<!doctype html><html></html>")
    (media_root / "cut.mp4").write_bytes(content[: len(content) // 2])
    (media_root / "locked").mkdir(exist_ok=True)
    outside = media_root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.mp4").write_bytes(content)
    (media_root / "link.mp4").symlink_to(outside / "secret.mp4")
    (media_root / "folder").symlink_to(outside)
    (media_root / "inner.mp4").symlink_to("movement.mp4")
    return media_root


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "Could not read 'empty.mp4' as a video: the file is empty"),
        ("words.mp4", "Could not read 'words.mp4' as a video: it is no video"),
        ("page.mp4", "Could not read 'page.mp4' as a video: this is an HTML page"),
        ("cut.mp4", "Could not read 'cut.mp4' as a video: it is no video, or its beginning is damaged"),
        (data_url("video/mp4", b""), "the file is empty"),
        (data_url("video/mp4", b"words"), "it is no video"),
        ("data:video/mp4;base64", "a comma before its content"),
        ("data:video/mp4;base64,A", "its base64 is damaged"),
        ("", "needs a path, an http, https or data: URL"),
        ("http://127.0.0.1:1/movement.mp4", "Connection refused"),
    ],
)
def test_what_cannot_be_read(server, files, name, reason):
    message = refusal(server, video(name))
    assert message.startswith("`messages[0].content[0]`") and reason in message
    assert str(files) not in message


@pytest.mark.parametrize("part", (image("words.mp4"), image("movement.mp4"), image(data_url("image/png", b""))))
def test_what_is_no_image(server, files, part):
    assert "as an image. Known formats are" in refusal(server, part)


def test_an_image_that_would_fill_the_memory(server):
    """As bombs of few bytes; they are not even decoded."""
    for size in ((2**13, 2**13 + 1), (2**14, 2**14)):
        file = io.BytesIO()
        PIL.Image.new("1", size).save(file, "PNG")
        message = refusal(server, image(data_url("image/png", file.getvalue())))
        assert "an image of more than 67,108,864 pixels" in message


def test_an_image_that_is_too_narrow(server):
    file = io.BytesIO()
    PIL.Image.new("RGB", (2, 1000)).save(file, "PNG")
    message = refusal(server, image(data_url("image/png", file.getvalue())))
    assert message == "`messages[0].content[0]`: absolute aspect ratio must be smaller than 200, got 500.0"


def test_paths_out_of_the_media_root(server, files):
    """All are answered alike: whether there is such a file is not told. Links within the folder are followed."""
    outside = files.parent / "outside"
    names = [
        "missing.mp4",
        "../outside/secret.mp4",
        "../outside/missing.mp4",
        str(outside / "secret.mp4"),
        str(outside / "missing.mp4"),
        (outside / "secret.mp4").as_uri(),
        (outside / "missing.mp4").as_uri(),
        "file:///etc/%70asswd",
        "/etc/passwd",
        "link.mp4",
        "folder/secret.mp4",
        "locked/../../outside/secret.mp4",
        "locked",
        ".",
        "nothing\0.mp4",
        "n" * 5000,
        "ftp://127.0.0.1/movement.mp4",
    ]
    for part in (video, image):
        for name in names:
            message = refusal(server, part(name))
            shown = repr(name) if len(repr(name)) < 300 else message.partition("no file ")[2].partition(" within")[0]
            expected = f"`messages[0].content[0]`: there is no file {shown} within the server's --media-root."
            assert message == expected
    assert answer(ask(server, video("inner.mp4"), text(QUESTION.text))) == QUESTION.answer


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(server, files):
    (files / "private.mp4").touch(mode=0)
    message = refusal(server, video("private.mp4"))
    assert "Permission denied" in message and str(files) not in message


def test_without_a_media_root(start, media_root):
    """Neither paths nor private addresses are opened unless the server is told to."""
    with start() as server:
        for name in (str(media_root / "movement.mp4"), "/nothing.mp4"):
            for part in (video(name), image(name)):
                assert f"this server opens no paths, and got {name!r}" in refusal(server, part)
        for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "2130706433"):
            for part in (video, image):
                assert "it leads to an address that is not public" in refusal(server, part(f"http://{host}:9/x.mp4"))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://localhost/video.mp4", "it leads to an address that is not public"),
        ("http://10.0.0.1/video.mp4", "it leads to an address that is not public"),
        ("file:///etc/passwd", "is not allowed"),
        ("ftp://127.0.0.1/video.mp4", "only http and https are followed"),
        ("http://127.0.0.1:9/video.mp4", "redirected to another port"),
    ],
)
def test_redirects_are_checked(server, location, reason):
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", location)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as redirecting:
        threading.Thread(target=redirecting.serve_forever, daemon=True).start()
        for part in (video, image):
            assert reason in refusal(server, part(f"http://127.0.0.1:{redirecting.server_port}/video.mp4"))
        redirecting.shutdown()


def test_what_is_too_large(start, media_root, tmp_path):
    content = bytes(2 * 2**20)
    (tmp_path / "large.mp4").write_bytes(content)
    with start(media_root=tmp_path, max_media_mib=1) as server:
        for part in (video("large.mp4"), image("large.mp4"), video(data_url("video/mp4", content[: 2**20 + 1]))):
            assert "larger than 1,048,576 bytes" in refusal(server, part)
        assert "The request is larger than 1,572,864 bytes" in refusal(server, video(data_url("video/mp4", content)))
        assert answer(ask(server, text("What?"), max_tokens=2))  # it goes on


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt-4"}, f"There is no model 'gpt-4': this server has {str(TINY_CHECKPOINT)!r}."),
        ({"model": "/etc"}, f"There is no model '/etc': this server has {str(TINY_CHECKPOINT)!r}."),
        ({"no_such": 1}, "There is no field `no_such`."),
        ({"messages": None}, "`messages`: Input should be a valid list"),
        ({"messages": []}, "`messages`: List should have at least 1 item"),
        ({"messages": [{"content": "What?"}]}, "The request lacks `messages[0].role`."),
        ({"messages": [{"role": "tool", "content": "What?"}]}, "`messages[0].role`: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": 5}]}, "`messages[0].content`: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [5]}]}, "`messages[0].content[0]`: Input should be a valid dict"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [1]}]}, "`messages[0].tool_calls` is not supp"),
        ({"max_tokens": 0}, "`max_tokens`: Input should be greater than or equal to 1, got 0."),
        ({"max_tokens": 5000}, "more, and 5,000 were asked for"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "leaves room for 0 more"),
        ({"temperature": "hot"}, "`temperature`: Input should be a valid number, got 'hot'."),
        ({"temperature": 3}, "`temperature`: Input should be less than or equal to 2, got 3."),
        ({"top_p": 0}, "`top_p`: Input should be greater than 0"),
        ({"frequency_penalty": -1}, "`frequency_penalty`: Input should be greater than -1"),
        ({"seed": 2**64}, "`seed`: Input should be less than"),
        ({"stop": ["a", ""]}, "`stop[1]`: String should have at least 1 character"),
        ({"logit_bias": {"512": 1}}, "`logit_bias` has a token '512'; tokens are numbers below 512."),
        ({"logit_bias": {"9" * 5000: 1}}, "...; tokens are numbers below 512."),
        ({"logit_bias": {"5": 1, "05": 1}}, "`logit_bias` has a token '05'"),
        ({"n": 2}, "`n`: Input should be 1, got 2."),
        ({"tools": [{"type": "function"}]}, "`tools`: List should have at most 0 items"),
        ({"response_format": {"type": "json_object"}}, "`response_format.type`: Input should be 'text'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
            "`response_format.type`: Input should be 'text', got 'json_schema'.",
        ),
        ({"generation_config": "{"}, "`generation_config` is no JSON"),
        ({"generation_config": "[" * 10**6}, "`generation_config` is no JSON"),
        (
            {"generation_config": {"repetition_penalty": 1e-40}},
            "`generation_config.repetition_penalty`: Input should be",
        ),
        (
            {"generation_config": {"temperature": float("inf")}},
            "`generation_config.temperature`: Input should be a fin",
        ),
        ({"generation_config": {"num_beams": 2}}, "There is no field `generation_config.num_beams`."),
        ({"generation_config": {"temperature": 0}}, "`generation_config.temperature`: Input should be greater than 0"),
        ({"chat_template_kwargs": {"chat_template": ""}}, "`chat_template_kwargs` may set add_vision_id, fps"),
        (
            {"chat_template_kwargs": {"add_vision_id": "no"}},
            "`chat_template_kwargs.add_vision_id`: Input should be a v",
        ),
        ({"chat_template_kwargs": {"fps": 0}}, "`chat_template_kwargs.fps`: Input should be greater than 0, got 0."),
    ],
)
def test_wrong_fields(server, changes, message):
    status, body = post(server, {"messages": [{"role": "user", "content": "What?"}], **changes})
    assert status == 400 and message in body["error"]["message"]
    assert body["error"]["param"].startswith(next(iter(changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": [text("\ud800")]}]},
        {"messages": [{"role": "user", "content": [video("movement.mp4", **{"\ud800": 1})]}]},
        {"generation_config": '{"\\ud800": 1}'},
        {"\ud800": 1},
    ],
)
def test_what_no_text_is(server, changes):
    """JSON can name half of a surrogate pair. No tokenizer takes it, and no error could repeat it."""
    status, body = post(server, {"messages": [{"role": "user", "content": "What?"}], **changes})
    assert status == 400 and "half of a surrogate pair, '\\ud800', which is no text" in body["error"]["message"]


def test_numbers_at_their_bounds(server):
    """Scores that leave the range of numbers would be a fault of the server, and on a GPU its end."""
    expected = answer(ask(server, text("What?"), temperature=0))
    for temperature in (1e-320, 1e-38, 1e-6):
        assert answer(ask(server, text("What?"), temperature=temperature)) == expected
        options = {"generation_config": {"do_sample": True, "temperature": temperature}}
        assert answer(ask(server, text("What?"), extra_body=options)) == expected
    extreme = [{"repetition_penalty": number} for number in (0.001, 1000)] + [{"temperature": 1e300}]
    for options in extreme:
        options |= {"do_sample": True, "max_new_tokens": 4}
        assert ask(server, text("What?"), extra_body={"generation_config": options}).usage.completion_tokens
    assert answer(ask(server, text("What?"), temperature=0, logit_bias={})) == expected
    assert ask(server, video("movement.mp4", fps=1e-300), text("What?"), max_tokens=1).usage.completion_tokens == 1


def test_fields_that_mean_nothing(server):
    """Many clients send all fields."""
    nothing = {"n": 1, "tools": [], "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}}
    nothing |= {"tool_choice": "auto", "user": "me", "stream_options": {"include_usage": True}, "functions": None}
    message = {"role": "user", "content": "What?", "name": "me", "refusal": None, "tool_calls": []}
    status, body = post(server, {"messages": [message], "max_tokens": 2, **nothing})
    assert status == 200, body


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "`messages[0].content[0].fps`: Input should be greater than 0"),
        ({"num_frames": "8"}, "`messages[0].content[0].num_frames`: Input should be a valid integer"),
        ({"fps": 1, "num_frames": 8}, "`num_frames` and `fps` are mutually exclusive"),
        ({"max_pixels": 10**9}, "`messages[0].content[0].max_pixels`: Input should be less than"),
        ({"size": {"longest_edge": 10**6, "shortest_edge": 1}}, "`messages[0].content[0].size.longest_edge`"),
        ({"num_frames": 8, "nframes": 4}, "brings `num_frames` twice, with other values"),
        (
            {"min_frames": 9, "max_frames": 8},
            "`messages[0].content[0]`: `min_frames` is greater than `max_frames`, got",
        ),
        ({"min_pixels": 9000, "max_pixels": 8000}, "`min_pixels` is greater than `max_pixels`, got"),
        ({"on_damage": "ignore"}, "`messages[0].content[0].on_damage`: Input should be 'raise' or 'skip'"),
        ({"speed": 2}, "A video in a message may bring num_frames, fps"),
    ],
)
def test_wrong_options_of_a_video(server, options, message):
    assert message in refusal(server, video("movement.mp4", **options))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "input_audio", "input_audio": {}}, "must be of one of the types text, input_text"),
        ({"type": "video_url"}, "needs a path, an http, https or data: URL as a string, got none"),
        (
            {"type": "video_url", "video_url": {"url": 5}},
            "needs a path, an http, https or data: URL as a string, got 5",
        ),
        ({"type": "image_url", "image_url": "a.png", "crop": 1}, "an image has no crop"),
        ({"type": "text"}, "needs a string `text`"),
        ({"type": "text", "text": "What?", "language": "en"}, "a text has no language"),
        ({}, "must be of one of the types text, input_text"),
    ],
)
def test_wrong_parts(server, part, message):
    assert message in refusal(server, part)


def test_too_many_media(server):
    assert "may have 64 images and videos, got 65" in refusal(server, *[video("movement.mp4")] * 65)


@pytest.mark.parametrize("body", (b"", b"{", b"[]", b'"text"', b'{"user": "\xff"}', b"[" * 10**6))
def test_a_body_that_is_no_object(server, body):
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"]["message"].startswith(
        "The body of the request must be an object of JSON, sent with the header Content-Type"
    )


@pytest.mark.parametrize(
    "path", ("/v1/responses", "/v1/completions", "/v1/audio/transcriptions", "/reset", "/v1/systemone")
)
def test_what_is_not_served(server, path):
    """Transformers' other endpoints unload the model, or open what clients name without limits."""
    request = urllib.request.Request(f"{server.url}{path}", b"{}", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 404
    assert "This server has /v1/chat/completions" in json.load(caught.value)["error"]["message"]


def test_only_the_served_model_can_be_loaded(server):
    for model, status in ((server.model, 200), ("/etc", 400)):
        request = urllib.request.Request(
            f"{server.url}/load_model", json.dumps({"model": model}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                assert '"status": "ready"' in response.read().decode()
                found = response.status
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == status


def test_a_fault_of_the_server_tells_nothing(server, monkeypatch):
    """Neither whole nor streamed; and the next request is answered."""

    def fail(*args, **kwargs):
        raise RuntimeError('a "secret" of /root')

    monkeypatch.setattr(server.handler.model, "generate", fail)
    body = {"messages": [{"role": "user", "content": "What?"}]}
    status, whole = post(server, body)
    assert status == 500 and whole["error"]["message"] == "The server failed. Its log says why."
    with pytest.raises(openai.APIError, match="The server failed. Its log says why."):
        list(ask(server, text("What?"), stream=True))
    monkeypatch.undo()
    assert answer(ask(server, text("What?"), max_tokens=2))


def test_no_memory_left(server, monkeypatch):
    import torch

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(server.handler.model, "generate", fail)
    status, body = post(server, {"messages": [{"role": "user", "content": "What?"}]})
    assert status == 503 and body["error"]["code"] == "out_of_memory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"force_model": None}, "Name the model"),
        ({"media_root": "/nothing"}, "--media-root must be a folder, got '/nothing'"),
        ({"media_root": ""}, "--media-root must be a folder, got ''"),  # of a variable that is not set
        ({"video_folder": ""}, "--video-folder '' cannot be made: No such file or directory."),
        ({"allowed_hosts": "http://nas.local"}, "hosts without scheme and port, got 'http://nas.local'"),
        ({"allowed_hosts": "nas.local,10.0.0.7:8080"}, "hosts without scheme and port, got '10.0.0.7:8080'"),
        ({"allowed_hosts": "*.local"}, "--allowed-hosts takes whole hosts without scheme and port, got '*.local'"),
        ({"video_memory_gib": float("nan")}, "--video-memory-gib must be a finite number, got nan."),
        ({"video_folder_gib": float("inf")}, "--video-folder-gib must be a finite number, got inf."),
        ({"media_timeout": float("nan")}, "--media-timeout must be a finite number, got nan."),
        ({"video_folder": __file__}, f"--video-folder {__file__!r} cannot be made: File exists."),
        ({"chat_template_kwargs": '{"fps": 0}'}, "`--chat-template-kwargs.fps`: Input should be greater than 0"),
        ({"chat_template_kwargs": '{"frames": 4}'}, "`--chat-template-kwargs` may set add_vision_id, fps, max_frames"),
        ({"chat_template_kwargs": "{"}, "--chat-template-kwargs must be an object of JSON, got '{'"),
        ({"chat_template_kwargs": "[1]"}, "--chat-template-kwargs must be an object of JSON, got '[1]'"),
    ],
)
def test_wrong_options_of_the_server(prepared, options, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        serve(**{"force_model": str(TINY_CHECKPOINT), "device": "cpu", **options})
