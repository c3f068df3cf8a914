# SPDX-License-Identifier: Apache-2.0
import json

import evaluate_pruning
import pytest
import torch
from evaluate_needle import make_needle
from evaluate_pruning import BUDGETS, RATES, SCENES, show
from synthetic_videos import COLOURS


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_keep_what_happens(scene):
    video = make_needle(3, 40, 0.5)
    video.flashes = []
    frames = show(video, scene, 10, 34)
    assert frames.shape == (24, 3, 112, 112) and frames.dtype == torch.uint8
    assert torch.equal(frames[8:], show(video, scene, 18, 34)) or scene == "noise"
    is_event = torch.tensor([video.shapes[0].start <= time < video.shapes[0].stop for time in range(10, 34)])
    shape = torch.tensor(COLOURS[video.shapes[0].colour])
    near = ((frames.int() - shape.view(3, 1, 1)).abs().amax(1) <= 8).flatten(1).sum(1)
    assert near[is_event].min() > 200 and near[~is_event].max() < 200
    moved = (frames[1:] != frames[:-1]).flatten(1).any(1)
    assert moved.all() == (scene != "still")


def test_the_tiny_model_with_rates_and_budgets(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_pruning, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(evaluate_pruning, "STREAM_SEEN", (128,))
    monkeypatch.setattr(evaluate_pruning, "STREAM_EVENT", 120)
    arguments = ["--frames", "60", "--scenes", "still", "--samples", "1", "--stream-frames", "320"]
    evaluate_pruning.main([*arguments, "--stream-budget", "512", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "pruning.json").read_text())["rows"]
    assert [(row["kind"], row.get("video_pruning_rate"), row.get("max_video_tokens")) for row in rows] == [
        (kind, *way)
        for kind in ("needle", "order", "exact")
        for way in [(rate, None) for rate in RATES] + [(None, budget) for budget in BUDGETS]
    ]
    # 10 of 30 time steps are left of what stands still.
    assert [row["tokens"] for row in rows[:9]] == [480, 124, 88, 52, 34, 160, 160, 160, 160]
    assert all(row["right"] == row["questions"] for row in rows if row.get("video_pruning_rate", 0) <= 0.25)
    stream = json.loads((tmp_path / "stream.json").read_text())["rows"]
    assert [(row["frames"], row["right"]) for row in stream] == [(128, 1), (320, 1)]
    assert all(row["tokens"] <= 512 and row["cache_mib"] <= 1 for row in stream)
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")
    assert "'max_video_tokens': 256" in capsys.readouterr().out


class Here:
    """In this process, where coverage sees it."""

    def __init__(self, processes, context, prepare, arguments):
        prepare(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    map = staticmethod(map)


def test_unknown_scenes_are_refused():
    with pytest.raises(SystemExit, match="There are no fog among"):
        evaluate_pruning.main(["--scenes", "still,fog"])
