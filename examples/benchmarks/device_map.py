# SPDX-License-Identifier: Apache-2.0
"""A model too large for one GPU, spread over all of them by `device_map="auto"`: Vamba with Qwen2-VL-72B's shapes.

    python examples/benchmarks/device_map.py --frames 1024 --output results

The checkpoint's files are hollow: they have a header and a size, and no data on the disk, which reads as zeros. So
`load_s` is what Transformers, Accelerate and the way to the GPUs take; a real disk adds its own time. After loading,
the weights are drawn at random. A video of 640x360 frames is encoded, and one question about it is answered. The
table is `device_map.md`, and `.json`. On a CPU the model is tiny and on one device, and the figures say nothing but
that the program runs.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from inference import (
    NUM_NEW_TOKENS,
    describe_machine,
    encode,
    forecast_gib,
    generate,
    make_config,
    make_pixels,
    make_text,
    milliseconds_a_token,
    write_results,
)

from transformers_vamba import VambaConfig, VambaForConditionalGeneration


QWEN2_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
QWEN2_72B |= {"num_key_value_heads": 8}
COLUMNS = {
    "gpus": ("GPUs", "{}"),
    "frames": ("frames", "{:,}"),
    "parameters": ("parameters, 10⁹", "{:.1f}"),
    "load_s": ("loading, s", "{:.0f}"),
    "encode_s": ("encoding, s", "{:.1f}"),
    "first_token_s": ("first token of a question, s", "{:.2f}"),
    "decode_ms": ("ms per token", "{:.0f}"),
    "peaks": ("peak GiB per GPU", "{}"),
    "peak_gib": ("together", "{:.0f}"),
    "forecast_gib": ("forecast", "{:.0f}"),
    "note": ("", "{}"),
}


def write_hollow_checkpoint(config: VambaConfig, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of this shape whose weights are zeros that take no room on the disk, a file per layer."""
    with torch.device("meta"):
        model = VambaForConditionalGeneration(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        _, is_layer, rest = name.partition(".layers.")
        layer = rest.partition(".")[0] if is_layer else "other"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor
    weight_map = {}
    for file_name, tensors in files.items():
        header, size = {}, 0
        for name, tensor in tensors.items():
            end = size + tensor.numel() * dtype.itemsize
            kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
            header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [size, end]}
            weight_map[name], size = file_name, end
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


@torch.no_grad()
def draw_weights(model) -> None:
    """The model's own random initialisation, in place of the zeros."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = False
    for module in model.modules():
        model._init_weights(module)


def measure(config: VambaConfig, num_frames: int, patches: tuple[int, int], dtype: torch.dtype) -> dict:
    """The row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_hollow_checkpoint(config, Path(folder), dtype)
        start = time.perf_counter()
        model = VambaForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map="auto")
        load_s = time.perf_counter() - start
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    draw_weights(model)
    gpus = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    row = {"model": "Vamba-72B", "attention": "sdpa", "gpus": len(gpus), "frames": num_frames, "load_s": load_s}
    row["parameters"] = num_parameters / 1e9

    warm_cache, _ = encode(model, make_pixels(model, min(num_frames, 128), patches, "cpu"))
    generate(model, make_text(model), 3, cache=warm_cache)
    del warm_cache
    video = make_pixels(model, num_frames, patches, "cpu")
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    cache, row["encode_s"] = encode(model, video)
    times = generate(model, make_text(model), NUM_NEW_TOKENS, cache=cache)
    row |= {"first_token_s": times[0], "decode_ms": milliseconds_a_token(times)}
    last_key = cache.videos[0][-1].keys[..., -1, :]
    if not last_key.isfinite().all():
        row["note"] = "not finite"
    if gpus:
        peaks = [torch.cuda.max_memory_allocated(gpu) / 2**30 for gpu in gpus]
        row |= {"peaks": ", ".join(f"{peak:.1f}" for peak in peaks), "peak_gib": math.fsum(peaks)}
        row["forecast_gib"] = forecast_gib(model, num_frames, None)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    config, patches = make_config("vamba", tiny=not has_gpu)
    if has_gpu:
        config = VambaConfig(text_config=QWEN2_72B, vision_config={"hidden_size": QWEN2_72B["hidden_size"]})
    row = measure(config, args.frames, patches, torch.bfloat16 if has_gpu else torch.float32)
    machine = describe_machine(torch.device("cuda" if has_gpu else "cpu"))
    write_results(args.output, machine, [row], "device_map", COLUMNS)
    print((args.output / "device_map.md").read_text())


if __name__ == "__main__":
    main()
