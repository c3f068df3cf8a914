# SPDX-License-Identifier: Apache-2.0
"""Requests for chat completions, checked before anything is opened."""

import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..messages import IMAGE_KEYS, find_source, plain_part
from ..messages import VIDEO_OPTIONS as OPTIONS_OF_VIDEOS
from ..video.reading import VideoWithOptions
from ..video.sources import describe_source, is_data_url
from .errors import RequestError


MAX_MEDIA = 64  # images and videos of a request
MAX_EDGE, MAX_PIXELS = 4096, 2**22  # of a frame, of those that a request may ask for
LEAST_PENALTY, MOST_PENALTY = 0.001, 1000.0  # past these, scores times a penalty leave the range of float32
# Of a message that a client sends back as it got it. They say nothing to the model.
IGNORED_OF_MESSAGES = {"name", "reasoning_content"}

StopString = Annotated[str, Field(min_length=1, max_length=256)]
Fields = TypeVar("Fields", bound=BaseModel)
Nothing = Annotated[list[None], Field(max_length=0)]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatRequest(BaseModel):
    """
    The fields of a request. Those that this server does not support may have the value that means nothing, since many
    clients send all fields.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    generation_config: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Without effect.
    metadata: dict | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    stream_options: dict | None = None  # usage always comes with the last chunk
    user: str | None = None

    # Not supported.
    audio: None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    logprobs: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    n: Literal[1] | None = None
    prediction: None = None
    presence_penalty: Literal[0] | None = None
    reasoning_effort: None = None
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Nothing | None = None
    top_logprobs: Literal[0] | None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class GenerationOptions(BaseModel):
    """What the `generation_config` of a request may set: nothing that changes how the server works."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    do_sample: bool | None = None
    max_new_tokens: int | None = Field(None, ge=1)
    min_new_tokens: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=LEAST_PENALTY, le=MOST_PENALTY)
    temperature: float | None = Field(None, gt=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    transformers_version: str | None = None  # of whoever wrote it
    typical_p: float | None = Field(None, gt=0, le=1)


class FrameSize(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    shortest_edge: int = Field(ge=1, le=MAX_EDGE)
    longest_edge: int = Field(ge=1, le=MAX_EDGE)


class VideoOptions(BaseModel):
    """What a request may say of how a video is read, in bounds that no frame fills the memory."""

    model_config = ConfigDict(extra="forbid", strict=True)

    fps: float | None = Field(None, gt=0, le=1000)
    num_frames: int | None = Field(None, ge=1)
    nframes: int | None = Field(None, ge=1)
    min_frames: int | None = Field(None, ge=1)
    max_frames: int | None = Field(None, ge=1)
    min_pixels: int | None = Field(None, ge=1, le=MAX_PIXELS)
    max_pixels: int | None = Field(None, ge=1, le=MAX_PIXELS)
    size: FrameSize | None = None
    on_damage: Literal["raise", "skip"] | None = None

    @model_validator(mode="after")
    def check_bounds(self) -> "VideoOptions":
        given = [f"`{name}`" for name in ("num_frames", "nframes", "fps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are mutually exclusive")
        for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
            if (getattr(self, least) or 0) > (getattr(self, most) or math.inf):
                raise ValueError(f"`{least}` is greater than `{most}`")
        return self


class ChatOptions(VideoOptions):
    """What `chat_template_kwargs` may set: how all videos are read, and whether images and videos are numbered."""

    add_vision_id: bool | None = None


def read_request(body: dict) -> ChatRequest:
    """The request in a body of JSON."""
    return validate(ChatRequest, body)


def read_generation_options(request: ChatRequest) -> dict:
    """What `generation_config` sets: an object, or one in a string, as `transformers chat` sends it."""
    given = request.generation_config
    try:
        given = json.loads(given) if isinstance(given, str) else given or {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"`generation_config` is no JSON: {error}.", "generation_config") from error
    options = validate(GenerationOptions, given, "generation_config")
    return options.model_dump(exclude_none=True, exclude={"transformers_version"})


def validate(kind: type[Fields], content, place: str = "") -> Fields:
    """The fields in content of JSON; a [`RequestError`] names the first one that is wrong, after `place`."""
    check_text(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # Where a field takes one of several types, the one that comes closest is the deepest.
        wrong = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
        name = name_field(wrong["loc"], content, place)
        if wrong["type"] == "extra_forbidden":
            raise RequestError(f"There is no field `{name}`.", name) from None
        if wrong["type"] == "missing":
            name = f"{name}.{wrong['loc'][-1]}".lstrip(".")
            raise RequestError(f"The request lacks `{name}`.", name) from None
        reason = wrong["msg"].removeprefix("Value error, ")
        raise RequestError(f"`{name}`: {reason}, got {describe_value(wrong['input'])}.", name) from None


def check_text(content) -> None:
    """Raises a [`RequestError`] for half of a surrogate pair, which JSON can name but which no text has."""
    remaining = [content]
    while remaining:
        each = remaining.pop()
        if isinstance(each, dict):
            remaining += [*each, *each.values()]
        elif isinstance(each, list):
            remaining += each
        elif isinstance(each, str) and not each.isascii():
            try:
                each.encode()
            except UnicodeEncodeError as error:
                half = each[error.start]
                raise RequestError(f"The request has half of a surrogate pair, {half!r}, which is no text.") from None


def name_field(location: tuple, content: Any, name: str) -> str:
    """The name of a field, as `messages[0].content`. Parts that are not there say which of several types was tried."""
    for part in location:
        if isinstance(part, int):
            name, content = f"{name}[{part}]", content[part]
        elif isinstance(content, dict) and part in content:
            name, content = f"{name}.{part}" if name else part, content[part]
    return name


def describe_value(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@dataclass(frozen=True)
class NamedMedium:
    """
    An image or a video as a message names it.

    Args:
        kind (`str`): `"image"` or `"video"`.
        source (`str`): A path, a URL or a `data:` URL.
        place (`str`): Where it stands in the request.
        options (`dict`): Arguments of the video processor.
    """

    kind: str
    source: str
    place: str
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What errors call it."""
        return describe_source(self.source)


@dataclass
class Conversation:
    """
    What chat templates take, and the images and videos in the order in which they stand in it.

    Args:
        messages (`list[dict]`): Messages whose parts name no source.
        media (`list[NamedMedium]`): The images and videos.
        template_options (`dict`): Arguments of the chat template.
    """

    messages: list[dict]
    media: list[NamedMedium]
    template_options: dict


def read_conversation(request: ChatRequest, server_options: dict) -> Conversation:
    """
    The conversation of a request.

    Args:
        request ([`ChatRequest`]): The request.
        server_options (`dict`): What `chat_template_kwargs` are where the request has none.
    """
    given = request.chat_template_kwargs or {}
    check_chat_options(given, "chat_template_kwargs")
    options = join_options(server_options, given)
    video_options = {OPTIONS_OF_VIDEOS[name]: value for name, value in options.items() if name in OPTIONS_OF_VIDEOS}
    template_options = {name: value for name, value in options.items() if name not in OPTIONS_OF_VIDEOS}
    messages, media = [], []
    for i, message in enumerate(request.messages):
        ignored = {name for name, value in (message.model_extra or {}).items() if value in (None, [])}
        if unknown := sorted(set(message.model_extra or {}) - ignored - IGNORED_OF_MESSAGES):
            name = f"messages[{i}].{unknown[0]}"
            raise RequestError(f"`{name}` is not supported: a message has `role` and `content`.", name)
        role = "system" if message.role == "developer" else message.role
        content: str | list = message.content or ""
        if isinstance(content, list):
            parts = [read_part(part, f"messages[{i}].content[{j}]", video_options) for j, part in enumerate(content)]
            media += [part for part in parts if isinstance(part, NamedMedium)]
            content = [{"type": part.kind} if isinstance(part, NamedMedium) else part for part in parts]
        messages.append({"role": role, "content": content})
    if len(media) > MAX_MEDIA:
        raise RequestError(f"A request may have {MAX_MEDIA} images and videos, got {len(media)}.", "messages")
    return Conversation(messages, media, template_options)


def check_chat_options(options: dict, place: str) -> None:
    """Raises a [`RequestError`] for `chat_template_kwargs` that are unknown or wrong; `place` is where they stand."""
    known = set(ChatOptions.model_fields)
    if unknown := sorted(set(options) - known):
        raise RequestError(f"`{place}` may set {', '.join(sorted(known))}, got {', '.join(unknown)}.", place)
    validate(ChatOptions, options, place)


def join_options(defaults: dict, given: dict) -> dict:
    """Options of videos, where one that is given takes the place of a default. Of rate and number one remains."""
    sampling = {"fps", "num_frames", "nframes"}
    is_sampled = any(given.get(name) is not None for name in sampling)
    kept = {name: value for name, value in defaults.items() if not (is_sampled and name in sampling)}
    return kept | {name: value for name, value in given.items() if value is not None}


def read_part(part: dict, name: str, video_options: dict) -> dict | NamedMedium:
    """A part of a message: of text, or what it names."""
    try:
        plain = plain_part(part)
    except ValueError as error:
        raise RequestError(f"`{name}`: {error}", name) from error
    if plain["type"] == "text":
        if not isinstance(plain.get("text"), str):
            raise RequestError(f"`{name}` needs a string `text`, got {describe_value(part)}.", name)
        if unknown := sorted(set(plain) - {"type", "text", "annotations", "logprobs"}):
            raise RequestError(f"`{name}`: a text has no {', '.join(unknown)}.", name)
        return {"type": "text", "text": plain["text"]}
    options: dict = {}
    if plain["type"] == "image":
        source, key = find_source(part, IMAGE_KEYS)
        if unknown := sorted(set(part) - {"type", "detail", key}):
            raise RequestError(f"`{name}`: an image has no {', '.join(unknown)}.", name)
        if key == "base64":
            source = f"data:application/octet-stream;base64,{source}"
    else:
        source, options = plain.get("video"), video_options
        if isinstance(source, VideoWithOptions):
            validate(VideoOptions, source.options, name)
            source, options = source.video, join_options(options, source.options)
    if not isinstance(source, str) or not source:
        given = "none" if source is None else describe_value(source)
        raise RequestError(f"`{name}` needs a path, an http, https or data: URL as a string, got {given}.", name)
    if source[:5].lower() == "data:" and not is_data_url(source):
        raise RequestError(f"`{name}`: a data: URL has a comma before its content.", name)
    return NamedMedium(plain["type"], source, name, options)
