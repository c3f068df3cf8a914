# SPDX-License-Identifier: Apache-2.0
"""The page to ask a video on, in a browser without a screen. With pictures of each step for the documentation:

VAMBA_SCREENSHOTS=docs/images python -m pytest tests/examples/test_app_in_browser.py
"""

import os
import shutil
import threading
from io import BytesIO
from pathlib import Path

import pytest
from ask_video import TINY_MODEL, load
from PIL import Image
from synthetic_videos import sample_video, write_mp4

from transformers_vamba.video.download import SourceLimits


pytest.importorskip("gradio", reason="the page needs Gradio: pip install -c constraints.txt '.[page]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("no Chromium: apt-get install chromium chromium-driver", allow_module_level=True)

import app  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


DEADLINE = 60  # seconds
VIDEO = "#video input[type=file]"


class Gate:
    """Holds a model before it encodes the segment of this number, until it is opened."""

    def __init__(self, encode_video, number):
        self.encode_video, self.number, self.opened = encode_video, number, threading.Event()

    def __call__(self, **segment):
        self.number -= 1
        if self.number == -1:
            assert self.opened.wait(DEADLINE)
        return self.encode_video(**segment)


@pytest.fixture
def page():
    model, processor = load(TINY_MODEL, "cpu")
    options = {"num_frames": None, "fps": None, "segment_frames": 8, "video_cache": None}
    return app.Page(model, processor, options, 2**30, SourceLimits(max_bytes=2**24, timeout=5, allow_private=False))


@pytest.fixture
def url(page, tmp_path):
    """Where the page is."""
    examples = list(app.write_examples(tmp_path))
    blocks = app.build(page, app.describe_model(TINY_MODEL, page.model), examples)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, theme=app.make_theme(), max_file_size=2**24)
    try:
        yield url
    finally:
        blocks.close(verbose=False)


class Visitor:
    """What somebody does and sees on the page, each in a browser of their own, which finds no host but this one."""

    def __init__(self, url):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1200,1450",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.browser.get(url)
        self.see(VIDEO)

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def see(self, selector, *texts):
        """Waits for an element with all of these texts, and returns its text."""

        def look():
            for element in self.find(selector):
                text = element.text
                if all(expected in text for expected in texts):
                    return [text]
            return None

        return self.wait(look, f"no {selector} with {texts}")[0]

    def wait(self, look, problem):
        wait = WebDriverWait(self.browser, DEADLINE, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: look(), problem)

    def drop(self, path):
        for button in self.find("#video button[aria-label='Clear']"):
            button.click()
        self.see(VIDEO)
        self.find(VIDEO)[0].send_keys(str(path))

    def write(self, place, text):
        (box,) = self.find(f"#{place} textarea, #{place} input")
        box.clear()
        box.send_keys(text)

    def ask(self, text):
        self.write("question", text)
        self.click("ask")

    def click(self, button):
        self.find(f"#{button}")[0].click()


@pytest.fixture
def visit(url):
    visitors = []

    def visit():
        visitors.append(Visitor(url))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.browser.quit()


@pytest.fixture
def keep_picture(tmp_path):
    """Keeps what a visitor sees as a small PNG, for the documentation if that is asked for."""
    folder = Path(os.environ.get("VAMBA_SCREENSHOTS", tmp_path))

    def keep(visitor, name):
        picture = Image.open(BytesIO(visitor.browser.get_screenshot_as_png())).convert("RGB")
        picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # colours matter here
        picture.save(folder / f"page_{name}.png", optimize=True)
        assert picture.size[0] > 1000 and (folder / f"page_{name}.png").stat().st_size < 150_000

    return keep


def test_a_visit(page, visit, keep_picture, tmp_path, monkeypatch):
    """A question too early, a file with its progress, two questions, a broken file."""
    write_mp4(tmp_path / "sequence.mp4", sample_video(8, 32, "sequence"))
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "sequence.mp4").read_bytes()[:6000])
    visitor = visit()
    visitor.see("#report", "No video yet.")
    visitor.ask("What came first?")
    visitor.see("#chat", "Give me a video first")
    keep_picture(visitor, "start")

    gate = Gate(page.model.encode_video, 2)
    monkeypatch.setattr(page.model, "encode_video", gate)
    visitor.drop(tmp_path / "sequence.mp4")
    visitor.see("#report", "sequence.mp4. Forecast", "256 video tokens", "16 of 32 frames")
    (bar,) = visitor.find("#report progress")
    assert (bar.get_attribute("value"), bar.get_attribute("max")) == ("16", "32")
    visitor.ask("What came first?")
    visitor.see("#chat", "not seen the whole video")
    keep_picture(visitor, "progress")
    gate.opened.set()
    visitor.see("#report", "32 frames in", "Ask.")

    visitor.ask("What came first?")
    visitor.see("#chat", "a green triangle", "Seen at 0:05.0 to 0:06.0")
    visitor.see("#chat img")
    keep_picture(visitor, "answer")
    visitor.ask("List the colors in the order in which they appeared.")
    visitor.see("#chat", "a green triangle", "green, then purple, then orange")
    visitor.wait(lambda: len(visitor.find("#chat img")) == 2, "no second picture")
    assert gate.number == -2  # four segments, and none again
    keep_picture(visitor, "second_answer")

    visitor.drop(tmp_path / "broken.mp4")
    problem = visitor.see("#report", "That did not work.", "'broken.mp4'", "damaged or missing")
    assert str(tmp_path) not in problem and "gradio" not in problem and "Traceback" not in problem
    keep_picture(visitor, "broken_file")
    errors = [entry for entry in visitor.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def test_two_visitors_and_examples(page, monkeypatch, visit):
    """Each has a video of their own, and an example brings its question. Who is gone is forgotten."""
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # after a second, not after an hour
    first, second = visit(), visit()
    for visitor, row in ((first, 0), (second, 1)):
        visitor.see("#examples tbody tr")
        visitor.find("#examples tbody tr")[row].click()
    for visitor in (first, second):
        visitor.see("#report", "Ask.")
        visitor.click("ask")
    assert "left" not in first.see("#chat", "green, then purple, then orange", "Seen at")
    assert "purple" not in second.see("#chat", "left", "Seen at")
    second.browser.close()
    first.wait(lambda: len(page.shelf.videos) == 1, "the video of a visitor who is gone is kept")
    first.ask("What came first?")
    first.see("#chat", "a green triangle")


def test_who_leaves_early(page, monkeypatch, visit, tmp_path):
    """What nobody waits for is not encoded to its end."""
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")
    write_mp4(tmp_path / "long.mp4", sample_video(4, 120, "sequence"))
    gate = Gate(page.model.encode_video, 2)
    monkeypatch.setattr(page.model, "encode_video", gate)
    visitor, other = visit(), visit()
    visitor.drop(tmp_path / "long.mp4")
    visitor.see("#report", "16 of 120 frames")
    visitor.browser.close()
    other.wait(lambda: not page.shelf.videos, "the video of a visitor who is gone is kept")
    gate.opened.set()
    for _ in range(app.VIDEOS_AT_ONCE):
        assert page.turns.acquire(timeout=DEADLINE)
    assert gate.number == -1  # three segments of fifteen


def test_links(page, visit, serving, tmp_path):
    """They stay outside of private networks, unless that is allowed. The same link can be fetched again."""
    write_mp4(tmp_path / "sequence.mp4", sample_video(8, 32, "sequence"))
    visitor = visit()
    with serving(tmp_path) as host:
        visitor.write("link", f"{host}/sequence.mp4")
        visitor.click("fetch")
        visitor.see("#report", "That did not work.", "an address that is not public")
        page.limits = SourceLimits(timeout=5)
        for name in ("link_2.mp4", "link_3.mp4"):
            visitor.click("fetch")
            visitor.see("#report", name, "Ask.")
