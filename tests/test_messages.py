# SPDX-License-Identifier: Apache-2.0
"""Parts of messages in the forms of several libraries, and videos that bring their own sampling."""

import base64
from pathlib import Path

import pytest
import torch
from PIL import Image

from transformers_vamba.messages import plain_conversation


def apply(processor, *parts, **kwargs):
    return processor.apply_chat_template(
        [{"role": "user", "content": list(parts)}], tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_forms_of_a_video_part(processor, video_file):
    expected = apply(processor, {"type": "video", "path": video_file})
    assert expected["video_grid_thw"].tolist() == [[4, 4, 6]]
    encoded = base64.b64encode(Path(video_file).read_bytes()).decode()
    for part in (
        {"type": "video_url", "video_url": {"url": Path(video_file).as_uri()}},
        {"type": "video_url", "video_url": video_file},
        {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded}"}},
        {"type": "input_video", "input_video": video_file},
        {"type": "input_video", "video_url": video_file},
        {"type": "video", "base64": encoded},
        {"type": "video", "video": Path(video_file).read_bytes()},
        {"type": "video", "video": {"bytes": Path(video_file).read_bytes(), "path": None}},
        {"type": "video", "video": video_file, "fps": None, "text": None, "image": None},
    ):
        outputs = apply(processor, part)
        assert torch.equal(outputs["input_ids"], expected["input_ids"]), part
        assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"]), part


def test_forms_of_other_parts(processor, tmp_path):
    path = str(tmp_path / "image.png")
    Image.new("RGB", (56, 56), (9, 99, 199)).save(path)
    expected = apply(processor, {"type": "image", "path": path}, {"type": "text", "text": "What?"})
    for image in (
        {"type": "image_url", "image_url": {"url": path, "detail": "auto"}},
        {"type": "input_image", "image_url": path},
        {"type": "image", "image": Image.open(path)},
    ):
        outputs = apply(processor, image, {"type": "input_text", "text": "What?"})
        assert torch.equal(outputs["input_ids"], expected["input_ids"])
        assert torch.equal(outputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"fps": 2.0}, {"fps": 2.0}),
        ({"nframes": 4}, {"num_frames": 4}),
        ({"num_frames": 4}, {"num_frames": 4}),
        ({"fps": 8.0, "max_frames": 6}, {"fps": 8.0, "max_frames": 6}),
        ({"max_pixels": 56 * 56}, {"max_pixels": 56 * 56}),
    ],
)
def test_a_video_brings_its_own_sampling(processor, video_file, options, sampling):
    plain, own = processor.video_processor(video_file), processor.video_processor(video_file, **sampling)
    for part in (
        {"type": "video", "video": video_file, **options},
        {"type": "video_url", "video_url": {"url": video_file, **options}},
    ):
        outputs = apply(processor, part, {"type": "video", "video": video_file})
        for name in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(outputs[name], torch.cat([own[name], plain[name]]))
    by_rate = apply(processor, {"type": "video", "video": video_file, **options}, num_frames=12)
    if "fps" in sampling or "num_frames" in sampling:
        assert torch.equal(by_rate["pixel_values_videos"], own["pixel_values_videos"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": "a.mp4", "video_start": 3.0}, "may bring .*fps.*, got video_start"),
        ({"type": "video", "video": "a.mp4", "fps": -1.0}, "`fps` must be a positive number, got -1.0"),
        ({"type": "video", "video": "a.mp4", "fps": 1.0, "nframes": 4}, "mutually exclusive"),
        ({"type": "video", "video": "a.mp4", "num_frames": 8, "nframes": 4}, "brings `num_frames` twice"),
        ({"type": "video_url", "video_url": {"url": "a.mp4", "fps": 1.0}, "fps": 2.0}, "brings `fps` twice"),
        ({"type": "video", "video": "a.mp4", "path": "b.mp4"}, "must have one of .*, got video and path"),
        ({"type": "image", "url": "a.png", "max_pixels": 100}, "brings no max_pixels for itself"),
        ({"type": "movie", "movie": "a.mp4"}, "must be of one of the types .*video.*, got 'movie'"),
    ],
)
def test_what_would_be_ignored_is_refused(processor, part, message):
    with pytest.raises(ValueError, match=message):
        apply(processor, part)


def test_conversations_are_left_as_they_are():
    conversation = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a.mp4", "fps": 1.0}}]}]
    kept = repr(conversation)
    assert plain_conversation([conversation, conversation])[0][0]["content"][0]["video"].options == {"fps": 1.0}
    assert repr(conversation) == kept
    assert plain_conversation([{"role": "user", "content": "What?"}]) == [{"role": "user", "content": "What?"}]


def test_setting_the_sampling_of_a_processor(processor, video_file):
    """The one that is set last holds."""
    video_processor = processor.video_processor
    video_processor.fps = 2.0
    assert video_processor.num_frames is None
    assert processor(videos=[video_file])["video_grid_thw"].tolist() == [[3, 4, 6]]
    video_processor.num_frames = 8
    assert video_processor.fps is None
    assert processor(videos=[video_file])["video_grid_thw"].tolist() == [[4, 4, 6]]
    assert type(video_processor)(**video_processor.to_dict()).to_dict() == video_processor.to_dict()
