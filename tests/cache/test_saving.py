# SPDX-License-Identifier: Apache-2.0
"""Processed videos on disk, as an interrupted save leaves them, or as a stranger wrote them."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vamba import make_media, make_text, tiny_model

from transformers_vamba import VambaCache
from transformers_vamba.evaluation.questions import VideoQuestionAnswering, VideoSettings


VIDEO, OTHER = make_media("video", (5, 4, 6)), make_media("video", (5, 4, 6), seed=1)
SETTINGS = VideoSettings(num_frames=4, fps=None, shortest_edge=28, longest_edge=84)


@pytest.fixture(scope="module", params=("dynamic", "quantized"))
def saved(request, model, tmp_path_factory):
    """A saved cache of two videos, of 30 and 12 tokens."""
    folder = tmp_path_factory.mktemp("saved")
    cache = model.encode_video(**VIDEO, video_cache_implementation=request.param)
    second = model.encode_video(**make_media("video", (2, 4, 6)), video_cache_implementation=request.param)
    cache.videos += second.videos
    cache.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields) -> None:
    content = json.loads((folder / "cache_config.json").read_text()) | fields
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "cache_config.json").write_text(json.dumps(content))


def edit_text_config(folder: Path, **fields) -> None:
    edit_config(folder, text_config=json.loads((folder / "cache_config.json").read_text())["text_config"] | fields)


def edit_layer(folder: Path, edit, layer: int = 1) -> None:
    path = folder / f"layer-{layer:05d}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, metadata=metadata)


def replace(name: str, change):
    """A damage: the first tensor whose name ends so, changed."""

    def edit(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(name))
        tensors[key] = change(tensors[key]).contiguous()

    return lambda folder: edit_layer(folder, edit)


def drop_tokens(tensors, prefix="0."):
    """One layer's part of a video, shorter than the others and whole in itself."""
    for name, tensor in tensors.items():
        if name.startswith(prefix) and tensor.ndim == 4 and tensor.shape[2] > 16 and not name.endswith("ssm"):
            tensors[name] = tensor[:, :, :-2].contiguous()


FIELDS = ("num_videos", "rows", "video_cache_implementation", "text_config", "cache_id")
DAMAGES = {
    **{f"no {name}": lambda folder, name=name: edit_config(folder, **{name: ...}) for name in FIELDS},
    "a list": lambda folder: (folder / "cache_config.json").write_text("[]"),
    "a number": lambda folder: (folder / "cache_config.json").write_text("3"),
    "no JSON": lambda folder: (folder / "cache_config.json").write_text("{"),
    "no text": lambda folder: (folder / "cache_config.json").write_bytes(b"\xff\xfe\x00"),
    "deep": lambda folder: (folder / "cache_config.json").write_text("[" * 10**6),
    "-1 videos": lambda folder: edit_config(folder, num_videos=-1),
    "a billion videos": lambda folder: edit_config(folder, num_videos=10**9),
    "one video more": lambda folder: edit_config(folder, num_videos=3),
    "one video fewer": lambda folder: edit_config(folder, num_videos=1),
    "videos in words": lambda folder: edit_config(folder, num_videos="2"),
    "half a video": lambda folder: edit_config(folder, num_videos=2.0),
    "true videos": lambda folder: edit_config(folder, num_videos=True),
    "a row of video 2": lambda folder: edit_config(folder, rows=[0, 2]),
    "a row of video -1": lambda folder: edit_config(folder, rows=[0, -1]),
    "a row in words": lambda folder: edit_config(folder, rows=["0", None]),
    "rows as an object": lambda folder: edit_config(folder, rows={"0": 1}),
    "an unknown way": lambda folder: edit_config(folder, video_cache_implementation="int8"),
    "a way in a list": lambda folder: edit_config(folder, video_cache_implementation=["dynamic"]),
    "a billion layers": lambda folder: edit_text_config(folder, num_hidden_layers=10**9),
    "layers in words": lambda folder: edit_text_config(folder, num_hidden_layers="3"),
    "a layer more": lambda folder: edit_text_config(folder, num_hidden_layers=4, layer_types=None),
    "no heads": lambda folder: edit_text_config(folder, num_attention_heads=0),
    "another head size": lambda folder: edit_text_config(folder, num_key_value_heads=4),
    "another state size": lambda folder: edit_text_config(folder, mamba_d_state=32),
    "sizes in words": lambda folder: edit_text_config(folder, hidden_size="64"),
    "a list of sizes": lambda folder: edit_config(folder, text_config=[64]),
    "a missing layer": lambda folder: (folder / "layer-00001.safetensors").unlink(),
    "a folder for a layer": lambda folder: [
        (folder / "layer-00001.safetensors").unlink(),
        (folder / "layer-00001.safetensors").mkdir(),
    ],
    "a truncated layer": lambda folder: (folder / "layer-00001.safetensors").write_bytes(
        (folder / "layer-00001.safetensors").read_bytes()[:-1]
    ),
    "an empty layer": lambda folder: (folder / "layer-00001.safetensors").write_bytes(b""),
    "another layer without an id": lambda folder: save_file(
        load_file(folder / "layer-00001.safetensors"), folder / "layer-00001.safetensors"
    ),
    "one value": replace(("values", "value_codes"), lambda tensor: tensor[:, :, :1]),
    "one scale": replace(("values", "value_scales"), lambda tensor: tensor[:, :, :1]),
    "no tokens": replace(("keys", "key_codes"), lambda tensor: tensor[:, :, :0]),
    "a head less": replace(("keys", "key_codes"), lambda tensor: tensor[:, :1]),
    "another dtype": replace(("keys", "key_scales"), lambda tensor: tensor.half()),
    "integers": replace(("keys", "key_scales"), lambda tensor: tensor.to(torch.int32)),
    "a state of another size": replace("ssm", lambda tensor: tensor[..., :-1]),
    "a flat state": replace("ssm", torch.flatten),
    "a convolution of another size": replace("conv", lambda tensor: tensor[:, 1:]),
    "a shorter layer": lambda folder: edit_layer(folder, drop_tokens),
    "a shorter last layer": lambda folder: edit_layer(folder, drop_tokens, layer=2),
    "no state": lambda folder: edit_layer(folder, lambda tensors: tensors.pop("1.ssm")),
    "no keys": lambda folder: edit_layer(
        folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("1.key")]
    ),
    "more than keys": lambda folder: edit_layer(folder, lambda tensors: tensors.update(extra=torch.zeros(1))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_named_at_loading(damage, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "cache")
    DAMAGES[damage](folder)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"processed video is damaged: '{folder}/(cache_config.json|layer-0000[012])"):
        VambaCache.from_pretrained(folder)
    assert time.perf_counter() - start < 5


def test_a_centre_of_another_size(model, tmp_path):
    model.encode_video(**VIDEO, video_cache_implementation="quantized").save_pretrained(tmp_path)
    replace("key_centre", lambda tensor: tensor[..., :8])(tmp_path)
    with pytest.raises(
        ValueError, match=r"has key_centre of shape \(1, 2, 1, 8\) for video 0, expected \(1, 2, 1, 16"
    ):
        VambaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("num_replaced", range(1, 4))
def test_interrupted_save_over_a_saved_cache(model, tmp_path, monkeypatch, num_replaced):
    """Whichever files are of which video, they never load as one."""
    model.encode_video(**VIDEO).save_pretrained(tmp_path)
    replace_file, replaced = Path.replace, []

    def interrupted(path, target):
        if len(replaced) == num_replaced:
            raise KeyboardInterrupt
        replaced.append(target)
        return replace_file(path, target)

    other = model.encode_video(**OTHER)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of another save .* as after a save that was interrupted"):
        VambaCache.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    loaded = VambaCache.from_pretrained(tmp_path)
    assert torch.equal(loaded.videos[0][0].keys, other.videos[0][0].keys)


def test_layers_of_two_caches(model, tmp_path):
    for name, video in (("one", VIDEO), ("other", OTHER)):
        model.encode_video(**video).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "other" / "layer-00002.safetensors", tmp_path / "one")
    with pytest.raises(ValueError, match="layer-00002.safetensors' is of another save"):
        VambaCache.from_pretrained(tmp_path / "one")


def test_saved_before_there_were_ids(model, tmp_path):
    cache = model.encode_video(**VIDEO)
    cache.save_pretrained(tmp_path)
    edit_config(tmp_path, cache_id=...)
    for path in tmp_path.glob("*.safetensors"):
        save_file(load_file(path), path)
    assert torch.equal(VambaCache.from_pretrained(tmp_path).videos[0][2].values, cache.videos[0][2].values)


def test_a_deeper_models_layers_go(tmp_path):
    tiny_model(num_hidden_layers=5).encode_video(**VIDEO).save_pretrained(tmp_path)
    tiny_model().encode_video(**VIDEO).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache_config.json",
        *(f"layer-0000{layer}.safetensors" for layer in range(3)),
        "steps.safetensors",
    ]


def test_a_cache_without_videos(model, tmp_path):
    VambaCache(model.config).save_pretrained(tmp_path)
    assert VambaCache.from_pretrained(tmp_path).videos == []
    edit_text_config(tmp_path, num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(ValueError, match="has a text_config that is no Vamba's .*at most 1024"):
        VambaCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ("no num_videos", "deep", "one value", "a missing layer", "a billion layers"))
def test_evaluation_makes_a_damaged_cache_anew(damage, model, processor, video_file, tmp_path):
    answering = VideoQuestionAnswering(model, processor, video_cache=tmp_path / "kept")
    expected = answering.encode([video_file], SETTINGS)
    (folder,) = (tmp_path / "kept").iterdir()
    DAMAGES[damage](folder)
    found = answering.encode([video_file], SETTINGS)
    text = make_text()
    with torch.no_grad():
        logits = [model(input_ids=text, cache=cache.fork()).logits for cache in (found, expected)]
    assert torch.equal(*logits)
    assert VambaCache.from_pretrained(folder).video_lengths == expected.video_lengths
