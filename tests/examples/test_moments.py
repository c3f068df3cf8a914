# SPDX-License-Identifier: Apache-2.0
"""The example that finds a moment, and the program that says how well moments are found."""

import json

import evaluate_moments
import find_moment
import numpy as np
import pytest
import torch
from evaluate_moments import average_precision, judge, make_alike, make_flashes, steps_of
from evaluate_needle import make_order
from synthetic_videos import write_mp4

from transformers_vamba.generation.locate import VideoReading


def test_find_moment_in_a_file(tmp_path, capsys):
    """Both events of a file, at their seconds, with their frames."""
    video = make_order([5, 1], 120, 0.5)
    write_mp4(tmp_path / "order.mp4", video, frame_rate=2.0)
    picture = tmp_path / "moment.png"
    question = "In which order did the colours come?"
    find_moment.main(
        [str(tmp_path / "order.mp4"), question, "--fps", "2", "--device", "cpu", "--output", str(picture)]
    )
    printed = capsys.readouterr().out
    assert ", then ".join(shape.colour for shape in video.shapes) in printed
    for shape in video.shapes:
        assert any(
            find_moment.clock(second / 2) + " to" in printed for second in range(shape.start - 2, shape.stop)
        ), printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_frames_at_their_times(tmp_path):
    video = make_order([5, 1], 40, 0.5)
    write_mp4(tmp_path / "order.mp4", video, frame_rate=2.0)
    _, processor = find_moment.load(find_moment.TINY_MODEL, "cpu")
    shape = video.shapes[0]
    seconds = np.array([shape.start / 2, (shape.stop - 1) / 2, shape.stop / 2])
    first, last, after = find_moment.frames_at(processor, tmp_path / "order.mp4", seconds).astype(int)
    assert np.abs(first - last).mean() < 1 < np.abs(last - after).mean()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "0:00.0"), (59.96, "1:00.0"), (61.25, "1:01.2"), (3661.5, "1:01:01.5"), (float("nan"), "?")],
)
def test_clock(seconds, expected):
    assert find_moment.clock(seconds) == expected


def test_what_is_measured():
    events = [(4, 8), (11, 12)]  # the steps 2 and 3, and 5
    assert steps_of(events, 8).any(0).nonzero()[0].tolist() == [2, 3, 5]
    assert steps_of(events, 8, margin=1)[1].nonzero()[0].tolist() == [4, 5, 6]
    weights = torch.tensor([0.3, 0.01, 0.4, 0.01, 0.01, 0.25, 0.01, 0.01])
    judged = judge(VideoReading(weights, torch.arange(8.0).double()), events)
    assert judged == {"peak": 1.0, "chance": 0.75, "found": 1.0, "right": pytest.approx(2 / 3), "overlap": 0.5}
    assert average_precision(weights.numpy(), events) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert average_precision(np.array([0, 0, 3, 2, 0, 1, 0, 0]), events) == 1


def test_videos_are_what_the_tests_need():
    assert len(make_flashes(0, 60, 0.5).flashes) > 1
    first, second = make_alike(0, 60, 0.5).shapes
    assert (first.kind, first.colour) == (second.kind, second.colour) and first.stop < second.start


def test_the_tiny_model_finds_moments_in_short_videos(tmp_path, capsys):
    evaluate_moments.main(["--frames", "60", "--samples", "2", "--device", "cpu", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "moments.json").read_text())
    (length,) = results["lengths"]
    tests = length["tests"]
    for test in ("needle", "order", "first", "last", "flashes"):
        assert tests[test]["peak"] == 1.0 and tests[test]["found"] > 0.7 > 0.5 > tests[test]["chance"]
    assert list(length["average_precision"]["order"]) == ["locate", "plain mean", *(f"layer {i}" for i in range(4))]
    assert (tmp_path / "moments.png").read_bytes().startswith(b"\x89PNG")
    assert "60 frames, 2 videos of each kind" in capsys.readouterr().out


def test_lengths_without_a_number_of_videos():
    with pytest.raises(SystemExit, match="lengths of at least 24 frames, and as many --samples"):
        evaluate_moments.main(["--frames", "60,240", "--samples", "1,2,3", "--device", "cpu"])
