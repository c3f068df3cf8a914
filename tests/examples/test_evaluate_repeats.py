# SPDX-License-Identifier: Apache-2.0
import json

import evaluate_repeats
import pytest
import torch
from evaluate_needle import make_needle
from evaluate_repeats import draw, overlap

from transformers_vamba.generation.locate import VideoReading


def test_slides_change_and_a_pointer_moves_now_and_then():
    video = make_needle(3, 96, 0.5)
    video.shapes, video.flashes = [], []
    for scene, changes in (("slides", {40, 80}), ("screen", {*range(1, 7), *range(25, 31), *range(73, 79), 49})):
        frames = draw(video, scene, 0, 96)
        assert frames.shape == (96, 3, 112, 112) and frames.dtype == torch.uint8
        moved = (frames[1:] != frames[:-1]).flatten(1).any(1).nonzero().flatten() + 1
        assert changes <= set(moved.tolist()) and len(moved) < 40
        assert torch.equal(frames[30:60], draw(video, scene, 30, 60))


def test_overlap_is_of_time():
    video = make_needle(3, 40, 0.5)
    start, stop = video.shapes[0].start / 2, video.shapes[0].stop / 2
    reading = VideoReading(torch.tensor([0.0, 1, 0]), torch.tensor([0, start, stop], dtype=torch.float64))
    assert overlap(reading, video) == 1
    twice = VideoReading(torch.tensor([0.0, 1, 0]), torch.tensor([0, start, 2 * stop - start], dtype=torch.float64))
    assert overlap(twice, video) == pytest.approx(0.5)


def test_the_tiny_model_without_repeats(tmp_path, capsys):
    evaluate_repeats.main(["--frames", "60", "--scenes", "still,waves", "--samples", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "repeats.json").read_text())["rows"]
    assert [(row["scene"], row["way"]) for row in rows] == [
        (scene, way) for scene in ("still", "waves") for way in ("whole", "dropped")
    ]
    still, dropped, *waves = rows
    assert still["tokens"] == 480 and dropped["tokens"] < 300 and [row["tokens"] for row in waves] == [480, 480]
    assert still["right"] == dropped["right"] == still["questions"]
    assert dropped["overlap"] > 0.5
    assert (tmp_path / "repeats.md").read_text() in capsys.readouterr().out
