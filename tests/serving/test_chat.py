# SPDX-License-Identifier: Apache-2.0
"""Questions about images and videos, as OpenAI's client asks them."""

import ast
import http.server
import io
import json
import re
import subprocess
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import PIL.Image
import pytest
from asking import QUESTION, answer, ask, data_url, image, num_cached, text, video
from tiny_vamba import ROOT


ORDER = "In which order did the colours come?"


@pytest.fixture(scope="module")
def content(media_root):
    return (media_root / "movement.mp4").read_bytes()


@pytest.fixture(scope="module")
def png():
    file = io.BytesIO()
    PIL.Image.new("RGB", (112, 112), "red").save(file, "PNG")
    return data_url("image/png", file.getvalue())


@pytest.fixture(scope="module")
def address(content):
    """Where the video is as a URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}/movement.mp4"
        files.shutdown()


def direct_answer(server, conversation, **options) -> str:
    """The greedy answer, by the model's own methods."""
    model, processor = server.handler.model, server.handler.processor
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_way_to_name_a_video(server, media_root, content, address):
    """The same content is known by whatever name it comes."""
    path = media_root / "movement.mp4"
    url = data_url("video/mp4", content)
    parts = [
        video("movement.mp4"),
        video(str(path)),
        video(path.as_uri()),
        video(address),
        video(url),
        {"type": "video_url", "video_url": "movement.mp4"},
        {"type": "input_video", "input_video": "movement.mp4"},
        {"type": "input_video", "input_video": {"url": address}},
        {"type": "input_video", "video_url": url},
        {"type": "video", "path": "movement.mp4"},
        {"type": "video", "base64": url.partition(",")[2]},
    ]
    before = len(server.encoded)
    for part in parts:
        completion = ask(server, part, text(QUESTION.text))
        assert answer(completion) == QUESTION.answer, part
        assert completion.choices[0].finish_reason == "stop"
        assert completion.model == server.model
    assert len(server.encoded) - before <= 1


def test_an_image(server, png):
    asked = [{"type": "image", "url": png}, text("Which colour is it?")]
    expected = direct_answer(server, [{"role": "user", "content": asked}])
    for part in (image(png), {"type": "input_image", "image_url": png, "detail": "low"}):
        assert answer(ask(server, part, asked[1], max_tokens=16)) == expected


def test_text_alone(server):
    expected = direct_answer(server, [{"role": "user", "content": "Which colour is it?"}])
    completion = ask(server, text("Which colour is it?"), max_tokens=16)
    assert answer(completion) == expected
    assert num_cached(completion) == 0


def test_several_videos_and_images_in_a_conversation(server, media_root, png):
    """As the model's own methods read them, in their order; and what a conversation begins with is known after it."""
    sources = [str(media_root / "sequence.mp4"), str(media_root / "movement.mp4")]
    first = [{"role": "user", "content": [video(sources[0]), image(png), text("What came first?")]}]
    reply = {"role": "assistant", "content": direct_answer(server, first)}
    conversation = [*first, reply, {"role": "user", "content": [video(sources[1]), text(QUESTION.text)]}]
    complete = server.client.chat.completions.create
    assert answer(complete(model=server.model, messages=first)) == reply["content"]
    before = len(server.encoded)
    completion = complete(model=server.model, messages=conversation)
    assert answer(completion) == direct_answer(server, conversation)
    assert len(server.encoded) == before + 1  # the second video, after what was known
    num_tokens = 8 * 16  # of each video
    assert num_cached(completion) > num_tokens
    known = complete(model=server.model, messages=conversation)
    assert num_cached(known) == num_cached(completion) + num_tokens
    assert len(server.encoded) == before + 1


def test_usage_counts_the_tokens_of_videos(server):
    tokenizer = server.handler.processor.tokenizer
    plain = ask(server, text(QUESTION.text))
    completion = ask(server, video("movement.mp4", num_frames=8), text(QUESTION.text))
    num_marks = len(tokenizer("<|vision_start|><|vision_end|>")["input_ids"])
    usage = completion.usage
    assert usage.prompt_tokens == plain.usage.prompt_tokens + num_marks + 4 * 16
    assert usage.completion_tokens == len(tokenizer(answer(completion))["input_ids"]) + 1  # and the end
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert num_cached(completion) == 0
    assert num_cached(ask(server, video("movement.mp4", num_frames=8), text("What moved?"))) == 4 * 16


def test_streaming(server):
    whole = ask(server, video("sequence.mp4"), text(ORDER))
    chunks = list(ask(server, video("sequence.mp4"), text(ORDER), stream=True))
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == answer(whole) and len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    body = {"messages": [{"role": "user", "content": "What?"}], "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_ten_at_once(server, png):
    """Whole and streamed, about videos, images and nothing, of several lengths: each gets its own answer."""
    asked = [
        (parts, {"max_tokens": max_tokens})
        for parts in (
            [video("movement.mp4"), text(QUESTION.text)],
            [video("movement.mp4"), text("What color moved?")],
            [video("sequence.mp4"), text("What came first?")],
            [image(png), text("Which colour is it?")],
            [text("Which colour is it?")],
        )
        for max_tokens in (2, 32)
    ]
    expected = [answer(ask(server, *parts, **options)) for parts, options in asked]

    def ask_streaming(asked):
        parts, options = asked
        chunks = ask(server, *parts, **options, stream=True)
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    with ThreadPoolExecutor(10) as threads:
        whole = threads.map(lambda each: answer(ask(server, *each[0], **each[1])), asked)
        assert list(whole) == expected
        assert list(threads.map(ask_streaming, asked)) == expected


def test_options_of_a_request(server):
    def ask_with(**options):
        return ask(server, video("sequence.mp4"), text(ORDER), **options)

    whole = answer(ask_with(temperature=0))
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask_with(**{name: 1})
        assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1
        assert whole.startswith(answer(short)) and answer(short) != whole
    stop = whole[3:6]
    stopped = ask_with(stop=["not there", stop])
    assert answer(stopped) == whole[: whole.index(stop)] and stopped.choices[0].finish_reason == "stop"
    assert answer(ask_with(extra_body={"generation_config": json.dumps({"max_new_tokens": 1})})) == answer(short)
    sampled = [answer(ask_with(temperature=2, seed=seed, max_tokens=8)) for seed in (0, 1, 2, 0)]
    assert sampled[0] == sampled[3] and len(set(sampled)) > 1
    fewer = ask_with(extra_body={"chat_template_kwargs": {"num_frames": 4}})
    assert fewer.usage.prompt_tokens == ask_with().usage.prompt_tokens - 6 * 16
    banned = server.handler.processor.tokenizer(whole)["input_ids"][0]
    assert not answer(ask_with(logit_bias={str(banned): -100})).startswith(whole[:2])


def test_models_and_health(server):
    assert [model.id for model in server.client.models.list()] == [server.model]
    for path in ("health", "v1/models"):
        with urllib.request.urlopen(f"{server.url}/{path}", timeout=60) as response:
            assert response.status == 200


def test_what_the_documentation_asks(server, media_root, address, capsys):
    """The blocks of `docs/serving.md` for curl and for OpenAI's client, about a video of the tests."""
    names = {
        "http://localhost:8000": server.url,
        "https://example.org/movie.mp4": address,
        "movie.mp4": "movement.mp4",
    }
    page = (ROOT / "docs" / "serving.md").read_text()
    for name, here in names.items():
        page = page.replace(name, here)
    expected = [
        answer(ask(server, video("movement.mp4", **options), text("What happens first?")))
        for options in ({}, {"fps": 2})
    ]

    block = r"^```{}\n(.*?)^```"
    commands = re.findall(block.format("bash"), page, re.MULTILINE | re.DOTALL)
    run = partial(subprocess.run, cwd=media_root, capture_output=True, text=True, check=True)
    printed = [run(["bash", "-ec", command]).stdout for command in commands if "curl" in command]
    lines = [line for line in printed.pop(1).splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == expected[1]
    assert [json.loads(reply)["choices"][0]["message"]["content"] for reply in printed] == [expected[0]] * 2

    exec("\n".join(re.findall(block.format("python"), page, re.MULTILINE | re.DOTALL)), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{expected[0]} CompletionUsage(")
    assert len(ast.literal_eval(second[second.index("[") :])) == 3
