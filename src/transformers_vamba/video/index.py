# SPDX-License-Identifier: Apache-2.0
"""One index of the frames of a file: when each is shown, and which packets it takes to decode it."""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from transformers.video_utils import VideoMetadata

from .container import DamageError, decode_packet, demux, display_size, has_table, open_video, video_stream
from .sources import FileView


# More frames than any file has, 155 hours at 60 a second: a file that states more, and lacks them, is damaged.
MOST_FRAMES = 2**25
# Each frame is drawn onto the one before, also where the packet is marked as a keyframe.
CODECS_OF_ONE_CANVAS = {"apng"}
PROBED_FRAMES = 24  # decoded at the beginning, to compare them with what the packets say
PROBED_PACKETS = 4 * PROBED_FRAMES
NO_TIME = np.iinfo(np.int64).min


@dataclass
class TimedMetadata(VideoMetadata):
    """
    What is known of a file.

    Args:
        frame_times (`np.ndarray`, *optional*):
            float64 of shape (frames,): when each frame is shown, in seconds after the first, if that is not at a
            constant rate. `fps` is the average rate then.
    """

    frame_times: np.ndarray | None = field(default=None, repr=False)

    @property
    def timestamps(self) -> list[float]:
        """Times of the sampled frames, in seconds."""
        if self.frame_times is None:
            return super().timestamps
        return self.frame_times[np.asarray(self.frames_indices)].tolist()


@dataclass
class Packets:
    """
    The packets of a video stream in the order of decoding.

    Args:
        pts (`np.ndarray`): int64 of shape (packets,): when each is shown, in units of the time base, or `NO_TIME`.
        is_key (`np.ndarray`): bool of shape (packets,): whether decoding can begin here.
        is_shown (`np.ndarray`): bool of shape (packets,): whether it has a frame that is shown.
        is_corrupt (`np.ndarray`): bool of shape (packets,): whether the container says that it is damaged.
    """

    pts: np.ndarray
    is_key: np.ndarray
    is_shown: np.ndarray
    is_corrupt: np.ndarray


@dataclass
class FrameIndex:
    """
    The frames that decoding a file gives.

    Args:
        metadata ([`TimedMetadata`]): Their number, rate or times, and size, upright and with square pixels.
        pts (`np.ndarray`, *optional*):
            int64 of shape (frames,), ascending: the time of each frame in units of the time base, if its packet says
            so and can be trusted. Otherwise frames are told apart by their order alone.
        packets ([`Packets`], *optional*): Given together with `pts`.
        num_missing (`int`): Frames at the end that the container lists but that are not in the file.
        damage (`list[str]`): What could not be decoded, if that is allowed.
    """

    metadata: TimedMetadata
    pts: np.ndarray | None = None
    packets: Packets | None = None
    num_missing: int = 0
    damage: list[str] = field(default_factory=list)


def is_hidden(codec: str, packet) -> bool:
    """Whether a packet of VP8 or VP9 has only a frame that others refer to and that is never shown."""
    first = memoryview(packet)[0]
    if codec == "vp8":
        return not first & 0x10
    # Two bits of frame marker, the profile, and with profile 3 a reserved bit; then whether an earlier frame is shown,
    # whether this is no keyframe, and whether it is shown. Several frames in a packet end with an index of them.
    if first >> 6 != 2 or memoryview(packet)[-1] & 0xE0 == 0xC0:
        return False
    shift = 4 if first & 0x30 == 0x30 else 3
    return not first >> shift & 1 and not first >> (shift - 2) & 1


def read_packets(container, stream) -> Packets:
    """Reads all packets of a stream, without decoding them."""
    codec = stream.codec_context.name.removeprefix("lib").partition("-")[0]
    codec = {"vpx": "vp8"}.get(codec, codec)
    may_hide = codec in ("vp8", "vp9")
    rows = [
        (
            NO_TIME if packet.pts is None else packet.pts,
            packet.is_keyframe,
            not packet.is_discard and not (may_hide and is_hidden(codec, packet)),
            packet.is_corrupt,
        )
        for packet in demux(container)
        if packet.size
    ]
    pts, *flags = zip(*rows) if rows else ((), (), (), ())
    packets = Packets(np.array(pts, dtype=np.int64), *(np.array(flag, dtype=bool) for flag in flags))
    if codec in CODECS_OF_ONE_CANVAS:
        packets.is_key[1:] = False
    return packets


@dataclass
class Probe:
    """What decoding the first frames gave: their times, their size, and whether they are pairs of fields."""

    pts: list[int | None]
    size: tuple[int, int] | None
    is_interlaced: bool
    reached_end: bool


def probe_frames(file: FileView) -> Probe:
    """Decodes the first frames of a file."""
    frames, is_interlaced, size, reached_end = [], False, None, False
    with open_video(file, thread_count=1) as container:
        stream = video_stream(container)
        for count, packet in enumerate(demux(container)):
            for frame in decode_packet(packet):
                size = size or display_size(frame, stream)
                is_interlaced = is_interlaced or frame.interlaced_frame
                frames.append(frame.pts)
            reached_end = not packet.size
            if len(frames) >= PROBED_FRAMES or count >= PROBED_PACKETS:
                break
    return Probe(frames, size, is_interlaced, reached_end)


def can_trust(packets: Packets, probe: Probe) -> bool:
    """Whether each packet that is shown gives one frame at its own time."""
    pts = np.sort(packets.pts[packets.is_shown])
    steps = np.diff(pts)
    if not len(pts) or pts[0] == NO_TIME or not packets.is_key[0] or packets.is_corrupt.any() or (steps == 0).any():
        return False
    # A frame of two fields may be in two packets. If that begins later on, the steps become shorter.
    if probe.is_interlaced and len(steps) and steps.min() * 3 < steps.max() * 2:
        return False
    if probe.reached_end and len(probe.pts) != len(pts):
        return False
    return len(probe.pts) > 0 and probe.pts == pts[: len(probe.pts)].tolist()


def scan_frames(file: FileView, skip_damage: bool) -> tuple[list[int | None], list[str], tuple[int, int] | None]:
    """
    Decodes a whole file for the times of its frames.

    Returns:
        The times in units of the time base, what could not be decoded, and the size of the first frame.

    Raises:
        `ValueError`: when it is damaged, unless `skip_damage`.
    """
    times, damage, size = [], [], None
    # The frames of several threads come with the errors of later ones, which would take them along.
    with open_video(file, thread_count=1 if skip_damage else None) as container:
        stream = video_stream(container)
        for packet in demux(container):
            try:
                for frame in decode_packet(packet):
                    size = size or display_size(frame, stream)
                    times.append(frame.pts)
            except DamageError as error:
                if not skip_damage:
                    raise
                damage.append(str(error))
    return times, damage, size


def constant_rate(times: np.ndarray, stated_rates: list[Fraction | None], tick: float) -> float | None:
    """
    The rate at which frames are shown, if it is constant: to within half a frame for a rate that the file states,
    which is taken first, and to within the rounding of its times otherwise.

    Args:
        times (`np.ndarray`): float64 of shape (frames,), in seconds after the first.
        stated_rates (`list`): What the file says.
        tick (`float`): Unit of the file's times, in seconds.
    """
    if len(times) < 2 or times[-1] <= 0:
        return None
    numbers = np.arange(len(times))
    rates = [(float(rate), max(0.5 / float(rate), tick)) for rate in stated_rates if rate]
    rates.append(((len(times) - 1) / times[-1], 1.5 * tick))
    return next(
        (rate for rate, tolerance in rates if np.abs(times - numbers / rate).max() <= tolerance * (1 + 1e-9)), None
    )


def seconds_of(pts: list[int | None] | np.ndarray, time_base: Fraction) -> np.ndarray | None:
    """
    Times in seconds after the first frame, ascending. If a recording's clock was set back in its middle, it goes on
    as before. `None` if a frame has no time.
    """
    if not len(pts) or any(time is None for time in pts):
        return None
    times = np.asarray(pts, dtype=np.float64)
    times = (times - times[0]) * float(time_base)
    steps = np.diff(times)
    if len(steps) and steps.min() <= 0:
        forward = steps[steps > 0]
        times[1:] = np.cumsum(np.where(steps > 0, steps, np.median(forward) if len(forward) else 1.0))
    return times


def build_index(file: FileView, skip_damage: bool = False) -> FrameIndex:
    """
    Indexes the frames of a file by its packets, and compares with what the decoder gives at its beginning. If they
    differ, if packets have no times, and to skip damage, the whole file is decoded once.

    Raises:
        `ValueError`: when it has no frames, or is damaged.
    """
    with open_video(file) as container:
        stream = video_stream(container)
        stated = len(stream.index_entries) if has_table(container) else 0
        packets = read_packets(container, stream)
        rates = [stream.average_rate, stream.guessed_rate]
        time_base, size = stream.time_base, (stream.height, stream.width)
    pts = np.sort(packets.pts[packets.is_shown])
    num_missing = max(stated - len(packets.pts), 0)
    if not len(pts) or len(pts) + num_missing > MOST_FRAMES:
        raise truncation_error(len(pts), num_missing) if num_missing else ValueError("the video has no frames")

    is_still = len(pts) == 1 and rates[0] is None
    probe = None if is_still else probe_frames(file)
    size = probe.size if probe and probe.size else size
    if probe is None or not skip_damage and can_trust(packets, probe):
        times = seconds_of(pts if pts[0] != NO_TIME else [], time_base)
        metadata = describe_frames(times, len(pts), num_missing, rates, time_base, size)
        return FrameIndex(metadata, pts, packets, num_missing)

    found, damage, scanned_size = scan_frames(file, skip_damage)
    if not found:
        raise ValueError("none of its frames could be decoded")
    if skip_damage and num_missing:
        damage.append(str(truncation_error(len(pts), num_missing)))
        num_missing = 0
    metadata = describe_frames(
        seconds_of(found, time_base), len(found), num_missing, rates, time_base, scanned_size or size
    )
    return FrameIndex(metadata, None, None, num_missing, damage)


def describe_frames(
    times: np.ndarray | None, num_shown: int, num_missing: int, rates: list, time_base: Fraction, size: tuple[int, int]
) -> TimedMetadata:
    """What is known of frames with these times, and of those that follow them and are missing."""
    rate = float(rates[0]) if rates[0] else None
    if times is not None and num_shown > 1:
        rate = constant_rate(times, rates, float(time_base))
    total = num_shown + num_missing
    metadata = TimedMetadata(total_num_frames=total, fps=rate, video_backend="pyav", height=size[0], width=size[1])
    if rate is None and times is not None and num_shown > 1:
        step = times[-1] / (num_shown - 1)
        metadata.fps = 1 / step
        metadata.frame_times = np.concatenate([times, times[-1] + step * np.arange(1, num_missing + 1)])
    metadata.duration = total / metadata.fps if metadata.fps else None
    return metadata


def truncation_error(num_frames: int, num_missing: int) -> DamageError:
    return DamageError(f"only {num_frames} of its {num_frames + num_missing} frames are there, the file is truncated")


def seconds_of_frames(metadata: VideoMetadata, num_frames: int) -> np.ndarray:
    """
    When each sampled frame is shown, in seconds after the first of the video: float64, NaN if that is not known.

    Raises:
        ValueError: if the metadata is of another number of frames.
    """
    if metadata.frames_indices is None or not (metadata.fps or getattr(metadata, "frame_times", None) is not None):
        return np.full(num_frames, np.nan)
    seconds = np.array(metadata.timestamps, dtype=np.float64)
    if len(seconds) != num_frames:
        raise ValueError(f"`frames_indices` of `video_metadata` has {len(seconds)} entries for {num_frames} frames.")
    return seconds
