# SPDX-License-Identifier: Apache-2.0
"""
Damaged and strange files: a clear error or a well-formed answer, never a hang, a crash or unbounded memory.

The files are read in a process of its own, this file run as a script, which may take `MEMORY` bytes beyond what it has
at its start and `TIMEOUT` seconds a file.
"""

import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from tiny_vamba import level_of_frame, levels_of

from transformers_vamba import VambaVideoProcessor
from transformers_vamba.video import container
from transformers_vamba.video.container import open_video


MEMORY = 2**30
TIMEOUT = 20
FILES_PER_DAMAGE = 24
NUM_FRAMES = 24  # of the undamaged files
NUMBERS = (0, 1, 0x7FFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
BOXES = b"moov mvhd trak tkhd elst mdhd stsd avc1 avcC stts stss stsc stsz stco moof tfhd trun mdat".split()
# Matroska's segment, cluster, block, time scale, duration, tracks, frame duration, width, height, codec data, time.
ELEMENTS = [
    bytes.fromhex(name)
    for name in "18538067 1f43b675 a3 2ad7b1 4489 1654ae6b ae 23e383 b0 ba 63a2 e7 1a45dfa3".split()
]


def flip_bits(content: bytearray, rng: random.Random):
    for _ in range(rng.choice((1, 8, 64, 512))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_bits_of_an_end(content: bytearray, rng: random.Random):
    """Of the first or last 1500 bytes, where a container keeps its headers."""
    start = rng.choice((0, len(content) - 1500))
    for _ in range(rng.choice((1, 2, 4, 16))):
        content[start + rng.randrange(1500)] ^= 1 << rng.randrange(8)


def truncate(content: bytearray, rng: random.Random):
    del content[rng.randrange(len(content)) :]


def behead(content: bytearray, rng: random.Random):
    del content[: rng.randrange(1, len(content))]


def drop(content: bytearray, rng: random.Random):
    start = rng.randrange(len(content))
    del content[start : start + rng.choice((1, 4, 100, 1000))]


def repeat(content: bytearray, rng: random.Random):
    start, end, at = sorted(rng.randrange(len(content)) for _ in range(3))
    content[at:at] = content[start:end] * rng.choice((1, 2, 10))


def overwrite(content: bytearray, rng: random.Random):
    start, length = rng.randrange(len(content)), rng.choice((1, 16, 256, 4096))
    content[start : start + length] = bytes([rng.choice((0, 255))]) * min(length, len(content) - start)


def end_in_noise(content: bytearray, rng: random.Random):
    content[rng.randrange(4, 2000) :] = rng.randbytes(rng.choice((10, 1000, 20_000)))


def write_absurd_numbers(content: bytearray, rng: random.Random):
    """Where a box of MP4 or an element of Matroska has its size, or a width, duration, count or offset."""
    is_mp4 = content[4:8] == b"ftyp"
    for _ in range(rng.choice((1, 2, 4))):
        name = rng.choice([name for name in (BOXES if is_mp4 else ELEMENTS) if name in content])
        at = content.find(name)
        at += rng.choice((-4, *range(4, 80, 2))) if is_mp4 else len(name) + rng.choice((0, 0, 1, 2))
        width = rng.choice((2, 4, 8))
        content[at : at + width] = (rng.choice(NUMBERS) * 0x100000001).to_bytes(8, "big")[-width:]


DAMAGES = (
    flip_bits,
    flip_bits_of_an_end,
    truncate,
    behead,
    drop,
    repeat,
    overwrite,
    end_in_noise,
    write_absurd_numbers,
)


def read_files():
    """Reads a file for each line of the input, and says on a line of the output what came of it."""
    video_processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84}, num_frames=8)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        path, kwargs = json.loads(line)
        try:
            outputs = video_processor(path, **kwargs)
        except (ValueError, OSError) as error:
            print(json.dumps({"error": str(error)}), flush=True)
        else:
            pixel_values, grid = outputs["pixel_values_videos"], outputs["video_grid_thw"]
            whole = pixel_values.shape == (int(grid.prod()), 1176) and bool(torch.isfinite(pixel_values).all())
            print(json.dumps({"grid": grid.tolist()[0], "whole": whole}), flush=True)


@pytest.fixture(scope="module")
def read():
    """Gives what reading a file in the other process gives."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"

    def read(path, **kwargs) -> dict:
        print(json.dumps([str(path), kwargs]), file=process.stdin)
        assert select.select([process.stdout], [], [], TIMEOUT)[0], f"no answer in {TIMEOUT} seconds"
        line = process.stdout.readline()
        assert line, f"the process ended with {process.wait()}"
        return json.loads(line)

    yield read
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def whole_files(write_video):
    files = {
        "index last.mp4": None,
        "index first.mp4": {"movflags": "faststart"},
        "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
        "video.mkv": None,
    }
    return [Path(write_video(name, NUM_FRAMES, options=options)) for name, options in files.items()]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file(read, whole_files, tmp_path, damage):
    results = []
    for seed in range(FILES_PER_DAMAGE):
        rng = random.Random(seed)
        whole = whole_files[seed % len(whole_files)]
        content = bytearray(whole.read_bytes())
        damage(content, rng)
        path = tmp_path / f"{seed} {whole.name}"
        path.write_bytes(content)
        result = read(path, **rng.choice(({}, {"fps": 2.0}, {"do_sample_frames": False})))
        if "error" in result:
            assert result["error"].startswith(f"Could not read {str(path)!r} as a video: "), path.name
        else:
            assert result["whole"], path.name
        results.append(result)
    assert any("error" in result for result in results)


def test_undamaged_file(read, whole_files):
    """The other process reads whole files, so its errors are those of the damage."""
    for path in whole_files:
        assert read(path) == {"grid": [4, 4, 6], "whole": True}


@pytest.mark.parametrize("log_level, thread_type", [(None, "AUTO"), (av.logging.ERROR, "SLICE")])
def test_no_frame_threads_with_a_log(video_file, log_level, thread_type):
    """PyAV's log takes Python's lock, so a decoder whose threads report errors can wait for them forever."""
    before = av.logging.get_level()
    av.logging.set_level(log_level)
    try:
        with open(video_file, "rb") as file, open_video(file) as container:
            assert container.streams.video[0].thread_type.name == thread_type
    finally:
        av.logging.set_level(before)


def raw_video(width: int, height: int, rate: str, num_frames: int = 3) -> bytes:
    frame = b"FRAME\n" + bytes(min(width * height * 3 // 2, 10_000))
    return f"YUV4MPEG2 W{width} H{height} F{rate} Ip C420\n".encode() + frame * num_frames


def gif(width: int, height: int) -> bytes:
    """One frame, without a rate."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0\x3b"


def nest(name: bytes, depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = struct.pack(">I", len(content) + 8) + name + content
    return b"\0\0\0\x14ftypisom\0\0\0\0isom" + content


SEGMENTS = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nindex last.mp4\n"
STRANGE_FILES = {
    "empty.mp4": (b"", "it is no video"),
    "byte.mp4": (b"\0", "Invalid data"),
    "text.mp4": (b"not a video " * 100, "Invalid data"),
    "noise.mp4": (random.Random(0).randbytes(100_000), "Invalid data|no video stream"),
    "zeros.mp4": (bytes(10_000_000), "Invalid data"),
    "start codes.mp4": (b"\0\0\0\1" * 1_000_000, "Invalid data"),
    "zip.mp4": (b"PK\x03\x04" + random.Random(1).randbytes(2000), "Invalid data|no video stream"),
    "nested moov.mp4": (nest(b"moov", 3000), ""),
    "nested trak.mp4": (nest(b"trak", 3000), ""),
    "nested.mkv": (bytes.fromhex("1a45dfa380") + bytes.fromhex("1853806701ffffffffffffff") * 5000, ""),
    "live.m3u8": (SEGMENTS, "a playlist that names further files"),
    "complete.m3u8": (SEGMENTS + b"#EXT-X-ENDLIST\n", "a playlist"),
    "itself.m3u8": (b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nitself.m3u8\n", "a playlist"),
    "list.mp4": (b"ffconcat version 1.0\n" + b"file 'index last.mp4'\n" * 100, "a playlist"),
    "list of itself.mp4": (b"ffconcat version 1.0\n" + b"file 'list of itself.mp4'\n" * 50, "a playlist"),
    "broadcast.sdp": (
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "a playlist",
    ),
    "wide and high.y4m": (raw_video(30_000, 30_000, "1:1"), ""),
    "wide and high.gif": (gif(16_000, 16_000), "more than 67,108,864"),
    "wider and higher.gif": (gif(65_535, 65_535), "Invalid argument"),
    "one frame in thirty years.y4m": (raw_video(64, 64, "1:1000000000"), None),
    "a billion frames a second.y4m": (raw_video(64, 64, "1000000000:1"), None),
    "narrow and high.y4m": (raw_video(2, 3000, "1:1"), None),
}


@pytest.mark.parametrize("name", STRANGE_FILES)
@pytest.mark.parametrize("kwargs", ({"fps": 2.0}, {"num_frames": 8}), ids=("by rate", "by count"))
def test_strange_file(read, whole_files, name, kwargs):
    content, message = STRANGE_FILES[name]
    path = whole_files[0].with_name(name)  # beside the file that the playlists name
    path.write_bytes(content)
    result = read(path, **kwargs)
    path.unlink()
    if message is None:
        assert result["whole"]
    elif name == "wider and higher.gif" and "fps" in kwargs:
        assert "needs the frame rate of the video" in result["error"]
    else:
        with pytest.raises(ValueError, match=f"^Could not read .*{name}' as a video: .*({message})"):
            raise ValueError(result["error"])


def test_no_file(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "folder.mp4").mkdir()
    paths = [tmp_path / name for name in ("pipe.mp4", "loop.mp4", "folder.mp4")]
    for path in [*paths, "/dev/zero", ".", "", "nul\0.mp4", "a" * 5000, "file:///nowhere.mp4"]:
        assert read(path)["error"].startswith("Expected the path or the file, http or https URL of a video, got ")


@pytest.mark.parametrize("url", ("http://", "https:///video.mp4", "http://[::1", "http://host:port/video.mp4"))
def test_damaged_url(read, url):
    assert read(url)["error"].startswith(f"Could not read {url!r} as a video: ")


@pytest.mark.parametrize("name", ("talk:1.mp4", "pipe:0", "file:talk.mp4", "concat:a|b", "100%d.mp4", "a?b#c.mp4"))
def test_name_that_looks_like_a_url(video_processor, video_file, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(Path(video_file).read_bytes())
    monkeypatch.chdir(tmp_path)
    expected = video_processor(video_file)["pixel_values_videos"]
    assert torch.equal(video_processor(name)["pixel_values_videos"], expected)


def test_title_that_is_not_utf8(video_processor, write_video, tmp_path):
    content = Path(write_video("video.mkv")).read_bytes()
    at = content.index(b"Lavf")  # the name of the program that wrote the file
    path = tmp_path / "latin.mkv"
    path.write_bytes(content[:at] + b"\xe9\xff" + content[at + 2 :])
    expected = video_processor(write_video("video.mkv"))["pixel_values_videos"]
    assert torch.equal(video_processor(path)["pixel_values_videos"], expected)


def test_unknown_codec(video_processor, video_file, tmp_path):
    path = tmp_path / "unknown.mp4"
    path.write_bytes(Path(video_file).read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(ValueError, match="unknown.mp4' as a video: it has no video stream of a known codec"):
        video_processor(path)


def test_video_without_a_rate(video_processor, tmp_path):
    path = tmp_path / "image.gif"
    path.write_bytes(gif(84, 56))
    outputs = video_processor(path, return_metadata=True)
    assert outputs["video_grid_thw"].tolist() == [[1, 4, 6]]
    assert outputs["video_metadata"][0].fps is None
    with pytest.raises(ValueError, match="image.gif' as a video: .*needs the frame rate"):
        video_processor(path, fps=1.0)


def test_frames_of_two_sizes(video_processor, write_video, tmp_path):
    """Raw H.264 files can be put one behind the other, and the size changes on the way."""
    path = tmp_path / "both.h264"
    path.write_bytes(
        Path(write_video("low.h264", 4)).read_bytes() + Path(write_video("high.h264", 4, height=96)).read_bytes()
    )
    with pytest.raises(ValueError, match=r"frame 4 is of shape \(96, 96, 3\), the first is of shape \(64, 96, 3\)"):
        video_processor(path)


def test_frames_that_would_fill_the_memory(video_processor, write_video, monkeypatch):
    path = write_video("low.h264", 4)
    monkeypatch.setattr(container, "MOST_PIXELS", 64 * 96 - 1)
    with pytest.raises(ValueError, match="low.h264' as a video: its frames are of 64x96 pixels, .* more than 6,143"):
        video_processor(path)


def test_frames_that_are_larger_than_the_header_says(video_processor, write_video, tmp_path, monkeypatch):
    path = tmp_path / "both.h264"
    path.write_bytes(
        Path(write_video("low.h264", 300)).read_bytes() + Path(write_video("high.h264", 2, height=96)).read_bytes()
    )
    monkeypatch.setattr(container, "MOST_PIXELS", 96 * 96 - 1)
    with pytest.raises(ValueError, match="both.h264' as a video: it is damaged"):
        video_processor(path, num_frames=302)
    outputs = video_processor(path, num_frames=302, on_damage="skip", return_metadata=True)
    assert outputs["video_metadata"][0].total_num_frames == 300


def test_truncated_matroska_gives_the_frames_that_are_there(video_processor, write_video, tmp_path):
    content = Path(write_video("video.mkv", NUM_FRAMES)).read_bytes()
    lengths = set()
    for end in range(len(content) // 4, len(content), 97):
        path = tmp_path / "truncated.mkv"
        path.write_bytes(content[:end])
        try:
            outputs = video_processor(path, do_sample_frames=False, return_metadata=True)
        except ValueError as error:
            assert "truncated.mkv' as a video: " in str(error)
            continue
        num_frames = outputs["video_metadata"][0].total_num_frames
        num_frames -= num_frames % 2 and num_frames > 1
        lengths.add(num_frames)
        levels = levels_of(outputs, video_processor)[:num_frames]
        expected = torch.tensor([float(level_of_frame(index)) for index in range(num_frames)])
        torch.testing.assert_close(levels, expected, atol=1.9, rtol=0)
    assert len(lengths) > 3


@pytest.mark.parametrize("damage", (truncate, flip_bits_of_an_end))
def test_processor_names_the_damaged_file(processor, video_file, tmp_path, damage):
    content = bytearray(Path(video_file).read_bytes())
    damage(content, random.Random(0))
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Could not read .*damaged.mp4' as a video: "):
        processor(text="<|vision_start|><|video_pad|><|vision_end|>", videos=[str(path)])


if __name__ == "__main__":
    read_files()
