# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_folders
import convert
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vamba import FIXTURES, TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()


def logits(model, processor) -> torch.Tensor:
    frames = torch.randint(256, (4, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    prompt = "<|vision_start|><|video_pad|><|vision_end|>Which shape moved?"
    inputs = processor(text=prompt, videos=[frames], do_sample_frames=False, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_result_is_whole_and_in_this_packages_layout(published, tmp_path, monkeypatch, capsys):
    destination = tmp_path / "converted"
    run(monkeypatch, published, destination)
    assert f"Wrote {destination}" in capsys.readouterr().out
    assert [folder.name for folder in tmp_path.iterdir()] == ["converted"]

    model = AutoModelForImageTextToText.from_pretrained(destination)
    tied = set(model.all_tied_weights_keys)
    tensors = load_shards(destination)
    assert tensors.keys() == model.state_dict().keys() - tied
    assert {name.split(".")[0] for name in load_shards(published)} == {"model", "visual"}
    assert {".".join(name.split(".")[:2]) for name in tensors} == {"model.visual", "model.language_model"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    index = json.loads((destination / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    for name, shard in index["weight_map"].items():
        with safe_open(destination / shard, "pt") as file:
            assert name in file.keys()

    source = VambaForConditionalGeneration.from_pretrained(published)
    processor = AutoProcessor.from_pretrained(destination)
    expected = logits(source, VambaProcessor.from_pretrained(published))
    assert torch.equal(logits(model, processor), expected)
    assert processor.chat_template == AutoProcessor.from_pretrained(TINY_CHECKPOINT).chat_template
    assert GenerationConfig.from_pretrained(destination).eos_token_id == 2
    assert model.config.architectures == ["VambaForConditionalGeneration"]


def test_a_single_file_in_either_layout(tmp_path):
    convert.convert(TINY_CHECKPOINT, tmp_path / "once")
    convert.convert(tmp_path / "once", tmp_path / "twice")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    expected = load_file(TINY_CHECKPOINT / "model.safetensors")
    assert [*map(torch.Tensor.sum, expected.values())] == [
        *map(torch.Tensor.sum, load_shards(tmp_path / "once").values())
    ]


def test_chat_template_of_the_tokenizer(published, tmp_path):
    """Where Qwen2-VL's checkpoints had it at first."""
    source = shutil.copytree(published, tmp_path / "source")
    template = json.loads((source / "chat_template.json").read_text())
    (source / "chat_template.json").unlink()
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | template))
    convert.convert(source, tmp_path / "converted")
    assert AutoProcessor.from_pretrained(tmp_path / "converted").chat_template == template["chat_template"]


def test_names_of_the_published_code_are_known():
    """Of a checkpoint that the published code itself wrote."""
    checkpoint = FIXTURES / "published"
    names = checkpoint_folders.check_parameters(checkpoint, checkpoint_folders.read_config(checkpoint))
    model = VambaForConditionalGeneration.from_pretrained(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    assert set(names.values()) == model.state_dict().keys()
    assert all(torch.equal(tensors[name], model.state_dict()[ours]) for name, ours in names.items())


def test_interrupted_conversion_goes_on(published, tmp_path, monkeypatch):
    convert.convert(published, tmp_path / "expected")
    rename_parameters, renamed = convert.rename_parameters, []

    def interrupted(source, target, names):
        if len(renamed) == 2:
            target.with_name(target.name + ".unfinished").write_bytes(b"half of it")
            raise KeyboardInterrupt
        rename_parameters(source, target, names)
        renamed.append(target)

    monkeypatch.setattr(convert, "rename_parameters", interrupted)
    destination = tmp_path / "converted"
    with pytest.raises(KeyboardInterrupt):
        convert.convert(published, destination)
    assert not destination.exists()
    inodes = [shard.stat().st_ino for shard in renamed]

    monkeypatch.setattr(convert, "rename_parameters", rename_parameters)
    convert.convert(published, destination)
    assert [(destination / shard.name).stat().st_ino for shard in renamed] == inodes
    assert contents(destination) == contents(tmp_path / "expected")


def test_unfinished_conversion_of_another_source_is_kept(published, tmp_path, monkeypatch):
    destination = tmp_path / "converted"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "check_same_logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert.convert(published, destination)
    before = contents(tmp_path / "converted.partial")
    with pytest.raises(FileExistsError, match="unfinished conversion of another"):
        convert.convert(TINY_CHECKPOINT, destination)
    assert contents(tmp_path / "converted.partial") == before
    convert.convert(TINY_CHECKPOINT, destination, overwrite=True)
    assert [folder.name for folder in tmp_path.iterdir()] == ["converted"]
    assert "model.safetensors.index.json" not in contents(destination)


def test_destination_is_replaced_only_when_told(published, tmp_path, monkeypatch):
    destination = tmp_path / "converted"
    shutil.copytree(TINY_CHECKPOINT, destination)
    before = contents(destination)
    with pytest.raises(SystemExit, match="exists. Pass --overwrite"):
        run(monkeypatch, published, destination)
    assert contents(destination) == before
    run(monkeypatch, published, destination, "--overwrite")
    assert [folder.name for folder in tmp_path.iterdir()] == ["converted"]
    assert "model-00001-of-00004.safetensors" in contents(destination)


def test_what_is_no_model_is_never_replaced(published, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("Once")
    with pytest.raises(FileExistsError, match="holds no model"):
        convert.convert(published, tmp_path / "thesis", overwrite=True)
    for destination in (published, published.parent):
        with pytest.raises(ValueError, match="is read from"):
            convert.convert(published, destination, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "Once"


def test_result_that_differs_is_not_put_in_place(published, tmp_path, monkeypatch):
    rename_parameters = convert.rename_parameters

    def corrupting(source, target, names):
        rename_parameters(source, target, names)
        tensors = load_file(target)
        save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, target, metadata={"format": "pt"})

    monkeypatch.setattr(convert, "rename_parameters", corrupting)
    with pytest.raises(ValueError, match="give logits that differ by up to"):
        convert.convert(published, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


SHARD = "model-00002-of-00004.safetensors"


def edit_shard(folder: Path, edit) -> None:
    tensors = load_file(folder / SHARD)
    edit(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def remove(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


NAME = "model.layers.1.mlp.up_proj.weight"
FAULTS = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"lacks 1 of the 4 shards .*: {SHARD}"),
    "truncated shard": (
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]),
        f"{SHARD}' is no whole safetensors file",
    ),
    "empty shard": (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD}' is no whole safetensors file"),
    "wrong shape": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.update({NAME: torch.zeros(3, 128)})),
        r"1 of another shape \(model.language_model.layers.1.mlp.up_proj.weight \(3, 128\) instead of \(256, 128\)\)",
    ),
    "missing parameter": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.pop(NAME)),
        r"1 missing \(model.language_model.layers.1.mlp.up_proj.weight\)",
    ),
    "unknown parameter": (
        lambda folder: edit_shard(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(3)})),
        r"1 unknown \(model.language_model.extra\)",
    ),
    "unknown architecture": (
        lambda folder: shutil.copy(TINY_CHECKPOINT / "tokenizer_config.json", folder / "config.json"),
        "no Vamba checkpoint: its config.json says model_type None",
    ),
    "unsupported switch": (
        lambda folder: edit_config(folder, use_alpha_balancing=False),
        "`use_alpha_balancing` is False, and only True is supported",
    ),
    "other sizes": (lambda folder: edit_config(folder, intermediate_size=512), "of another shape"),
    "no weights": (lambda folder: remove(folder, "*.safetensors*"), "has no weights: expected model.safetensors"),
    "no configuration": (lambda folder: remove(folder, "config.json"), "config.json"),
    "no processor": (lambda folder: remove(folder, "*processor*", "*token*"), "lacks a processor or a tokenizer"),
    "no vocabulary": (lambda folder: remove(folder, "tokenizer.json"), "its vocabulary is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_source_are_named_and_nothing_is_written(fault, published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path / "source")
    make, message = FAULTS[fault]
    make(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path / "source", tmp_path / "converted")
    assert [folder.name for folder in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_nowhere(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=re.escape(f"There is no folder '{tmp_path / 'nowhere'}'")):
        run(monkeypatch, tmp_path / "nowhere", tmp_path / "converted")


MEASURE_MEMORY = """
import json, resource, sys
from pathlib import Path
sys.path[:0] = {paths}
import convert, torch
from checkpoint_folders import read_config
from transformers_vamba import VambaForConditionalGeneration

tiny, folder = Path({tiny!r}), Path({folder!r})
config = read_config(tiny)
text = {{"hidden_size": 512, "intermediate_size": 2**15, "num_hidden_layers": 2, "num_attention_heads": 16}}
config = type(config)(**config.to_dict() | {{
    "text_config": config.text_config.to_dict() | text | {{"layer_types": None}},
    "vision_config": config.vision_config.to_dict() | {{"hidden_size": 512}},
}})
with torch.device("meta"):
    model = VambaForConditionalGeneration(config)
config.save_pretrained(folder / "source")
convert.load_processor(tiny).save_pretrained(folder / "source")
# A file of zeros, which takes no place on the disk.
header, end = {{"__metadata__": {{"format": "pt"}}}}, 0
for name, tensor in model.state_dict().items():
    if name not in model.all_tied_weights_keys:
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {{"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}}
header = json.dumps(header).encode()
with open(folder / "source" / "model.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + end)

convert.convert(tiny, folder / "tiny")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert(folder / "source", folder / "converted")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(end / 2**20, (after - before) / 2**10)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    code = MEASURE_MEMORY.format(paths=sys.path, tiny=str(TINY_CHECKPOINT), folder=str(tmp_path))
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    size, growth = map(float, completed.stdout.splitlines()[-1].split())
    print(f"{size:.0f} MiB converted, peak memory grew by {growth:.0f} MiB")
    assert size > 400
    assert growth < size / 2  # some of it pages of the files, which a system short of memory takes back
