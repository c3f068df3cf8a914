import unittest

import upstream  # noqa: F401
from tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs

from transformers_vamba import VambaVideoProcessor


class VambaVideoProcessorTester:
    batch_size = 5
    num_frames = 8
    num_channels = 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=32,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class VideoProcessorTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VambaVideoProcessor
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VambaVideoProcessorTester()
        self.video_processor_dict = {
            "size": {"shortest_edge": 28, "longest_edge": 56},
            "min_pixels": 28 * 28,
            "num_frames": 8,
            "do_convert_rgb": True,
        }

    # The mixin expects the videos stacked. Here the patches of all are concatenated, and a grid counts those of each.
    def check_call(self, return_tensors, as_list=False, num_channels=3, expected_frames=8, **kwargs):
        self.video_processor_tester.num_channels = num_channels
        videos = self.video_processor_tester.prepare_video_inputs(return_tensors=return_tensors)
        if as_list:
            videos = [list(video) for video in videos]
        processor = VambaVideoProcessor(**self.video_processor_dict)
        for given, num_videos in ((videos[0], 1), (videos, len(videos))):
            encoded = processor(given, return_tensors="pt", **kwargs)
            grid = encoded["video_grid_thw"]
            self.assertEqual(grid[:, 0].tolist(), [expected_frames // 2] * num_videos)
            patch_dim = 3 * processor.temporal_patch_size * processor.patch_size**2
            self.assertEqual(encoded["pixel_values_videos"].shape, (grid.prod(dim=1).sum(), patch_dim))

    def test_call_pil(self):
        self.check_call("pil")

    def test_call_numpy(self):
        self.check_call("np")

    def test_call_pytorch(self):
        self.check_call("torch")

    def test_nested_input(self):
        self.check_call("np", as_list=True)

    def test_call_numpy_4_channels(self):
        self.check_call("pil", num_channels=4)

    def test_call_sample_frames(self):
        self.check_call("torch", do_sample_frames=False, num_frames=4)
        self.check_call("torch", num_frames=4, expected_frames=4)
        metadata = [[{"duration": 2.0, "total_num_frames": 8, "fps": 4}]]
        videos = self.video_processor_tester.prepare_video_inputs(return_tensors="torch")
        encoded = VambaVideoProcessor(**self.video_processor_dict)(videos[0], fps=3, video_metadata=metadata)
        self.assertEqual(encoded["video_grid_thw"][0][0], 3)
        with self.assertRaises(ValueError):  # the frame rate of the video is unknown
            VambaVideoProcessor(**self.video_processor_dict)(videos[0], fps=3)

    # The mixin's sizes are those of processors that crop.
    def test_video_processor_from_dict_with_kwargs(self):
        processor = VambaVideoProcessor.from_dict(self.video_processor_dict)
        self.assertEqual(dict(processor.size), {"shortest_edge": 28, "longest_edge": 56})
        size = {"shortest_edge": 42, "longest_edge": 84}
        processor = VambaVideoProcessor.from_dict(self.video_processor_dict, size=size)
        self.assertEqual(dict(processor.size), size)
