# SPDX-License-Identifier: Apache-2.0
import json

import evaluate_needle
import pytest
from evaluate_needle import is_right, make_needle, make_order
from synthetic_videos import MIN_GAP, pack_videos, render_frames


@pytest.mark.parametrize("num_frames", [24, 61, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_events_are_where_they_should_be(num_frames, seed):
    for depth in (0.0, 0.3, 1.0):
        (shape,) = make_needle(seed, num_frames, depth).shapes
        assert 3 <= shape.stop - shape.start <= 8
        assert shape.start == round(depth * (num_frames - (shape.stop - shape.start)))
    for distance in (0.0, 0.3, 1.0):
        video = make_order(seed, num_frames, distance)
        first, second = video.shapes
        longest = num_frames - (first.stop - first.start) - (second.stop - second.start)
        gap = second.start - first.stop
        assert gap == pytest.approx(MIN_GAP + distance * (longest - MIN_GAP), abs=0.5)
        assert 0 <= first.start and second.stop <= num_frames
        assert first.colour != second.colour
        for start, stop in video.flashes:
            assert all(stop + MIN_GAP <= shape.start or start >= shape.stop + MIN_GAP for shape in video.shapes)


def test_a_needle_is_in_its_frames_and_in_no_other():
    video = make_needle(3, 40, 0.5)
    video.flashes = []
    frames = render_frames(pack_videos([video]), 0, 40)[0].int()
    changed = (frames != frames[0]).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == list(range(video.shapes[0].start, video.shapes[0].stop))


def test_what_counts_as_right():
    needle, order = make_needle(0, 40, 0.5), make_order(0, 40, 0.5)
    shape, (first, second) = needle.shapes[0], order.shapes
    assert is_right("needle", needle, f"{shape}") and is_right("needle", needle, f"It was {shape}.".upper())
    assert not is_right("needle", needle, shape.colour) and not is_right("needle", needle, "")
    assert is_right("order", order, f"{first.colour}, then {second.colour}")
    assert not is_right("order", order, f"{second.colour}, then {first.colour}")
    assert not is_right("order", order, first.colour) and not is_right("order", order, second.colour)


def test_the_tiny_model_finds_what_is_in_short_videos(tmp_path, capsys):
    arguments = ["--minutes", "0.4,0.5", "--shares", "0.2,0.8", "--samples", "2", "--device", "cpu"]
    evaluate_needle.main([*arguments, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "needle.json").read_text())
    assert results["frames"] == [24, 30]
    assert results["needle"] == results["order"] == [[1.0, 1.0], [1.0, 1.0]]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert "needle, 30 frames: [1.0, 1.0]" in capsys.readouterr().out


def test_too_short_videos_are_refused():
    with pytest.raises(SystemExit, match="at least 24 frames, got lengths of \\[6\\]"):
        evaluate_needle.main(["--minutes", "0.1", "--device", "cpu"])
