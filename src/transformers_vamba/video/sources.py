# SPDX-License-Identifier: Apache-2.0
"""One way to open the encoded file of a video, wherever it is: a path, a URL, bytes, an open file, a pipe."""

import base64
import binascii
import io
import os
import select
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, unquote_to_bytes

from .container import DamageError
from .download import Copied, SourceLimits, download, open_url


# How long a named pipe may be without a program that writes to it.
WRITER_TIMEOUT = 5.0
LONGEST_NAME = 300  # characters of a source in an error


def is_remote(source: str) -> bool:
    return source.partition("://")[0].lower() in ("http", "https")


def is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:" and "," in source


def local_path(source: str) -> str:
    """
    The path that a path or `file://` URL means. Names with `#`, `?` or `%20` are often put after `file://` as they
    are on disk, unquoted: such a file is taken if the quoted one is not there.
    """
    if not source.lower().startswith("file://"):
        return source
    host, slash, path = source[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise FileNotFoundError(f"{absence_error(source)} The file of another host, {host!r}, cannot be opened.")
    path = slash + path
    unquoted = unquote(path)
    return path if not os.path.lexists(unquoted) and os.path.lexists(path) else unquoted


def is_file(video) -> bool:
    """Whether `video` is a form of an encoded file, rather than frames."""
    if isinstance(video, Mapping):
        return "bytes" in video or "path" in video
    return isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(video, "read")


def plain_source(video):
    """A file given as a mapping of `bytes` and `path`, as `datasets` gives it, or as a path, in its plainest form."""
    if isinstance(video, Mapping):
        content = video.get("bytes")
        video = video.get("path") if content is None else content
        if video is None:
            raise ValueError("A video given as a mapping needs its `bytes` or its `path`, and both are missing.")
    return os.fspath(video) if isinstance(video, os.PathLike) else video


def describe_source(video) -> str:
    """The name of a source in an error, of bounded length."""
    if isinstance(video, (bytes, bytearray, memoryview)):
        return f"{len(video):,} bytes"
    if isinstance(video, str) and is_data_url(video):
        return f"'{video[: min(video.index(','), 80)]},...' ({len(video):,} characters)"
    name = repr(video)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}... ({len(name):,} characters)"


def absence_error(source) -> FileNotFoundError:
    """What to raise for a path without a file that could be a video."""
    return FileNotFoundError(
        f"Expected the path or the file, http or https URL of a video, got {describe_source(source)}."
    )


def file_kind(source: str) -> Callable[[int], bool] | None:
    """Which of `stat.S_ISREG`, `S_ISDIR` and `S_ISFIFO` holds of a path, `None` for other kinds and without a file."""
    try:
        mode = os.stat(local_path(source)).st_mode
    except (OSError, ValueError):
        return None
    return next((kind for kind in (stat.S_ISREG, stat.S_ISDIR, stat.S_ISFIFO) if kind(mode)), None)


def permitted_path(source: str, limits: SourceLimits) -> str:
    """
    The path of a file that may be opened.

    Raises:
        `FileNotFoundError`: for a path without a file, and the same for whatever is not a file of `media_root`.
        `ValueError`: if local files may not be opened.
    """
    if not limits.allow_local:
        raise ValueError("files of this machine may not be opened here")
    path, kinds = local_path(source), {stat.S_ISREG, stat.S_ISFIFO}
    if limits.media_root is not None:
        kinds = {stat.S_ISREG}
        root = os.path.realpath(limits.media_root)
        # Resolved before it is looked for: what is outside must not even be known to exist.
        path = "" if "\0" in path else os.path.realpath(os.path.join(root, path))
        if not Path(path).is_relative_to(root):
            raise absence_error(source)
    kind = file_kind(path)
    if kind is stat.S_ISDIR and limits.media_root is None:  # one with images has been made a list of them
        raise FileNotFoundError(f"{absence_error(source)} It is a folder, and has no images.")
    if kind not in kinds:
        raise absence_error(source)
    return path


def check_exists(video, limits: SourceLimits):
    """
    Raises a `FileNotFoundError` for a path without a file, and a `ValueError` for one that may not be opened, and for
    a file opened as text.
    """
    if isinstance(video, io.TextIOBase):
        raise ValueError(f"{describe_source(video)} is open as text; a video needs a file opened with mode 'rb'.")
    if isinstance(video, str) and not is_remote(video) and not is_data_url(video):
        with errors_of(video):
            permitted_path(video, limits)


@contextmanager
def errors_of(source):
    """Turns the errors of reading `source` into a `ValueError` that names it."""
    import av

    try:
        yield
    except FileNotFoundError:
        raise
    except (av.FFmpegError, HTTPException, MemoryError, OSError, ValueError) as error:
        raise ValueError(f"Could not read {describe_source(source)} as a video: {describe_error(error)}") from error


def describe_error(error: Exception) -> str:
    """What an error says, without the numbers of FFmpeg."""
    import av

    if isinstance(error, MemoryError):
        return f"its frames do not fit in memory ({error or 'no memory is left'})"
    if isinstance(error, DamageError):
        return f"{error}. With `on_damage='skip'` the frames that can be decoded are taken"
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        error = error.reason if isinstance(error.reason, Exception) else error
    if isinstance(error, OSError) and error.filename and error.strerror:
        return error.strerror  # without the path, which the one who asked may not know
    return error.strerror if isinstance(error, av.FFmpegError) and error.strerror else str(error)


class LiveSource:
    """A binary file that cannot be sought, read as it comes. A buffered one would wait until its buffer is full."""

    def __init__(self, file):
        self.read = getattr(file, "read1", file.read)

    def seekable(self) -> bool:
        return False


class FileView:
    """
    A position of its own in a file that can be sought, so that several decoders read one file at a time.

    Args:
        file (`BinaryIO`): The file, or another view of it.
    """

    def __init__(self, file):
        self.file: Any = file.file if isinstance(file, FileView) else file
        self.lock: threading.Lock = file.lock if isinstance(file, FileView) else threading.Lock()
        self.position = 0
        name = getattr(self.file, "name", None)
        self.name = name if isinstance(name, str) else ""  # FFmpeg looks at its ending

    def read(self, size: int = -1) -> bytes:
        with self.lock:
            self.file.seek(self.position)
            content = self.file.read(size)
        self.position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            with self.lock:
                self.position = self.file.seek(offset, os.SEEK_END)
        else:
            self.position = offset + (self.position if whence == os.SEEK_CUR else 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True


class NamedPipe:
    """
    The reading end of a named pipe. Opening it waits for no writer, and reading only so long.

    Args:
        path (`str`): The pipe.
        timeout (`float`, *optional*): Longest wait for the next byte, in seconds.

    Raises:
        `FileNotFoundError`: when no program writes to it.
    """

    def __init__(self, path: str, timeout: float | None):
        self.timeout = timeout
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLIN)
        if not self.poll.poll(WRITER_TIMEOUT * 1000):
            self.close()
            raise FileNotFoundError(f"{absence_error(path)} No program writes to this pipe.")

    def read(self, size: int = 2**16) -> bytes:
        while True:
            if not self.poll.poll(None if self.timeout is None else self.timeout * 1000):
                raise TimeoutError(f"no byte came in {self.timeout:g} seconds")
            try:
                return os.read(self.descriptor, size)
            except BlockingIOError:
                continue

    def seekable(self) -> bool:
        return False

    def close(self):
        os.close(self.descriptor)


@contextmanager
def spool(file, limits: SourceLimits) -> Iterator[BinaryIO]:
    """What a file that cannot be sought gives until its end, in a temporary one."""
    with TemporaryFile() as spooled:
        Copied(limits).copy(getattr(file, "read1", file.read), spooled)
        yield spooled


def decode_data_url(source: str, limits: SourceLimits) -> bytes:
    header, _, data = source[len("data:") :].partition(",")
    if len(data) > 3 * limits.max_bytes:  # before it is decoded; a byte takes three characters at most
        raise ValueError(f"it is larger than {limits.max_bytes:,} bytes, the limit (`max_bytes`)")
    content = unquote_to_bytes(data)
    if header.lower().endswith(";base64"):
        try:
            content = base64.b64decode(content, validate=False)
        except binascii.Error as error:
            raise ValueError(f"its base64 is damaged: {error}") from error
    Copied(limits).check_size(len(content))
    return content


@contextmanager
def open_source(video, limits: SourceLimits, live: bool = False) -> Iterator[Any]:
    """
    Opens the encoded file of a video to be read from its beginning; a file that is open already is left open.

    Args:
        video: A path, a URL, bytes, an open binary file, or a mapping of `bytes` and `path`. See [`plain_source`].
        limits ([`SourceLimits`]): What may be opened.
        live (`bool`): Whether a source that cannot be sought is read as it comes, rather than to its end first.

    Raises:
        `FileNotFoundError`: for a path without a file.
        `OSError`, `HTTPException`, `ValueError`: for what cannot be had, and past the limits.
    """
    if isinstance(video, (bytes, bytearray, memoryview)):
        yield io.BytesIO(video)
    elif hasattr(video, "read"):
        seekable = getattr(video, "seekable", None)
        if seekable is not None and seekable():
            yield video
        elif live:
            yield LiveSource(video)
        else:
            with spool(video, limits) as file:
                yield file
    elif is_data_url(video):
        yield io.BytesIO(decode_data_url(video, limits))
    elif is_remote(video):
        if live:
            with open_url(video, limits) as response:
                yield LiveSource(response)
        else:
            with download(video, limits) as file:
                yield file
    else:
        with open_local(video, limits, live) as file:
            yield file


@contextmanager
def open_local(source: str, limits: SourceLimits, live: bool) -> Iterator[BinaryIO | LiveSource]:
    """Opens a path or `file://` URL; a named pipe is read to its end first unless it is live."""
    path = permitted_path(source, limits)
    if file_kind(path) is not stat.S_ISFIFO:
        with open(path, "rb") as file:
            Copied(limits).check_size(os.fstat(file.fileno()).st_size)
            yield file
        return
    pipe = NamedPipe(path, None if live else limits.timeout)
    try:
        if live:
            yield LiveSource(pipe)
        else:
            with spool(pipe, limits) as file:
                yield file
    finally:
        pipe.close()
