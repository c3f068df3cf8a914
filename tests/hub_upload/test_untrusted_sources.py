# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, adapters and results of strangers: nothing lost, nothing leaked, nothing run."""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import checkpoint_folders
import convert
import init_from_qwen2_vl
import peft
import push
import pytest
import torch
from huggingface_hub import ModelCard
from layouts import write_qwen2_vl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor


SECRET = "hf_secretOfTheUser"
CARD = {"repo_id": "me/x", "base_model": None, "license": "mit", "results": None}


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def edit(file: Path, **fields) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | fields))


def edit_tensors(folder: Path, change=lambda tensors: None, **metadata) -> None:
    """Changes the tensors of the first shard of a checkpoint, or writes into its header."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt", **metadata})


def run_convert(source, destination):
    convert.convert(source, destination)


def run_push(source, destination):
    push.write_repository(source, destination, **CARD)


def run_init(source, destination):
    init_from_qwen2_vl.init_from_qwen2_vl(source, destination)


COMMANDS = {"convert": run_convert, "push": run_push, "init": run_init}


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory):
    return write_qwen2_vl(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


@pytest.fixture
def source(command, published, qwen2_vl, tmp_path):
    """What the command takes, sharded, to be spoilt."""
    return shutil.copytree(qwen2_vl if command is run_init else published, tmp_path / "source")


def refused(command, source, tmp_path, message):
    """The command fails with this message, quickly, and leaves everything as it was."""
    before = hashes(tmp_path)
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError), match=message):
        command(source, tmp_path / "result")
    assert time.perf_counter() - start < 20
    assert hashes(tmp_path) == before
    assert not (tmp_path / "result").exists() and not (tmp_path / "result.partial").exists()


# Names of shards


def rename_shard(folder: Path, name: str, at: Path) -> None:
    """Moves the first shard elsewhere, and lists it in the index by this name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    at.parent.mkdir(parents=True, exist_ok=True)
    (folder / shard).rename(at)
    index["weight_map"] = {key: name if value == shard else value for key, value in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ("../outside.safetensors", "sub/part.safetensors", "absolute", "a.bin", "..", "", 3))
def test_shard_names_are_plain(command, source, tmp_path, name):
    at = tmp_path / "elsewhere" / "part.safetensors"
    if name == "sub/part.safetensors":
        at = source / name
    elif name == "../outside.safetensors":
        at = tmp_path / "outside.safetensors"
    rename_shard(source, str(at) if name == "absolute" else name, at)
    refused(command, source, tmp_path, "lists the shard .*, expected the plain name of a .safetensors file")


def test_two_shards_of_one_name(command, source, tmp_path):
    """The second used to be written over the first, which was the user's own file."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = {first: "a/part.safetensors", second: "b/part.safetensors"}
    for old, new in moved.items():
        (source / new).parent.mkdir()
        (source / old).rename(source / new)
    index["weight_map"] = {name: moved.get(shard, shard) for name, shard in index["weight_map"].items()}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, source, tmp_path, "lists the shard 'a/part.safetensors'")


@pytest.mark.parametrize("shares_blocks", (True, False))
def test_a_made_folder_can_be_edited_without_touching_the_source(
    command, source, tmp_path, monkeypatch, shares_blocks
):
    if not shares_blocks:  # a system without copies that share blocks
        monkeypatch.delattr(os, "copy_file_range")
    before = hashes(source)
    command(source, tmp_path / "result")
    for file in (tmp_path / "result").iterdir():
        assert not file.is_symlink()
        with open(file, "r+b") as opened:
            opened.write(b"edited")
    assert hashes(source) == before


def test_copies_are_whole(published, tmp_path):
    for name, remove in (("with", False), ("without", True)):
        with pytest.MonkeyPatch.context() as patch:
            if remove:
                patch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "another device")))
            run_push(published, tmp_path / name)
        for shard in published.glob("*.safetensors"):
            assert (tmp_path / name / shard.name).read_bytes() == shard.read_bytes()


# Code, links and fields of strangers


FILES_WITH_AUTO_MAP = ("config.json", "preprocessor_config.json", "tokenizer_config.json", "processor_config.json")
STRANGE_MAP = {
    "AutoConfig": "stranger/code--configuration_x.X",
    "AutoModel": "stranger/code--modeling_x.X",
    "AutoTokenizer": ["stranger/code--tokenization_x.X", None],
    "AutoImageProcessor": "stranger/code--image_processing_x.X",
    "AutoProcessor": "processing_x.X",
}


def test_auto_maps_of_the_source_are_dropped(command, source, tmp_path):
    for name in (*FILES_WITH_AUTO_MAP, "video_preprocessor_config.json", "generation_config.json"):
        edit(source / name, auto_map=STRANGE_MAP, custom_generate="stranger/code")
    config = json.loads((source / "config.json").read_text())
    edit(source / "config.json", vision_config=config["vision_config"] | {"auto_map": STRANGE_MAP})
    edit(source / "processor_config.json", image_processor={"auto_map": STRANGE_MAP, "patch_size": 14})
    edit(source / "processor_config.json", video_processor={"auto_map": STRANGE_MAP})
    (source / "tokenization_x.py").write_text("raise AssertionError('foreign code ran')")
    command(source, tmp_path / "result")
    for file in (tmp_path / "result").glob("*.json"):
        assert "stranger" not in file.read_text() and "_x.X" not in file.read_text(), file
        auto_map = json.loads(file.read_text()).get("auto_map")
        assert auto_map in (None, push.AUTO_MAP)
    assert not (tmp_path / "result" / "tokenization_x.py").exists()


LINKED = ("generation_config.json", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json")
LINKED += ("preprocessor_config.json", "merges.txt", "model.safetensors.index.json", "special_tokens_map.json")


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("content", ("text", "json"))
def test_links_out_of_the_folder_are_refused(command, source, tmp_path, name, content):
    (tmp_path / "secret").write_text(SECRET if content == "text" else json.dumps({"chat_template": SECRET}))
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret" if content == "text" else Path("..") / "secret")
    refused(command, source, tmp_path, f"{name}' is a link to .*secret', out of its folder")


def test_links_of_shards_and_dangling_links(command, source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(command, source, tmp_path, "is a link to .*elsewhere.safetensors', out of its folder")
    (tmp_path / "elsewhere.safetensors").unlink()
    with pytest.raises(ValueError, match="is a link to .*elsewhere.safetensors', out of its folder"):
        command(source, tmp_path / "result")


def test_a_pipe_is_not_waited_for(command, source, tmp_path):
    (source / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(source / "generation_config.json")
    with pytest.raises(ValueError, match="generation_config.json' is no file"):
        command(source, tmp_path / "result")


def test_the_hubs_cache_is_made_of_links(command, source, tmp_path):
    """A snapshot's files are links to its repository's blobs, and to those alone."""
    repository = tmp_path / "models--me--x"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    command(snapshot, tmp_path / "result")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "generation_config.json").unlink(missing_ok=True)
    (snapshot / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="out of its folder"):
        command(snapshot, tmp_path / "other")


def add_secrets(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"] | {"_name_or_path": "/home/user/secret", "hf_token": SECRET}
    edit(folder / "config.json", hf_token=SECRET, _name_or_path="/home/user/secret", vision_config=vision)
    edit(folder / "config.json", quantization_config={"dataset": SECRET}, id2label={"0": SECRET})
    edit(folder / "config.json", attn_implementation="stranger/kernel", num_labels=10**9)
    edit(folder / "generation_config.json", hf_token=SECRET, eos_token_id=2)
    edit(folder / "tokenizer_config.json", hf_token=SECRET, name_or_path="/home/user/secret", tokenizer_file="/etc/x")
    edit(folder / "preprocessor_config.json", hf_token=SECRET, cache_dir="/home/user/secret")
    edit(folder / "processor_config.json", hf_token=SECRET, image_processor={"hf_token": SECRET, "patch_size": 14})
    if (folder / "model.safetensors.index.json").is_file():
        edit(folder / "model.safetensors.index.json", metadata={"hf_token": SECRET}, hf_token=SECRET)
    (folder / "trainer_state.json").write_text(json.dumps({"hf_token": SECRET}))
    (folder / ".env").write_text(SECRET)
    edit_tensors(folder, hf_token=SECRET)


def test_unknown_fields_are_left_out(command, source, tmp_path):
    add_secrets(source)
    command(source, tmp_path / "result")
    for file in (tmp_path / "result").rglob("*"):
        content = file.read_bytes()
        for secret in (SECRET, "/home/user", "/etc/x", "stranger/kernel", str(tmp_path), "checked-"):
            assert secret.encode() not in content, (file, secret)
    assert json.loads((tmp_path / "result" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_what_is_left_out_is_named(published, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(published, tmp_path / "source")
    add_secrets(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["push.py", str(source), "me/x", "--dry-run"])
    push.main()
    printed = capsys.readouterr().out
    for name in ("hf_token", "_name_or_path", "vision_config.hf_token", "vision_config._name_or_path"):
        assert repr(name) in next(line for line in printed.splitlines() if line.startswith("Left out: config.json:"))
    for line in (
        "generation_config.json: 'hf_token'",
        "processor_config.json: 'hf_token', 'image_processor.hf_token'",
    ):
        assert f"Left out: {line}\n" in printed
    assert "Left out: model-00001-of-00004.safetensors: 'hf_token'\n" in printed
    assert "Left out: '.env'\n" in printed and "Left out: 'trainer_state.json'\n" in printed
    assert SECRET not in printed
    convert.convert(source, tmp_path / "converted")
    assert "Left out: generation_config.json: 'hf_token'\n" in capsys.readouterr().out


def test_a_clean_checkpoint_leaves_nothing_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["push.py", str(TINY_CHECKPOINT), "me/x", "--dry-run"])
    push.main()
    assert "Left out" not in capsys.readouterr().out


# Damaged files


def set_field(name: str, **fields):
    return lambda folder: edit(folder / name, **fields)


def write(name: str, content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


INDEX = "model.safetensors.index.json"
DAMAGES = {
    "index: a list": (write(INDEX, "[]"), "index.json' holds a JSON list"),
    "index: a number": (write(INDEX, "1"), "index.json' holds a JSON int"),
    "index: no JSON": (write(INDEX, "{"), "index.json' is no JSON"),
    "index: no text": (write(INDEX, b"\xff\xfe"), "index.json' is no JSON"),
    "index: no map": (write(INDEX, "{}"), "index.json' has no weight_map"),
    "index: a list of names": (write(INDEX, '{"weight_map": ["x"]}'), "index.json' has no weight_map"),
    "index: an empty map": (write(INDEX, '{"weight_map": {}}'), "index.json' has no weight_map"),
    "index: a map of maps": (write(INDEX, '{"weight_map": {"x": {}}}'), "lists the shard {}"),
    "config: a list": (write("config.json", "[]"), "config.json' holds a JSON list"),
    "config: deep": (write("config.json", "[" * 10**5), "config.json' is no JSON"),
    "config: null": (write("config.json", "null"), "config.json' holds a JSON NoneType"),
    "config: sizes in words": (set_field("config.json", hidden_size="64"), "config.json of .* is no"),
    "config: vision in words": (set_field("config.json", vision_config="large"), "config.json of .* is no"),
    "config: a list of vision": (set_field("config.json", vision_config=[1]), "config.json of .* is no"),
    "config: rope in words": (set_field("config.json", rope_scaling="mrope"), "config.json of .* is no"),
    "config: a billion layers": (
        set_field("config.json", num_hidden_layers=10**9),
        r"says num_hidden_layers 1000000000, and its files hold \d+ tensors",
    ),
    "config: a thousand layers": (set_field("config.json", num_hidden_layers=1000), "says num_hidden_layers 1000"),
    "config: a billion blocks": (
        set_field("config.json", vision_config={"depth": 10**9, "hidden_size": 64, "embed_dim": 32}),
        "says depth 1000000000",
    ),
    "config: no heads": (set_field("config.json", num_attention_heads=0), "config.json of .* (is no|describes no)"),
    "config: sizes beyond memory": (set_field("config.json", vocab_size=10**18), "config.json of .* describes no"),
    "generation: a list": (write("generation_config.json", "[]"), "generation_config.json' holds a JSON list"),
    "generation: no JSON": (write("generation_config.json", "x"), "generation_config.json' is no JSON"),
    "tokenizer: a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json' holds a JSON list"),
    "processor: a number": (write("preprocessor_config.json", "1"), "preprocessor_config.json' holds a JSON int"),
    "vocabulary: a list": (write("tokenizer.json", "[]"), "lacks a processor or a tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(command, source, tmp_path, damage):
    make, message = DAMAGES[damage]
    make(source)
    refused(command, source, tmp_path, message)


def test_numbers_that_are_none(command, source, tmp_path):
    shard = sorted(source.glob("*.safetensors"))[0]
    intact = shard.read_bytes()
    with safe_open(shard, "pt") as file:
        name = max(file.keys(), key=lambda name: math.prod(file.get_slice(name).get_shape()))

    def fill(value):
        def change(tensors):
            tensors[name].view(-1)[-1] = value

        return change

    for value in (math.nan, math.inf, -math.inf):
        edit_tensors(source, fill(value))
        refused(command, source, tmp_path, f"holds 1 parameters with NaN or infinite values .{name}")
    shard.write_bytes(intact)
    for dtype in (torch.int32, torch.int8, torch.bool):
        edit_tensors(source, lambda tensors, dtype=dtype: tensors.update({name: tensors[name].to(dtype)}))
        refused(
            command, source, tmp_path, f"holds 1 parameters that are not floating point of 16 bits or more .{name} "
        )
        shard.write_bytes(intact)


def test_a_large_tensor_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folders, "PIECE", 64)
    tensors = {"a": torch.zeros(1000, dtype=torch.bfloat16), "b": torch.zeros(0), "c": torch.ones(())}
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint_folders.check_numbers(tmp_path / "x.safetensors")
    for index in (0, 31, 32, 999):
        damaged = tensors["a"].clone()
        damaged[index] = math.nan
        save_file(tensors | {"a": damaged}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"1 parameters with NaN or infinite values \(a\)"):
            checkpoint_folders.check_numbers(tmp_path / "x.safetensors")


@pytest.mark.parametrize("write_with", ("convert", "push"))
def test_two_names_for_one_parameter(write_with, published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")

    def double(tensors):
        name = next(name for name in tensors if name.startswith("model."))
        tensors["model.language_model." + name.removeprefix("model.")] = tensors[name].clone()

    edit_tensors(source, double)
    refused(COMMANDS[write_with], source, tmp_path, r"2 under two names \(model\..*, model\.language_model\.")


# What stands beside the destination


@pytest.mark.parametrize("kind", ("folder", "file", "link", "dangling link"))
def test_leftover_replaced_is_named_first_and_left(command, source, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(checkpoint_folders, "read_header", lambda *_: pytest.fail("the source was read before"))
    replaced = tmp_path / "result.replaced"
    {
        "folder": lambda: replaced.mkdir(),
        "file": lambda: replaced.write_text("notes"),
        "link": lambda: replaced.symlink_to(source),
        "dangling link": lambda: replaced.symlink_to("nowhere"),
    }[kind]()
    before = hashes(tmp_path)
    with pytest.raises(FileExistsError, match="result.replaced' exists, and is needed to replace"):
        command(source, tmp_path / "result")
    assert hashes(tmp_path) == before and (replaced.is_symlink() or replaced.exists())


@pytest.mark.parametrize("kind", ("folder", "file", "record in words"))
def test_a_partial_folder_of_somebody_else_is_named_and_left(command, source, tmp_path, kind):
    partial = tmp_path / "result.partial"
    if kind == "file":
        partial.write_text("notes")
    else:
        partial.mkdir()
        (partial / "notes.txt").write_text("notes")
    if kind == "record in words":
        (partial / "unfinished.json").write_text('{"command": ["convert.py"]}')
    before = hashes(tmp_path)
    with pytest.raises(FileExistsError, match="result.partial' exists and is "):
        command(source, tmp_path / "result")
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", ("result.partial", "result"))
@pytest.mark.parametrize("to", ("folder", "nowhere"))
def test_links_for_destinations_are_refused(command, source, tmp_path, name, to):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / name).symlink_to(tmp_path / to)
    with pytest.raises(FileExistsError, match=f"{name}' is a link to .*{to}', which is not followed"):
        command(source, tmp_path / "result")
    assert (tmp_path / name).is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["config.json"]


def test_unfinished_work_of_another_command_is_left(published, qwen2_vl, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convert, "check_same_logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_convert(published, tmp_path / "result")
    before = hashes(tmp_path)
    for source, command in ((published, run_push), (qwen2_vl, run_init)):
        with pytest.raises(FileExistsError, match="result.partial' exists and is the unfinished work of 'convert.py'"):
            command(source, tmp_path / "result")
    assert hashes(tmp_path) == before
    run_convert(published, tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert not (tmp_path / "result" / "unfinished.json").exists()


@pytest.mark.parametrize("name", ("result", "result.partial", "result.replaced"))
def test_the_source_is_not_where_the_result_goes(command, source, tmp_path, name):
    source = source.rename(tmp_path / name)
    checkpoint_folders.start(tmp_path / "x", "convert.py").rename(tmp_path / "record")
    shutil.copy(tmp_path / "record" / "unfinished.json", source)
    before = hashes(tmp_path)
    for folder in (source, source / "within"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{name}' is where .* is read from: write into another folder"):
            command(folder, tmp_path / "result")
    assert hashes(tmp_path) == before


def test_what_a_killed_run_left_is_its_own(published, qwen2_vl, tmp_path):
    for source, command, module in ((published, run_push, push), (qwen2_vl, run_init, init_from_qwen2_vl)):
        partial = checkpoint_folders.start(tmp_path / "result", module.COMMAND)
        (partial / "half").write_text("half")
        command(source, tmp_path / "result")
        assert not partial.exists()
        assert not {"half", "unfinished.json"} & {path.name for path in (tmp_path / "result").iterdir()}
        shutil.rmtree(tmp_path / "result")


# The card, and adapters


def test_results_are_finite_numbers(tmp_path):
    for text in ("NaN", "Infinity", "-Infinity", "true", "null", '"0.5"', "[0.5]", "{}", "1" + "0" * 400):
        (tmp_path / "results.json").write_text(f'{{"data": {{"accuracy": {text}}}}}')
        with pytest.raises(ValueError, match="results.json' holds no number as 'accuracy' of 'data'"):
            push.read_results(tmp_path / "results.json")
    for text, message in (
        ("[]", "holds a JSON list"),
        ('{"data": 0.5}', "holds no results"),
        ('{"data": [0.5]}', "holds no results"),
        ('{"": {"accuracy": 0.5}}', "holds no results"),
        ('{"data": {" ": 0.5}}', "holds no number"),
        ("{", "is no JSON"),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            push.read_results(tmp_path / "results.json")


def test_names_of_results_are_escaped(tmp_path):
    data = "d |\n\n# Heading\n<script>alert(1)</script> [a](https://evil.example) `code` ![](x)"
    metric = 'm"\n---\nlicense: evil\n'
    (tmp_path / "results.json").write_text(json.dumps({data: {metric: 0.5}, "plain data": {"exact_match": 1}}))
    push.write_repository(TINY_CHECKPOINT, tmp_path / "x", **CARD | {"results": tmp_path / "results.json"})
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert card.data.license == "mit"
    table = card.text[card.text.index("## Results") : card.text.index("## Citation")]
    assert not any(line.startswith(("# ", "---", "license")) for line in table.splitlines())
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {len(row.replace("\\|", "").split("|")) for row in rows} == {5}
    assert "<script" not in table.replace("\\<", "") and "](" not in table.replace("\\]", "")
    assert "| exact_match |" in table
    assert {result.dataset_name for result in card.data.eval_results} == {data, "plain data"}


@pytest.fixture(scope="session")
def sound_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path="me/base")
    return folder


@pytest.fixture
def adapter(sound_adapter, tmp_path):
    return shutil.copytree(sound_adapter, tmp_path / "adapter")


BASE_MODELS = (
    "me/base)](https://evil.example",
    'a/"; import os; "',
    "a/b\n---",
    "a/b c",
    "me/../x",
    "me/-x",
    3,
    ["a/b"],
    "x",
)


@pytest.mark.parametrize("base_model", BASE_MODELS)
def test_names_of_base_models_are_validated(adapter, tmp_path, base_model):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base_model)
    refused(run_push, adapter, tmp_path, "base model|Repo id|repo name|Cannot have")
    if isinstance(base_model, str):
        with pytest.raises(ValueError):
            push.write_repository(TINY_CHECKPOINT, tmp_path / "result", **CARD | {"base_model": base_model})


def test_unknown_fields_of_an_adapter(adapter, tmp_path, monkeypatch, capsys):
    edit(adapter / "adapter_config.json", hf_token=SECRET, auto_mapping={"parent_library": "antigravity"})
    edit_tensors(adapter, hf_token=SECRET)
    (adapter / "optimizer.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["push.py", str(adapter), "me/lora", "--dry-run"])
    push.main()
    printed = capsys.readouterr().out
    assert "Left out: adapter_config.json: 'auto_mapping', 'hf_token'\n" in printed
    assert "Left out: 'optimizer.pt'\n" in printed
    assert "Left out: adapter_model.safetensors: 'hf_token'\n" in printed
    assert SECRET.encode() not in (tmp_path / "lora-hub" / "adapter_model.safetensors").read_bytes()
    pushed = (tmp_path / "lora-hub" / "adapter_config.json").read_text()
    assert SECRET not in pushed and "antigravity" not in pushed
    assert {"peft_type", "r", "target_modules", "lora_alpha", "task_type"} <= json.loads(pushed).keys()


ADAPTER_DAMAGES = {
    "a list": (write("adapter_config.json", "[]"), "adapter_config.json' holds a JSON list"),
    "no JSON": (write("adapter_config.json", "{"), "adapter_config.json' is no JSON"),
    "no type": (set_field("adapter_config.json", peft_type=None), "says peft_type None, which PEFT does not know"),
    "a type of its own": (set_field("adapter_config.json", peft_type="](x"), "which PEFT does not know"),
    "a list of types": (set_field("adapter_config.json", peft_type=["LORA"]), "which PEFT does not know"),
    "no base": (set_field("adapter_config.json", base_model_name_or_path=None), "The base model None is none"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "truncated": (write("adapter_model.safetensors", b"12345678"), "is no whole safetensors file"),
    "NaN": (
        lambda folder: edit_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(math.nan)),
        "1 parameters with NaN or infinite values",
    ),
}


@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_damaged_adapters(adapter, tmp_path, damage):
    make, message = ADAPTER_DAMAGES[damage]
    make(adapter)
    refused(run_push, adapter, tmp_path, message)


def test_links_of_an_adapter(adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(adapter / name, tmp_path / name)
        (adapter / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}' is a link to"):
            run_push(adapter, tmp_path / "result")
        (adapter / name).unlink()
        shutil.move(tmp_path / name, adapter / name)


def test_the_class_itself_refuses_a_billion_layers(published, tmp_path):
    for fields in ({"num_hidden_layers": 10**9}, {"vision_config": {"depth": 10**9, "hidden_size": 128}}):
        source = shutil.copytree(published, tmp_path / "source", dirs_exist_ok=True)
        edit(source / "config.json", **fields)
        start = time.perf_counter()
        with pytest.raises(ValueError, match="must be at most 1024, got 1000000000"):
            VambaForConditionalGeneration.from_pretrained(source)
        assert time.perf_counter() - start < 5


def test_messages_name_the_users_folder(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(FileNotFoundError) as error:
        convert.load_processor(source)
    assert str(source) in str(error.value) and "checked-" not in str(error.value)


def test_results_load(published, tmp_path):
    """The good path: all three layouts and what is made of them."""
    run_convert(published, tmp_path / "converted")
    run_push(tmp_path / "converted", tmp_path / "pushed")
    run_convert(tmp_path / "pushed", tmp_path / "again")
    assert hashes(tmp_path / "converted") == hashes(tmp_path / "again")
    processor = VambaProcessor.from_pretrained(tmp_path / "again")
    assert processor.tokenizer("Which shape moved?")["input_ids"]
