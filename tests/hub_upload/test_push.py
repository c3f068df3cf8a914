# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import push
import pytest
import torch
import transformers
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_vamba


PACKAGE = Path(transformers_vamba.__file__).parent
REPO = "me/vamba-tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own, which the client of this process is logged in to."""
    server = HubServer()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    # Transformers keeps a client, which notes the address when it is made.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    resolve = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    assert server.faults == []


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
    push.main()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The tiny model in four shards, of which some are uploaded in parts."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT).save_pretrained(folder, max_shard_size="2MB")
    AutoProcessor.from_pretrained(TINY_CHECKPOINT).save_pretrained(folder)
    return folder


def test_folder_is_whole(pushed_folder):
    names = {file.name for file in pushed_folder.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (pushed_folder / "model.safetensors").samefile(TINY_CHECKPOINT / "model.safetensors") or (
        sha256(pushed_folder / "model.safetensors") == sha256(TINY_CHECKPOINT / "model.safetensors")
    )
    for name in names - {"model.safetensors"}:
        assert str(TINY_CHECKPOINT.parent) not in (pushed_folder / name).read_text()


def test_only_the_folder_says_which_class_is_where(pushed_folder, tmp_path):
    assert "auto_map" not in (TINY_CHECKPOINT / "config.json").read_text()
    for name in ("config.json", "processor_config.json"):
        assert json.loads((pushed_folder / name).read_text())["auto_map"] == push.AUTO_MAP
    AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(TINY_CHECKPOINT).save_pretrained(tmp_path)
    assert not any(b"auto_map" in content for name, content in contents(tmp_path).items() if name.endswith(".json"))


def test_loads_with_the_package_without_remote_code(pushed_folder):
    for kwargs in ({}, {"trust_remote_code": True}):  # the installed package comes first
        model = AutoModelForImageTextToText.from_pretrained(pushed_folder, **kwargs)
        processor = AutoProcessor.from_pretrained(pushed_folder, **kwargs)
        assert type(model) is transformers_vamba.VambaForConditionalGeneration
        assert type(processor) is transformers_vamba.VambaProcessor
        assert type(processor.video_processor) is transformers_vamba.VambaVideoProcessor


def test_card(pushed_folder, tmp_path):
    card = ModelCard.load(pushed_folder / "README.md")
    assert card.data.pipeline_tag == "video-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    measured = json.loads((TINY_CHECKPOINT / "evaluation.json").read_text())
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results == {(data, metric): value for data in measured for metric, value in measured[data].items()}
    model = AutoModelForImageTextToText.from_pretrained(pushed_folder)
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} in F32" in card.text
    assert f"{model.config.text_config.num_hidden_layers} layers of width 128" in card.text
    in_order = [scores["order"] for scores in measured.values()]
    assert f"| order | {in_order[0]} | {in_order[1]} |" in card.text

    push.write_repository(
        TINY_CHECKPOINT, tmp_path / "x", repo_id=REPO, base_model="Qwen/Qwen2-VL-2B", license="mit", results=None
    )
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.eval_results) == ("Qwen/Qwen2-VL-2B", "mit", None)
    assert "## Results" not in card.text and "model-index" not in card.content


def test_published_layout_is_pushed_as_it_is(published, tmp_path):
    push.write_repository(published, tmp_path / "x", repo_id=REPO, base_model=None, license="mit", results=None)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    expected = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values()))


def test_dry_run_writes_and_prints_without_a_token(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_TOKEN")
    run(monkeypatch, TINY_CHECKPOINT, REPO, "--dry-run")
    printed = capsys.readouterr().out
    assert "vamba-tiny-hub for the private repository me/vamba-tiny:" in printed
    for file in (tmp_path / "vamba-tiny-hub").iterdir():
        assert f"{file.stat().st_size:,}  {file.name}\n" in printed
    assert hub.repositories == {}


def test_push_from_the_command_line(hub, tmp_path, sharded):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "huggingface")}
    completed = subprocess.run(
        [sys.executable, Path(push.__file__), sharded, REPO, "--base-model", "me/base"],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert f"Pushed: {hub.url}/{REPO}/commit/" in completed.stdout
    folder = tmp_path / "vamba-tiny-hub"
    assert hub.repositories[REPO].files() == contents(folder)
    assert hub.repositories[REPO].private
    assert any(part > 1 for _, part in hub.parts)
    assert TOKEN not in completed.stdout + completed.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_dropped_connection_is_taken_up_again(hub, monkeypatch, tmp_path, sharded):
    dropped = sha256(sharded / "model-00002-of-00004.safetensors")
    hub.drops[dropped] = 1
    run(monkeypatch, sharded, REPO)
    assert hub.repositories[REPO].files() == contents(tmp_path / "vamba-tiny-hub")
    size = (sharded / "model-00002-of-00004.safetensors").stat().st_size
    assert size < hub.received[dropped] < 2 * size


def test_interrupted_push_goes_on_where_it_was(hub, monkeypatch, tmp_path, sharded):
    shards = {shard.name: sha256(shard) for shard in sharded.glob("*.safetensors")}
    *arrived, lost = sorted(shards.values())
    hub.drops[lost] = 100
    hub.before_drops = set(arrived)
    with pytest.raises(SystemExit, match="'me/vamba-tiny' was not updated: .* Run the same command to go on"):
        run(monkeypatch, sharded, REPO)
    assert hub.repositories[REPO].files() == {}
    assert hub.objects.keys() == set(arrived)
    before = dict(hub.received)

    hub.drops.clear()
    run(monkeypatch, sharded, REPO)
    assert hub.repositories[REPO].files() == contents(tmp_path / "vamba-tiny-hub")
    assert {oid: hub.received[oid] for oid in arrived} == {oid: before[oid] for oid in arrived}


def test_second_push_sends_what_changed(hub, monkeypatch, tmp_path):
    run(monkeypatch, TINY_CHECKPOINT, REPO)
    before = dict(hub.received)
    with pytest.raises(SystemExit, match=r"is not what would be written there \(see README.md\)"):
        run(monkeypatch, TINY_CHECKPOINT, REPO, "--license", "mit")
    run(monkeypatch, TINY_CHECKPOINT, REPO, "--license", "mit", "--overwrite")
    assert b"license: mit" in hub.repositories[REPO].files()["README.md"]
    assert hub.received == before
    assert len(hub.repositories[REPO].commits) == 3


def test_pull_request(hub, monkeypatch, tmp_path, capsys):
    run(monkeypatch, TINY_CHECKPOINT, REPO, "--create-pr")
    assert f"Pushed: {hub.url}/{REPO}/discussions/1" in capsys.readouterr().out
    assert hub.repositories[REPO].files() == {}
    assert hub.repositories[REPO].files("refs/pr/1") == contents(tmp_path / "vamba-tiny-hub")


def test_public_only_when_told(hub, monkeypatch):
    run(monkeypatch, TINY_CHECKPOINT, REPO, "--public")
    assert not hub.repositories[REPO].private
    with pytest.raises(SystemExit, match="'me/vamba-tiny' exists and is public. Pass --public"):
        run(monkeypatch, TINY_CHECKPOINT, REPO)
    assert len(hub.repositories[REPO].commits) == 2


def test_bad_arguments_are_named_and_nothing_is_written(hub, monkeypatch, tmp_path, published):
    broken = shutil.copytree(published, tmp_path / "broken")
    (broken / "model-00003-of-00004.safetensors").unlink()
    (tmp_path / "results.json").write_text('{"accuracy": 1.0}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (("nowhere/at/all", REPO), "There is no folder 'nowhere/at/all'"),
        ((TINY_CHECKPOINT, "vamba-tiny"), "needs its owner in front: my-name/vamba-tiny"),
        ((TINY_CHECKPOINT, "me/vamba tiny"), "Repo id must use"),
        ((broken, REPO), "lacks 1 of the 4 shards"),
        ((TINY_CHECKPOINT, REPO, "--results", "results.json"), "holds no results: expected JSON"),
        ((TINY_CHECKPOINT, REPO, "--folder", "notes", "--overwrite"), "holds no model"),
        ((TINY_CHECKPOINT, REPO, "--folder", TINY_CHECKPOINT, "--overwrite"), "is read from"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *arguments)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="There is no token for the Hub: log in with `hf auth login`"):
        run(monkeypatch, TINY_CHECKPOINT, REPO)
    assert sorted(tmp_path.rglob("*")) == before
    assert hub.repositories == {}


def test_refused_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    with pytest.raises(SystemExit, match="401") as error:
        run(monkeypatch, TINY_CHECKPOINT, REPO)
    assert "hf_anotherToken" not in str(error.value)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA whose weights are away from zero, saved with what a Trainer leaves beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"paths and more")
    return folder


def test_adapter_goes_alone(hub, monkeypatch, tmp_path, adapter):
    with pytest.raises(SystemExit, match="pass --base-model with its name on the Hub"):
        run(monkeypatch, adapter, "me/lora")
    run(monkeypatch, adapter, "me/lora", "--base-model", REPO)
    files = hub.repositories["me/lora"].files()
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert str(TINY_CHECKPOINT).encode() not in b"".join(files.values())
    card = ModelCard.load(tmp_path / "lora-hub" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (REPO, "adapter")
    assert card.data.library_name == "peft"
    assert "rank 2" in card.text

    base = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora-hub").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    expected = peft.PeftModel.from_pretrained(base, adapter).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_models_push_to_hub(hub, tmp_path):
    """Transformers' own method, and loading by name what it pushed."""
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    model.push_to_hub("me/pushed", private=True)
    AutoProcessor.from_pretrained(TINY_CHECKPOINT).push_to_hub("me/pushed", private=True)
    loaded = AutoModelForImageTextToText.from_pretrained("me/pushed", cache_dir=tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    processor = AutoProcessor.from_pretrained("me/pushed", cache_dir=tmp_path / "cache")
    assert type(processor) is transformers_vamba.VambaProcessor


def test_checkpoint_by_its_name_on_the_hub(hub, monkeypatch, tmp_path, sharded):
    """Pushed, downloaded by the client, and pushed again under another name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    run(monkeypatch, sharded, REPO)
    run(monkeypatch, REPO, "me/again")
    first, second = (hub.repositories[name].files() for name in (REPO, "me/again"))
    assert {name for name in first if first[name] != second.get(name)} == {"README.md"}
