# SPDX-License-Identifier: Apache-2.0
"""Images and videos are encoded once, however many ask about them, one after another or at the same time."""

import asyncio
import hashlib
import json
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from transformers import PreTrainedModel

from .. import __version__
from ..cache.cache import VambaCache
from .adapters import find_adapter
from .index import VideoFolder, VideoMemory, count_bytes
from .media import MediaReader, OpenedMedium, refuse


ENCODING_THREADS = 2  # videos that are decoded at a time, each in several threads


def fingerprint_model(model: PreTrainedModel, processor, name: str) -> str:
    """
    What a processed video depends on besides its content: the weights, and how pixels are made. Of a folder on this
    machine it takes the names, sizes and times of the files, as their content would take long to read. Of an adapter
    there are two, its own and that of its base.
    """
    revision = getattr(model.config, "_commit_hash", None)
    adapter = find_adapter(*([name] if os.path.exists(name) else name.split("@", 1)))
    files = []
    for folder in {str(adapter or name), model.config.name_or_path}:
        if os.path.isdir(folder):
            stats = [(entry.path, entry.stat()) for entry in os.scandir(folder) if entry.is_file()]
            files += [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    files.sort()
    settings = [each.to_dict() for each in (model.config, processor.image_processor, processor.video_processor)]
    parts = [__version__, name, revision, files, str(model.dtype), settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Encoding:
    """A video that is being encoded, and how many requests wait for it."""

    def __init__(self):
        self.task: asyncio.Task[tuple[VambaCache, bool]]
        self.num_waiting = 0
        self.stop = threading.Event()


class NobodyWaits(Exception):
    """All who waited for a video have left."""


class ProcessedVideos:
    """
    The processed videos of a model. A sequence of images and videos is kept under the content of all of them, since
    the model reads them one after another: what a longer sequence begins with is not encoded again.

    Args:
        model ([`VambaForConditionalGeneration`]): Encodes.
        reader ([`MediaReader`]): Reads.
        submit (`Callable`): Runs a function on the thread of the model, and returns its future.
        fingerprint (`str`): See [`fingerprint_model`].
        memory ([`VideoMemory`]): Keeps them.
        folder ([`VideoFolder`], *optional*): Keeps them as well.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: MediaReader,
        submit: Callable,
        fingerprint: str,
        memory: VideoMemory,
        folder: VideoFolder | None = None,
    ):
        self.model, self.reader, self.submit = model, reader, submit
        self.fingerprint, self.memory, self.folder = fingerprint, memory, folder
        self._encodings: dict[str, Encoding] = {}
        self._threads = ThreadPoolExecutor(ENCODING_THREADS, "encode")
        config = model.config.text_config
        values = 2 * config.num_hidden_layers * config.num_key_value_heads
        self._bytes_per_token = values * config.hidden_size // config.num_attention_heads * model.dtype.itemsize
        self._patches_per_token = model.config.vision_config.spatial_merge_size**2

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
        return key in self.memory or key in self._encodings or self.folder is not None and key in self.folder

    async def _encoded(self, key: str, base: VambaCache | None, media: list[OpenedMedium]) -> tuple[VambaCache, bool]:
        """
        The cache of this key, as it is in memory, or as it is being encoded, or encoded now, `media` after `base`; and
        whether it was encoded for this call.
        """
        kept, encoding = self.memory.get(key), self._encodings.get(key)
        is_new = kept is None and encoding is None
        if not is_new:
            for medium in media:
                medium.close()
        if kept is not None:
            return kept, False
        if encoding is None:
            encoding = self._encodings[key] = Encoding()
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
                if self._encodings.get(key) is encoding:
                    del self._encodings[key]

    async def _encode_and_keep(self, key: str, base, media, stop: threading.Event) -> tuple[VambaCache, bool]:
        loop = asyncio.get_running_loop()
        cache, is_encoded = await loop.run_in_executor(self._threads, self._load_or_encode, key, base, media, stop)
        if self.folder is not None and is_encoded:
            loop.run_in_executor(self._threads, self.folder.save, key, cache)  # nobody has to wait for it
        return cache, is_encoded

    def _load_or_encode(self, key: str, base, media: list[OpenedMedium], stop: threading.Event):
        """On a thread that may wait: the cache, which is in memory then, and whether it had to be encoded."""
        try:
            cache = None
            if self.folder is not None and key in self.folder:
                self._reserve(key, self.folder.size(key), media[-1])
                cache = self.folder.load(key, self.model.device)
            is_encoded = cache is None
            if cache is None:
                cache = self._encode(key, base, media, stop)
            self.memory.put(key, cache)
            return cache, is_encoded
        finally:
            self.memory.release(key)
            for medium in media:
                medium.close()

    def _encode(self, key: str, base: VambaCache | None, media: list[OpenedMedium], stop: threading.Event):
        cache = None if base is None else base.fork()
        num_bytes = 0 if base is None else count_bytes(base)
        for medium in media:
            is_first = True
            with closing(self.reader.read(medium)) as segments:
                for segment in segments:
                    if stop.is_set():
                        raise NobodyWaits
                    if is_first:
                        num_bytes += self._bytes_per_token * self._count_tokens(segment)
                        self._reserve(key, num_bytes, medium)
                        is_first = False
                    # One segment at a time: questions about other videos are answered in between.
                    cache = self.submit(self.model.encode_video, **segment, cache=cache).result()
        assert cache is not None
        return cache

    def _count_tokens(self, segment: dict) -> int:
        """Of a medium, by its first segment."""
        num_patches = sum(math.prod(grid) for grid in segment["video_grid_thw"].tolist())
        return num_patches // self._patches_per_token + segment.get("num_remaining_tokens", 0)

    def _reserve(self, key: str, num_bytes: int, medium: OpenedMedium) -> None:
        try:
            self.memory.reserve(key, num_bytes)
        except ValueError as error:
            raise refuse(medium.named, f"{medium!r} is too long: {error}") from error
