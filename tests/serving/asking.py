# SPDX-License-Identifier: Apache-2.0
"""Requests as OpenAI's client sends them."""

import base64

from synthetic_videos import sample_video


QUESTION = next(each for each in sample_video([77, 0], 16, "movement").questions if each.kind == "direction")


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def text(question: str) -> dict:
    return {"type": "text", "text": question}


def video(source: str, **options) -> dict:
    return {"type": "video_url", "video_url": {"url": source}, **options}


def image(source: str) -> dict:
    return {"type": "image_url", "image_url": {"url": source}}


def ask(server, *parts, **options):
    messages = [{"role": "user", "content": list(parts)}]
    return server.client.chat.completions.create(model=server.model, messages=messages, **options)


def answer(completion) -> str:
    return completion.choices[0].message.content


def num_cached(completion) -> int:
    return completion.usage.prompt_tokens_details.cached_tokens
