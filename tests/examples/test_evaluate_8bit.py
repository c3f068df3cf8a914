# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from tiny_vamba import FIXTURES, ROOT, TINY_CHECKPOINT

from transformers_vamba import VambaForConditionalGeneration


evaluate_8bit = pytest.importorskip("evaluate_8bit", exc_type=ImportError)  # without torchao


def test_the_tiny_model(tmp_path, capsys):
    evaluate_8bit.main(["--frames", "32", "--samples", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "8bit.json").read_text())["ways"]
    assert list(rows) == evaluate_8bit.WAYS
    assert all(row["right"] == row["questions"] == {"needle": 1, "order": 1, "exact": 4} for row in rows.values())
    error = {way: torch.tensor(row["errors"]).amax().item() for way, row in rows.items()}
    assert error["float32"] == 0 < error["bfloat16"] < 0.01
    assert error["bfloat16"] < error["int8, both"] < error["float8, both"] < 0.06
    first = {way: row["errors"][0][0] for way, row in rows.items()}  # the keys of the first layer are before any mixer
    assert first["bfloat16"] == first["int8, mixers"] == first["float8, mixers"] < first["int8, tower"]
    printed = capsys.readouterr().out
    assert "float8, both: 20 linear layers in 8 bits" in printed and (tmp_path / "8bit.md").read_text() in printed


@pytest.mark.parametrize("kind", evaluate_8bit.FORMATS)
def test_saved_and_loaded(kind, tmp_path):
    model = evaluate_8bit.load(TINY_CHECKPOINT, "cpu", f"{kind}, both")
    quantized = {name for name, module in model.named_modules() if evaluate_8bit.is_quantized(module)}
    assert all(".visual.blocks." in name or ".vision_mixer.mixer." in name for name in quantized)
    assert len(quantized) == 4 * 3 + 2 * 4  # of 3 blocks and 4 layers
    model.save_pretrained(tmp_path)
    loaded = VambaForConditionalGeneration.from_pretrained(tmp_path)
    torch.manual_seed(0)
    video = {"pixel_values_videos": torch.randn(512, 1176), "video_grid_thw": torch.tensor([[8, 8, 8]])}
    caches = [each.encode_video(**video) for each in (model, loaded)]
    for ours, theirs in zip(*(cache.videos[0] for cache in caches)):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_published_layout():
    model = evaluate_8bit.load(FIXTURES / "published", "cpu", "int8, both")
    assert sum(evaluate_8bit.is_quantized(module) for module in model.modules()) == 4 * 2 + 2 * 3


def test_the_documentation_names_the_same_layers():
    page = (ROOT / "docs" / "speed.md").read_text()
    assert all(f'r"{pattern}"' in page for pattern in evaluate_8bit.PARTS["both"])
