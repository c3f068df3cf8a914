# SPDX-License-Identifier: Apache-2.0
import functools
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vamba import ROOT, make_text, tiny_model
from video_files import pictures, write_file

from transformers_vamba.video import decoding, index
from transformers_vamba.video import segments as video_segments


def joined(segments):
    """The segments as one video, and their numbers of temporal patches."""
    segments = list(segments)
    grids = torch.cat([segment["video_grid_thw"] for segment in segments])
    pixels = torch.cat([segment["pixel_values_videos"] for segment in segments])
    names = {"pixel_values_videos", "video_grid_thw"}
    assert all(set(segment) - {"num_remaining_tokens", "video_timestamps_ms"} == names for segment in segments)
    times = torch.cat([segment["video_timestamps_ms"] for segment in segments])
    assert len(times) == grids[:, 0].sum()
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[grids[:, 0].sum(), *grids[0, 1:]]])}, (
        grids[:, 0].tolist()
    )


def assert_equal(segments, expected, num_steps=None):
    outputs, steps = joined(segments)
    assert torch.equal(outputs["video_grid_thw"], expected["video_grid_thw"])
    assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert num_steps is None or steps == num_steps


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("video-segments")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not background_threads()


class Live(io.RawIOBase):
    """A source that cannot be sought: the content of a file, and then a failure, if one is given."""

    name = "live"

    def __init__(self, content, failure=None):
        self.content, self.failure, self.position = content, failure, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        chunk = self.content[self.position : self.position + len(buffer)]
        if not chunk and self.failure:
            raise self.failure
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


@pytest.mark.parametrize(
    ("sampling", "num_steps"),
    [
        ({}, [2, 2]),
        ({"num_frames": 16}, [2, 2, 2, 2]),
        ({"num_frames": 11}, [2, 2, 1]),
        ({"num_frames": 9}, [2, 2]),
        ({"num_frames": 3}, [1]),
        ({"num_frames": 1}, [1]),
        ({"num_frames": 100}, [2, 2, 2, 2, 2, 2]),
        ({"fps": 2.0}, [2, 1]),
        ({"fps": 3.0}, [2, 2]),
        ({"fps": 8.0}, [2, 2, 2, 2, 2, 2]),
        ({"fps": 0.01}, [1]),
        ({"fps": 8.0, "max_frames": 7}, [2, 1]),
        ({"fps": 1.0, "min_frames": 5}, [2]),
        ({"do_sample_frames": False}, [2, 2, 2, 2, 2, 2]),
        ({"num_frames": 6, "max_pixels": 28 * 56, "do_normalize": False}, [2, 1]),
    ],
)
def test_segments_are_the_video(processor, video_file, sampling, num_steps):
    expected = processor(videos=[video_file], return_tensors="pt", **sampling)
    segments = processor.iter_video_segments(video_file, segment_frames=4, **sampling)
    assert_equal(segments, expected, num_steps)


@pytest.mark.parametrize("segment_frames", [2, 6, 10, 12, 64])
@pytest.mark.parametrize("num_frames", [1, 13, 14, 25])
def test_odd_frames_and_segments(processor, write_video, segment_frames, num_frames):
    path = write_video("odd.mp4", num_frames=num_frames)
    expected = processor(videos=[path], return_tensors="pt", do_sample_frames=False)
    segments = processor.iter_video_segments(path, segment_frames=segment_frames, do_sample_frames=False)
    assert_equal(segments, expected)


def test_cores_are_left_to_the_decoders(processor, video_file, monkeypatch):
    """PyTorch's threads in the background are few; those of the caller, and of threads that begin later, stay."""
    default, numbers, later = torch.get_num_threads(), [], []
    preprocess = processor.video_processor.preprocess_resized

    def record(*args, **kwargs):
        numbers.append(torch.get_num_threads())
        return preprocess(*args, **kwargs)

    monkeypatch.setattr(processor.video_processor, "preprocess_resized", record)
    try:
        torch.set_num_threads(8)
        assert len(list(processor.iter_video_segments(video_file, num_frames=8, segment_frames=4))) == 2
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(default)
    assert numbers == [2, 2] and later == [8]


def test_decoding_goes_on_while_patches_are_made(processor, video_file, monkeypatch):
    num_resized, seen, video_processor = 0, [], processor.video_processor
    resize, preprocess = video_processor.resize, video_processor.preprocess_resized

    def count(*args, **kwargs):
        nonlocal num_resized
        num_resized += 1
        return resize(*args, **kwargs)

    def wait(*args, **kwargs):
        deadline = time.monotonic() + 60
        while not seen and num_resized < 2 * 6 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        seen.append(num_resized)
        return preprocess(*args, **kwargs)

    monkeypatch.setattr(video_processor, "resize", count)
    monkeypatch.setattr(video_processor, "preprocess_resized", wait)
    assert len(list(processor.iter_video_segments(video_file, num_frames=8, segment_frames=2))) == 4
    assert seen[0] >= 2 * 6  # each frame is resized twice: those of this segment, and of two more


def times_of(segments):
    return torch.cat([segment["video_timestamps_ms"] for segment in segments]).tolist()


@pytest.mark.parametrize("sampling", ({"num_frames": 11}, {"fps": 2.7}, {"do_sample_frames": False}))
def test_times_of_segments_are_those_of_the_video(processor, write_video, sampling):
    path = write_video("times.mkv", num_frames=50)
    whole = processor(videos=[path], return_metadata=True, return_video_timestamps=True, **sampling)
    seconds = whole["video_metadata"][0].timestamps[::2][: int(whole["video_grid_thw"][0, 0])]
    assert whole["video_timestamps_ms"].tolist() == [round(1000 * each) for each in seconds]
    assert times_of(processor.iter_video_segments(path, segment_frames=4, **sampling)) == [
        round(1000 * each) for each in seconds
    ]
    if "num_frames" not in sampling:
        live = times_of(processor.iter_video_segments(Live(Path(path).read_bytes()), live=True, **sampling))
        assert live == pytest.approx([1000 * each for each in seconds], abs=1)
    assert "video_timestamps_ms" not in processor(videos=[path], **sampling)


def test_times_of_frames_in_memory(processor):
    """They are known only from metadata."""
    frames = np.zeros((6, 56, 56, 3), dtype=np.uint8)
    options = {"do_sample_frames": False, "return_video_timestamps": True, "return_tensors": "pt"}
    assert processor(videos=[frames], **options)["video_timestamps_ms"].tolist() == [-1, -1, -1]
    metadata = {"total_num_frames": 60, "fps": 10.0, "frames_indices": [0, 10, 20, 30, 40, 50]}
    both = processor(videos=[frames, frames[:2]], video_metadata=[metadata, {"total_num_frames": 2}], **options)
    assert both["video_timestamps_ms"].tolist() == [0, 2000, 4000, -1]
    with pytest.raises(ValueError, match="`frames_indices` of `video_metadata` has 6 entries for 4 frames"):
        processor(videos=[frames[:4]], video_metadata=[metadata], **options)


def test_default_rate_is_the_processors(processor, video_file):
    processor.video_processor.num_frames, processor.video_processor.fps = None, 2.0
    expected = processor(videos=[video_file], return_tensors="pt")
    assert expected["video_grid_thw"][0, 0] == 3
    assert_equal(processor.iter_video_segments(video_file), expected, [3])


@pytest.mark.parametrize(
    ("name", "options"),
    [("s.mkv", None), ("s.ts", None), ("fragmented-s.mp4", {"movflags": "frag_keyframe+empty_moov"})],
)
@pytest.mark.parametrize("fps", [1.0, 2.0, 2.7, 8.0, 50.0])
@pytest.mark.parametrize("live", [False, True])
def test_live_source_gives_the_frames_of_the_file(processor, write_video, name, options, fps, live):
    path = write_video(name, num_frames=50, options=options)
    expected = processor(videos=[path], return_tensors="pt", fps=fps)
    assert_equal(
        processor.iter_video_segments(Live(Path(path).read_bytes()), live=live, fps=fps, segment_frames=4), expected
    )
    every_frame = processor(videos=[path], return_tensors="pt", do_sample_frames=False)
    source = Live(Path(path).read_bytes())
    assert_equal(processor.iter_video_segments(source, live=live, do_sample_frames=False), every_frame)


def test_pipe_and_open_file(processor, write_video, tmp_path):
    path = write_video("pipe.mkv")
    expected = processor(videos=[path], return_tensors="pt", fps=4.0)
    with open(path, "rb") as file:
        assert_equal(processor.iter_video_segments(file, fps=4.0, segment_frames=4), expected)
        assert not file.closed
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(Path(path).read_bytes()))
    writer.start()
    assert_equal(processor.iter_video_segments(pipe, fps=4.0, segment_frames=4), expected)
    writer.join()


def test_buffered_pipe_is_read_as_it_comes(processor, write_video):
    """Such as the standard input, or that of a program: its frames are there before a buffer is full."""
    path = write_video("buffered.mkv", num_frames=50)
    content, expected = Path(path).read_bytes(), processor(videos=[path], return_tensors="pt", fps=8.0)
    descriptor, source = os.pipe()
    rest = threading.Timer(2, lambda: (os.write(source, content[len(content) * 3 // 4 :]), os.close(source)))
    os.write(source, content[: len(content) * 3 // 4])
    with os.fdopen(descriptor, "rb") as file:
        segments = processor.iter_video_segments(file, live=True, fps=8.0, segment_frames=4)
        rest.start()
        first = next(segments)
        assert rest.is_alive()
        assert_equal([first, *segments], expected)


@pytest.mark.parametrize("states_length", [True, False])
def test_http_url(processor, write_video, monkeypatch, states_length):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = Path(write_video("url.mkv"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_header(self, name, value):
            if states_length or name != "Content-Length":
                super().send_header(name, value)

    handler = functools.partial(Handler, directory=str(path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        segments = list(processor.iter_video_segments(url, fps=2.0, segment_frames=4))
        by_count = processor.iter_video_segments(url, num_frames=4)
        assert_equal(by_count, processor(videos=[str(path)], return_tensors="pt", num_frames=4))
        live = list(processor.iter_video_segments(url, live=True, fps=2.0, segment_frames=4))
        with pytest.raises(ValueError, match="Could not read .*absent.mp4"):
            next(processor.iter_video_segments(f"{url}/absent.mp4"))
        server.shutdown()
    for read in (segments, live):
        assert_equal(read, processor(videos=[str(path)], return_tensors="pt", fps=2.0))


def test_arrays_and_lists_of_frames_are_cut(processor, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (13, 56, 84, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in frames]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    forms = [frames, torch.from_numpy(frames), images, list(frames), frames.transpose(0, 3, 1, 2)]
    for sampling in ({"num_frames": 9}, {"do_sample_frames": False}, {"fps": 2.0, "video_metadata": [{"fps": 3.0}]}):
        if "video_metadata" in sampling:
            sampling["video_metadata"][0]["total_num_frames"] = len(frames)
        expected = processor(videos=[frames], return_tensors="pt", **sampling)
        for form in [*forms, [str(tmp_path / f"{i}.png") for i in range(len(frames))]]:
            assert_equal(processor.iter_video_segments(form, segment_frames=4, **sampling), expected)
    expected = processor(videos=[frames[:1]], return_tensors="pt", do_sample_frames=False)
    assert_equal(processor.iter_video_segments(images[0], segment_frames=4), expected)


def test_cache_and_answer_are_those_of_the_whole_video(processor, video_file):
    model = tiny_model()
    whole = model.encode_video(**processor(videos=[video_file], return_tensors="pt", num_frames=22))
    cache = None
    for segment in processor.iter_video_segments(video_file, num_frames=22, segment_frames=4):
        cache = model.encode_video(**segment, cache=cache)
    assert cache.video_lengths == whole.video_lengths == [11 * 2 * 3]
    for layer, expected in zip(cache.videos[0], whole.videos[0], strict=True):
        torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-5)
        if expected.mixer_state is not None:
            torch.testing.assert_close(layer.mixer_state.ssm, expected.mixer_state.ssm, rtol=0, atol=1e-5)
    question = {"input_ids": make_text(), "max_new_tokens": 12, "do_sample": False}
    tokens = model.generate(**question, cache=cache.fork())
    assert torch.equal(tokens, model.generate(**question, cache=whole.fork()))


@pytest.fixture
def decoded(monkeypatch):
    """The lengths of the stretches of frames that have been preprocessed so far."""
    lengths = []
    preprocess = video_segments.preprocess_stretches

    def record(*args):
        for segment, length, num_frames in preprocess(*args):
            lengths.append(length)
            yield segment, length, num_frames

    monkeypatch.setattr("transformers_vamba.video.segments.preprocess_stretches", record)
    return lengths


def test_decodes_ahead_but_not_far(processor, write_video, decoded):
    path = write_video("ahead.mp4", num_frames=60)
    segments = processor.iter_video_segments(path, segment_frames=4, do_sample_frames=False)
    assert not decoded and not background_threads()
    for num_read in (1, 2, 3):
        next(segments)
        time.sleep(0.2)
        assert len(decoded) == num_read + video_segments.SEGMENTS_AHEAD
    segments.close()
    assert len(decoded) == 3 + video_segments.SEGMENTS_AHEAD


@pytest.mark.parametrize("stop", ["close", "break", "exception", "forgotten"])
def test_reader_that_stops_early(processor, video_file, stop):
    segments = processor.iter_video_segments(video_file, num_frames=24, segment_frames=2)
    next(segments)
    assert background_threads()
    if stop == "close":
        segments.close()
    elif stop == "break":
        for _ in segments:
            break
        segments = None
    elif stop == "exception":
        with pytest.raises(KeyboardInterrupt):
            segments.throw(KeyboardInterrupt)
    else:
        del segments
    assert not background_threads()


def test_stopping_does_not_wait_for_a_segment_that_takes_long(processor, write_video, monkeypatch):
    path = write_video("long.mp4", num_frames=240)
    num_packets = 0
    demux = decoding.demux

    def slow(container):
        nonlocal num_packets
        for packet in demux(container):
            num_packets += 1
            time.sleep(0.005)
            yield packet

    monkeypatch.setattr(decoding, "demux", slow)
    segments = processor.iter_video_segments(path, num_frames=8, segment_frames=2)
    next(segments)
    segments.close()
    assert num_packets < 150


def test_program_that_ends_does_not_wait(write_video):
    path = write_video("unread.mp4", num_frames=60)
    program = """
import sys, time
from transformers_vamba import VambaVideoProcessor
from transformers_vamba.video import decoding, segments as video_segments

demux = decoding.demux

def slow(container):
    for i, packet in enumerate(demux(container)):
        time.sleep(0 if i < 30 else 120)
        yield packet

decoding.demux = slow
segments = video_segments.iter_video_segments(VambaVideoProcessor(), sys.argv[1], segment_frames=2)
next(segments)
print("end", flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, path]
    with subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "end\n"
        assert process.wait(timeout=60) == 0
        assert "Exception ignored" not in process.stderr.read()


def test_truncated_file_gives_what_is_there_and_then_an_error(processor, write_video, tmp_path):
    whole = write_video("whole.mp4", num_frames=80, options={"movflags": "faststart"})
    content = Path(whole).read_bytes()
    path = tmp_path / "broken.mp4"
    path.write_bytes(content[: len(content) * 7 // 10])
    for sampling, interval in (({"num_frames": 80}, 1), ({"fps": 4.0}, 2)):
        segments, before = processor.iter_video_segments(path, segment_frames=4, **sampling), []
        with pytest.raises(ValueError, match=r"Could not read .*broken\.mp4.* frames are there.*truncated") as error:
            for segment in segments:
                before.append(segment)
        found = int(re.search(r"only (\d+) of its 80", str(error.value)).group(1))
        outputs, steps = joined(before)
        assert 16 < found < 80 and sum(steps) == found // interval // 2
        expected = processor(videos=[whole], return_tensors="pt", **sampling)["pixel_values_videos"]
        assert torch.equal(outputs["pixel_values_videos"], expected[: len(outputs["pixel_values_videos"])])

    path.write_bytes(content[:-1])  # the sampled frames are all there
    segments = processor.iter_video_segments(path, num_frames=8, segment_frames=4)
    assert len(list(islice(segments, 2))) == 2
    with pytest.raises(ValueError, match="only 79 of its 80 frames are there"):
        next(segments)


def test_live_frames_without_times_are_sampled_to_the_end(processor, tmp_path):
    path = write_file(tmp_path / "raw.h264", pictures(60), rate=25, options={"bf": "0"})
    expected = processor(videos=[path], return_tensors="pt", fps=5.0)
    assert expected["video_grid_thw"][0, 0] == 6
    assert_equal(processor.iter_video_segments(Live(Path(path).read_bytes()), live=True, fps=5.0), expected)


def test_live_mp4_with_its_table_at_the_end(processor, tmp_path):
    noise = list(np.random.default_rng(0).integers(256, size=(60, 120, 160, 3), dtype=np.uint8))
    path = write_file(tmp_path / "table last.mp4", noise)
    content = Path(path).read_bytes()
    assert content.index(b"moov") > len(content) // 2
    with pytest.raises(ValueError, match="its table of frames comes after them.* read it without `live`"):
        list(processor.iter_video_segments(Live(content), live=True, fps=5.0))
    assert len(list(processor.iter_video_segments(Live(content), fps=5.0))) == 1


def test_failure_of_a_live_source_comes_behind_its_frames(processor, write_video):
    content = Path(write_video("failing.mkv", num_frames=60)).read_bytes()
    source = Live(content[: len(content) * 2 // 3], OSError("connection lost"))
    before = []
    with pytest.raises(ValueError, match="Could not read .*Live.* as a video: .*connection lost"):
        for segment in processor.iter_video_segments(source, live=True, fps=8.0, segment_frames=4):
            before.append(segment)
    assert len(before) > 3


def test_frames_that_change_their_size(processor, write_video, tmp_path):
    """Raw H.264 files can be put one after another, and the size changes on the way."""
    path = tmp_path / "both.h264"
    path.write_bytes(
        Path(write_video("6.h264", 6)).read_bytes() + Path(write_video("wide.h264", 6, width=192)).read_bytes()
    )
    segments = processor.iter_video_segments(path, segment_frames=2, do_sample_frames=False)
    assert len(list(islice(segments, 3))) == 3
    with pytest.raises(ValueError, match="frame 6 is of shape .*64, 192.*, the first is of shape .*64, 96"):
        next(segments)


@pytest.mark.parametrize(
    ("video", "kwargs", "error", "message"),
    [
        ("absent.mp4", {}, FileNotFoundError, "absent.mp4"),
        ("/", {}, FileNotFoundError, "'/'"),
        (3, {}, ValueError, "A video must be a path.*int"),
        ("video", {"segment_frames": 0}, ValueError, "positive multiple of 2.*, got 0"),
        ("video", {"segment_frames": 5}, ValueError, "positive multiple of 2.*, got 5"),
        ("video", {"num_frames": 4, "fps": 1.0}, ValueError, "mutually exclusive"),
        ("video", {"fps": -1.0}, ValueError, "`fps` must be a positive number"),
    ],
)
def test_bad_arguments_are_refused_at_once(processor, video_file, video, kwargs, error, message):
    with pytest.raises(error, match=message):
        processor.iter_video_segments(video_file if video == "video" else video, **kwargs)


@pytest.mark.parametrize(
    ("content", "sampling", "message"),
    [
        (b"not a video " * 100, {}, "Could not read .*bad.mp4.* as a video"),
        (b"", {}, "Could not read .*bad.mp4.* as a video"),
        (Live(b""), {"fps": 1.0}, "Could not read .*Live.* as a video"),
        (Live(b""), {"fps": 1.0, "live": True}, "Could not read .*Live.* as a video"),
        (
            Live(b""),
            {"live": True, "num_frames": 8},
            "`num_frames` needs the number of frames.* live source.* with `fps`",
        ),
        (
            Live(b""),
            {"live": True, "fps": 1.0, "max_frames": 8},
            "`max_frames` needs the number of frames.* live source",
        ),
        (np.zeros((0, 28, 28, 3), np.uint8), {}, "no frames"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"fps": 1.0}, "needs the frame rate of the video"),
    ],
)
def test_what_is_no_video(processor, tmp_path, content, sampling, message):
    if isinstance(content, bytes):
        (tmp_path / "bad.mp4").write_bytes(content)
        content = tmp_path / "bad.mp4"
    with pytest.raises(ValueError, match=message):
        next(processor.iter_video_segments(content, **sampling))


def test_error_of_the_video_processor_reaches_the_reader(processor, video_file):
    with pytest.raises(ValueError, match="`shortest_edge` and `longest_edge`"):
        next(processor.iter_video_segments(video_file, size={"height": 28, "width": 28}))


@pytest.mark.parametrize(("progress", "shown"), [(None, False), (False, False), (True, True)])
def test_progress_bar(processor, video_file, capsys, progress, shown):
    list(processor.iter_video_segments(video_file, num_frames=12, segment_frames=4, progress=progress))
    printed = capsys.readouterr().err
    assert ("12/12" in printed) == shown
    assert bool(printed) == shown


HOUR = 3600
# The patches of the whole video are 542 MB, its frames as decoded 11 MB, its keys and values 59 MB.
MAX_GROWTH_OF_SEGMENTS = 100e6
MAX_GROWTH_OF_ASKING = 300e6
ASK = """
import json, sys
from itertools import islice
from ask_video import TINY_MODEL, answer, encode, load

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

def growth_over(function):
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew, at what is resident
    before = memory("VmRSS")
    result = function()
    return memory("VmHWM") - before, result

short, long = sys.argv[1:]
model, processor = load(TINY_MODEL, "cpu")
ask = lambda video: answer(model, processor, encode(model, processor, video), "What came first?")
read = lambda video, stop=None: sum(1 for _ in islice(processor.iter_video_segments(video), stop))
read(long, 1), ask(short)
segments, num_segments = growth_over(lambda: read(long))
asking, reply = growth_over(lambda: ask(long))
print(json.dumps({"segments": segments, "asking": asking, "num_segments": num_segments, "reply": reply}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure the peak")
def test_hour_of_video_is_asked_in_bounded_memory(write_video):
    short, long = (write_video(f"{n}.mp4", num_frames=n, height=32, width=32, fps=1) for n in (192, HOUR))
    examples = ROOT / "examples"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(examples), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", ASK, short, long], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    outputs = json.loads(result.stdout)
    for name in ("segments", "asking"):
        print(f"growth of the peak memory over an hour of video, {name}: {outputs[name] / 1e6:.0f} MB")
    assert outputs["num_segments"] == 57 and outputs["reply"]
    assert outputs["segments"] < MAX_GROWTH_OF_SEGMENTS
    assert outputs["asking"] < MAX_GROWTH_OF_ASKING


def test_absurd_number_of_frames(video_processor, video_file, monkeypatch):
    """A damaged header may state billions of frames: no list of them is made."""
    monkeypatch.setattr(index, "MOST_FRAMES", 20)
    content = Path(video_file).read_bytes()
    path = Path(video_file).with_name("absurd.mp4")
    at = content.index(b"stsz") + 12
    path.write_bytes(content[:at] + (10**6).to_bytes(4, "big") + content[at + 4 :])
    with pytest.raises(ValueError, match=r"absurd\.mp4' as a video: "):
        next(video_segments.iter_video_segments(video_processor, path))
