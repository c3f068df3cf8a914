import unittest
from pathlib import Path

import upstream  # noqa: F401
from tests.test_processing_common import ProcessorTesterMixin
from transformers import AutoProcessor, Qwen2VLImageProcessor

from transformers_vamba import VambaProcessor, VambaVideoProcessor


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "vamba-tiny"


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VambaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return AutoProcessor.from_pretrained(CHECKPOINT).tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4 * 28 * 28)

    @classmethod
    def _setup_video_processor(cls):
        return VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84}, num_frames=8)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": AutoProcessor.from_pretrained(CHECKPOINT).chat_template}

    # Patches of the 11-frame video: 56x84 pixels are 4x6 patches for two frames.
    video_sampling_expectations = [
        {"num_frames": 4, "fps": None, "expected_dim": 0, "output_length": 2 * 4 * 6},
        {"num_frames": None, "fps": 12, "expected_dim": 0, "output_length": 2 * 4 * 6},
        {"do_sample_frames": False, "fps": 12, "expected_dim": 0, "output_length": 5 * 4 * 6},
        {"do_sample_frames": False, "expected_dim": 0, "output_length": 5 * 4 * 6},
        {"expected_dim": 0, "output_length": 4 * 4 * 6},
    ]
