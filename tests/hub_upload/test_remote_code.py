# SPDX-License-Identifier: Apache-2.0
"""The repository folder in an environment that has Transformers but not this package."""

from types import SimpleNamespace

import convert
import peft
import push
import pytest
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor


LOAD = """
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
"""
LOAD_PUBLISHED = """
from transformers_vamba import VambaForConditionalGeneration, VambaProcessor

model = VambaForConditionalGeneration.from_pretrained(folder)
processor = VambaProcessor.from_pretrained(folder)
"""
COMPUTE = """
import torch
from peft import PeftModel
from safetensors.torch import save_file

frames = torch.randint(256, (6, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
content = [{"type": "video"}, {"type": "text", "text": "Which shape moved?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=prompt, videos=[frames], do_sample_frames=False, return_tensors="pt")
with torch.no_grad():
    outputs = {"logits": model(**inputs).logits, "tokens": model.generate(**inputs, max_new_tokens=4, do_sample=False)}
    adapted = PeftModel.from_pretrained(model, adapter)
    outputs["adapted"] = adapted(**inputs).logits
    outputs["merged"] = adapted.merge_and_unload()(**inputs).logits
save_file(outputs, outputs_file)
"""
WITHOUT_THE_PACKAGE = """
import importlib.util

assert importlib.util.find_spec("transformers_vamba") is None
"""
REFUSE_TO_RUN_CODE_UNTOLD = """
from transformers import AutoModelForImageTextToText

try:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code of a repository ran untold")
"""
SAVE_AGAIN = """
from transformers import AutoConfig, AutoModel, AutoVideoProcessor, pipeline

AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
processor.save_pretrained(again)
pipe = pipeline("image-text-to-text", model=again, trust_remote_code=True)
autos = (AutoVideoProcessor, AutoModel, AutoConfig)
parts = [pipe.model, pipe.processor, *(auto.from_pretrained(again, trust_remote_code=True) for auto in autos)]
print(*(type(part).__module__.split(".")[0] + "." + type(part).__name__ for part in parts))
"""


@pytest.fixture(scope="module")
def folders(published, tmp_path_factory):
    """What a checkpoint goes through on its way: published, converted, pushed; and an adapter, saved and pushed."""
    folders = SimpleNamespace(home=tmp_path_factory.mktemp("round-trip"), published=published)
    folders.converted, folders.pushed, folders.adapter, folders.pushed_adapter, folders.again = (
        folders.home / name for name in ("converted", "pushed", "adapter", "pushed-adapter", "again")
    )
    convert.convert(published, folders.converted)
    card = {"license": "mit", "results": None}
    push.write_repository(folders.converted, folders.pushed, repo_id="me/x", base_model=None, **card)
    torch.manual_seed(0)
    peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(folders.converted),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    ).save_pretrained(folders.adapter)
    push.write_repository(folders.adapter, folders.pushed_adapter, repo_id="me/lora", base_model="me/x", **card)
    return folders


def code_for(folders, folder, adapter, *parts: str) -> str:
    """Parts of the code above with the names that they use, to be run here or elsewhere."""
    names = {"folder": folder, "adapter": adapter, "again": folders.again}
    names["outputs_file"] = folders.home / "outputs.safetensors"
    return "\n".join([*(f"{name} = {str(value)!r}" for name, value in names.items()), *parts])


def outputs_of(folders) -> dict[str, torch.Tensor]:
    return load_file(folders.home / "outputs.safetensors")


@pytest.fixture(scope="module")
def expected(folders):
    """Of the published checkpoint and the adapter as it was saved."""
    exec(code_for(folders, folders.published, folders.adapter, LOAD_PUBLISHED, COMPUTE), {})
    outputs = outputs_of(folders)
    assert not torch.allclose(outputs["adapted"], outputs["logits"], atol=0.1)
    torch.testing.assert_close(outputs["merged"], outputs["adapted"], atol=1e-4, rtol=0)
    return outputs


def assert_same(outputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert outputs.keys() == expected.keys()
    assert [name for name in outputs if not torch.equal(outputs[name], expected[name])] == []


@pytest.mark.parametrize("layout", ("converted", "pushed"))
def test_logits_with_the_package(layout, folders, expected):
    exec(code_for(folders, getattr(folders, layout), folders.pushed_adapter, LOAD, COMPUTE), {})
    assert_same(outputs_of(folders), expected)


def test_logits_without_the_package(clean_python, folders, expected):
    parts = (WITHOUT_THE_PACKAGE, REFUSE_TO_RUN_CODE_UNTOLD, LOAD, COMPUTE, SAVE_AGAIN)
    printed = clean_python(code_for(folders, folders.pushed, folders.pushed_adapter, *parts))
    assert_same(outputs_of(folders), expected)
    # What a user saves there, after training say, brings the code along.
    names = ("VambaForConditionalGeneration", "VambaProcessor", "VambaVideoProcessor", "VambaModel", "VambaConfig")
    printed_last = printed.split()[-len(names) :]  # DeepSpeed, where it is installed, prints a line before
    assert printed_last == [f"transformers_modules.{name}" for name in names]
    # Where the package is installed, it loads without that code.
    assert type(AutoProcessor.from_pretrained(folders.again)).__module__.startswith("transformers_vamba.")


def test_logits_by_name_without_the_package(clean_python, folders, expected):
    """From a Hub that has the folder, by two lines."""
    server = HubServer()
    server.push(folders.pushed, "me/x")
    code = code_for(folders, "me/x", folders.pushed_adapter, WITHOUT_THE_PACKAGE, LOAD, COMPUTE)
    clean_python(code, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0")
    assert_same(outputs_of(folders), expected)
    assert server.faults == []
    server.shutdown()
    server.server_close()
