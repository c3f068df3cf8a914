# SPDX-License-Identifier: Apache-2.0

import functools
import http.server
import math
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vamba import level_of_frame, levels_of
from torchvision.transforms.v2.functional import normalize
from transformers import AutoVideoProcessor, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from transformers_vamba import VambaVideoProcessor, video_processing_vamba


def frames_of(num_frames, height, width, seed=0):
    """Random frames, uint8 of shape (num_frames, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def assert_frames(outputs, video_processor, indices):
    expected = torch.tensor([level_of_frame(index) for index in indices], dtype=torch.float32)
    torch.testing.assert_close(levels_of(outputs, video_processor), expected, atol=1.9, rtol=0)


@pytest.mark.parametrize(
    ("total", "num_frames", "expected"),
    [
        (24, 8, [1, 4, 7, 10, 13, 16, 19, 22]),
        (10, 4, [0, 3, 5, 8]),
        (10, 100, list(range(10))),
        (11, 100, list(range(10))),
        (10, 3, [1, 4]),
        (10, 1, [4]),
        (1, 8, [0]),
    ],
)
def test_sampling_by_count(total, num_frames, expected):
    indices = VambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total), num_frames=num_frames)
    assert indices.tolist() == expected


@pytest.mark.parametrize(
    ("total", "video_fps", "fps", "expected"),
    [
        (24, 8.0, 2, [2, 6, 10, 14, 18, 22]),
        (24, 8.0, 100, list(range(24))),
        (24, 8.0, 0.01, [11]),
        (24, 8.0, 1e-300, [11]),
        (24, 8.0, 5e-324, [11]),
        (24, 8.0, 1.0, [4, 12]),
        (60, 30.0, 1.0, [15, 45]),
        # 0.3 intervals a second over 20 seconds are 6 intervals, but 6.000000000000001 or 5.99 in floating point
        (600, 30.0, 0.3, [50, 150, 250, 350, 450, 550]),
        (300, 30000 / 1001, 1.0, [15, 45, 75, 105, 135, 165, 195, 225, 255, 285]),
    ],
)
def test_sampling_by_rate(total, video_fps, fps, expected):
    metadata = VideoMetadata(total_num_frames=total, fps=video_fps)
    assert VambaVideoProcessor().sample_frames(metadata, fps=fps).tolist() == expected


def test_sampled_frames_are_the_middle_of_each_interval():
    for total, num_frames in [(7919, 128), (107892, 1024), (1_000_003, 1024), (130, 128)]:
        indices = VambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total), num_frames=num_frames)
        # The first and the last frame of each interval, between whole frames.
        firsts = [math.floor(i * total / num_frames) for i in range(num_frames)]
        lasts = [first - 1 for first in firsts[1:]] + [total - 1]
        assert indices.tolist() == [(first + last) // 2 for first, last in zip(firsts, lasts)]


def test_min_and_max_frames_bound_the_samples_only_when_set():
    metadata = VideoMetadata(total_num_frames=4000, fps=1.0)
    assert len(VambaVideoProcessor().sample_frames(metadata, fps=1.0)) == 4000
    assert len(VambaVideoProcessor().sample_frames(metadata, fps=1.0, max_frames=100)) == 100
    assert len(VambaVideoProcessor().sample_frames(metadata, fps=0.001, min_frames=10)) == 10


def test_file_gives_the_sampled_frames(video_processor, video_file):
    outputs = video_processor(video_file, return_tensors="pt", return_metadata=True)
    assert outputs["video_grid_thw"].tolist() == [[4, 4, 6]]
    assert outputs["pixel_values_videos"].shape == (4 * 4 * 6, 3 * 2 * 14 * 14)
    assert outputs["pixel_values_videos"].dtype == torch.float32
    assert outputs["video_metadata"][0].frames_indices.tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert (outputs["video_metadata"][0].fps, outputs["video_metadata"][0].duration) == (8.0, 3.0)
    assert_frames(outputs, video_processor, [1, 4, 7, 10, 13, 16, 19, 22])


def test_rate_in_a_call_replaces_the_default_count_and_the_other_way_round(video_processor, video_file):
    assert_frames(video_processor(video_file, fps=2.0), video_processor, [2, 6, 10, 14, 18, 22])
    assert_frames(video_processor(video_file, num_frames=2), video_processor, [5, 17])
    by_rate = VambaVideoProcessor(size=dict(video_processor.size), fps=2.0)
    assert by_rate.num_frames is None
    assert_frames(by_rate(video_file), video_processor, [2, 6, 10, 14, 18, 22])
    assert_frames(by_rate(video_file, num_frames=2), video_processor, [5, 17])


def test_without_sampling_every_frame_is_used(video_processor, video_file):
    assert_frames(video_processor(video_file, do_sample_frames=False), video_processor, range(24))


@pytest.mark.parametrize("sampling", [{}, {"num_frames": None, "fps": 0.5}])
def test_save_and_load(tmp_path, video_file, sampling):
    video_processor = VambaVideoProcessor(
        size={"shortest_edge": 28, "longest_edge": 84}, max_pixels=56 * 84, **sampling
    )
    video_processor.save_pretrained(tmp_path)
    for loaded in (VambaVideoProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VambaVideoProcessor
        assert loaded.to_dict() == video_processor.to_dict()
        torch.testing.assert_close(
            loaded(video_file)["pixel_values_videos"], video_processor(video_file)["pixel_values_videos"]
        )


def test_patches_are_those_of_qwen2_vl():
    videos = [frames_of(6, 56, 84), frames_of(4, 84, 56, seed=1)]
    expected = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)(
        videos, size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, return_tensors="pt"
    )
    outputs = VambaVideoProcessor()(videos, size={"shortest_edge": 56, "longest_edge": 84}, return_tensors="pt")
    torch.testing.assert_close(outputs["video_grid_thw"], expected["video_grid_thw"])
    torch.testing.assert_close(outputs["pixel_values_videos"], expected["pixel_values_videos"])


@pytest.mark.parametrize(
    ("height", "width", "edges", "final"),
    [
        (360, 640, (360, 640), (364, 644)),
        (1080, 1920, (360, 640), (364, 644)),
        (1920, 1080, (640, 360), (644, 364)),
        (200, 300, (256, 300), (252, 308)),
        (817, 1921, (272, 640), (280, 644)),
        (100, 2000, (256, 640), (252, 644)),
        (8, 6, (256, 256), (252, 252)),
        (1, 1, (256, 256), (252, 252)),
    ],
)
def test_sizes_of_frames(height, width, edges, final):
    video_processor = VambaVideoProcessor()
    assert video_processor.get_resized_sizes(height, width) == [edges, final]
    grid = torch.tensor([[1, final[0] // 14, final[1] // 14]])
    outputs = video_processor(np.zeros((2, height, width, 3), np.uint8))
    torch.testing.assert_close(outputs["video_grid_thw"], grid)
    assert len(outputs["pixel_values_videos"]) == grid.prod()
    assert video_processor.get_num_of_video_patches(2, height, width) == grid.prod()


def test_number_of_patches():
    video_processor = VambaVideoProcessor()
    assert video_processor.get_num_of_video_patches(1024, 360, 640) == 512 * 26 * 46
    assert video_processor.get_num_of_video_patches(1024, 360, 640) // 4 == 153_088
    for num_frames in (1, 2, 3, 4, 5):
        video = frames_of(num_frames, 56, 56)
        kwargs = {"size": {"shortest_edge": 28, "longest_edge": 56}, "max_pixels": 56 * 56}
        expected = len(video_processor(video, **kwargs)["pixel_values_videos"])
        assert video_processor.get_num_of_video_patches(num_frames, 56, 56, kwargs) == expected


def test_frames_are_resized_in_two_steps_as_pil_does():
    frames = frames_of(1, 45, 80)[0]
    smooth = np.asarray(Image.fromarray(frames).resize((400, 225), Image.Resampling.BICUBIC))
    video_processor = VambaVideoProcessor(size={"shortest_edge": 100, "longest_edge": 200})
    pixels = video_processor(smooth[None], do_rescale=False, do_normalize=False)["pixel_values_videos"]
    expected = np.asarray(
        Image.fromarray(smooth)
        .resize((200, 112), Image.Resampling.BICUBIC)
        .resize((196, 112), Image.Resampling.BICUBIC)
    )
    expected = video_processor(expected[None], do_resize=False, do_rescale=False, do_normalize=False)[
        "pixel_values_videos"
    ]
    difference = (pixels.float() - expected.float()).abs()
    assert difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float32))
@pytest.mark.parametrize("do_rescale", (True, False))
@pytest.mark.parametrize("do_normalize", (True, False))
def test_patches_are_those_of_normalized_frames(dtype, do_rescale, do_normalize):
    video_processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84})
    videos = [torch.from_numpy(frames_of(n, 56, 84, seed=n)).to(dtype) for n in (4, 7)]
    kwargs = {"do_rescale": do_rescale, "do_normalize": do_normalize}
    kwargs |= {"image_mean": [0.4, 0.5, 0.1], "image_std": [0.2, 0.3, 0.5]}
    outputs = video_processor(videos, return_tensors="pt", **kwargs)
    assert outputs["video_grid_thw"].tolist() == [[2, 4, 6], [3, 4, 6]]
    frames = torch.cat([videos[0], videos[1][:6]]).movedim(-1, 1)
    frames = video_processor.rescale_and_normalize(
        frames, do_rescale, 1 / 255, do_normalize, tuple(kwargs["image_mean"]), tuple(kwargs["image_std"])
    )
    patches = frames.reshape(5, 2, 3, 2, 2, 14, 3, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(5 * 24, -1)
    assert outputs["pixel_values_videos"].dtype == patches.dtype
    assert torch.equal(outputs["pixel_values_videos"], patches)


def test_patches_are_normalized_where_they_stay(monkeypatch):
    """A video of float would be four times as large as its frames, and take the memory twice."""
    places = []

    def record(patches, *args, **kwargs):
        places.append((patches.data_ptr(), len(patches)))
        return normalize(patches, *args, **kwargs)

    monkeypatch.setattr(video_processing_vamba, "normalize", record)
    video_processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 28})
    pixels = video_processor(frames_of(70, 28, 28), return_tensors="pt")["pixel_values_videos"]
    assert places == [(pixels[16 * step].data_ptr(), 16) for step in range(35)]


def test_odd_last_frame_is_dropped_and_single_frame_repeated(video_processor):
    frames = frames_of(5, 56, 84)
    for kwargs in ({}, {"do_sample_frames": False}):
        odd, even, single, double = (
            video_processor(video, **kwargs)["pixel_values_videos"]
            for video in (frames, frames[:4], frames[:1], frames[[0, 0]])
        )
        assert torch.equal(odd, even)
        assert torch.equal(single, double)


def forms_of(frames, folder):
    """One video in each form that is no encoded file."""
    images = [Image.fromarray(frame) for frame in frames]
    paths = [str(folder / f"{index}.png") for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    channels_first = frames.transpose(0, 3, 1, 2)
    return {
        "array": frames,
        "array, channels first": channels_first,
        "tensor": torch.from_numpy(frames),
        "tensor, channels first": torch.from_numpy(channels_first.copy()),
        "PIL frames": images,
        "array frames": list(frames),
        "tensor frames": list(torch.from_numpy(frames)),
        "list of one": [frames],
        "row of one": [[images]],
        "batch array": frames[None],
        "row of frame paths": [[paths]],
        "row of frame Paths": [[[Path(path) for path in paths]]],
    }


def test_forms_of_a_video(video_processor, tmp_path):
    frames = frames_of(12, 56, 84)
    indices = [0, 1, 3, 4, 6, 7, 9, 10]
    expected = video_processor(frames[indices], do_sample_frames=False)
    for form, video in forms_of(frames, tmp_path).items():
        outputs = video_processor(video)
        assert torch.equal(outputs["video_grid_thw"], expected["video_grid_thw"]), form
        assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"]), form


def test_videos_of_different_forms_and_sizes_in_one_batch(video_processor, video_file):
    video = frames_of(4, 56, 84)
    channels_first = torch.from_numpy(frames_of(2, 84, 56).transpose(0, 3, 1, 2).copy())
    images = [Image.fromarray(frame) for frame in frames_of(6, 28, 84)]
    alone = [video_processor(item) for item in (video, video_file, channels_first, images)]
    for videos in ([video, video_file, channels_first, images], [[video, video_file], [], [channels_first, images]]):
        together = video_processor(videos)
        for name in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(together[name], torch.cat([outputs[name] for outputs in alone]))


@pytest.mark.parametrize("form", ["Path", "file URL", "list", "row"])
def test_forms_of_a_path(video_processor, video_file, form):
    video = {
        "Path": Path(video_file),
        "file URL": Path(video_file).as_uri(),
        "list": [video_file],
        "row": [[video_file]],
    }
    expected = video_processor(video_file)["pixel_values_videos"]
    assert torch.equal(video_processor(video[form])["pixel_values_videos"], expected)


def test_http_url(video_processor, video_file, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder, name = Path(video_file).parent, Path(video_file).name
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        outputs = video_processor(f"{url}/{name}")
        with pytest.raises(ValueError, match="Could not read .*absent.mp4"):
            video_processor(f"{url}/absent.mp4")
        server.shutdown()
    assert torch.equal(outputs["pixel_values_videos"], video_processor(video_file)["pixel_values_videos"])


@pytest.mark.parametrize(
    ("name", "options"), [("video.mkv", None), ("fragmented.mp4", {"movflags": "frag_keyframe+empty_moov"})]
)
def test_container_that_does_not_state_its_number_of_frames(video_processor, write_video, video_file, name, options):
    outputs = video_processor(write_video(name, options=options))
    assert torch.equal(outputs["pixel_values_videos"], video_processor(video_file)["pixel_values_videos"])


@pytest.mark.parametrize("quarter_turns", (1, -1, 2))
def test_video_of_a_phone_is_turned_upright(processor, tmp_path, quarter_turns):
    """The file notes by how many quarters, counterclockwise, its frames are to be turned."""
    upright = np.full((56, 112, 3), 50, np.uint8)
    upright[:28, :56] = 200
    path = str(tmp_path / "phone.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "5"})
        stored = np.ascontiguousarray(np.rot90(upright, -quarter_turns))
        stream.height, stream.width, stream.pix_fmt = *stored.shape[:2], "yuv420p"
        stream.set_display_rotation(90 * quarter_turns)
        for frame in [*[av.VideoFrame.from_ndarray(stored, format="rgb24")] * 4, None]:
            container.mux(stream.encode(frame))
    frames, _ = processor.video_processor.fetch_videos(path)
    assert frames.shape == (4, 56, 112, 3) and np.abs(frames.astype(int) - upright).mean() < 4
    outputs = processor(videos=[path], return_tensors="pt")
    (segment,) = processor.iter_video_segments(path)
    assert outputs["video_grid_thw"][0, 1] < outputs["video_grid_thw"][0, 2]
    assert torch.equal(segment["pixel_values_videos"], outputs["pixel_values_videos"])


def test_frames_that_an_edit_list_hides_are_not_counted(video_processor, write_video):
    path = write_video("edited.mp4", pts_shift=0.5)  # the first 4 of 24 frames come before the start
    outputs = video_processor(path, num_frames=100, return_metadata=True)
    assert outputs["video_metadata"][0].total_num_frames == 20
    assert_frames(outputs, video_processor, range(4, 24))


def test_grey_frames_become_rgb(video_processor):
    grey = frames_of(4, 56, 84)[..., :1]
    expected = video_processor(np.repeat(grey, 3, axis=-1))["pixel_values_videos"]
    torch.testing.assert_close(video_processor(grey)["pixel_values_videos"], expected)
    images = [Image.fromarray(frame[..., 0]) for frame in grey]
    torch.testing.assert_close(video_processor(images)["pixel_values_videos"], expected)


@pytest.fixture
def bad_file(tmp_path, write_video):
    """Writes a file that cannot be read as a video; returns its path."""

    def write(kind):
        path = tmp_path / f"{kind}.mp4"
        if kind == "text":
            path.write_text("not a video " * 100)
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "sound":
            with wave.open(str(path), "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(8000)
                sound.writeframes(b"\0" * 16000)
        elif kind == "truncated, index at the end":
            content = Path(write_video()).read_bytes()
            path.write_bytes(content[: len(content) // 2])
        elif kind == "truncated, index first":
            content = Path(write_video("faststart.mp4", options={"movflags": "faststart"})).read_bytes()
            path.write_bytes(content[:-1])  # the last of the 24 frames ends early
        return path

    return write


@pytest.mark.parametrize("kind", ["text", "empty", "sound", "truncated, index at the end", "truncated, index first"])
def test_file_that_is_no_video(video_processor, bad_file, kind):
    path = bad_file(kind)
    with pytest.raises(ValueError, match=f"Could not read .*{path.name}.* as a video: .+"):
        video_processor(str(path))


def test_truncated_file_states_how_much_is_there(video_processor, bad_file):
    with pytest.raises(ValueError, match="only 23 of its 24 frames are there, the file is truncated"):
        video_processor(bad_file("truncated, index first"))


@pytest.mark.parametrize("path", ["absent.mp4", "file:///absent.mp4", "ftp://host/video.mp4", "/"])
def test_path_without_a_file(video_processor, path):
    with pytest.raises(FileNotFoundError, match=f"Expected the path .* got '.*{Path(path).name}'"):
        video_processor(path)


@pytest.mark.parametrize(
    ("video", "kwargs", "message"),
    [
        (np.zeros((0, 28, 28, 3), np.uint8), {}, "no frames"),
        (np.zeros((0, 28, 28, 3), np.uint8), {"do_sample_frames": False}, "at least one pixel, got 0 of 28x28"),
        (np.zeros((2, 0, 28, 3), np.uint8), {}, "at least one pixel, got 2 of 0x28"),
        ([], {}, "at least one video"),
        ([[], []], {}, "at least one video"),
        (3, {}, "A video must be a path.*int"),
        (None, {}, "A video must be a path.*NoneType"),
        (np.zeros((28, 28), np.uint8), {}, r"A video must be a path.*\(28, 28\)"),
        ([np.zeros((28, 28, 3), np.uint8), np.zeros((28, 56, 3), np.uint8)], {}, "must have one shape"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"fps": 1.0}, "needs the frame rate of the video"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"fps": 1.0, "num_frames": 2}, "mutually exclusive, got num_frames=2"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"num_frames": 0}, "`num_frames` must be a positive number, got 0"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"num_frames": -1}, "`num_frames` must be a positive number, got -1"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"fps": 0.0}, "`fps` must be a positive number, got 0.0"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"num_frames": "8"}, "`num_frames` must be a positive number, got '8'"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"max_frames": 0}, "`max_frames` must be a positive number, got 0"),
        (np.zeros((4, 28, 30, 3), np.uint8), {"do_resize": False}, "multiples of 28, got 28x30"),
        (np.zeros((4, 28, 28, 3), np.uint8), {"size": {"height": 28, "width": 28}}, "shortest_edge"),
        (
            np.zeros((4, 1, 1000, 3), np.uint8),
            {"size": {"shortest_edge": 1, "longest_edge": 1000}},
            "aspect ratio must be smaller than 200",
        ),
        (
            np.zeros((4, 28, 28, 3), np.uint8),
            {"video_metadata": [{"total_num_frames": 4}, {"total_num_frames": 4}]},
            "1 videos (and|but) 2",
        ),
    ],
)
def test_bad_input(video_processor, video, kwargs, message):
    with pytest.raises(ValueError, match=message):
        video_processor(video, **kwargs)


def test_rate_of_frames_with_metadata(video_processor):
    frames = frames_of(12, 56, 84)
    metadata = [{"total_num_frames": 12, "fps": 6.0}]
    outputs = video_processor(frames, fps=2.0, video_metadata=metadata)
    expected = video_processor(frames[[1, 4, 7, 10]])
    assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"])


def test_count_and_rate_at_construction_are_refused():
    with pytest.raises(ValueError, match="mutually exclusive"):
        VambaVideoProcessor(num_frames=8, fps=1.0)


def test_frame_files_are_not_sampled_again(video_processor, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        Image.new("RGB", (56, 56)).save(path)
    assert video_processor([[paths]])["video_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(ValueError, match="Sampling frames from a list of images is not supported"):
        video_processor([[paths]], do_sample_frames=True)


@pytest.mark.parametrize(
    "height, width, expected",
    [(360, 640, 213), (1080, 1920, 51), (1920, 1080, 51), (64, 96, 3000)],
)
def test_frames_by_their_size(height, width, expected):
    """As many as make 120,000 patches at edges of 128 to 1,280, two frames counted once: numbers of the published."""
    processor = VambaVideoProcessor(size={"shortest_edge": 128, "longest_edge": 1280})
    metadata = VideoMetadata(total_num_frames=100_000, fps=25, height=height, width=width)
    indices = processor.sample_frames(metadata, max_patches=120_000)
    whole = processor.sample_frames(metadata, num_frames=expected)
    assert np.array_equal(indices, whole) and len(indices) == expected - expected % 2
    assert len(processor.sample_frames(metadata, num_frames=8, max_patches=120_000)) == 8
    assert len(processor.sample_frames(metadata, num_frames=8, max_patches=1)) == 1


def test_frames_by_their_size_from_a_file(video_file):
    processor = VambaVideoProcessor(size={"shortest_edge": 28, "longest_edge": 84}, num_frames=128)
    # 56x84 pixels are 4x6 patches, 12 counted a frame.
    given = processor(videos=video_file, num_frames=None, max_patches=100, return_tensors="pt")
    expected = processor(videos=video_file, num_frames=8, return_tensors="pt")
    assert torch.equal(given["pixel_values_videos"], expected["pixel_values_videos"])
    assert given["video_grid_thw"][0, 0] == 4


def test_frames_by_their_size_need_it():
    with pytest.raises(ValueError, match="pass `video_metadata` with the `height` and `width`"):
        VambaVideoProcessor().sample_frames(VideoMetadata(total_num_frames=8, fps=8), max_patches=100)
