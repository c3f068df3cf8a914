# SPDX-License-Identifier: Apache-2.0
"""What happens on the page to ask a video on. `test_app_in_browser.py` looks at the page itself."""

import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from ask_video import TINY_MODEL, load
from PIL import Image
from synthetic_videos import sample_video, write_mp4
from tiny_vamba import ROOT

from transformers_vamba.video.download import SourceLimits


pytest.importorskip("gradio", reason="the page needs Gradio: pip install -c constraints.txt '.[page]'")
import app  # noqa: E402


DEADLINE = 60  # seconds
STRICT = SourceLimits(max_bytes=2**24, timeout=5, allow_private=False)
ORDER = "List the colors in the order in which they appeared."


@pytest.fixture
def make_page():
    def make(cache_bytes=2**30, limits=STRICT, **options):
        model, processor = load(TINY_MODEL, "cpu")
        options = {"num_frames": None, "fps": None, "segment_frames": 32, "video_cache": None} | options
        return app.Page(model, processor, options, cache_bytes, limits)

    return make


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Files of generated videos, of broken ones, and of odd ones."""
    folder = tmp_path_factory.mktemp("videos")
    write_mp4(folder / "sequence.mp4", sample_video(8, 32, "sequence"))  # green, then purple, then orange
    write_mp4(folder / "movement.mp4", sample_video(1, 32, "movement"))  # a green cross moves left
    write_mp4(folder / "long.mp4", sample_video(4, 120, "sequence"))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is no video.\n" * 100)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile 'sequence.mp4'\n")
    (folder / "cut.mp4").write_bytes((folder / "sequence.mp4").read_bytes()[:6000])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    with av.open(str(folder / "one.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 112
        frame = av.VideoFrame.from_ndarray(np.zeros((112, 112, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return folder


def watch(page, session, path):
    return [report for report, _ in page.watch(str(path), session)]


def ask(page, session, question):
    """All states of the conversation, each as a list of texts."""
    return [[texts_of(message) for message in messages] for messages, _ in page.ask(question, session)]


def texts_of(message):
    content = message["content"]
    return "".join(part for part in ([content] if isinstance(content, str) else content) if isinstance(part, str))


def test_watch_once_and_ask_twice(make_page, videos, monkeypatch):
    """The forecast, the progress, the answers; only `watch` reads the video."""
    page, session = make_page(segment_frames=8), app.Session()
    reports = watch(page, session, videos / "sequence.mp4")
    assert "Forecast" in reports[1] and "256 video tokens" in reports[1]
    assert [f"{n} of 32 frames" in report for n, report in zip((8, 16, 24, 32), reports[2:])] == [True] * 4
    assert reports[-1].endswith("once for all questions. Ask.</p>")

    monkeypatch.setattr(page.model, "encode_video", None)
    states = ask(page, session, ORDER)
    grown = [state[-1] for state in states if len(state) == 2]
    assert grown[-1] == "green, then purple, then orange"
    assert len(set(grown)) > 2 and all(grown[-1].startswith(part) for part in grown)
    assert states[-1][-1].startswith("Seen at 0:0")
    assert ask(page, session, "What came first?")[-1][3:5] == ["What came first?", "a green triangle"]
    (text, picture) = session.messages[-1]["content"]
    assert Image.open(picture["path"]).size == (770, 396)
    page.clear(session)
    assert not session.messages and "purple" in ask(page, session, ORDER)[-1][1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "it is no video"),
        ("list.mp4", "a playlist"),
        ("sound.mp4", "no video stream"),
        ("cut.mp4", "damaged or missing"),
    ],
)
def test_broken_files(make_page, videos, name, problem):
    """What is wrong, in a sentence that tells nothing of the machine, and nothing is kept."""
    page, session = make_page(), app.Session()
    report = watch(page, session, videos / name)[-1]
    assert report.startswith("<p><b>That did not work.</b>") and name in report and problem in report
    assert str(videos.parent) not in report and "Traceback" not in report
    assert not page.shelf.videos
    assert "not seen the whole video" in ask(page, session, ORDER)[-1][-1]


def test_unexpected_errors(make_page, videos, monkeypatch, caplog):
    page, session = make_page(), app.Session()
    monkeypatch.setattr(page.model, "encode_video", None)
    report = watch(page, session, videos / "sequence.mp4")[-1]
    assert "Something failed here" in report and "NoneType" not in report and "NoneType" in caplog.text
    assert not page.shelf.videos
    monkeypatch.undo()
    watch(page, session, videos / "sequence.mp4")
    monkeypatch.setattr(page.model, "generate", None)
    assert ask(page, session, ORDER)[-1] == [ORDER, app.describe_failure(ValueError())]
    monkeypatch.undo()
    assert "purple" in ask(page, session, ORDER)[-1][-2]
    assert "too little memory" in app.describe_failure(torch.OutOfMemoryError())


def test_one_frame(make_page, videos):
    page, session = make_page(), app.Session()
    assert "1 of 1 frames" in watch(page, session, videos / "one.mp4")[-2]
    assert "cannot be told" in ask(page, session, "What came first?")[-1][-1]


def test_questions_that_cannot_be_asked(make_page, videos):
    page, session = make_page(), app.Session()
    assert "Give me a video first" in ask(page, session, ORDER)[-1][-1]
    watch(page, session, videos / "sequence.mp4")
    assert ask(page, session, " ")[-1] == ["Write a question first."]
    assert "2,001 characters" in ask(page, session, "a" * 2001)[-1][-1]
    assert not session.messages
    assert len(ask(page, session, "$a_{b " * 300)[-1]) == 3  # long, and no formula


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file:///etc/passwd", "begins with http"),
        ("/etc/passwd", "begins with http"),
        ("http://10.0.0.1/video.mp4", "not public"),
        ("http://[::1]/video.mp4", "not public"),
        ("http://", "no host"),
        ("http://[::1/video.mp4", "Invalid IPv6 URL"),
    ],
)
def test_links_that_are_refused(make_page, url, problem):
    *_, (report, value) = make_page().fetch(url, app.Session())
    assert "That did not work" in report and problem in report
    assert not isinstance(value, str)


def test_links(make_page, videos, serving):
    with serving(videos) as host:
        page, session = make_page(), app.Session()
        *_, (report, _) = page.fetch(f"{host}/sequence.mp4", session)
        assert "not public" in report
        page = make_page(limits=SourceLimits(max_bytes=2**24))
        *_, (_, path) = page.fetch(f" {host}/sequence.mp4?name=..", session)
        assert Path(path).read_bytes() == (videos / "sequence.mp4").read_bytes()
        assert "Ask." in watch(page, session, path)[-1]
        page.limits = SourceLimits(max_bytes=2000)
        *_, (report, _) = page.fetch(f"{host}/sequence.mp4", session)
        assert "larger than 2,000 bytes" in report
        assert not Path(path).exists()  # one fetched file per visitor


def test_visitors_do_not_mix(make_page, videos):
    page, first, second = make_page(), app.Session(), app.Session()
    watch(page, first, videos / "sequence.mp4")
    watch(page, second, videos / "movement.mp4")
    with ThreadPoolExecutor(2) as visitors:
        for _ in range(3):
            states = list(visitors.map(partial(ask, page), (first, second), (ORDER, "What kind of shape moved?")))
            assert states[0][-1][-2] == "green, then purple, then orange" and states[1][-1][-2] == "cross"
    assert len(first.messages) == len(second.messages) == 9


def test_memory_is_bounded(make_page, videos):
    """Who asked longest ago makes room; what never fits is refused."""
    page = make_page(cache_bytes=int(1.2 * 2**20))  # a video of 32 frames takes 0.5 MiB, one of 120 takes 1.9
    first, second, third = sessions = [app.Session() for _ in range(3)]
    watch(page, first, videos / "sequence.mp4")
    watch(page, second, videos / "sequence.mp4")
    ask(page, first, ORDER)
    watch(page, third, videos / "movement.mp4")
    assert [session.video.was_dropped for session in sessions] == [False, True, False]
    assert second.video.cache is None and "give it again" in ask(page, second, ORDER)[-1][-1]
    assert "purple" in ask(page, first, ORDER)[-1][-2]

    assert "Give a shorter video." in watch(page, second, videos / "long.mp4")[-1]
    assert page.shelf.videos == [third.video, first.video]
    video = first.video
    page.forget(first)
    assert page.shelf.videos == [third.video] and first.video is None and video.cache is None


def test_a_gpu_that_is_full(make_page, videos, monkeypatch):
    page, session = make_page(), app.Session()
    monkeypatch.setattr(app, "free_memory", lambda device: 2**26)
    report = watch(page, session, videos / "sequence.mp4")[-1]
    assert "would take 0.13 GiB" in report and "0.06 GiB are free" in report
    assert not page.shelf.videos


def test_a_video_that_is_being_encoded_keeps_its_room(make_page, videos):
    page, first, second = make_page(cache_bytes=2**20 // 2), app.Session(), app.Session()
    reports = page.watch(str(videos / "sequence.mp4"), first)
    assert "Decoding." in [next(reports) for _ in range(2)][-1][0]
    assert "try again in a few minutes" in watch(page, second, videos / "movement.mp4")[-1]
    assert "Ask." in list(reports)[-1][0] and page.shelf.videos == [first.video]
    reports = page.watch(str(videos / "sequence.mp4"), first)
    next(reports), next(reports)
    reports.close()  # the visitor is gone
    assert not page.shelf.videos


def test_videos_wait_for_their_turn(make_page, videos):
    page, sessions = make_page(), [app.Session() for _ in range(4)]
    reports = [page.watch(str(videos / "sequence.mp4"), session) for session in sessions]
    firsts = [next(each)[0] for each in reports]
    assert ["waits for its turn" in first for first in firsts] == [False, False, True, True]
    sessions[3].video = None  # given up
    assert not list(reports[3])
    reports[0].close()
    assert all("Ask." in list(reports[i])[-1][0] for i in (1, 2))
    assert "Ask." in watch(page, sessions[3], videos / "movement.mp4")[-1]


def test_another_video_stops_the_first(make_page, videos):
    page, session = make_page(segment_frames=2), app.Session()
    reports = page.watch(str(videos / "long.mp4"), session)
    for _ in range(5):
        next(reports)
    watch(page, session, videos / "movement.mp4")
    assert len(list(reports)) <= 1
    assert [session.video] == page.shelf.videos
    assert ask(page, session, "What kind of shape moved?")[-1][1] == "cross"
    assert list(page.watch(None, session))[-1] == ("<p>No video yet.</p>", []) and not page.shelf.videos


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--segment-frames", "0"], "multiple of 2"),
        (["--num-frames", "8", "--fps", "1"], "mutually exclusive"),
        (["--fps", "nan"], "`fps` must be a positive number, got nan"),
        (["--cache-gib", "nan"], "--cache-gib must be a positive number, got nan"),
        (["--max-gib", "-1"], "--max-gib must be a positive number, got -1.0"),
        (["--model", "checkpoints/nothing"], "checkpoints/nothing"),
    ],
)
def test_options_that_are_wrong(capsys, arguments, error):
    """Said before anything is loaded, and not to each visitor."""
    with pytest.raises(SystemExit):
        app.main(arguments)
    assert error in capsys.readouterr().err


def test_what_the_page_says_of_the_model(make_page, tmp_path):
    model = make_page().model
    assert "98.7%" in app.describe_model(TINY_MODEL, model) and "cannot" in app.describe_model(TINY_MODEL, model)
    other = app.describe_model(str(tmp_path), model)
    assert tmp_path.name in other and "98.7%" not in other and str(tmp_path.parent) not in other


def test_a_space_needs_what_the_package_needs():
    pyproject = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'^    "(.+)",$', pyproject.partition("\ndependencies = [")[2].partition("]")[0], re.MULTILINE)
    assert sorted([*needed, "matplotlib"]) == (ROOT / "examples/space/requirements.txt").read_text().split()
    header = (ROOT / "examples/space/README.md").read_text()
    (version,) = re.findall(r"^sdk_version: (.+)$", header, re.MULTILINE)
    assert f"\ngradio=={version}\n" in (ROOT / "constraints.txt").read_text()


def test_a_space(tmp_path):
    """The folder that is uploaded shows the page, with the package that lies in it."""
    space = tmp_path / "space"
    subprocess.run(["make", "-s", f"SPACE={space}", "space"], cwd=ROOT, check=True)
    (app_file,) = re.findall(r"^app_file: (.+)$", (space / "README.md").read_text(), re.MULTILINE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, app_file], cwd=space, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        timer = threading.Timer(DEADLINE, process.kill)
        timer.start()
        try:
            assert any(f"http://127.0.0.1:{port}" in line for line in process.stdout)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=DEADLINE) as response:
                text = response.read().decode()
        finally:
            timer.cancel()
            process.terminate()
    assert "Ask a video" in text and "The tiny model" in text
    assert list((space / "examples/transformers_vamba").glob("__pycache__/__init__.*"))
