# SPDX-License-Identifier: Apache-2.0
"""Where processed videos are kept, in memory and in a folder, the least recently used out first."""

import itertools
import os
import re
import shutil
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils import logging

from ..cache.cache import VambaCache
from ..cache.saving import CACHE_CONFIG_NAME


logger = logging.get_logger(__name__)

KEY = re.compile(r"[0-9a-f]{64}")  # names of folders that this module has made


def count_bytes(cache: VambaCache) -> int:
    """Of all videos of a cache."""
    layers = itertools.chain(*cache.videos)
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


class VideoMemory:
    """
    Processed videos in memory. May be used from several threads.

    Args:
        max_bytes (`int`): Of the videos that are kept, and of those that are being encoded.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._caches: OrderedDict[str, VambaCache] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._changed = threading.Condition()

    def __contains__(self, key: str) -> bool:
        return key in self._caches

    def get(self, key: str) -> VambaCache | None:
        with self._changed:
            if key in self._caches:
                self._caches.move_to_end(key)
            return self._caches.get(key)

    def reserve(self, key: str, num_bytes: int) -> None:
        """
        Makes room for a video that is about to be encoded: drops others, and waits for others to be encoded. For one
        that has room and needs more of it, nothing is waited for.

        Raises:
            `ValueError`: if it will never fit.
        """
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"it takes {num_bytes / 2**20:,.0f} MiB once it is processed, and this server has "
                f"{self.max_bytes / 2**20:,.0f} MiB for that (--video-memory-gib). Ask for fewer frames "
                "(`num_frames`, `fps`) or smaller ones (`max_pixels`)."
            )
        with self._changed:
            if key not in self._reserved:
                self._changed.wait_for(lambda: sum(self._reserved.values()) + num_bytes <= self.max_bytes)
            self._reserved[key] = num_bytes
            self._evict()

    def release(self, key: str) -> None:
        """Gives up what was reserved."""
        with self._changed:
            self._reserved.pop(key, None)
            self._changed.notify_all()

    def put(self, key: str, cache: VambaCache) -> None:
        """Keeps a video, in the place of what was reserved for it."""
        with self._changed:
            self._reserved.pop(key, None)
            self._caches[key], self._sizes[key] = cache, count_bytes(cache)
            self._evict()
            self._changed.notify_all()

    def _evict(self) -> None:
        while self._caches and sum(self._sizes.values()) + sum(self._reserved.values()) > self.max_bytes:
            key, _ = self._caches.popitem(last=False)
            del self._sizes[key]


class VideoFolder:
    """
    Processed videos in a folder, which outlive the process. May be used from several threads.

    Args:
        path (`Path`): The folder, created if it is missing.
        max_bytes (`int`): Of the files in it.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.path, self.max_bytes = path, max_bytes
        self._lock = threading.Lock()
        path.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: str) -> bool:
        return (self.path / key / CACHE_CONFIG_NAME).is_file()

    def size(self, key: str) -> int:
        """Of a video and of what interrupted saves of it have left; another server may drop it meanwhile."""
        total = 0
        for folder, _, names in os.walk(self.path / key):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total

    def load(self, key: str, device: torch.device) -> VambaCache | None:
        """A video on a device; `None` for one that is damaged, as after a save that was interrupted."""
        try:
            cache = VambaCache.from_pretrained(self.path / key, device=device)
            os.utime(self.path / key)
            return cache
        except (OSError, ValueError) as error:
            logger.warning(f"A processed video is encoded again: {error}")
            return None

    def save(self, key: str, cache: VambaCache) -> None:
        """Keeps a video, and drops those that have not been used for longest. A failure is logged."""
        try:
            with self._lock:
                cache.save_pretrained(self.path / key)
                self._evict()
        except Exception as error:  # a full disk, say: the video is in memory, and no answer depends on this
            logger.error(f"A processed video could not be saved in {str(self.path)!r}: {error}")

    def _evict(self) -> None:
        used = []
        for path in self.path.iterdir():
            with suppress(FileNotFoundError):  # dropped by another server
                if KEY.fullmatch(path.name) and not path.is_symlink():
                    used.append((path.stat().st_mtime_ns, path))
        total = 0
        for _, path in sorted(used, reverse=True):
            total += self.size(path.name)
            if total > self.max_bytes:
                shutil.rmtree(path, ignore_errors=True)
