# SPDX-License-Identifier: Apache-2.0
"""A page to ask a video on: drop a file or give a link, and ask as often as you like. The video is encoded once.

    python examples/app.py --model PATH_OR_NAME

Several visitors at once have a video each. What the page keeps of them is bounded by `--cache-gib`: whoever asked
longest ago has to give the video again. Links are fetched from public addresses alone. Docs: docs/page.md.
"""

import argparse
import html
import json
import logging
import math
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import gradio as gr
import torch
from ask_video import TINY_MODEL, VIDEO_CACHES, WEIGHT_BITS, check_sampling, forecast, free_memory, load
from find_moment import answer_with_reading, clock, draw, frames_of, strongest_moments
from synthetic_videos import sample_video, write_mp4
from transformers import TextIteratorStreamer

from transformers_vamba import VambaCache, VambaProcessor
from transformers_vamba.video.download import SourceLimits, download
from transformers_vamba.video.sources import errors_of, is_remote


LONGEST_QUESTION = 2000  # characters
MOST_MESSAGES = 60  # that are shown of a conversation
MOST_MOMENTS = 6
VIDEOS_AT_ONCE, ANSWERS_AT_ONCE, VISITORS_AT_ONCE = 2, 4, 16  # others wait
EXAMPLES = (  # a story, its seed, its number of frames, and which of its questions to show
    ("sequence", 8, 32, 0),
    ("movement", 1, 32, 2),
    ("start_end", 3, 32, 1),
    ("sequence", 4, 120, 0),
)


@dataclass(eq=False)
class WatchedVideo:
    """A video of one visitor: its file, and what the model keeps of it, from its end until others need room."""

    path: str
    cache: VambaCache | None = None
    num_bytes: int = 0
    was_dropped: bool = False
    pictures: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="vamba-"))

    @property
    def name(self):
        return os.path.basename(self.path)

    def without_folder(self, text):
        """A text without the folder of this machine that the file lies in."""
        return text.replace(os.path.join(os.path.dirname(self.path), ""), "")


@dataclass(eq=False)
class Session:
    """What the page knows of one visitor."""

    video: WatchedVideo | None = None
    messages: list = field(default_factory=list)
    fetched: TemporaryDirectory | None = None
    num_fetched: int = 0

    def say(self, role, *content):
        """Adds a message to the conversation, and returns it."""
        self.messages.append({"role": role, "content": list(content)})
        del self.messages[:-MOST_MESSAGES]
        return self.messages[-1]


class Shelf:
    """The videos of all visitors. Together they take at most `num_bytes`: who asked longest ago makes room."""

    def __init__(self, num_bytes):
        self.num_bytes, self.videos, self.lock = num_bytes, [], threading.Lock()

    def reserve(self, video, num_bytes):
        """Room for a video that is about to be encoded."""
        with self.lock:
            idle = [other for other in self.videos if other.cache is not None]
            missing = sum(other.num_bytes for other in self.videos) + num_bytes - self.num_bytes
            if missing > sum(other.num_bytes for other in idle):
                raise ValueError(
                    f"What is kept of this video would take {num_bytes / 2**30:.2f} GiB. This page has "
                    f"{self.num_bytes / 2**30:.2f} GiB for the videos of all visitors. Give a shorter video"
                    + (", or try again in a few minutes." if num_bytes <= self.num_bytes else ".")
                )
            while missing > 0:
                other = idle.pop(0)
                missing -= other.num_bytes
                self._remove(other)
                other.was_dropped = True
            video.num_bytes = num_bytes
            self.videos.append(video)

    def take(self, video):
        """What is kept of a video that is asked about; `None` if it is not encoded or had to make room."""
        with self.lock:
            if video in self.videos:
                self.videos.append(self.videos.pop(self.videos.index(video)))
            return video.cache

    def drop(self, video):
        with self.lock:
            if video in self.videos:
                self._remove(video)

    def _remove(self, video):
        self.videos.remove(video)
        video.cache = None


class Page:
    """
    What happens on the page. The model serves one visitor at a time: a segment of a video, or an answer.

    Args:
        options (`dict`): Which frames are sampled, and how the video is kept, as `ask_video.forecast` takes them.
        cache_bytes (`int`): What is kept of all videos together, at most.
        limits (`SourceLimits`): Of files and links.
    """

    def __init__(self, model, processor, options, cache_bytes, limits):
        self.model, self.processor, self.options, self.limits = model, processor, options, limits
        self.processor.video_processor.source_limits = limits
        self.shelf, self.lock = Shelf(cache_bytes), threading.Lock()
        self.turns, self.answers = threading.Semaphore(VIDEOS_AT_ONCE), ThreadPoolExecutor(ANSWERS_AT_ONCE)

    def fetch(self, url, session):
        """Brings the video that a link leads to. Yields the report, and the path for the video's place on the page."""
        url = url.strip()
        if not is_remote(url):
            yield report_problem("A link begins with http:// or https:// and leads to a file."), gr.skip()
            return
        yield report("Fetching the video.", progress=""), gr.skip()
        session.fetched, session.num_fetched = TemporaryDirectory(prefix="vamba-"), session.num_fetched + 1
        try:
            suffix = Path(urlsplit(url).path).suffix
            suffix = suffix if suffix[1:].isalnum() else ".mp4"
            # A name of its own: a video of the same name and content as before would not be watched again.
            path = Path(session.fetched.name) / f"link_{session.num_fetched}{suffix}"
            with errors_of(url), download(url, self.limits) as file, open(path, "wb") as copy:
                file.seek(0)
                shutil.copyfileobj(file, copy)
        except (OSError, ValueError) as error:
            yield report_problem(str(error)), gr.skip()
            return
        yield report("Fetched."), str(path)

    def watch(self, path, session):
        """Encodes a video, instead of the one before. Yields the report and the conversation, which begins anew."""
        self.shelf.drop(session.video)
        video = session.video = WatchedVideo(path) if path else None
        session.messages = []
        if video is None:
            yield report("No video yet."), []
            return
        try:
            while not self.turns.acquire(timeout=1):
                if session.video is not video:
                    return
                yield report("Other visitors' videos come first. This one waits for its turn.", progress=""), []
            try:
                yield from ((text, []) for text in self.encode(video, session))
            finally:
                self.turns.release()
        except (OSError, ValueError) as error:
            yield report_problem(video.without_folder(str(error))), []
        except Exception as error:
            yield report_problem(describe_failure(error)), []
        finally:
            if video.cache is None:
                self.shelf.drop(video)

    def encode(self, video, session):
        """Yields a report before each segment and in the end. Leaves off when the visitor gives another video."""
        yield report(f"{video.name}: looking at it.", progress="")
        expected = forecast(self.model, self.processor, video.path, **self.options)
        self.check_memory(expected)
        self.shelf.reserve(video, expected.video_cache)
        lines = [f"{video.name}. Forecast (memory as on a GPU): {expected}."]
        yield report(*lines, "Decoding.", progress="")
        options = dict(self.options)
        segment_frames, video_cache = options["segment_frames"], options.pop("video_cache")
        cache, num_frames, start = None, 0, time.perf_counter()
        with closing(self.processor.iter_video_segments(video.path, progress=False, **options)) as segments:
            for segment in segments:
                if session.video is not video:
                    return
                num_steps = int(segment["video_grid_thw"][:, 0].sum())
                with self.lock:
                    cache = self.model.encode_video(
                        **segment, cache=cache, segment_frames=segment_frames, video_cache_implementation=video_cache
                    )
                num_frames = min(
                    num_frames + num_steps * self.processor.video_processor.temporal_patch_size, expected.num_frames
                )
                done = f"Decoded and encoded {num_frames:,} of {expected.num_frames:,} frames."
                yield report(*lines, done, progress=f'value="{num_frames}" max="{expected.num_frames}"')
        video.cache = cache
        seconds = time.perf_counter() - start
        yield report(
            *lines, f"Decoded and encoded {num_frames:,} frames in {seconds:.2f} s, once for all questions. Ask."
        )

    def check_memory(self, expected):
        """Raises a `ValueError` for a video that the GPU has too little memory for."""
        device, needed = self.model.device, expected.peak - expected.weights
        free = free_memory(device)
        if free is None:
            return
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if needed > free:
            raise ValueError(
                f"This video would take {needed / 2**30:.2f} GiB of the GPU's memory, of which "
                f"{free / 2**30:.2f} GiB are free. Give a shorter one, or try again in a few minutes."
            )

    def ask(self, question, session):
        """Answers a question. Yields the conversation, as the answer grows, and what the question's box holds."""
        question, video = question.strip(), session.video
        cache = self.shelf.take(video) if video else None
        problem = self.find_problem(question, video, cache)
        if problem:
            yield [*session.messages, {"role": "assistant", "content": problem}], gr.skip()
            return
        session.say("user", question)
        reply = session.say("assistant", "")
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        result = self.answers.submit(self.answer, cache, question, streamer)
        for piece in streamer:
            reply["content"][0] += piece
            if session.video is not video:
                return
            yield session.messages, ""
        try:
            text, reading, seconds = result.result()
        except Exception as error:
            reply["content"] = [describe_failure(error)]
            yield session.messages, ""
            return
        reply["content"] = [text or "(no words)"]
        yield session.messages, ""
        seen = self.show_moments(video, question, text, reading, seconds)
        if session.video is video:
            session.say("assistant", *seen)
            yield session.messages, ""

    def find_problem(self, question, video, cache):
        """Why a question cannot be answered, if it cannot."""
        if video is None:
            return "Give me a video first: drop a file, give a link, or take one of the examples."
        if video.was_dropped:
            return "Other visitors' videos needed the memory that yours took. Please give it again."
        if cache is None:
            return "I have not seen the whole video. Its report says how far I am, or what is wrong with it."
        if not question:
            return "Write a question first."
        if len(question) > LONGEST_QUESTION:
            return f"This question has {len(question):,} characters. Ask in {LONGEST_QUESTION:,} at most."

    def answer(self, cache, question, streamer):
        """The answer, how much of each time step was read for it, and how long it took, in seconds."""
        try:
            with self.lock:
                start = time.perf_counter()
                text, reading, *_ = answer_with_reading(self.model, self.processor, cache, question, streamer=streamer)
                return text, reading, time.perf_counter() - start
        finally:
            streamer.end()  # nobody waits for the words of an answer that failed

    def show_moments(self, video, question, reply, reading, seconds):
        """The content of a message: when the answer was seen, in words and as a picture with frames."""
        took = f"{seconds:.2f} s, without decoding or encoding the video again."
        if len(reading.seconds) == 1 or reading.seconds.isnan().any():
            return [f"{took} When it was seen cannot be told: the video has one moment, or its file tells no times."]
        moments = strongest_moments(reading, MOST_MOMENTS)
        places = ", ".join(f"{clock(each.start)} to {clock(each.stop)} ({each.weight:.0%})" for each in moments)
        text = f"Seen at {places}: shares of what was read of the video. {took}"
        picture = Path(video.pictures.name) / f"{time.monotonic_ns()}.png"
        try:
            frames = frames_of(self.processor, video.path, reading, moments)
            with self.lock:  # pyplot is for one thread at a time
                draw(picture, question, reply, reading, moments, frames, size=(7, 3.6))
        except (OSError, ValueError) as error:  # the file may be gone by now
            return [f"{text} No picture: {video.without_folder(str(error))}"]
        return [text, {"path": str(picture), "alt_text": f"{question} {places}"}]

    def clear(self, session):
        """Empties the conversation. The video stays."""
        session.messages.clear()

    def forget(self, session):
        """Gives back what a visitor who is gone has taken."""
        self.shelf.drop(session.video)
        session.video = None  # and what is being encoded leaves off


def report(*lines, progress=None):
    """HTML of plain lines, with a bar: the attributes of `<progress>`, none for one that only moves."""
    bar = "" if progress is None else f"<progress {progress} style='width: 100%'></progress>"
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines) + bar


def report_problem(problem):
    return f"<p><b>That did not work.</b> {html.escape(problem)}</p>"


def describe_failure(error):
    """What a visitor is told of an error that is not theirs; the rest is for the log."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The GPU has too little memory left. Try again in a few minutes, or give a shorter video."
    logging.error("Something failed on the page.", exc_info=error)
    return "Something failed here that should not. The log of this page says what."


def describe_model(path, model):
    """What the model can do and what it cannot, in Markdown."""
    name = Path(path).name if Path(path).exists() else path
    size = f"{model.num_parameters() / 1e6:,.1f} M parameters"
    every = (
        "It sees frames and hears no sound. Each question is answered from the video alone, without the questions "
        "before it. What was read for an answer says where it comes from, not that it is right."
    )
    if Path(path).resolve() != TINY_MODEL.resolve():
        return f"**{name}**, {size}. {every} It can be wrong without saying so: look at the moments it shows."
    results = json.loads((TINY_MODEL / "evaluation.json").read_text())
    exact = "; ".join(f"{length}: {result['all']:.1%}" for length, result in results.items())
    return (
        f"**The tiny model** ({size}) shows that everything works. **It can** tell the colours, shapes, order, "
        "movement and flashes of the synthetic videos below, and of others that `examples/synthetic_videos.py` makes. "
        f"Exact answers on unseen ones: {exact}. **It cannot** do anything else: in a film, "
        f"too, it sees shapes. {every}"
    )


def write_examples(folder):
    """Generated videos, which the tiny model knows, each with a question."""
    for story, seed, num_frames, which in EXAMPLES:
        video = sample_video(seed, num_frames, story)
        path = Path(folder) / f"{story}_{num_frames}_frames.mp4"
        write_mp4(path, video)
        yield [str(path), video.questions[which].text]


def make_theme():
    """Gradio's own, with fonts of the visitor's machine: nothing is fetched from elsewhere."""
    return gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))


def build(page, about, examples):
    """The page itself."""
    with gr.Blocks(title="Ask a video", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        # Called an hour after a visitor has gone. (Gradio takes a dataclass itself for one of its instances.)
        session = gr.State(lambda: Session(), delete_callback=page.forget)
        gr.Markdown("# Ask a video\n\nVamba reads a video once, and answers any number of questions about it.")
        gr.Markdown(about)
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], height=280, elem_id="video")
                with gr.Row():
                    link = gr.Textbox(
                        label="or the link to a file", placeholder="https://…/video.mp4", elem_id="link", scale=4
                    )
                    fetch = gr.Button("Fetch", elem_id="fetch", scale=1)
                progress = gr.HTML(report("No video yet."), elem_id="report")
            with gr.Column():
                chat = gr.Chatbot(label="Questions and answers", height=460, elem_id="chat", buttons=["copy"])
                question = gr.Textbox(
                    label="Question",
                    placeholder="What happens first?",
                    max_length=LONGEST_QUESTION,
                    elem_id="question",
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
        gr.Examples(examples, [video, question], label="Generated videos", elem_id="examples", cache_examples=False)

        gr.on(
            [fetch.click, link.submit],
            page.fetch,
            [link, session],
            [progress, video],
            concurrency_limit=VISITORS_AT_ONCE,
            show_progress="hidden",
        )
        # A second video is looked at while the first is being encoded, which then leaves off.
        video.change(
            page.watch,
            [video, session],
            [progress, chat],
            concurrency_limit=VISITORS_AT_ONCE,
            trigger_mode="multiple",
            show_progress="hidden",
        )
        gr.on(
            [ask.click, question.submit],
            page.ask,
            [question, session],
            [chat, question],
            concurrency_limit=ANSWERS_AT_ONCE,
            show_progress="minimal",
            show_progress_on=chat,
        )
        chat.clear(page.clear, session, queue=False)
    return blocks.queue(max_size=64)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A page to ask a video on.")
    parser.add_argument(
        "--model",
        default=os.environ.get("VAMBA_MODEL", TINY_MODEL),
        help="folder or Hub name of a checkpoint (default: the variable VAMBA_MODEL, or the tiny one)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-frames", type=int, help="how many frames to look at (default: the processor's)")
    parser.add_argument("--fps", type=float, help="or how many per second")
    parser.add_argument("--segment-frames", type=int, default=32, help="frames that are encoded at a time")
    parser.add_argument("--video-cache", choices=VIDEO_CACHES, help="8 bits, or the host's memory, or both")
    parser.add_argument("--weight-bits", type=int, choices=WEIGHT_BITS, help="quantize the weights")
    parser.add_argument("--cache-gib", type=float, default=4.0, help="memory for what is kept of all videos together")
    parser.add_argument("--max-gib", type=float, default=1.0, help="greatest size of a file or download")
    parser.add_argument("--share", action="store_true", help="a public link, through Gradio's servers")
    args = parser.parse_args(arguments)
    options = {"num_frames": args.num_frames, "fps": args.fps, "segment_frames": args.segment_frames}
    try:
        for name in ("cache_gib", "max_gib"):
            if not 0 < getattr(args, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, got {getattr(args, name)}")
        check_sampling(VambaProcessor.from_pretrained(args.model), **options)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    model, processor = load(args.model, args.device, args.weight_bits)
    max_bytes = int(args.max_gib * 2**30)
    limits = SourceLimits(max_bytes=max_bytes, max_seconds=600, timeout=20, allow_private=False)
    page = Page(model, processor, {**options, "video_cache": args.video_cache}, int(args.cache_gib * 2**30), limits)
    with TemporaryDirectory(prefix="vamba-") as folder:
        blocks = build(page, describe_model(args.model, model), list(write_examples(folder)))
        blocks.launch(share=args.share, max_file_size=max_bytes, theme=make_theme(), footer_links=[])


if __name__ == "__main__":
    main()
