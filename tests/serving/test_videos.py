# SPDX-License-Identifier: Apache-2.0
"""Videos are encoded once, kept within a budget, and given up when nobody waits for them."""

import http.server
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest
from asking import QUESTION, answer, ask, image, num_cached, text, video
from synthetic_videos import sample_video, write_mp4

from transformers_vamba.serving import media as media_module
from transformers_vamba.serving.index import VideoFolder, VideoMemory, count_bytes


VIDEO_BYTES = 2**19  # more than a processed video of 16 frames takes, and less than two


def wait_until(condition, what: str):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def decoded(monkeypatch):
    """What was decoded, by name."""
    names, read = [], media_module.MediaReader.read

    def counted(self, medium):
        names.append(medium.named.source)
        return read(self, medium)

    monkeypatch.setattr(media_module.MediaReader, "read", counted)
    return names


def test_the_second_question_decodes_and_encodes_nothing(start, media_root, decoded):
    with start(media_root=media_root) as server:
        first = ask(server, video("movement.mp4"), text("What is there?"))
        assert (len(decoded), len(server.encoded)) == (1, 1)
        second = ask(server, video("movement.mp4"), text(QUESTION.text))
        assert (len(decoded), len(server.encoded)) == (1, 1)
        assert answer(second) == QUESTION.answer
        assert num_cached(first) == 0 and num_cached(second) == 8 * 16
        # In another way it is another one, and so is another content under the same name.
        ask(server, video("movement.mp4", num_frames=4), text("What?"), max_tokens=1)
        assert len(server.encoded) == 2


def test_a_file_that_was_replaced_is_another_one(start, media_root, tmp_path):
    path = tmp_path / "video.mp4"
    shutil.copy(media_root / "sequence.mp4", path)
    with start(media_root=tmp_path) as server:
        ask(server, video("video.mp4"), text(QUESTION.text))
        shutil.copy(media_root / "movement.mp4", path)
        assert answer(ask(server, video("video.mp4"), text(QUESTION.text))) == QUESTION.answer
        assert len(server.encoded) == 2


def test_a_file_that_is_written_to_while_it_is_read(start, media_root, tmp_path, monkeypatch):
    """It is not kept as what it was before, whose content may come under another name."""
    path = tmp_path / "video.mp4"
    shutil.copy(media_root / "sequence.mp4", path)
    image_path = tmp_path / "image.bmp"
    PIL.Image.new("RGB", (56, 56), "red").save(image_path)
    read = media_module.MediaReader.read

    def late(self, medium):
        """After somebody else has copied another file over it, in place."""
        if not kept.is_set():
            shutil.copy(media_root / "movement.mp4", path)
            PIL.Image.new("RGB", (56, 56), "blue").save(image_path)
        return read(self, medium)

    monkeypatch.setattr(media_module.MediaReader, "read", late)
    with start(media_root=tmp_path) as server:
        for part in (video("video.mp4"), image("image.bmp")):
            kept = threading.Event()
            with pytest.raises(Exception, match="has changed while it was read. Ask again."):
                ask(server, part, text(QUESTION.text))
            kept.set()
            assert not server.handler.videos.memory._caches
        assert answer(ask(server, video("video.mp4"), text(QUESTION.text))) == QUESTION.answer


def test_two_requests_at_once_encode_once(start, media_root, decoded):
    with start(media_root=media_root) as server, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, server, video("movement.mp4"), text(QUESTION.text)) for _ in range(8)]
        assert {answer(each.result()) for each in asked} == {QUESTION.answer}
        assert (len(decoded), len(server.encoded)) == (1, 1)
        # A failure is told to all, and is not kept.
        asked = [threads.submit(ask, server, video("nothing.mp4"), text("What?")) for _ in range(3)]
        assert all("there is no file 'nothing.mp4'" in str(each.exception()) for each in asked)
        shutil.copy(media_root / "movement.mp4", media_root / "nothing.mp4")
        assert answer(ask(server, video("nothing.mp4"), text(QUESTION.text))) == QUESTION.answer


def test_the_least_recently_used_goes_first(start, media_root, tmp_path):
    for seed in range(3):
        write_mp4(tmp_path / f"{seed}.mp4", sample_video(seed, 16, "sequence"))
    with start(media_root=tmp_path, video_memory_gib=2 * VIDEO_BYTES / 2**30) as server:

        def encodes(name: str) -> bool:
            before = len(server.encoded)
            cached = num_cached(ask(server, video(name), text("What?"), max_tokens=1))
            assert (cached == 0) == (len(server.encoded) == before + 1)
            return cached == 0

        assert encodes("0.mp4") and encodes("1.mp4")
        assert not encodes("0.mp4")
        assert encodes("2.mp4")  # in the place of 1, which was not used for longest
        assert not encodes("0.mp4") and not encodes("2.mp4")
        assert encodes("1.mp4")


def test_a_video_that_takes_more_than_the_budget_is_refused_before_it_is_encoded(start, media_root):
    with start(media_root=media_root, video_memory_gib=0.001) as server:
        write_mp4(media_root / "long.mp4", sample_video(1, 128, "sequence"))
        with pytest.raises(Exception, match="'long.mp4' is too long: it takes 2 MiB .* server has 1 MiB for that"):
            ask(server, video("long.mp4"), text("What?"))
        assert not server.encoded
        assert answer(ask(server, video("movement.mp4"), text(QUESTION.text))) == QUESTION.answer


def test_a_folder_outlives_the_server(start, media_root, tmp_path, decoded):
    folder = tmp_path / "videos"
    (tmp_path / "videos" / "of-others").mkdir(parents=True)
    options = {"media_root": media_root, "video_folder": folder}
    with start(**options) as server:
        ask(server, video("movement.mp4"), text("What?"), max_tokens=1)
        wait_until(lambda: any((each / "layer-00003.safetensors").exists() for each in folder.iterdir()), "saved")
    (saved,) = [each for each in folder.iterdir() if each.name != "of-others"]
    decoded.clear()
    with start(**options) as server:
        completion = ask(server, video("movement.mp4"), text(QUESTION.text))
        assert answer(completion) == QUESTION.answer and num_cached(completion) == 8 * 16
        assert not decoded and not server.encoded
    # What a save that was interrupted has left is encoded again.
    (saved / "layer-00002.safetensors").write_bytes(b"damaged")
    with start(**options) as server:
        completion = ask(server, video("movement.mp4"), text(QUESTION.text))
        assert answer(completion) == QUESTION.answer and num_cached(completion) == 0
        assert len(server.encoded) == 1


def test_a_video_of_the_folder_that_takes_more_than_the_memory(start, media_root, tmp_path):
    """Whoever kept it had more of it."""
    folder, options = tmp_path / "videos", {"media_root": media_root, "video_folder": tmp_path / "videos"}
    write_mp4(media_root / "large.mp4", sample_video(1, 128, "sequence"))
    with start(**options) as server:
        ask(server, video("large.mp4"), text("What?"), max_tokens=1)
        wait_until(lambda: any(folder.rglob("steps.safetensors")), "saved")
    with start(**options, video_memory_gib=0.001) as server:
        with pytest.raises(Exception, match="400 .*'large.mp4' is too long: it takes 2 MiB .* server has 1 MiB"):
            ask(server, video("large.mp4"), text("What?"))


def test_what_an_interrupted_save_has_left_counts(server, media_root, tmp_path):
    ask(server, video("movement.mp4"), text("What?"), max_tokens=1)
    cache = next(iter(server.handler.videos.memory._caches.values()))
    folder = VideoFolder(tmp_path, max_bytes=2 * VIDEO_BYTES)
    (tmp_path / ("a" * 64) / ".saving-1").mkdir(parents=True)
    (tmp_path / ("a" * 64) / ".saving-1" / "layer-00000.safetensors").write_bytes(bytes(2 * VIDEO_BYTES))
    folder.save("b" * 64, cache)
    assert [each.name for each in tmp_path.iterdir()] == ["b" * 64]


def test_a_folder_stays_within_its_size(server, media_root, tmp_path):
    ask(server, video("movement.mp4"), text("What?"), max_tokens=1)
    cache = next(iter(server.handler.videos.memory._caches.values()))
    folder = VideoFolder(tmp_path, max_bytes=2 * VIDEO_BYTES)
    (tmp_path / "of-others").mkdir()
    keys = [character * 64 for character in "abc"]
    for key in keys[:2]:
        folder.save(key, cache)
    assert folder.load(keys[0], cache.videos[0][0].keys.device).video_lengths == cache.video_lengths
    folder.save(keys[2], cache)
    assert {each.name for each in tmp_path.iterdir()} == {keys[0], keys[2], "of-others"}
    assert keys[0] in folder and keys[1] not in folder


def test_what_is_being_encoded_counts(server, media_root):
    """A second video waits until the first one is encoded if there is no room for both."""
    ask(server, video("movement.mp4"), text("What?"), max_tokens=1)
    cache = next(iter(server.handler.videos.memory._caches.values()))
    size = count_bytes(cache)
    memory = VideoMemory(3 * size)
    memory.put("old", cache)
    memory.reserve("first", 2 * size)
    assert "old" in memory
    waiting = threading.Thread(target=memory.reserve, args=("second", 2 * size))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and "old" in memory
    memory.put("first", cache)
    waiting.join(30)
    assert not waiting.is_alive()
    assert "old" not in memory and "first" in memory
    memory.release("second")
    with pytest.raises(ValueError, match="--video-memory-gib"):
        memory.reserve("third", 3 * size + 1)


def post_and_leave(server, body: dict):
    """A connection with a request on it, to be closed without waiting for the answer."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", (False, True))
def test_an_answer_that_nobody_waits_for_ends(server, monkeypatch, stream):
    """The client leaves in the middle of 4,000 tokens."""
    questions, ask_question = [], server.handler.answering.ask
    monkeypatch.setattr(server.handler.answering, "ask", lambda each: (questions.append(each), ask_question(each)))
    done = threading.Event()
    generate = server.handler.model.generate

    def watched(*args, **kwargs):
        try:
            return generate(*args, **kwargs)
        finally:
            done.set()

    monkeypatch.setattr(server.handler.model, "generate", watched)
    body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 4000, "stream": stream}
    eos = server.handler.model.generation_config.eos_token_id
    connection = post_and_leave(server, body | {"logit_bias": {str(eos): -100}})
    wait_until(lambda: questions and questions[0].num_tokens > 3, "the answer begins")
    connection.close()
    assert done.wait(30)
    assert questions[0].is_cancelled and questions[0].num_tokens < 4000


def test_a_video_that_nobody_waits_for_is_given_up(start, media_root, monkeypatch):
    """After the segment that is being encoded. While somebody waits it goes on."""
    write_mp4(media_root / "longer.mp4", sample_video(1, 512, "sequence"))
    with start(media_root=media_root) as server:
        begun, go_on = threading.Event(), threading.Event()
        encode_video = server.handler.model.encode_video

        def held(**inputs):
            begun.set()
            assert go_on.wait(30)
            return encode_video(**inputs)

        monkeypatch.setattr(server.handler.model, "encode_video", held)
        content = [video("longer.mp4", num_frames=512), text("What?")]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        connections = [post_and_leave(server, body) for _ in range(2)]
        assert begun.wait(30)
        (encoding,) = server.handler.videos._encodings.values()
        wait_until(lambda: encoding.num_waiting == 2, "both wait")
        connections[0].close()
        wait_until(lambda: encoding.num_waiting == 1, "one has left")
        assert not encoding.stop.is_set()
        connections[1].close()
        wait_until(encoding.stop.is_set, "both have left")
        go_on.set()
        wait_until(encoding.task.done, "it ends")
        assert len(server.encoded) < 8 and not server.handler.videos._encodings
        assert answer(ask(server, video("movement.mp4"), text(QUESTION.text))) == QUESTION.answer


class VersionedFile(http.server.BaseHTTPRequestHandler):
    """`server.content` under the ETag `server.version`; `server.statuses` are those of the answers."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        is_known = self.headers.get("If-None-Match") == self.server.version
        content = b"" if is_known else self.server.content
        self.server.statuses.append(304 if is_known else 200)
        self.send_response(self.server.statuses[-1])
        self.send_header("ETag", self.server.version)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_a_url_is_downloaded_again_only_if_it_has_changed(start, media_root, decoded):
    with (
        start(allowed_hosts="127.0.0.1") as server,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), VersionedFile) as files,
    ):
        threading.Thread(target=files.serve_forever, daemon=True).start()
        files.statuses, files.version = [], '"1"'
        files.content = (media_root / "sequence.mp4").read_bytes()
        part = video(f"http://127.0.0.1:{files.server_port}/video.mp4")
        first = [answer(ask(server, part, text(QUESTION.text))) for _ in range(2)]
        assert files.statuses == [200, 304] and len(decoded) == 1 and first[0] == first[1]
        # What was forgotten in between is downloaded again.
        server.handler.videos.memory._caches.clear()
        server.handler.videos.memory._sizes.clear()
        assert answer(ask(server, part, text(QUESTION.text))) == first[0]
        assert files.statuses[2:] == [304, 200]
        files.version, files.content = '"2"', (media_root / "movement.mp4").read_bytes()
        assert answer(ask(server, part, text(QUESTION.text))) == QUESTION.answer
        assert set(files.statuses[4:]) == {200}
        assert answer(ask(server, part, text(QUESTION.text))) == QUESTION.answer
        assert files.statuses[-1] == 304
        files.shutdown()


def test_the_frames_that_a_server_takes(start, media_root):
    """What a request says, else what the server was started with, else what the checkpoint says."""
    with start(media_root=media_root, chat_template_kwargs='{"num_frames": 4}') as server:

        def num_tokens(options=None, **request) -> int:
            completion = ask(server, video("movement.mp4", **(options or {})), text("What?"), max_tokens=1, **request)
            return completion.usage.prompt_tokens

        servers = num_tokens()
        num_frames = {"num_frames": 8}
        assert num_tokens(num_frames) == servers + 2 * 16
        assert num_tokens(extra_body={"chat_template_kwargs": num_frames}) == servers + 2 * 16
        assert num_tokens(num_frames, extra_body={"chat_template_kwargs": {"fps": 1}}) == servers + 2 * 16
        assert num_tokens({"fps": 2}) == servers + 6 * 16
        assert len(server.encoded) == 3
