# SPDX-License-Identifier: Apache-2.0
"""The sources that a video may come from, and the limits on them."""

import base64
import http.server
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import pictures, write_file

from transformers_vamba import VambaConfig, forecast_memory
from transformers_vamba.video import download
from transformers_vamba.video.download import SourceLimits, is_public, quote_url
from transformers_vamba.video.sources import describe_source, local_path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` in the way that the path names; `server.requests` is what was asked for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        getattr(self, self.path.strip("/").partition("/")[0].partition("?")[0], self.whole)()

    def start(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def whole(self):
        self.start(Content_Length=len(self.server.content))
        self.wfile.write(self.server.content)

    def broken(self):
        """Always ends in the middle."""
        self.start(Content_Length=len(self.server.content))
        self.wfile.write(self.server.content[: len(self.server.content) // 2])
        self.close_connection = True

    def resumed(self):
        """Ends in the middle the first time, and goes on from there."""
        given = self.headers.get("Range")
        if given is None:
            self.start(Content_Length=len(self.server.content), ETag='"1"')
            self.wfile.write(self.server.content[: len(self.server.content) // 2])
            self.close_connection = True
            return
        begin, total = int(re.fullmatch(r"bytes=(\d+)-", given)[1]), len(self.server.content)
        self.start(206, Content_Length=total - begin, Content_Range=f"bytes {begin}-{total - 1}/{total}", ETag='"1"')
        self.wfile.write(self.server.content[begin:])

    def replaced(self):
        """Ends in the middle the first time, and has another video the next."""
        if len(self.server.requests) == 1:
            self.start(Content_Length=len(self.server.content), ETag='"1"')
            self.wfile.write(bytes(len(self.server.content) // 2))
            self.close_connection = True
        else:
            self.whole()

    def chunked(self):
        self.start(Transfer_Encoding="chunked")
        content = self.server.content
        for chunk in (content[: len(content) // 2], content[len(content) // 2 :], b""):
            self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def chunked_broken(self):
        self.start(Transfer_Encoding="chunked")
        self.wfile.write(f"{len(self.server.content):x}\r\n".encode() + self.server.content[:2000])
        self.close_connection = True

    def endless(self):
        self.start(Transfer_Encoding="chunked")
        try:
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            self.close_connection = True

    def slow(self):
        self.start(Content_Length=1000)
        try:
            for _ in range(1000):
                self.wfile.write(b"\0")
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def trickle(self, beginning):
        """What is not yet the content, byte by byte."""
        try:
            self.wfile.write(beginning)
            for _ in range(1000):
                self.wfile.write(b"0")
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def slow_header(self):
        self.trickle(b"HTTP/1.1 200 OK\r\nX-Name: ")

    def slow_chunk(self):
        self.trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    def stalled(self):
        self.start(Content_Length=1000)
        time.sleep(3)
        self.close_connection = True

    def huge(self):
        self.start(Content_Length=2**50)
        self.close_connection = True

    def busy(self):
        """For a moment."""
        if len(self.server.requests) == 1:
            self.start(503, Content_Length=0)
        else:
            self.whole()

    def absent(self):
        self.start(404, Content_Length=0)

    def moved(self):
        self.start(302, Location=self.server.location, Content_Length=0)


@pytest.fixture
def server(write_video, monkeypatch):
    """Serves a video file whose index is at its end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.path = write_video()
        server.content, server.requests = Path(server.path).read_bytes(), []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def read_both(processor, video, **kwargs):
    """The patches of a video, which both readers give."""
    whole = processor(videos=[video() if callable(video) else video], return_tensors="pt", **kwargs)
    segments = processor.iter_video_segments(video() if callable(video) else video, segment_frames=4, **kwargs)
    joined = torch.cat([segment["pixel_values_videos"] for segment in segments])
    assert torch.equal(joined, whole["pixel_values_videos"])
    return joined


@pytest.mark.parametrize(
    "name", ["whole", "resumed", "replaced", "chunked", "busy", "a b/ü.mp4?name=c d&e=é", "a%20b"]
)
@pytest.mark.parametrize("sampling", [{"num_frames": 8}, {"fps": 2.0}])
def test_urls(processor, server, name, sampling):
    expected = processor(videos=[server.path], return_tensors="pt", **sampling)["pixel_values_videos"]
    outputs = processor(videos=[f"{server.url}/{name}"], return_tensors="pt", **sampling)
    assert torch.equal(outputs["pixel_values_videos"], expected)
    if name == "resumed":
        assert server.requests[1][1] == f"bytes={len(server.content) // 2}-"
    server.requests.clear()
    segments = processor.iter_video_segments(f"{server.url}/{name}", **sampling)
    assert torch.equal(torch.cat([segment["pixel_values_videos"] for segment in segments]), expected)


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"1"', "Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT"}, '"1"'),
        ({"ETag": 'W/"1"'}, None),
        ({"Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT", "Date": "Tue, 03 Nov 2026 10:00:01 GMT"}, "Tue, 03 N"),
        # A further change in the same second would have the same date.
        ({"Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT", "Date": "Tue, 03 Nov 2026 10:00:00 GMT"}, None),
        ({"Last-Modified": "Tue, 03 Nov 2026 10:00:00 GMT"}, None),
        ({"Last-Modified": "yesterday", "Date": "Tue, 03 Nov 2026 10:00:00 GMT"}, None),
        ({"Date": "Tue, 03 Nov 2026 10:00:00 GMT"}, None),
    ],
)
def test_by_what_versions_are_told_apart(headers, validator):
    message = Message()
    for name, value in headers.items():
        message[name] = value
    found = download.find_validator(message)
    assert found is None if validator is None else found.startswith(validator)


def test_a_file_that_is_replaced_by_an_older_one_has_changed(tmp_path, monkeypatch):
    """Python's own server, as others, calls it unmodified since the date of the newer one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path, limits = tmp_path / "video.mp4", SourceLimits()

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    class NoHead(Files):
        def do_HEAD(self):
            self.send_error(405)

    for handler, knows in ((Files, True), (NoHead, False)):
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
            threading.Thread(target=files.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{files.server_port}/video.mp4"
            path.write_bytes(b"newer")
            os.utime(path, (1_600_000_000, 1_600_000_000))
            with download.download_version(url, limits) as (_, version):
                assert version == "Sun, 13 Sep 2020 12:26:40 GMT"
            assert download.is_unchanged(url, version, limits) == knows
            path.write_bytes(b"older")
            os.utime(path, (1_500_000_000, 1_500_000_000))
            assert not download.is_unchanged(url, version, limits)
            files.shutdown()
    assert not download.is_unchanged(url, version, limits)  # nobody answers: the download says so


def test_quoted_urls():
    assert quote_url("http://bücher.example/a b/é.mp4?q=a b#t=3") == (
        "http://xn--bcher-kva.example/a%20b/%C3%A9.mp4?q=a%20b"
    )
    assert quote_url("https://host/a%20b?x=%26") == "https://host/a%20b?x=%26"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"the download ended after [\d,]+ of [\d,]+ bytes"),
        ("chunked_broken", "the download ended early, after 2,000 bytes"),
        ("absent", "HTTP Error 404"),
    ],
)
def test_broken_off_downloads(processor, server, name, message):
    url = f"{server.url}/{name}"
    match = f"Could not read '{url}' as a video: {message}"
    for read in (
        lambda: processor(videos=[url]),
        lambda: next(processor.iter_video_segments(url, fps=1.0)),
        lambda: forecast_memory(VambaConfig(), processor, url),
    ):
        server.requests.clear()
        with pytest.raises(ValueError, match=match):
            read()
        assert len(server.requests) == (1 if name == "absent" else download.ATTEMPTS)


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("whole", {"max_bytes": 100}, "larger than 100 bytes"),
        ("endless", {"max_bytes": 10**6}, r"larger than 1,000,000 bytes, the limit \(`max_bytes`\)"),
        ("huge", {}, "larger than .* bytes"),
        ("slow", {"max_seconds": 0.5}, r"longer than 0.5 seconds, the limit \(`max_seconds`\)"),
        ("slow_header", {"max_seconds": 0.5}, r"longer than 0.5 seconds, the limit \(`max_seconds`\)"),
        ("slow_chunk", {"max_seconds": 0.5}, r"longer than 0.5 seconds, the limit \(`max_seconds`\)"),
        ("stalled", {"timeout": 0.2, "max_seconds": 1}, "timed out|longer than 1 seconds"),
        ("whole", {"allow_private": False}, "an address that is not public"),
        ("whole", {"allowed_hosts": frozenset({"example.org"})}, "'127.0.0.1' is not among the allowed"),
    ],
)
def test_limits_of_downloads(processor, server, name, limits, message):
    processor.video_processor.source_limits = SourceLimits(**limits)
    start = time.monotonic()
    for read in (lambda url: processor(videos=[url]), lambda url: next(processor.iter_video_segments(url))):
        with pytest.raises(ValueError, match=f"Could not read .*{name}' as a video: .*({message})"):
            read(f"{server.url}/{name}")
    assert time.monotonic() - start < 8
    assert "source_limits" not in processor.video_processor.to_dict()


def test_size_of_a_file(processor, write_video):
    processor.video_processor.source_limits = SourceLimits(max_bytes=1000)
    path = write_video()
    for read in (lambda: processor(videos=[path]), lambda: next(processor.iter_video_segments(path))):
        with pytest.raises(ValueError, match=r"larger than 1,000 bytes, the limit \(`max_bytes`\)"):
            read()


def test_size_of_a_data_url_is_that_of_its_content(processor, write_video):
    content = Path(write_video()).read_bytes()
    processor.video_processor.source_limits = SourceLimits(max_bytes=len(content) - 1)
    with pytest.raises(ValueError, match=r"larger than .* bytes, the limit \(`max_bytes`\)"):
        processor(videos=[data_url(content)])
    processor.video_processor.source_limits = SourceLimits(max_bytes=len(content))
    quoted = "data:video/mp4," + "".join(f"%{byte:02x}" for byte in content)
    outputs = [processor(videos=[url], num_frames=4) for url in (data_url(content), quoted)]
    assert torch.equal(outputs[0]["pixel_values_videos"], outputs[1]["pixel_values_videos"])


def test_a_folder_without_images(processor, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for read in (lambda path: processor(videos=[path]), processor.iter_video_segments):
        with pytest.raises(FileNotFoundError, match="It is a folder, and has no images"):
            read(str(tmp_path))


@pytest.mark.parametrize("scheme", ("http", "https"))
def test_a_private_address_is_not_even_connected_to(processor, scheme):
    """Nor is the address told, which would show the network behind this machine."""
    processor.video_processor.source_limits = SourceLimits(allow_private=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match="leads to an address that is not public") as caught:
            processor(videos=[f"{scheme}://localhost:{port}/video.mp4"])
        assert "127.0.0.1" not in str(caught.value)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_private_hosts_that_are_allowed(processor, server):
    """By name: the addresses of other hosts must still be public, whatever they redirect to."""
    processor.video_processor.source_limits = SourceLimits(allow_private=False, private_hosts=frozenset({"127.0.0.1"}))
    expected = read_both(processor, f"{server.url}/whole")
    assert torch.equal(expected, read_both(processor, server.path))
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    with pytest.raises(ValueError, match="leads to an address that is not public"):
        processor(videos=[f"{elsewhere}/whole"])
    server.location = f"{elsewhere}/whole"
    with pytest.raises(ValueError, match="leads to an address that is not public|redirected to another port"):
        processor(videos=[f"{server.url}/moved"])


def test_public_addresses():
    for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"):
        assert is_public(address), address
    private = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"]
    private += ["::1", "::", "::127.0.0.1", "fe80::1%eth0", "fd00::1", "ff02::1", "2002:a00:1::", "64:ff9b:1::1"]
    private += [f"{prefix}{ip}" for prefix in ("::ffff:", "64:ff9b::") for ip in ("127.0.0.1", "10.1.2.3")]
    for address in private:
        assert not is_public(address), address


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://127.0.0.1/video.mp4", "only http and https are followed"),
        ("file:///etc/passwd", "is not allowed"),
        ("http://127.0.0.1:1/video.mp4", "redirected to another port"),
        ("/whole", None),
    ],
)
def test_redirects(processor, server, location, message):
    server.location = location
    if message is None:
        assert torch.equal(read_both(processor, f"{server.url}/moved"), read_both(processor, server.path))
        return
    with pytest.raises(ValueError, match=message):
        processor(videos=[f"{server.url}/moved"])


def test_local_files_can_be_refused(processor, video_file, tmp_path):
    processor.video_processor.source_limits = SourceLimits(allow_local=False)
    image = tmp_path / "0.png"
    Image.fromarray(pictures(1)[0]).save(image)
    for video in (video_file, Path(video_file).as_uri(), [[[str(image)]]], str(tmp_path)):
        with pytest.raises(ValueError, match="files of this machine may not be opened here"):
            processor(videos=video)
    assert len(processor(videos=[Path(video_file).read_bytes()])["pixel_values_videos"])


def test_a_media_root(processor, video_file, tmp_path):
    """Paths are relative to it, and nothing is told of what is outside."""
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "video.mp4").write_bytes(Path(video_file).read_bytes())
    (tmp_path / "secret.mp4").write_bytes(Path(video_file).read_bytes())
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    os.mkfifo(root / "pipe.mp4")
    expected = read_both(processor, video_file)
    processor.video_processor.source_limits = SourceLimits(media_root=str(root))
    inside = root / "inner" / "video.mp4"
    for name in ("inner/video.mp4", "inner/../inner/video.mp4", str(inside), inside.as_uri()):
        assert torch.equal(read_both(processor, name), expected)
    refused = ["../secret.mp4", "../missing.mp4", "missing.mp4", "link.mp4", "pipe.mp4", "inner", video_file, "/etc"]
    for name in [*refused, (tmp_path / "secret.mp4").as_uri(), "nothing\0.mp4"]:
        for read in (lambda name: processor(videos=[name]), lambda name: next(processor.iter_video_segments(name))):
            with pytest.raises(FileNotFoundError) as caught:
                read(name)
            assert str(caught.value) == f"Expected the path or the file, http or https URL of a video, got {name!r}."


def test_size_of_a_data_url(processor, video_file):
    content = Path(video_file).read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    processor.video_processor.source_limits = SourceLimits(max_bytes=len(content))
    processor(videos=[url])
    processor.video_processor.source_limits = SourceLimits(max_bytes=len(content) - 1)
    with pytest.raises(ValueError, match=r"larger than .* bytes, the limit \(`max_bytes`\)"):
        processor(videos=[url])


@pytest.mark.parametrize("name", ["a#b.mp4", "a?b.mp4", "a%20b.mp4", "a b.mp4", "ü.mp4", "100%.mp4"])
def test_file_urls(processor, video_file, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(Path(video_file).read_bytes())
    expected = read_both(processor, video_file)
    for url in (path.as_uri(), f"file://{path}", f"file://localhost{path}"):
        assert torch.equal(read_both(processor, url), expected)
        assert local_path(url) == str(path)


def test_file_url_of_another_host(processor, video_file):
    with pytest.raises(FileNotFoundError, match="The file of another host, 'elsewhere', cannot be opened"):
        processor(videos=[f"file://elsewhere{video_file}"])


def data_url(content, header="data:video/mp4;base64"):
    return f"{header},{base64.b64encode(content).decode()}"


def test_forms_of_an_encoded_file(processor, video_file):
    content = Path(video_file).read_bytes()
    expected = read_both(processor, video_file)
    forms = {
        "bytes": lambda: content,
        "bytearray": lambda: bytearray(content),
        "memoryview": lambda: memoryview(content),
        "BytesIO": lambda: io.BytesIO(content),
        "open file": lambda: open(video_file, "rb"),
        "unseekable": lambda: io.BufferedReader(Unseekable(content)),
        "data URL": lambda: data_url(content),
        "mapping of bytes": lambda: {"bytes": content, "path": "movie.mp4"},
        "mapping of a path": lambda: {"bytes": None, "path": video_file},
        "decoder of datasets": lambda: SimpleNamespace(
            get_frames_at=None, _hf_encoded={"bytes": content, "path": None}
        ),
    }
    for form, video in forms.items():
        assert torch.equal(read_both(processor, video), expected), form
    content_twice = processor(videos=[content, content], return_tensors="pt")
    assert content_twice["video_grid_thw"].tolist() == [[4, 4, 6]] * 2


class Unseekable(io.RawIOBase):
    def __init__(self, content):
        self.source = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.source.readinto(buffer)


def test_pipes_with_the_index_at_the_end(processor, video_file, tmp_path):
    content, expected = Path(video_file).read_bytes(), read_both(processor, video_file, num_frames=6)

    def opened_pipe():
        read, write = os.pipe()
        threading.Thread(target=lambda: (os.write(write, content), os.close(write))).start()
        return os.fdopen(read, "rb")

    assert torch.equal(read_both(processor, opened_pipe, num_frames=6), expected)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def named_pipe():
        threading.Thread(target=lambda: pipe.write_bytes(content)).start()
        return pipe

    assert torch.equal(read_both(processor, named_pipe, num_frames=6), expected)


def test_pipe_limits(processor, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_vamba.video.sources.WRITER_TIMEOUT", 0.2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileNotFoundError, match="pipe'. No program writes to this pipe"):
        processor(videos=[str(pipe)])
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, b"begun")
    processor.video_processor.source_limits = SourceLimits(timeout=0.2)
    with pytest.raises(ValueError, match="no byte came in 0.2 seconds"):
        processor(videos=[str(pipe)])
    os.close(writer)


class FakeDecoder:
    """What torchcodec's `VideoDecoder` has."""

    def __init__(self, frames, channels_first=True):
        data = torch.from_numpy(np.stack(frames))
        self.frames = data.permute(0, 3, 1, 2) if channels_first else data
        self.metadata = SimpleNamespace(num_frames=len(data), average_fps=8.0)

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        assert all(isinstance(index, int) for index in indices)
        return SimpleNamespace(data=self.frames[indices], pts_seconds=None)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("sampling", [{"num_frames": 6}, {"fps": 2.0}, {"do_sample_frames": False}])
def test_decoder_of_another_package(processor, channels_first, sampling):
    frames = pictures(24, 56, 84)
    metadata = [{"total_num_frames": 24, "fps": 8.0}]
    expected = read_both(processor, np.stack(frames), video_metadata=metadata, **sampling)
    assert torch.equal(read_both(processor, FakeDecoder(frames, channels_first), **sampling), expected)


def test_folder_of_frames(processor, tmp_path):
    frames = pictures(12, 56, 84)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")  # frame10 comes after frame9
    (tmp_path / "notes.txt").write_text("no image")
    expected = read_both(processor, np.stack(frames))
    assert torch.equal(read_both(processor, str(tmp_path)), expected)
    assert torch.equal(read_both(processor, tmp_path), expected)
    conversation = [{"role": "user", "content": [{"type": "video", "video": tmp_path}]}]
    outputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", num_frames=8
    )
    assert torch.equal(outputs["pixel_values_videos"], expected)
    Image.fromarray(frames[0][:28]).save(tmp_path / "frame5.png")
    with pytest.raises(ValueError, match=r"must have one shape, got \(28, 84, 3\) after \(56, 84, 3\)"):
        processor(videos=[str(tmp_path)], num_frames=12)


def test_layouts_of_arrays(processor):
    frames = np.stack(pictures(8, 56, 84))
    expected = read_both(processor, frames)
    alpha = np.concatenate([frames, np.full((8, 56, 84, 1), 255, np.uint8)], axis=-1)
    for video in (alpha, alpha.transpose(0, 3, 1, 2), list(alpha), torch.from_numpy(alpha)):
        assert torch.equal(read_both(processor, video), expected)
    assert torch.equal(read_both(processor, [Image.fromarray(frame) for frame in alpha]), expected)
    grey = frames[..., 0]
    expected = read_both(processor, grey[..., None].repeat(3, axis=-1))
    for video in (grey, grey[..., None], grey[:, None], list(grey), torch.from_numpy(grey)):
        assert torch.equal(read_both(processor, video), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_levels_of_floats(processor, dtype):
    frames = np.stack(pictures(8, 56, 84))
    expected = read_both(processor, frames)
    ones = (frames / 255).astype(dtype)
    assert torch.equal(read_both(processor, ones), expected)
    assert torch.equal(read_both(processor, torch.from_numpy(ones).permute(0, 3, 1, 2)), expected)
    hundreds = frames.astype(np.float32)
    torch.testing.assert_close(read_both(processor, hundreds), expected, atol=0.03, rtol=0)
    normalized = (ones - dtype(0.5)) / dtype(0.25)
    with pytest.raises(ValueError, match="Frames must have levels between 0 and 255, .* Pass `do_rescale=False`"):
        processor(videos=[normalized])
    assert len(processor(videos=[normalized], do_rescale=False, do_normalize=False)["pixel_values_videos"])
    with pytest.raises(ValueError, match="got uint16 from 0 to 65535"):
        processor(videos=[np.linspace(0, 65535, 4 * 28 * 28 * 3).reshape(4, 28, 28, 3).astype(np.uint16)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fps", "num_frames", "max_frames"])
def test_numbers_that_are_none(processor, video_file, name, value):
    message = f"`{name}` must be a positive number, got {value}"
    for read in (processor.video_processor, processor.iter_video_segments):
        with pytest.raises(ValueError, match=message):
            read(video_file, **{name: value})
    if name == "fps":
        with pytest.raises(ValueError, match=message):
            processor(videos=[video_file], fps=value)


def test_errors_name_a_source_shortly(processor, tmp_path, video_file):
    for video in (data_url(bytes(10**6)), "data:video/mp4;base64,AAA", bytes(10**6), "x" * 10**5):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            processor(videos=[video])
        assert len(str(error.value)) < 600
    assert describe_source(data_url(bytes(300))) == "'data:video/mp4;base64,...' (422 characters)"
    with open(video_file, encoding="latin-1") as file, pytest.raises(ValueError, match="open as text.*mode 'rb'"):
        processor(videos=[file])
    with pytest.raises(ValueError, match="needs its `bytes` or its `path`"):
        processor(videos=[{"bytes": None, "path": None}])


@pytest.mark.parametrize("live", [True, False])
def test_interrupt_while_a_source_has_stalled(processor, write_video, live):
    content = Path(write_video("stalled.mkv", num_frames=50)).read_bytes()
    read, write = os.pipe()
    os.write(write, content[: len(content) * 3 // 4])
    interrupted = []

    def interrupt():
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with os.fdopen(read, "rb") as source:
        threading.Timer(1, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            list(processor.iter_video_segments(source, live=live, fps=8.0, segment_frames=4))
        assert time.monotonic() - interrupted[0] < 2
        os.close(write)  # the source goes on, and so does the thread that reads it: to its end
        for thread in [thread for thread in threading.enumerate() if thread.name == "video-segments"]:
            thread.join(5)
            assert not thread.is_alive()


MEMORY = """
import resource, sys
import numpy as np
from transformers_vamba import VambaVideoProcessor
from transformers_vamba.video.segments import iter_video_segments

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, name = sys.argv[1:]
processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 112}, num_frames=60)
read = {"whole": processor, "segments": lambda path: list(iter_video_segments(processor, path))}[name]
read(small)
before = peak()
read(large)
print(peak() - before)
"""


def test_large_frames_are_shrunk_as_they_are_decoded(tmp_path):
    """Sixty frames take 605 MB as they are decoded, and a megabyte as patches."""
    small, large = (
        write_file(tmp_path / f"{size}.mkv", [np.zeros((size, 2 * size, 3), np.uint8)] * 60, "mpeg4")
        for size in (64, 1296)
    )
    for name in ("whole", "segments"):
        command = [sys.executable, "-c", MEMORY, small, large, name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        assert int(result.stdout) < 300e6, name


def test_memory_error_names_the_file(video_processor, video_file, monkeypatch):
    def full(frame):
        raise MemoryError("1 GiB for a frame")

    monkeypatch.setattr(type(video_processor), "frame_transform", lambda self, frames, kwargs: full)
    with pytest.raises(ValueError, match="video.mp4' as a video: its frames do not fit in memory .1 GiB for a frame"):
        video_processor(video_file)
