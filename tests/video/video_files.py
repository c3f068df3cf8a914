# SPDX-License-Identifier: Apache-2.0
"""Video files of every kind, written by the tests, and their frames as a plain decoder gives them."""

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np


def pictures(num_frames: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """A pattern that moves by three pixels a frame, uint8 of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-(width + 3 * num_frames) // 8), 3), dtype=np.uint8)
    pattern = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height]
    return [np.ascontiguousarray(pattern[:, 3 * i : 3 * i + width]) for i in range(num_frames)]


def write_file(
    path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    rate: int = 30,
    times: list[int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict | None = None,
    container_options: dict | None = None,
    prepare: Callable | None = None,
    change: Callable | None = None,
    container_format: str | None = None,
) -> str:
    """
    Encodes frames.

    Args:
        times (`list[int]`, *optional*): When each frame is shown, in milliseconds.
        prepare (`Callable`, *optional*): Called with the stream before anything is encoded.
        change (`Callable`, *optional*): Called with all packets; gives those that are written.
    """
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if prepare is not None:
            prepare(stream)
        packets = []
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in change(packets) if change is not None else packets:
            container.mux(packet)
    return str(path)


def decode_all(path) -> tuple[list[np.ndarray], list[float | None]]:
    """All frames of a file and their times in seconds after the first."""
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.best("video")))
    first = frames[0].time
    times = [None if frame.time is None else frame.time - first for frame in frames]
    return [frame.to_ndarray(format="rgb24") for frame in frames], times


def hidden_copy(packet, bit: int, pts: int):
    """A packet of VP8 or VP9 with the same keyframe, which is decoded and not shown."""
    content = bytearray(bytes(packet))
    content[0] &= ~(1 << bit)
    copy = av.Packet(bytes(content))
    copy.pts = copy.dts = pts
    copy.time_base, copy.stream, copy.is_keyframe = packet.time_base, packet.stream, False
    return copy
