# SPDX-License-Identifier: Apache-2.0
"""Decoding the frames that are wanted of a file, in order: plainly, or by several decoders at once."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from .container import DamageError, Picture, decode_packet, demux, open_video, video_stream
from .index import NO_TIME, FrameIndex, Packets
from .sources import FileView


# A stretch from keyframe to keyframe is kept until its turn comes: longer ones are decoded plainly.
MOST_FRAMES_OF_STRETCH = 64
MOST_PACKETS_OF_STRETCH = 4096
MOST_DECODERS = 16


@dataclass
class Stretch:
    """
    What one decoder decodes: packets from a keyframe to the last one that a wanted frame needs.

    Args:
        start (`int`), stop (`int`): The packets, as positions in the order of decoding.
        wanted (`list[int]`): The times of the wanted frames, ascending, in units of the time base.
    """

    start: int
    stop: int
    wanted: list[int]


def plan_stretches(packets: Packets, wanted: np.ndarray) -> list[Stretch] | None:
    """
    Cuts the decoding of wanted frames at keyframes. Frames between two keyframes in time belong to the first, also
    those that come after the second in the file (of an open group of pictures), which need both.

    Args:
        packets ([`Packets`]): All packets.
        wanted (`np.ndarray`): int64 of shape (frames,): times of the wanted frames, ascending.

    Returns:
        The stretches in order, `None` if the file cannot be cut so.
    """
    starts = np.flatnonzero(packets.is_key & (packets.pts != NO_TIME))
    key_times = packets.pts[starts]
    if not len(starts) or starts[0] != 0 or (np.diff(key_times) <= 0).any() or wanted[0] < key_times[0]:
        return None
    shown = np.flatnonzero(packets.is_shown)
    order = shown[np.argsort(packets.pts[shown], kind="stable")]
    positions = order[np.searchsorted(packets.pts[order], wanted)]
    owners = np.searchsorted(key_times, wanted, side="right") - 1
    stretches = []
    for owner in np.unique(owners):
        of_owner = owners == owner
        stretches.append(Stretch(int(starts[owner]), int(positions[of_owner].max()) + 1, wanted[of_owner].tolist()))
    return stretches


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Decoders:
    """Decoders of one file, each for one thread at a time."""

    def __init__(self, file: FileView):
        self.file = file
        self.idle: SimpleQueue[Picture] = SimpleQueue()
        self.opened = ExitStack()

    def decode(self, packets: list, wanted: list[int], transform: Callable) -> list[torch.Tensor] | None:
        """
        `transform` of each wanted frame, or `None` if one of them did not come.

        Args:
            packets (`list`): The packets of a stretch.
            wanted (`list[int]`): As in [`Stretch`].
        """
        try:
            picture = self.idle.get_nowait()
        except Empty:
            container = self.opened.enter_context(open_video(FileView(self.file), thread_count=1))
            picture = Picture(video_stream(container))
        codec, remaining, done = picture.stream.codec_context, set(wanted), {}
        codec.flush_buffers()
        try:
            for packet in [*packets, None]:
                if packet is not None:
                    # A frame that no other refers to is decoded if it is wanted itself.
                    codec.skip_frame = "DEFAULT" if packet.pts in remaining else "NONREF"
                for frame in codec.decode(packet):
                    if frame.pts in remaining:
                        remaining.remove(frame.pts)
                        done[frame.pts] = transform(picture.to_array(frame))
        except ValueError:  # damaged; plain decoding says where
            return None
        self.idle.put(picture)
        return None if remaining else [done[time] for time in wanted]


def decode_in_parallel(
    file: FileView, index: FrameIndex, indices: np.ndarray, transform: Callable, stop: Callable[[], bool]
) -> Iterator[torch.Tensor]:
    """
    The wanted frames, bit for bit those of [`decode_plainly`], decoded by as many decoders as there are cores, which
    work ahead by one stretch each. What the stretches do not give, plain decoding does.
    """
    import av

    wanted = index.pts[indices] if index.pts is not None and not index.num_missing else np.array([], dtype=np.int64)
    stretches = None
    if index.packets is not None and len(wanted) and av.logging.get_level() is None:
        stretches = plan_stretches(index.packets, wanted)
    if not stretches or len(stretches) == 1 or any(map(is_long, stretches)):
        yield from decode_plainly(file, index, indices, transform, stop)
        return

    num_done, num_decoders = 0, min(num_cores(), MOST_DECODERS, len(stretches))
    decoders = Decoders(file)
    with decoders.opened, ThreadPoolExecutor(num_decoders, "video-decoder") as pool:
        packets = read_stretches(file, stretches, stop)
        ahead: deque[Future] = deque()
        try:
            while True:
                for stretch, stretch_packets in packets:
                    ahead.append(pool.submit(decoders.decode, stretch_packets, stretch.wanted, transform))
                    if len(ahead) > num_decoders:
                        break
                if not ahead:
                    break
                frames = ahead.popleft().result()
                if frames is None:
                    break
                yield from frames
                num_done += len(frames)
        finally:
            packets.close()
            for future in ahead:
                future.cancel()
    if num_done < len(indices) and not stop():
        yield from decode_plainly(file, index, indices[num_done:], transform, stop)


def is_long(stretch: Stretch) -> bool:
    return len(stretch.wanted) > MOST_FRAMES_OF_STRETCH or stretch.stop - stretch.start > MOST_PACKETS_OF_STRETCH


def read_stretches(
    file: FileView, stretches: list[Stretch], stop: Callable[[], bool]
) -> Generator[tuple[Stretch, list]]:
    """Each stretch and its packets, from one pass over the file."""
    with open_video(FileView(file)) as container:
        position = 0
        kept: deque[tuple[int, Any]] = deque()  # packets that the next stretch may need as well
        source = (packet for packet in demux(container) if packet.size)
        for stretch in stretches:
            while kept and kept[0][0] < stretch.start:
                kept.popleft()
            while position < stretch.stop and not stop():
                packet = next(source, None)
                if packet is None:
                    break
                if position >= stretch.start:
                    kept.append((position, packet))
                position += 1
            yield stretch, [packet for place, packet in kept if place < stretch.stop]


def decode_plainly(
    file: FileView, index: FrameIndex, indices: np.ndarray, transform: Callable, stop: Callable[[], bool]
) -> Iterator[torch.Tensor]:
    """
    The wanted frames of a file that is decoded from its beginning to the last of them.

    Raises:
        `ValueError`: when one of them does not come.
    """
    pts = index.pts
    num_there = index.metadata.total_num_frames - index.num_missing
    wanted = deque((i if pts is None else pts[i]) for i in indices.tolist() if i < num_there)
    number = 0
    with open_video(FileView(file), thread_count=1 if index.damage else None) as container:
        stream = video_stream(container)
        picture = Picture(stream)
        for packet in demux(container):
            if not wanted or stop():
                return
            try:
                frames = decode_packet(packet)
            except DamageError:
                if not index.damage:
                    raise
                continue
            for frame in frames:
                place = number if pts is None else frame.pts
                number += 1
                if wanted and place == wanted[0]:
                    wanted.popleft()
                    yield transform(picture.to_array(frame))
                elif wanted and pts is not None and (place is None or place > wanted[0]):
                    raise undecoded_error(index, wanted[0], stream)
    if wanted and not stop():
        raise undecoded_error(index, wanted[0], None)


def undecoded_error(index: FrameIndex, place: int, stream) -> DamageError:
    where = "a frame"
    if index.pts is not None and stream is not None:
        where = f"the frame at {float((place - index.pts[0]) * stream.time_base):.1f} s"
    return DamageError(f"it is damaged: {where} could not be decoded")
