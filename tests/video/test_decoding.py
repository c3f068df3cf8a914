# SPDX-License-Identifier: Apache-2.0
"""Several decoders at once give, bit for bit, what one gives."""

import threading

import av
import numpy as np
import pytest
from video_files import decode_all, pictures, write_file

from transformers_vamba.video import decoding
from transformers_vamba.video.decoding import decode_in_parallel, plan_stretches
from transformers_vamba.video.index import Packets, build_index
from transformers_vamba.video.sources import FileView


X264 = "keyint=12:min-keyint=12:scenecut=0"
FILES = {
    "b-frames.mp4": {"options": {"x264-params": f"{X264}:bframes=3:b-pyramid=normal"}},
    "open groups.mp4": {"options": {"x264-params": f"{X264}:bframes=3:open-gop=1"}},
    "open groups.ts": {"options": {"x264-params": f"{X264}:bframes=3:open-gop=1"}},
    "interlaced.ts": {"options": {"x264-params": f"{X264}:interlaced=1:bframes=2"}},
    "open groups, hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=1:log-level=none"}},
    "fragmented.mp4": {"options": {"g": "12"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "alt-ref.webm": {
        "codec": "libvpx-vp9",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "deadline": "realtime", "b": "100k"},
    },
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12", "deadline": "realtime", "b": "300k"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "intra.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "varying.mkv": {"options": {"g": "12"}, "times": [i * i for i in range(50)]},
}
NUM_FRAMES = 50


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes a file of [`FILES`] when it is first asked for."""
    folder, written = tmp_path_factory.mktemp("files"), {}

    def file(name):
        if name not in written:
            written[name] = write_file(folder / name, pictures(NUM_FRAMES), **FILES[name])
        return written[name]

    return file


@pytest.fixture(autouse=True)
def three_decoders(monkeypatch):
    monkeypatch.setattr(decoding, "num_cores", lambda: 3)


@pytest.fixture
def plain(monkeypatch):
    """The numbers of frames that were left to plain decoding."""
    lengths, decode = [], decoding.decode_plainly

    def record(file, index, indices, *args):
        lengths.append(len(indices))
        return decode(file, index, indices, *args)

    monkeypatch.setattr(decoding, "decode_plainly", record)
    return lengths


def decode(path, indices, index=None):
    with open(path, "rb") as file:
        view = FileView(file)
        index = index or build_index(view)
        return list(decode_in_parallel(view, index, np.asarray(indices), np.copy, lambda: False))


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_plain_decoder(files, plain, name):
    frames, _ = decode_all(files(name))
    assert len(frames) == NUM_FRAMES
    for indices in (
        range(50),
        range(0, 50, 2),
        range(1, 50, 2),
        range(5, 50, 10),
        (11, 12, 13),
        (0, 49),
        (49,),
        (30,),
    ):
        assert all(map(np.array_equal, decode(files(name), indices), [frames[i] for i in indices]))
        assert len(decode(files(name), indices)) == len(indices)
    assert set(plain) <= {1, 3}  # where there is one stretch alone


def test_keyframes_of_an_animated_png_are_none(tmp_path, plain):
    path = write_file(tmp_path / "animated.apng", pictures(12), "apng", pix_fmt="rgb24")
    with av.open(path) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1
    frames, _ = decode_all(path)
    assert all(map(np.array_equal, decode(path, range(12)), frames))
    assert plain == [12]


@pytest.mark.parametrize("shift", [0.2, 0.5])
def test_frames_that_an_edit_list_hides(write_video, plain, shift):
    path = write_video("edited.mp4", 40, pts_shift=shift)
    frames, _ = decode_all(path)
    assert len(frames) < 40
    for step in (1, 3):
        decoded = decode(path, range(0, len(frames), step))
        assert all(map(np.array_equal, decoded, frames[::step])) and len(decoded) == len(frames[::step])
    assert not plain


def test_packets_that_nobody_needs_are_not_decoded(files, monkeypatch):
    sent, decode_stretch = [], decoding.Decoders.decode

    def record(self, packets, wanted, transform):
        sent.append(len(packets))
        return decode_stretch(self, packets, wanted, transform)

    monkeypatch.setattr(decoding.Decoders, "decode", record)
    decode(files("vp8.webm"), (1, 25))
    assert sent == [2, 2]
    sent.clear()
    decode(files("intra.avi"), (3, 20, 33))
    assert sent == [1, 1, 1]


def test_stretches_of_open_groups():
    """Packets 3 and 4 come after the second keyframe in the file, and before it in time."""
    pts = np.array([0, 2, 1, 5, 3, 4, 6, 7])
    is_key = np.array([True, False, False, True, False, False, False, False])
    packets = Packets(pts, is_key, np.ones(8, dtype=bool), np.zeros(8, dtype=bool))
    stretches = plan_stretches(packets, np.array([1, 4, 5]))
    assert [(stretch.start, stretch.stop, stretch.wanted) for stretch in stretches] == [(0, 6, [1, 4]), (3, 4, [5])]
    assert plan_stretches(packets, np.array([-1, 4])) is None
    packets.is_key[0] = False
    assert plan_stretches(packets, np.array([1, 4])) is None


def test_what_several_decoders_do_not_give_one_does(files, monkeypatch, plain):
    """As where the frames of a group cannot be decoded from its keyframe on."""
    path = files("b-frames.mp4")
    frames, _ = decode_all(path)
    decode_stretch, count = decoding.Decoders.decode, 0

    def fail(self, *args):
        nonlocal count
        count += 1
        return decode_stretch(self, *args) if count != 2 else None

    monkeypatch.setattr(decoding.Decoders, "decode", fail)
    decoded = decode(path, range(0, 50, 4))
    assert all(map(np.array_equal, decoded, frames[::4])) and len(decoded) == 13
    assert len(plain) == 1 and 0 < plain[0] < 13


def test_decoders_work_ahead_but_not_far(files, monkeypatch):
    path, begun, lock = files("intra.avi"), [], threading.Lock()
    decode_stretch = decoding.Decoders.decode

    def record(self, *args):
        with lock:
            begun.append(1)
        return decode_stretch(self, *args)

    monkeypatch.setattr(decoding.Decoders, "decode", record)
    with open(path, "rb") as file:
        view = FileView(file)
        frames = decode_in_parallel(view, build_index(view), np.arange(50), np.copy, lambda: False)
        for _ in range(5):
            next(frames)
        assert 5 <= len(begun) <= 5 + 4
        frames.close()
    assert len(begun) <= 9
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("video-decoder")]


def test_stopping(files):
    with open(files("intra.avi"), "rb") as file:
        view, done = FileView(file), []
        frames = decode_in_parallel(view, build_index(view), np.arange(50), np.copy, lambda: len(done) > 4)
        for frame in frames:
            done.append(frame)
        assert 4 < len(done) < 12
