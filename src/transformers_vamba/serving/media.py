# SPDX-License-Identifier: Apache-2.0
"""Images and videos that a request names: opened within the server's limits, known by their content, and read."""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Generator, Hashable
from contextlib import ExitStack, closing
from http.client import HTTPException
from typing import Any, BinaryIO, Generic, TypeVar

import PIL.Image
import PIL.ImageOps

from ..processing_vamba import VambaProcessor
from ..video.download import SourceLimits, download_version, is_unchanged
from ..video.sources import describe_error, is_data_url, is_remote, open_source
from .errors import RequestError
from .requests import NamedMedium


# Those that Pillow decodes by itself. For others it starts programs, or reads further files.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 2**26
CHUNK_BYTES = 2**20
MAX_KNOWN = 4096

Value = TypeVar("Value")


class OpenedMedium:
    """
    An image or a video whose file is open, or of a URL, whose content is known and has not changed.

    Args:
        named ([`NamedMedium`]): What the request says of it.
        file (`BinaryIO`, *optional*): The file. `None` where it would have to be downloaded again.
        digest (`str`): Of its content.
        stack (`ExitStack`): Closes the file.
        stamp (`tuple`, *optional*): Of a file of this machine when its digest was taken, see [`stamp_file`].
    """

    def __init__(
        self, named: NamedMedium, file: BinaryIO | None, digest: str, stack: ExitStack, stamp: tuple | None = None
    ):
        self.named, self.file, self.digest, self.stack, self.stamp = named, file, digest, stack, stamp

    # What stands for the file in errors of its reader, and what the reader needs of it.
    def __repr__(self) -> str:
        return self.named.name

    def read(self, size: int = -1) -> bytes:
        assert self.file is not None
        return self.file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert self.file is not None
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        assert self.file is not None
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    @property
    def key(self) -> str:
        """The same for the same content read in the same way."""
        return f"{self.named.kind}:{self.digest}:{json.dumps(self.named.options, sort_keys=True)}"

    def has_changed(self) -> bool:
        """Whether somebody has written into the file since it was opened."""
        return self.stamp is not None and self.file is not None and stamp_file(self.file) != self.stamp

    def close(self) -> None:
        self.stack.close()


def stamp_file(file: BinaryIO) -> tuple:
    """What changes whenever the content of a file of this machine does."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def refuse(named: NamedMedium, reason: str) -> RequestError:
    return RequestError(f"`{named.place}`: {reason}", named.place, "invalid_media")


def refuse_changed(medium: OpenedMedium) -> RequestError:
    return refuse(medium.named, f"{medium!r} has changed while it was read. Ask again.")


class Known(Generic[Value]):
    """What is known of sources, the last `MAX_KNOWN` of them. May be used from several threads."""

    def __init__(self):
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, source: Hashable) -> Value | None:
        return self._values.get(source)

    def __setitem__(self, source: Hashable, value: Value | None) -> None:
        with self._lock:
            self._values.pop(source, None)
            if value is not None:
                self._values[source] = value
            if len(self._values) > MAX_KNOWN:
                self._values.popitem(last=False)


class MediaReader:
    """
    Opens and reads what requests name. Its methods block, and may be called from several threads.

    Args:
        processor ([`VambaProcessor`]): Prepares images and videos.
        limits ([`SourceLimits`]): What may be opened.
    """

    def __init__(self, processor: VambaProcessor, limits: SourceLimits):
        self.processor, self.limits = processor, limits
        PIL.Image.init()
        self.image_formats = [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]
        self._digests = Known[str]()  # of files of this machine, by what changes with their content
        self._versions = Known[tuple[str, str]]()  # of URLs, and the digest of each

    def open(self, media: list[NamedMedium]) -> list[OpenedMedium]:
        """Opens images and videos, all or none. Raises a [`RequestError`] for one that cannot be had."""
        opened: list[OpenedMedium] = []
        try:
            for named in media:
                opened.append(self._open(named))
        except BaseException:
            for each in opened:
                each.close()
            raise
        return opened

    def _open(self, named: NamedMedium) -> OpenedMedium:
        is_local = not is_remote(named.source) and not is_data_url(named.source)
        if is_local and not self.limits.allow_local:
            raise refuse(
                named,
                f"this server opens no paths, and got {named.name}. Send the content as a data: URL, give an http or "
                "https URL, or start the server with --media-root.",
            )
        with ExitStack() as stack:
            try:
                known = self._versions[named.source]
                if known is not None and is_unchanged(named.source, known[0], self.limits):
                    return OpenedMedium(named, None, known[1], stack.pop_all())
                version = stamp = None
                if is_remote(named.source):
                    file, version = stack.enter_context(download_version(named.source, self.limits))
                else:
                    file = stack.enter_context(open_source(named.source, self.limits))
                    stamp = stamp_file(file) if is_local else None
                digest = self._digest(file, stamp)
                if version is not None:
                    self._versions[named.source] = version, digest
            except FileNotFoundError as error:
                # One answer for all that is no file within the folder, wherever it may be.
                reason = f"there is no file {named.name} within the server's --media-root."
                raise refuse(named, reason) from error
            except (HTTPException, OSError, ValueError) as error:
                reason = f"could not open {named.name}: {describe_error(error)}."
                raise refuse(named, reason) from error
            return OpenedMedium(named, file, digest, stack.pop_all(), stamp)

    def _digest(self, file, stamp: tuple | None) -> str:
        """SHA-256 of a file's content. A file of this machine that has not changed since is not read again."""
        if stamp is not None and (known := self._digests[stamp]) is not None:
            return known
        digest = hashlib.sha256()
        file.seek(0)  # a download is at its end
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        file.seek(0)
        if stamp is not None:
            self._digests[stamp] = digest.hexdigest()
        return digest.hexdigest()

    def read(self, medium: OpenedMedium) -> Generator[dict[str, Any]]:
        """
        Yields the arguments of `encode_video` for an image, or for each segment of a video.

        Raises:
            [`RequestError`]: for what cannot be read.
        """
        if medium.file is None:  # its cache is gone
            self._versions[medium.named.source] = None
            with closing(self._open(medium.named)) as downloaded:
                if downloaded.digest != medium.digest:
                    raise refuse_changed(medium)
                yield from self.read(downloaded)
            return
        try:
            if medium.named.kind == "image":
                image = self._read_image(medium)
                inputs = self.processor.image_processor(images=[image], return_tensors="pt")
                yield {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
            else:
                for segment in self.processor.iter_video_segments(medium, progress=False, **medium.named.options):
                    yield dict(segment)
        except (KeyError, MemoryError, OSError, TypeError, ValueError) as error:
            if medium.has_changed():
                raise refuse_changed(medium) from error
            raise error if isinstance(error, RequestError) else refuse(medium.named, str(error)) from error
        if medium.has_changed():  # what was read is not the content of the digest
            raise refuse_changed(medium)

    def _read_image(self, medium: OpenedMedium) -> PIL.Image.Image:
        try:
            image = PIL.Image.open(medium, formats=self.image_formats)  # type: ignore[arg-type]
            if image.width * image.height <= MAX_IMAGE_PIXELS:
                return PIL.ImageOps.exif_transpose(image).convert("RGB")
        except PIL.Image.DecompressionBombError:
            pass
        except Exception as error:  # of whatever kind: each format of Pillow has its own
            reason = f"could not read {medium!r} as an image. Known formats are {', '.join(self.image_formats)}."
            raise refuse(medium.named, reason) from error
        raise refuse(medium.named, f"{medium!r} is an image of more than {MAX_IMAGE_PIXELS:,} pixels.")
