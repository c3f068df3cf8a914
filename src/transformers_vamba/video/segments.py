# SPDX-License-Identifier: Apache-2.0
"""Videos a segment at a time: decoded and cut into patches ahead of their reader, in bounded memory."""

import atexit
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import takewhile
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import BinaryIO, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.image_processing_utils import BatchFeature
from transformers.utils import requires_backends
from transformers.video_utils import make_batched_metadata

from ..video_processing_vamba import VambaVideoProcessor
from .reading import (
    absence_error,
    count_frames,
    describe_stream,
    errors_of,
    is_remote,
    local_path,
    normalize_video,
    open_video,
    pick_frames,
    stack_frames,
    to_arrays,
    truncation_error,
)


# More frames than any file has, 155 hours at 60 a second: a file that states more, and lacks them, is damaged.
MOST_FRAMES = 2**25
# Segments that are ready or in the making while the reader is busy with one.
SEGMENTS_AHEAD = 2


class Sampling(NamedTuple):
    """
    Which frames of a file to take.

    Args:
        pick (`Callable`): Takes them from an iterator of all frames and their PyAV stream.
        num_frames (`int`, *optional*): How many they are, where that is known.
        truncation (`ValueError`, *optional*): What to raise behind the last frame of a truncated file.
    """

    pick: Callable[[Iterable, object], Iterator]
    num_frames: int | None = None
    truncation: ValueError | None = None


def iter_video_segments(
    video_processor: VambaVideoProcessor,
    video,
    segment_frames: int = 64,
    progress: bool | None = None,
    **videos_kwargs,
) -> Iterator[BatchFeature]:
    """See [`~VambaProcessor.iter_video_segments`]. `num_frames` and `fps` are among `videos_kwargs`."""
    sampling_kwargs = complete_kwargs(video_processor, videos_kwargs)
    temporal_patch_size = sampling_kwargs["temporal_patch_size"]
    if segment_frames < 1 or segment_frames % temporal_patch_size:
        raise ValueError(
            f"`segment_frames` must be a positive multiple of {temporal_patch_size}, the frames of a temporal patch, "
            f"got {segment_frames}."
        )
    if not hasattr(video, "read"):
        video = normalize_video(video)
    check_exists(video)
    videos_kwargs = {name: value for name, value in videos_kwargs.items() if name not in ("num_frames", "fps")}
    videos_kwargs |= {"do_sample_frames": False, "video_metadata": None, "return_metadata": False}
    videos_kwargs.setdefault("return_tensors", "pt")

    def segments():
        stop = threading.Event()
        with ExitStack() as stack:  # closed from the last to the first, wherever the reader stops
            if isinstance(video, (np.ndarray, torch.Tensor)):
                indices = sample_array(video_processor, video, sampling_kwargs)
                num_frames = len(indices)
                stretches = (video[indices[i : i + segment_frames]] for i in range(0, num_frames, segment_frames))
            else:
                requires_backends(video_processor, ["av"])
                with errors_of(video):
                    file = stack.enter_context(open_source(video))
                    sampling = sample_file(video_processor, file, sampling_kwargs)
                num_frames = sampling.num_frames
                stretches = decode_stretches(video, file, sampling, segment_frames, stop)
            stack.enter_context(closing(stretches))
            disable = None if progress is None else not progress
            bar = stack.enter_context(tqdm(total=num_frames, desc="video", unit="frame", disable=disable))
            preprocessed = preprocess_stretches(video_processor, stretches, temporal_patch_size, videos_kwargs)
            num_seen = 0
            for segment, segment_length in stack.enter_context(closing(read_ahead(preprocessed, stop))):
                num_seen += segment_length
                if num_frames is not None:
                    tokens_per_step = segment["video_grid_thw"][0, 1:].prod() // sampling_kwargs["merge_size"] ** 2
                    num_remaining_steps = (num_frames - num_seen) // temporal_patch_size
                    segment["num_remaining_tokens"] = num_remaining_steps * int(tokens_per_step)
                yield segment
                bar.update(segment_length)

    return segments()


def check_exists(video) -> None:
    """Raises a `FileNotFoundError` for a path without a file."""
    if isinstance(video, str) and not is_remote(video):
        path = local_path(video)
        if not os.path.exists(path) or os.path.isdir(path):
            raise absence_error(video)


def complete_kwargs(video_processor: VambaVideoProcessor, videos_kwargs: dict) -> dict:
    """The arguments of a call, and what it leaves out from the video processor, as in its `preprocess`."""
    names = video_processor.valid_kwargs.__annotations__
    defaults = {name: getattr(video_processor, name, None) for name in names}
    return {**defaults, **video_processor.choose_sampling(videos_kwargs)}


def sample_array(video_processor: VambaVideoProcessor, video, sampling_kwargs: dict) -> np.ndarray:
    """The frames of an array to take, as indices in ascending order."""
    if not sampling_kwargs["do_sample_frames"]:
        return np.arange(len(video))
    metadata = make_batched_metadata([video], video_metadata=sampling_kwargs["video_metadata"])
    if len(metadata) != 1:
        raise ValueError(f"Got 1 video and {len(metadata)} entries of `video_metadata`.")
    return video_processor.sample_frames(**{**sampling_kwargs, "metadata": metadata[0]})


def sample_file(video_processor: VambaVideoProcessor, file: BinaryIO, sampling_kwargs: dict) -> Sampling:
    """
    Chooses the frames of a file to take.

    Args:
        video_processor ([`VambaVideoProcessor`]):
            Samples a file that can be sought, whose frames are counted first without decoding them.
        file (`BinaryIO`):
            The file. A live source, which cannot be sought, is sampled by the times of its frames as they come.
        sampling_kwargs (`dict`):
            Arguments of `sample_frames`, and `do_sample_frames`.

    Raises:
        `ValueError`: for a file without frames, and a live source that is to be sampled by their number.
    """
    do_sample_frames = sampling_kwargs["do_sample_frames"]
    if not file.seekable():
        for name in ("num_frames", "min_frames", "max_frames") if do_sample_frames else ():
            if sampling_kwargs[name] is not None:
                raise ValueError(
                    f"`{name}` needs the number of frames of the video, which a live source, one that cannot be "
                    f"sought, does not tell ahead. Sample it by rate, with `fps` and without `{name}`."
                )
        if not do_sample_frames or sampling_kwargs["fps"] is None:
            return Sampling(lambda frames, stream: frames)
        return Sampling(lambda frames, stream: sample_live(frames, stream, sampling_kwargs["fps"]))

    found, missing = count_frames(file)
    if missing and (not found or found + missing > MOST_FRAMES):
        raise truncation_error(found, missing)
    if not found:
        raise ValueError("the video has no frames")
    indices = np.arange(found + missing)
    if do_sample_frames:
        with open_video(file) as container:
            metadata = describe_stream(container.streams.video[0], found + missing)
        indices = video_processor.sample_frames(**{**sampling_kwargs, "metadata": metadata})
    truncation = truncation_error(found, missing) if missing else None
    return Sampling(lambda frames, stream: pick_frames(frames, indices), len(indices), truncation)


def sample_live(frames: Iterable, stream, fps: float) -> Iterator:
    """
    Takes the frame in the middle of each interval of `1 / fps` seconds, as they come. Where the rate is constant
    these are the frames that `sample_frames` chooses, but the end need not be known.
    """
    rate = float(stream.average_rate) if stream.average_rate else None
    # The frame nearest to a middle may begin half a frame later, and Matroska rounds times to milliseconds.
    tolerance = 0.5 / rate + 0.001 if rate else 0.0
    start, num_intervals = None, 0
    for index, frame in enumerate(frames):
        if frame.time is None and rate is None:
            raise ValueError("its frames have neither times nor a rate, so they cannot be sampled by `fps`")
        time = index / rate if frame.time is None else frame.time
        start = time if start is None else start
        position = (time - start + tolerance) * fps
        if position >= num_intervals + 0.5:
            yield frame
            num_intervals = math.floor(position + 0.5)


class LiveSource:
    """A binary file that cannot be sought, read as it comes: a buffered one would wait until its buffer is full."""

    def __init__(self, file: BinaryIO):
        self.read = getattr(file, "read1", file.read)

    def seekable(self) -> bool:
        return False


@contextmanager
def open_source(video) -> Iterator[BinaryIO]:
    """
    Opens a path or a URL to be read from its beginning; a file that is open already is left open.

    What a URL names goes to a temporary file on disk, or is read as it comes if the server does not say how long it
    is.
    """
    if hasattr(video, "read"):
        yield video if video.seekable() else LiveSource(video)
    elif is_remote(video):
        with urlopen(video, timeout=60) as response, TemporaryFile() as file:
            if response.length is None:
                yield LiveSource(response)
            else:
                shutil.copyfileobj(response, file)
                yield file
    else:
        # A buffer would wait until a live source has filled it.
        with open(local_path(video), "rb", buffering=0) as file:
            yield file


def decode_stretches(
    source, file: BinaryIO, sampling: Sampling, num_frames: int, stop: threading.Event
) -> Iterator[np.ndarray]:
    """
    Decodes the sampled frames of a file in one pass, uint8 of shape (`num_frames` or less, height, width, 3) at a
    time, until `stop` is set. Where it fails, what came before is given first.

    Raises:
        `ValueError`: when the file is truncated, damaged or gives no frame; it names `source`.
    """
    failure = sampling.truncation

    def until_failure(arrays):
        nonlocal failure
        length = 0
        try:
            for array in arrays:
                yield array
                length += 1
            if not length:
                raise ValueError("it ended before a frame could be sampled")
        except Exception as error:
            failure = failure or error

    with errors_of(source):
        container = open_video(file)
    with container:
        packets = takewhile(lambda _: not stop.is_set(), container.demux(video=0))
        if sampling.truncation is not None:
            packets = (packet for packet in packets if not packet.is_corrupt)
        frames = (frame for packet in packets for frame in packet.decode())
        arrays = until_failure(to_arrays(sampling.pick(frames, container.streams.video[0])))
        while (stretch := stack_frames(arrays, num_frames)) is not None:
            yield stretch
    if failure is not None:
        with errors_of(source):
            raise failure


def preprocess_stretches(
    video_processor: VambaVideoProcessor, stretches: Iterable, temporal_patch_size: int, videos_kwargs: dict
) -> Iterator[tuple[BatchFeature, int]]:
    """The patches of each stretch of frames, and their number of frames."""
    for i, frames in enumerate(stretches):
        if i:  # only a whole video repeats a frame to fill a temporal patch
            frames = frames[: len(frames) - len(frames) % temporal_patch_size]
        if len(frames):
            yield video_processor([frames], **videos_kwargs), len(frames)


def read_ahead(items: Iterator, stop: threading.Event) -> Iterator:
    """
    Runs a generator in a background thread, `SEGMENTS_AHEAD` items ahead. Errors are raised where their item would
    have come. Closing sets `stop`, so that an item in the making may be given up, and waits for the thread.
    """
    results, room, end = SimpleQueue(), threading.Semaphore(SEGMENTS_AHEAD), object()

    def run():
        room.acquire()
        while not stop.is_set():
            try:
                results.put((next(items, end), None))
            except BaseException as error:
                results.put((end, error))
            room.acquire()

    def close():
        stop.set()
        room.release()
        thread.join()

    # A program may end without reading on. It would wait for other threads before it runs what `atexit` knows.
    thread = threading.Thread(target=run, name="video-segments", daemon=True)
    thread.start()
    atexit.register(close)
    unregister = atexit.unregister  # the module may be gone when a program ends
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is end:
                return
            room.release()
            yield item
    finally:
        close()
        unregister(close)
        items.close()
