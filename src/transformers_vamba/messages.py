# SPDX-License-Identifier: Apache-2.0
"""The parts of chat messages, in the forms of several libraries, as Transformers' chat templates take them."""

from collections.abc import Mapping

from .video.reading import VideoWithOptions


TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
VIDEO_TYPES = ("video", "video_url", "input_video")
# Where a part has its image or video, in the order in which they are looked for.
IMAGE_KEYS = ("image", "image_url", "input_image", "url", "path", "base64")
VIDEO_KEYS = ("video", "video_url", "input_video", "url", "path", "base64")
# What a video may bring for itself, and its name among the arguments of the video processor.
VIDEO_OPTIONS = {
    name: name
    for name in ("num_frames", "fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "size", "on_damage")
} | {"nframes": "num_frames"}
IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")


def plain_conversation(conversation):
    """
    Messages whose parts are `{"type": "text"}`, `{"type": "image"}` and `{"type": "video"}` alone.

    Args:
        conversation: One conversation, or a list of them. It is left as it is.

    Raises:
        `ValueError`: for a part of another type, and for options that would be ignored.
    """
    if isinstance(conversation, (list, tuple)):
        return [plain_conversation(item) for item in conversation]
    if not isinstance(conversation, Mapping) or not isinstance(conversation.get("content"), (list, tuple)):
        return conversation
    return {**conversation, "content": [plain_part(part) for part in conversation["content"]]}


def plain_part(part):
    """One part of a message in the form that chat templates know."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind in TEXT_TYPES:
        return {**part, "type": "text"}
    if kind in IMAGE_TYPES:
        return plain_image(part)
    if kind in VIDEO_TYPES:
        return plain_video(part)
    raise ValueError(
        f"A part of a message must be of one of the types {', '.join((*TEXT_TYPES, *IMAGE_TYPES, *VIDEO_TYPES))}, got "
        f"{kind!r}."
    )


def plain_image(part: Mapping) -> dict:
    if ignored := [name for name in IMAGE_OPTIONS if part.get(name) is not None]:
        raise ValueError(
            f"An image in a message brings no {', '.join(ignored)} for itself: pass it for all images, as "
            "`processor_kwargs={'images_kwargs': {...}}`."
        )
    source, _ = find_source(part, IMAGE_KEYS)
    return (
        {"type": "image"}
        if source is None
        else {"type": "image", "url" if isinstance(source, str) else "image": source}
    )


def plain_video(part: Mapping) -> dict:
    source, key = find_source(part, VIDEO_KEYS)
    given = [(name, value) for name, value in part.items() if name not in ("type", *VIDEO_KEYS) and value is not None]
    if isinstance(part.get(key), Mapping) and "url" in part[key]:
        given += [(name, value) for name, value in part[key].items() if name != "url" and value is not None]
    if unknown := sorted({name for name, _ in given} - set(VIDEO_OPTIONS)):
        raise ValueError(
            f"A video in a message may bring {', '.join(VIDEO_OPTIONS)} for itself, got {', '.join(unknown)}."
        )
    if source is None:
        return {"type": "video"}
    options: dict = {}
    for name, value in given:
        known = options.setdefault(VIDEO_OPTIONS[name], value)
        if known is not value and known != value:
            raise ValueError(f"A video in a message brings `{VIDEO_OPTIONS[name]}` twice, with other values.")
    return {"type": "video", "video": VideoWithOptions(source, options) if options else source}


def find_source(part: Mapping, keys: tuple[str, ...]):
    """The image or video of a part and its key, or `None` for one that is passed next to the messages."""
    found = [key for key in keys if part.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"A part of a message must have one of {', '.join(keys)}, got {' and '.join(found)}.")
    if not found:
        return None, None
    source = part[found[0]]
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    if found[0] == "base64":
        source = f"data:application/octet-stream;base64,{source}" if keys is VIDEO_KEYS else source
    return source, found[0]
