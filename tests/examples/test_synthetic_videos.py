# SPDX-License-Identifier: Apache-2.0
import re

import av
import numpy as np
import pytest
import torch
from synthetic_videos import (
    COLOURS,
    DIRECTIONS,
    MAX_FLASHES,
    MIN_GAP,
    QUESTIONS,
    STORIES,
    iter_frames,
    pack_videos,
    render_frames,
    sample_video,
    write_mp4,
)


def watch(video):
    """The answers to all questions that the video could carry, read off its frames: which colours are there in which
    frame, where, and which frames are white."""
    frames = np.stack(list(iter_frames(video)))
    is_flash = (frames == 255).all(axis=(1, 2, 3))
    colours = {}  # of each: the frames that show it, and its mean position in each of these, as (x, y)
    for name, rgb in COLOURS.items():
        pixels = (frames == np.array(rgb)).all(axis=-1)
        visible = np.flatnonzero(pixels.any(axis=(1, 2)))
        if len(visible):
            colours[name] = (visible, np.array([np.argwhere(pixels[t]).mean(axis=0)[::-1] for t in visible]))
    answers = {"flashes": str(int(is_flash[0]) + int((is_flash[1:] & ~is_flash[:-1]).sum()))}
    kinds = {shape.colour: shape.kind for shape in video.shapes}

    def name(colour):
        return f"{'an' if colour == 'orange' else 'a'} {colour} {kinds[colour]}"

    by_time = sorted(colours, key=lambda colour: colours[colour][0][0])
    if video.story == "movement":
        (mover,) = [c for c, (_, places) in colours.items() if np.abs(places - places[0]).max() > 1]
        moved = colours[mover][1][-1] - colours[mover][1][0]
        direction = max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], moved))
        answers |= {"moved_colour": mover, "moved_shape": kinds[mover], "direction": direction}
    elif video.story == "start_end":
        (start,) = [colour for colour, (visible, _) in colours.items() if visible[0] == 0]
        (end,) = [colour for colour, (visible, _) in colours.items() if visible[-1] == len(frames) - 1]
        answers |= {"start": name(start), "end": name(end)}
    elif len(colours) == 1:
        answers |= {"appeared": name(by_time[0])}
    else:
        answers |= {"order": ", then ".join(by_time), "first": name(by_time[0]), "last": name(by_time[-1])}
    return answers


@pytest.mark.parametrize("num_frames", [8, 9, 12, 32, 128, 512])
@pytest.mark.parametrize("story", STORIES)
def test_answers_are_what_the_frames_show(story, num_frames):
    for seed in range(max(2, 256 // num_frames)):
        video = sample_video([seed, num_frames], num_frames, story)
        assert {question.kind: question.answer for question in video.questions} == watch(video)
        assert all(question.text in QUESTIONS[question.kind] for question in video.questions)


@pytest.mark.parametrize("num_frames", [8, 20, 2048])
def test_events_are_apart_and_within_the_video(num_frames):
    for seed in range(300):
        video = sample_video(seed, num_frames)
        events = [(shape.move_start, shape.move_stop) for shape in video.shapes if shape.move_stop]
        if video.story != "movement":
            events += [(shape.start, shape.stop) for shape in video.shapes]
        events = sorted(events + video.flashes)
        assert all(0 <= start < stop <= num_frames and stop - start >= 2 for start, stop in events)
        assert all(later[0] - earlier[1] >= MIN_GAP for earlier, later in zip(events, events[1:], strict=False))


def test_the_seed_decides():
    assert sample_video(3, 32) == sample_video(3, 32)
    assert len({sample_video(seed, 32).describe() for seed in range(50)}) == 50


def test_every_answer_occurs():
    answers = {}
    for seed in range(2000):
        for question in sample_video(seed, 32).questions:
            answers.setdefault(question.kind, set()).add(question.answer)
    assert answers["flashes"] == {str(count) for count in range(MAX_FLASHES + 1)}
    assert answers["moved_colour"] == set(COLOURS)
    assert answers["direction"] == set(DIRECTIONS)
    assert len(answers["start"]) == len(answers["appeared"]) == 6 * 4
    assert all(re.fullmatch(r"\w+(, then \w+){1,2}", answer) for answer in answers["order"])


def test_too_few_frames_are_refused():
    with pytest.raises(ValueError, match="num_frames is 7.*at least 8"):
        sample_video(0, 7)


def test_stretches_are_cut_from_the_same_video():
    videos = [sample_video(seed, 24) for seed in range(6)]
    scenes = pack_videos(videos)
    frames = render_frames(scenes, 0, 24)
    assert frames.shape == (6, 24, 3, 112, 112) and frames.dtype == torch.uint8
    assert torch.equal(frames, torch.cat([render_frames(scenes, 0, 5), render_frames(scenes, 5, 24)], dim=1))
    assert np.array_equal(np.stack(list(iter_frames(videos[2], 7))), frames[2].permute(0, 2, 3, 1))


def test_mp4_is_h264_and_shows_the_frames(tmp_path):
    video = sample_video(11, 32)
    write_mp4(tmp_path / "video.mp4", video)
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 2)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    frames = np.stack(list(iter_frames(video)))
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean() < 4
