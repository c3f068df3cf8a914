# SPDX-License-Identifier: Apache-2.0
"""What has been encoded stays: an index by content, in memory and in a folder, the least recently used out first."""

import asyncio
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..cache.cache import VambaCache
from .media import MediaReader, OpenedMedium


logger = logging.get_logger(__name__)

ENCODING_THREADS = 2  # videos that are decoded at a time, each in several threads
KEY = re.compile(r"[0-9a-f]{64}")  # names of folders that this module has made


class Encoding:
    """A video that is being encoded, and how many requests wait for it."""

    def __init__(self):
        self.task: asyncio.Task
        self.num_waiting = 0
        self.stop = threading.Event()


class NobodyWaits(Exception):
    """All who waited for a video have left."""


def count_bytes(cache: VambaCache) -> int:
    layers = itertools.chain(*cache.videos)
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


def fingerprint_model(model: PreTrainedModel, processor, name: str) -> str:
    """
    What a processed video depends on besides its content: the weights, and how pixels are made. Of a folder on this
    machine it takes the names, sizes and times of the files, as their content would take long to read.
    """
    revision = getattr(model.config, "_commit_hash", None)
    files = []
    if os.path.isdir(name):
        stats = [(entry.name, entry.stat()) for entry in os.scandir(name) if entry.is_file()]
        files = sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
    settings = [each.to_dict() for each in (model.config, processor.image_processor, processor.video_processor)]
    parts = [__version__, name, revision, files, str(model.dtype), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class ProcessedVideos:
    """
    The processed videos of a model. A sequence of images and videos is kept under the content of all of them, since
    the model reads them one after another: what a longer sequence begins with is not encoded again.

    Args:
        model ([`VambaForConditionalGeneration`]): Encodes.
        reader ([`MediaReader`]): Reads.
        submit (`Callable`): Runs a function on the thread of the model, and returns its future.
        fingerprint (`str`): See [`fingerprint_model`].
        max_bytes (`int`): Of the processed videos in memory that no request is using.
        folder (`Path`, *optional*): Where they are kept as well.
        max_folder_bytes (`int`): Of the files in the folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: MediaReader,
        submit: Callable,
        fingerprint: str,
        max_bytes: int,
        folder: Path | None = None,
        max_folder_bytes: int = 0,
    ):
        self.model, self.reader, self.submit, self.fingerprint = model, reader, submit, fingerprint
        self.max_bytes, self.folder, self.max_folder_bytes = max_bytes, folder, max_folder_bytes
        self.caches: OrderedDict[str, VambaCache] = OrderedDict()
        self.encodings: dict[str, Encoding] = {}
        self._threads = ThreadPoolExecutor(ENCODING_THREADS, "encode")
        self._folder_lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    async def get(self, media: list[OpenedMedium]) -> tuple[VambaCache, int]:
        """
        The processed images and videos, in their order, and how many tokens of them were not encoded for this call.
        Ask against a fork. Closes the media.
        """
        cache, num_known, start = None, 0, 0
        try:
            keys = [self._key(media[:end]) for end in range(1, len(media) + 1)]
            known = next((end for end in range(len(media), 0, -1) if self._is_known(keys[end - 1])), 0)
            # Kept after each video: a further request may go on in another way.
            ends = [end for end in range(known + 1, len(media)) if media[end - 1].named.kind == "video"]
            for end in sorted({*ends, known, len(media)} - {0}):
                begin, start = start, end  # those before `start` are closed by whoever encodes them
                cache, is_new = await self._encoded(keys[end - 1], cache, media[begin:end])
                num_known = num_known if is_new else sum(cache.video_lengths)
        finally:
            for medium in media[start:]:
                medium.close()
        assert cache is not None
        return cache, num_known

    def _key(self, media: list[OpenedMedium]) -> str:
        return hashlib.sha256("\n".join([self.fingerprint, *(medium.key for medium in media)]).encode()).hexdigest()

    def _is_known(self, key: str) -> bool:
        return key in self.caches or key in self.encodings or self._is_in_folder(key)

    def _is_in_folder(self, key: str) -> bool:
        return self.folder is not None and (self.folder / key).is_dir()

    async def _encoded(self, key: str, base: VambaCache | None, media: list[OpenedMedium]) -> tuple[VambaCache, bool]:
        """
        The cache of this key, as it is in memory, or as it is being encoded, or encoded now, `media` after `base`; and
        whether it was encoded for this call.
        """
        encoding = self.encodings.get(key)
        is_new = key not in self.caches and encoding is None
        if not is_new:
            for medium in media:
                medium.close()
        if key in self.caches:
            self.caches.move_to_end(key)
            return self.caches[key], False
        if encoding is None:
            encoding = self.encodings[key] = Encoding()
            encoding.task = asyncio.create_task(self._encode_and_keep(key, base, media, encoding.stop))
            encoding.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may look at it
        encoding.num_waiting += 1
        try:
            cache, is_encoded = await asyncio.shield(encoding.task)
            return cache, is_new and is_encoded
        finally:
            encoding.num_waiting -= 1
            if not encoding.num_waiting:
                encoding.stop.set()
                if self.encodings.get(key) is encoding:
                    del self.encodings[key]

    async def _encode_and_keep(self, key: str, base, media, stop: threading.Event) -> tuple[VambaCache, bool]:
        loop = asyncio.get_running_loop()
        cache, is_encoded = await loop.run_in_executor(self._threads, self._load_or_encode, key, base, media, stop)
        self._keep(key, cache)
        if self.folder is not None and is_encoded:
            loop.run_in_executor(self._threads, self._save, key, cache)  # nobody has to wait for it
        return cache, is_encoded

    def _load_or_encode(self, key: str, base, media, stop: threading.Event) -> tuple[VambaCache, bool]:
        try:
            cache = self._load(key)
            return (self._encode(base, media, stop), True) if cache is None else (cache, False)
        finally:
            for medium in media:
                medium.close()

    def _encode(self, base: VambaCache | None, media: list[OpenedMedium], stop: threading.Event) -> VambaCache:
        cache = None if base is None else base.fork()
        for medium in media:
            with closing(self.reader.read(medium)) as segments:
                for segment in segments:
                    if stop.is_set():
                        raise NobodyWaits
                    # One segment at a time: questions about other videos are answered in between.
                    cache = self.submit(self.model.encode_video, **segment, cache=cache).result()
        assert cache is not None
        return cache

    def _keep(self, key: str, cache: VambaCache) -> None:
        """Keeps a cache in memory, in the place of those that have not been used for longest."""
        num_bytes = count_bytes(cache)
        if num_bytes > self.max_bytes:
            logger.warning(
                f"A processed video takes {num_bytes / 2**30:.2f} GiB and is not kept in memory, whose limit is "
                f"{self.max_bytes / 2**30:.2f} GiB (--video-memory-gib): the next question encodes it again."
            )
            return
        self.caches[key] = cache
        while sum(map(count_bytes, self.caches.values())) > self.max_bytes:
            self.caches.popitem(last=False)

    def _load(self, key: str) -> VambaCache | None:
        """What is in the folder; `None` without it, and if it is damaged, as after a save that was interrupted."""
        if self.folder is None or not self._is_in_folder(key):
            return None
        path = self.folder / key
        try:
            cache = VambaCache.from_pretrained(path, device=self.model.device)
            os.utime(path)
            return cache
        except (OSError, ValueError) as error:
            logger.warning(f"A processed video is encoded again: {error}")
            return None

    def _save(self, key: str, cache: VambaCache) -> None:
        assert self.folder is not None
        try:
            with self._folder_lock:
                cache.save_pretrained(self.folder / key)
                self._evict_from_folder()
        except Exception as error:  # a full disk, say: the video is in memory, and answers do not depend on this
            logger.error(f"A processed video could not be saved to {str(self.folder)!r}: {error}")

    def _evict_from_folder(self) -> None:
        """Removes the least recently used of what this module has put there."""
        assert self.folder is not None
        paths = [path for path in self.folder.iterdir() if KEY.fullmatch(path.name) and not path.is_symlink()]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in paths]
        total = sum(sizes)
        for path, size in zip(paths, sizes):
            if total <= self.max_folder_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= size
