# SPDX-License-Identifier: Apache-2.0

import os
from collections import Counter

import av
import huggingface_hub
import numpy as np
import pytest
import torch
from tiny_vamba import ROOT, TINY_CHECKPOINT, level_of_frame
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor

from transformers_vamba import VambaProcessor, VambaVideoProcessor


HELPERS = [str(ROOT / name) for name in ("tests", "examples", "examples/benchmarks", "hub_upload")]

# Qwen2-VL's, as its checkpoints ship it.
CHAT_TEMPLATE = (TINY_CHECKPOINT / "chat_template.jinja").read_text()

# No test asks the Hub: without a network each try takes minutes.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ["HF_HUB_OFFLINE"] = "1"

# The programs that the tests start import helpers and examples as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), *HELPERS])

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

TOKENIZER_TEXT = [
    "You are a helpful assistant.",
    "system user assistant",
    "What happens in the video? Describe the image. Which colour moved first?",
]


@pytest.fixture(scope="session")
def write_video(tmp_path_factory):
    """
    Writes an H.264 file and returns its path.

    Frame i is grey, of level `level_of_frame(i)`; `options` are those of the container, and `pts_shift` is how many
    seconds of the beginning come before time zero.
    """
    folder = tmp_path_factory.mktemp("videos")

    def write(name="video.mp4", num_frames=24, height=64, width=96, fps=8, options=None, pts_shift=0):
        path = folder / name
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "g": "8"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.max_b_frames = 0
            frames = [np.full((height, width, 3), level_of_frame(index), np.uint8) for index in range(num_frames)]
            images = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
            for image in [*images, None]:
                for packet in stream.encode(image):
                    shift = int(pts_shift / packet.time_base)
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    container.mux(packet)
        return str(path)

    return write


@pytest.fixture(scope="session")
def video_file(write_video):
    """An H.264 file: 24 frames of 64x96 at 8 frames per second."""
    return write_video()


@pytest.fixture(scope="session")
def byte_level_bpe():
    """A small vocabulary and its merges."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TOKENIZER_TEXT, vocab_size=300, min_frequency=1, show_progress=False)
    return bpe


@pytest.fixture
def tokenizer(tmp_path, byte_level_bpe):
    """A small tokenizer of Qwen2-VL's kind, with its special tokens after the vocabulary."""
    vocab_file, merges_file = byte_level_bpe.save_model(str(tmp_path))
    tokenizer = Qwen2Tokenizer(vocab=vocab_file, merges=merges_file, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


@pytest.fixture
def video_processor():
    """Small frames and few of them: 56x84 pixels from the test videos."""
    return VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84}, num_frames=8)


@pytest.fixture
def image_processor():
    return Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 4)


@pytest.fixture
def processor(image_processor, tokenizer, video_processor):
    return VambaProcessor(image_processor, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_runtest_teardown(item):
    if item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()  # for the other processes that test beside this one


def pytest_terminal_summary(terminalreporter):
    """Counts the outcomes of each of Transformers' mixins."""
    counts = Counter(
        (report.nodeid.split("::")[1], outcome)
        for outcome in ("passed", "skipped", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.nodeid.startswith("tests/conformance/") and report.nodeid.count("::") > 1
    )
    for mixin in sorted({mixin for mixin, _ in counts}):
        outcomes = ", ".join(f"{counts[mixin, outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        terminalreporter.write_line(f"conformance {mixin}: {outcomes}")
