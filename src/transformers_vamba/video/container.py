# SPDX-License-Identifier: Apache-2.0
"""A file as PyAV opens it: its video stream, and its frames as they are meant to be seen."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


# FFmpeg's formats that name further files or URLs. Reading a video must not open those, and the list of a live
# broadcast waits for more of them forever.
PLAYLIST_FORMATS = {"concat", "dash", "hls", "imf", "sdp", "vobsub"}
# Pixels that are longer than this many times their width, or the other way round, are a damaged header.
LONGEST_PIXEL = 20
# Twice those of 8K video. A file of a few kilobytes may state more, and fill the memory with a frame for each decoder.
MOST_PIXELS = 2**26
# Containers with a table of all frames. One that is damaged there has been cut off with the file.
TABLE_FORMATS = {"mov", "mp4"}


class DamageError(ValueError):
    """A part of a file cannot be decoded."""


@contextmanager
def open_video(file, thread_count: int | None = None) -> Iterator:
    """
    Opens the container of a video with PyAV, without reaching for anything but `file` itself.

    Args:
        file (`BinaryIO`):
            The file, at any position if it can be sought. Given as a path, a name such as `talk:1.mp4` would pass for
            a URL.
        thread_count (`int`, *optional*): Threads of the decoder. As many as there are cores by default.

    Returns:
        `av.container.InputContainer`: the container; its [`video_stream`] can be decoded.

    Raises:
        `ValueError`: when it has no video stream.
    """
    import av

    if file.seekable():
        file.seek(0)
        start = file.read(1024)
        file.seek(0)
        check_start(start)
    options = {
        "format_whitelist": ",".join(sorted(av.formats_available - PLAYLIST_FORMATS)),
        "protocol_whitelist": "none",
    }
    try:
        # A title that is not UTF-8 is no reason to refuse the video.
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.EINVAL:
            raise ValueError("it is no video, or a playlist that names further files") from error
        if isinstance(error, av.InvalidDataError):
            raise ValueError(f"it is no video, or its beginning is damaged or missing: {error.strerror}") from error
        raise
    with container:
        stream = video_stream(container)
        if stream is None or stream.codec_context is None:
            raise ValueError("it has no video stream of a known codec")
        if is_cover(stream):
            raise ValueError("it has no video stream, only a cover picture")
        if stream.width * stream.height > MOST_PIXELS:
            size = f"{stream.height:,}x{stream.width:,}"
            raise ValueError(f"its frames are of {size} pixels, which are more than {MOST_PIXELS:,}")
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # frames may be larger than the header says
        # With PyAV's logging on, a thread that logs an error and the one that waits for it would wait for one another.
        if av.logging.get_level() is None and thread_count != 1:
            stream.thread_type = "AUTO"
        if thread_count is not None:
            stream.codec_context.thread_count = thread_count
        yield container


def is_cover(stream) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def video_stream(container):
    """
    The video stream that FFmpeg takes for the best one, `None` without any. If that is a cover or a single picture,
    such as a preview, and there is a film, that with the most frames.
    """
    best = container.streams.best("video")
    if best is not None and (is_cover(best) or best.frames == 1):
        films = [stream for stream in container.streams.video if stream.codec_context is not None]
        best = max(films, key=lambda stream: (not is_cover(stream), stream.frames, stream is best), default=best)
    return best


def check_start(start: bytes):
    """Raises a `ValueError` for a file that begins as no video does, which says what it is."""
    if not start:
        raise ValueError("the file is empty, it is no video")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        raise ValueError("this is an HTML page, it is no video")


def count_missing_bytes(file) -> int:
    """
    How many bytes a Matroska or AVI file lacks of what its header states, which is that of a recording that was cut
    off. Such files have no table of frames that would tell.
    """
    file.seek(0)
    start = file.read(4096)
    at, stated = start.find(b"\x18\x53\x80\x67") + 4, 0  # Matroska's segment, and its size in 1 to 8 bytes
    if start[:4] == b"RIFF":
        stated = int.from_bytes(start[4:8], "little") + 8
    elif start[:4] == b"\x1a\x45\xdf\xa3" and 4 <= at < len(start) and start[at]:
        length = 9 - start[at].bit_length()
        size = int.from_bytes(start[at : at + length], "big") & (1 << 7 * length) - 1
        if size != (1 << 7 * length) - 1:  # unknown, as in a live recording
            stated = at + length + size
    return max(stated - file.seek(0, 2), 0)


def has_table(container) -> bool:
    return not TABLE_FORMATS.isdisjoint(container.format.name.split(","))


def demux(container) -> Iterator:
    """The packets of the video stream, and at last an empty one, which tells the decoder to give what it has."""
    drops_corrupt = has_table(container)
    for packet in container.demux(video_stream(container)):
        is_last = not packet.size and packet.dts is None
        if is_last or packet.size and not (drops_corrupt and packet.is_corrupt):
            yield packet


def decode_packet(packet) -> list:
    """
    The frames that come out of the decoder as a packet goes in. Raises a `DamageError` with the time of a damaged
    one.
    """
    import av

    try:
        return packet.decode()
    except av.FFmpegError as error:
        if isinstance(error, (MemoryError, av.error.MemoryError)):
            raise
        raise damage_error(packet, error.strerror) from error


def damage_error(packet, reason: str | None) -> DamageError:
    time = packet.pts if packet.pts is not None else packet.dts
    start = packet.stream.start_time or 0
    where = "" if time is None else f" near {float((time - start) * packet.time_base):.1f} s"
    return DamageError(f"it is damaged{where}: {reason}")


def display_width(frame, stream) -> int:
    """The width of a frame in square pixels, before it is turned."""
    aspect = stream.sample_aspect_ratio
    if not aspect or not 1 / LONGEST_PIXEL <= aspect <= LONGEST_PIXEL:
        return frame.width
    return max(round(frame.width * aspect), 1)


def display_matrix(frame) -> np.ndarray:
    """Where the first and the second axis of a frame lead, float of shape (2, 2), rows of (right, down)."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return np.eye(2)
    return np.frombuffer(bytes(matrix), dtype=np.int32).reshape(3, 3)[:2, :2].astype(np.float64)


def is_turned(matrix: np.ndarray) -> bool:
    """Whether a display matrix makes rows of columns, to the nearest quarter turn."""
    return abs(matrix[0, 1]) > abs(matrix[0, 0])


def display_size(frame, stream) -> tuple[int, int]:
    """Height and width of a frame as it is meant to be seen."""
    size = (frame.height, display_width(frame, stream))
    return size[::-1] if is_turned(display_matrix(frame)) else size


class Picture:
    """
    Brings the frames of a stream into the form in which they are meant to be seen, for one thread at a time.

    Args:
        stream (`av.VideoStream`): The stream.
    """

    def __init__(self, stream):
        from av.video.reformatter import VideoReformatter

        self.stream, self.reformatter = stream, VideoReformatter()

    def to_array(self, frame) -> np.ndarray:
        """
        A frame of PyAV, uint8 of shape (height, width, 3): upright, as a phone held upright films sideways and notes
        the turn that a player has to make, not mirrored, and with square pixels.
        """
        width = display_width(frame, self.stream)
        kwargs = {} if width == frame.width else {"width": width, "height": frame.height, "interpolation": "BICUBIC"}
        # A reformatter of its own for each frame, which `to_ndarray` takes, starts its threads for each frame anew.
        array = self.reformatter.reformat(frame, format="rgb24", threads=1, **kwargs).to_ndarray()
        matrix = display_matrix(frame)
        if is_turned(matrix):
            array, (right, down) = array.swapaxes(0, 1), (matrix[1, 0], matrix[0, 1])
        else:
            right, down = matrix[0, 0], matrix[1, 1]
        return array[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
