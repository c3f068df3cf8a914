# SPDX-License-Identifier: Apache-2.0
"""What users run next: pipelines, Transformers' server and chat, quantised and spread weights."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import PIL.Image
import pytest
import torch
from synthetic_videos import sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils.import_utils import is_serve_available


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    """A video file, a question about it and the answer, which the tiny model knows."""
    path = tmp_path_factory.mktemp("videos") / "movement.mp4"
    video = sample_video([77, 0], 16, "movement")
    write_mp4(path, video)
    question = next(question for question in video.questions if question.kind == "direction")
    return str(path), question.text, question.answer


@pytest.fixture(scope="module")
def image():
    return PIL.Image.new("RGB", (112, 112), "red")


def ask(model, processor, content: list[dict]) -> str:
    """The greedy answer, by the model's own methods."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT), AutoProcessor.from_pretrained(TINY_CHECKPOINT)


@pytest.mark.parametrize("task", ("image-text-to-text", "any-to-any"))
def test_pipeline(task, tiny, question, image):
    path, text, answer = question
    pipe = pipeline(task, model=str(TINY_CHECKPOINT))
    contents = {
        "video": [{"type": "video", "path": path}, {"type": "text", "text": text}],
        "image": [{"type": "image", "image": image}, {"type": "text", "text": "Which colour is it?"}],
        "text": [{"type": "text", "text": "Which colour is it?"}],
    }
    for kind, content in contents.items():
        outputs = pipe(
            [{"role": "user", "content": content}], max_new_tokens=8, do_sample=False, return_full_text=False
        )
        assert outputs[0]["generated_text"] == ask(*tiny, content), kind
        assert kind != "video" or outputs[0]["generated_text"] == answer


@pytest.mark.parametrize("saved_side", ("left", "right"))
def test_pipeline_in_batches(saved_side, tiny, question, image, tmp_path):
    """Prompts of different lengths, also with a checkpoint whose tokenizer was saved to pad on the right."""
    path, text, _ = question
    folder = shutil.copytree(TINY_CHECKPOINT, tmp_path / "checkpoint")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": saved_side}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    pipe = pipeline("image-text-to-text", model=str(folder))
    for media in ([], [{"type": "video", "path": path}], [{"type": "image", "image": image}]):
        contents = [[*media, {"type": "text", "text": words}] for words in (text, "Hi", "Which colour is it?")]
        chats = [[{"role": "user", "content": content}] for content in contents]
        outputs = pipe(text=chats, batch_size=3, max_new_tokens=8, do_sample=False, return_full_text=False)
        assert [output[0]["generated_text"] for output in outputs] == [ask(*tiny, content) for content in contents]


def request(address: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(address, data, {"Content-Type": "application/json"}), timeout=60) as response:
        return response.read()


@pytest.fixture(scope="module")
def server(tmp_path_factory, question):
    """The address of `transformers serve` with the tiny model, and the Python that runs it."""
    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    pytest.importorskip("transformers.cli.transformers")  # needs `requests` besides, in older versions
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers_vamba", "serve", str(TINY_CHECKPOINT)]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
            + ["--media-root", os.path.dirname(question[0])],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                request(f"{address}/health")
                break
            except URLError:
                time.sleep(0.2)
        yield address
        process.terminate()
        process.wait(20)


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_server_answers_about_images_and_videos(server, tiny, question, image):
    """Chat completions as OpenAI's clients ask for them, whole and as a stream."""
    path, text, answer = question
    png = io.BytesIO()
    image.save(png, "PNG")
    parts = {
        "video": [{"type": "video_url", "video_url": {"url": path}}, {"type": "text", "text": text}],
        "image": [
            {"type": "image_url", "image_url": {"url": data_url("image/png", png.getvalue())}},
            {"type": "text", "text": "Which colour is it?"},
        ],
        "text": [{"type": "text", "text": "Which colour is it?"}],
    }
    expected = {
        "video": answer,
        "image": ask(*tiny, [{"type": "image", "image": image}, parts["image"][1]]),
        "text": ask(*tiny, parts["text"]),
    }
    for kind, content in parts.items():
        body = {"model": str(TINY_CHECKPOINT), "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        whole = json.loads(request(f"{server}/v1/chat/completions", body))
        assert whole["choices"][0]["message"]["content"] == expected[kind], kind
        lines = request(f"{server}/v1/chat/completions", body | {"stream": True}).decode().splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        deltas = [choice["delta"].get("content") for event in events for choice in event["choices"]]
        assert "".join(delta or "" for delta in deltas) == expected[kind], kind


def test_torchao_on_the_cpu(tiny, question):
    """8-bit weights of every linear layer of the decoder, the mixers' included."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    path, text, answer = question
    model, processor = tiny
    quantized = AutoModelForImageTextToText.from_pretrained(
        TINY_CHECKPOINT, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    layer = quantized.model.language_model.layers[0]
    for linear in (layer.vision_mixer.mixer.in_proj, layer.vision_mixer.mixer.out_proj, layer.cross_attn.k_proj):
        assert "Int8" in type(linear.weight).__name__ or "AffineQuantized" in type(linear.weight).__name__
    content = [{"type": "video", "path": path}, {"type": "text", "text": text}]
    assert ask(quantized, processor, content) == answer == ask(model, processor, content)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", (4, 8))
def test_bitsandbytes(bits, tiny, question):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    path, text, answer = question
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.bfloat16)
    quantized = AutoModelForImageTextToText.from_pretrained(
        TINY_CHECKPOINT, quantization_config=config, device_map={"": 0}
    )
    mixer = quantized.model.language_model.layers[0].vision_mixer.mixer
    for linear in (mixer.in_proj, mixer.out_proj):
        assert linear.weight.dtype in (torch.uint8, torch.int8)
    content = [{"type": "video", "path": path}, {"type": "text", "text": text}]
    reply = ask(quantized, tiny[1], content)
    print(f"{bits} bits: {reply!r}, expected {answer!r}")
    assert bits == 4 or reply == answer  # of so small a model, 4 bits may lose the answer


@pytest.mark.gpu
@pytest.mark.parametrize("place", ("two GPUs", "GPU and CPU"))
def test_device_map_auto(place, tiny, question):
    """Weights spread over devices by Accelerate, in shares that leave none of them out."""
    if place == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    path, text, answer = question
    share = int(0.7 * sum(p.numel() * p.element_size() for p in tiny[0].parameters()))
    max_memory = {0: share, 1: 2 * share} if place == "two GPUs" else {0: share, "cpu": 2 * share}
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, device_map="auto", max_memory=max_memory)
    assert len(set(model.hf_device_map.values())) == 2, model.hf_device_map
    content = [{"type": "video", "path": path}, {"type": "text", "text": text}]
    assert ask(model, tiny[1], content) == answer
