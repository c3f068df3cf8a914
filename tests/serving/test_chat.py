# SPDX-License-Identifier: Apache-2.0
"""Questions about images and videos, as OpenAI's client asks them."""

import base64
import io

import PIL.Image
from synthetic_videos import sample_video


QUESTION = next(each for each in sample_video([77, 0], 16, "movement").questions if each.kind == "direction")


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def ask(server, *parts, **options):
    messages = [{"role": "user", "content": list(parts)}]
    return server.client.chat.completions.create(model=server.model, messages=messages, **options)


def text(question: str) -> dict:
    return {"type": "text", "text": question}


def video(source: str) -> dict:
    return {"type": "video_url", "video_url": {"url": source}}


def answer(completion) -> str:
    return completion.choices[0].message.content


def test_a_video(server):
    completion = ask(server, video("movement.mp4"), text(QUESTION.text))
    assert answer(completion) == QUESTION.answer
    assert completion.choices[0].finish_reason == "stop"


def test_an_image(server):
    png = io.BytesIO()
    PIL.Image.new("RGB", (112, 112), "red").save(png, "PNG")
    image = {"type": "image_url", "image_url": {"url": data_url("image/png", png.getvalue())}}
    assert answer(ask(server, image, text("Which colour is it?"), max_tokens=8))
