# SPDX-License-Identifier: Apache-2.0
"""Videos a segment at a time: decoded and cut into patches ahead of their reader, in bounded memory."""

import atexit
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.image_processing_utils import BatchFeature

from .container import Picture, decode_packet, demux, has_table, open_video, video_stream
from .index import seconds_of_frames
from .patches import allocate
from .reading import check_video, normalize_video, open_frames, open_named_source
from .sources import errors_of


# Segments that are ready or in the making while the reader is busy with one, and as many that are decoded before.
SEGMENTS_AHEAD = 2
# How long leaving waits for what is being read: a source that has stalled may never go on.
LEAVING_SECONDS = 1.0


def iter_video_segments(
    video_processor,
    video,
    segment_frames: int = 64,
    progress: bool | None = None,
    live: bool = False,
    **videos_kwargs,
) -> Iterator[BatchFeature]:
    """See [`~VambaProcessor.iter_video_segments`]. `num_frames` and `fps` are among `videos_kwargs`."""
    kwargs = video_processor.complete_kwargs(videos_kwargs)
    temporal_patch_size = kwargs["temporal_patch_size"]
    if segment_frames < 1 or segment_frames % temporal_patch_size:
        raise ValueError(
            f"`segment_frames` must be a positive multiple of {temporal_patch_size}, the frames of a temporal patch, "
            f"got {segment_frames}."
        )
    video = normalize_video(video)
    check_video(video, video_processor.source_limits)
    if live:
        check_live(kwargs)
    segment_kwargs = {name: value for name, value in videos_kwargs.items() if name not in ("num_frames", "fps")}
    segment_kwargs |= {"return_metadata": False, "video_metadata": None}
    segment_kwargs.setdefault("return_tensors", "pt")

    def segments():
        stop = threading.Event()
        read = read_live if live else read_sampled
        # Decoding goes on while a segment is made into patches.
        stretches = read_ahead(read(video_processor, video, kwargs, segment_frames, stop.is_set), stop)
        preprocessed = preprocess_stretches(video_processor, stretches, temporal_patch_size, segment_kwargs)
        disable = None if progress is None else not progress
        with (
            tqdm(desc="video", unit="frame", disable=disable) as bar,
            closing(read_ahead(preprocessed, stop)) as ready,
        ):
            num_seen = 0
            for segment, segment_length, num_frames in ready:
                num_seen += segment_length
                bar.total = num_frames
                if num_frames is not None:
                    tokens_per_step = segment["video_grid_thw"][0, 1:].prod() // kwargs["merge_size"] ** 2
                    num_remaining_steps = (num_frames - num_seen) // temporal_patch_size
                    segment["num_remaining_tokens"] = num_remaining_steps * int(tokens_per_step)
                yield segment
                bar.update(segment_length)

    return segments()


def check_live(kwargs: dict):
    """Raises a `ValueError` for sampling that needs the length of a video."""
    for name in ("num_frames", "min_frames", "max_frames") if kwargs["do_sample_frames"] else ():
        if kwargs[name] is not None:
            raise ValueError(
                f"`{name}` needs the number of frames of the video, which a live source does not tell ahead. Sample "
                f"it by rate, with `fps` and without `{name}`, or read it to its end first, without `live`."
            )


def read_sampled(
    video_processor, video, kwargs: dict, segment_frames: int, stop: Callable[[], bool]
) -> Generator[tuple[list[torch.Tensor], np.ndarray, int]]:
    """
    The sampled frames of a video, resized, at most `segment_frames` at a time, their times in seconds (float64, NaN if
    not known), and how many there are in all. If reading fails, what came before is given first.
    """
    with open_frames(
        video, video_processor.source_limits, kwargs["on_damage"], kwargs["input_data_format"], stop
    ) as frames:
        indices, metadata = video_processor.choose_frames(frames, kwargs)
        seconds = seconds_of_frames(metadata, len(indices))
        transform = video_processor.frame_transform(frames, kwargs)
        with closing(frames.read(indices, transform)) as resized:
            for i, stretch in enumerate(cut(resized, segment_frames)):
                yield stretch, seconds[i * segment_frames :][: len(stretch)], len(indices)
        if frames.failure is not None:
            with errors_of(video):
                raise frames.failure


def read_live(
    video_processor, video, kwargs: dict, segment_frames: int, stop: Callable[[], bool]
) -> Generator[tuple[list[torch.Tensor], np.ndarray, None]]:
    """As [`read_sampled`], of a source that is read as it comes: the number of frames is not known."""
    fps = kwargs["fps"] if kwargs["do_sample_frames"] else None
    limits = video_processor.source_limits
    with open_named_source(video, limits, live=True) as file, errors_of(video), open_video(file) as container:
        stream = video_stream(container)
        picture, transform = Picture(stream), video_processor.frame_transform(None, kwargs)
        decoded = (frame for packet in live_packets(container) if not stop() for frame in decode_packet(packet))
        first = next(decoded, None)
        begin = (first and first.time) or 0.0
        decoded = decoded if first is None else itertools.chain([first], decoded)
        sampled = decoded if fps is None else sample_live(decoded, stream.average_rate, fps)
        num_frames = 0
        for stretch in cut(((transform(picture.to_array(frame)), frame.time) for frame in sampled), segment_frames):
            num_frames += len(stretch)
            resized, seconds = zip(*stretch)
            yield list(resized), np.array(seconds, dtype=np.float64) - begin, None
        if not num_frames and not stop():
            raise ValueError("it ended before a frame could be sampled")


def live_packets(container) -> Iterator:
    """[`demux`] of what cannot be sought: the packets of an MP4 can only be told apart if its table comes first."""
    import av

    try:
        yield from demux(container)
    except av.InvalidDataError as error:
        if not has_table(container):
            raise
        raise ValueError(
            "it is damaged, or its table of frames comes after them, so it cannot be read as it comes: read it "
            "without `live`, or have it written with `-movflags faststart`"
        ) from error


def cut(frames: Iterator, length: int) -> Iterator[list]:
    """Lists of `length` frames, the last one shorter. If a frame fails, those before it are given first."""
    failure = None

    def until_failure():
        nonlocal failure
        try:
            yield from frames
        except Exception as error:
            failure = error

    intact = until_failure()
    while stretch := list(itertools.islice(intact, length)):
        yield stretch
    if failure is not None:
        raise failure


def sample_live(frames: Iterable, rate: Fraction | None, fps: float) -> Iterator:
    """
    Takes the frame that is nearest to the middle of each interval of `1 / fps` seconds, as `sample_frames` does, but
    the end need not be known: a frame is chosen when the next one has come.
    """
    held, held_time, start = None, 0.0, 0.0
    num_intervals, step = 0, 1 / float(rate) if rate else 0.0
    for index, frame in enumerate(frames):
        if frame.time is not None:
            time = frame.time
        elif rate:
            time = float(index / rate)
        else:
            raise ValueError("its frames have neither times nor a rate, so they cannot be sampled by `fps`")
        start = start if index else time
        if held is not None:
            step = time - held_time
            num_passed = count_middles(held_time - start + step / 2, fps)
            if num_passed > num_intervals:
                yield held
            num_intervals = max(num_intervals, num_passed)
        held, held_time = frame, time
    if held is not None and count_middles(held_time - start + step / 2, fps) > num_intervals:
        yield held


def count_middles(seconds: float, fps: float) -> int:
    """How many middles of intervals of `1 / fps` lie before a time. Matroska rounds times to milliseconds."""
    return math.floor((seconds + 0.001) * fps + 0.5)


def preprocess_stretches(
    video_processor, stretches: Generator, temporal_patch_size: int, videos_kwargs: dict
) -> Generator[tuple[BatchFeature, int, int | None]]:
    """
    The patches of each stretch of resized frames, their number of frames, and that of the whole video.
    """
    with closing(stretches):
        for i, (frames, seconds, num_frames) in enumerate(stretches):
            if i:  # only a whole video repeats a frame to fill a temporal patch
                frames = frames[: len(frames) - len(frames) % temporal_patch_size]
            if frames:
                # Channels last, as the frames lie in memory: rows are copied whole.
                frames = [frame.movedim(0, -1) for frame in frames]
                stretch = torch.stack(frames, out=allocate((len(frames), *frames[0].shape), frames[0])).movedim(-1, 1)
                segment = video_processor.preprocess_resized([stretch], **videos_kwargs)
                video_processor.add_timestamps(segment, [seconds], **videos_kwargs)
                yield segment, len(frames), num_frames


def leave_cores_to_decoders():
    """
    Gives PyTorch in this thread, begun just now, a quarter of its threads. Between operations they wait in a loop, on
    cores that the decoders need.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(max(default // 4, 1))
    # That would hold for all threads that begin later as well, unless one of them sets it back.
    restoring = threading.Thread(target=torch.set_num_threads, args=(default,), daemon=True)
    restoring.start()
    restoring.join()


def read_ahead(items: Generator, stop: threading.Event) -> Generator:
    """
    Runs a generator in a background thread, `SEGMENTS_AHEAD` items ahead. Errors are raised where their item would
    have come. Closing sets `stop`, so that an item in the making may be given up, and waits for the thread, though not
    for a source that has stalled: the thread ends on its own when that goes on.
    """
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    room, end = threading.Semaphore(SEGMENTS_AHEAD), object()

    def run():
        leave_cores_to_decoders()
        room.acquire()
        while not stop.is_set():
            try:
                results.put((next(items, end), None))
            except BaseException as error:
                results.put((end, error))
            room.acquire()
        results.put((end, None))  # for a reader that waits already
        items.close()

    def close():
        stop.set()
        room.release()
        thread.join(LEAVING_SECONDS)

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
