# SPDX-License-Identifier: Apache-2.0
"""Time and memory of encoding a video with Vamba-7B's shapes, by the format of the matrix products.

    python examples/benchmarks/encoding.py --frames 256,1024 --output results

Weights and pixels are random; the shapes and 640x360 frames are real. In int8 and float8, torchao holds the layers of
the vision tower and the projections of the mixers (docs/speed.md). `encoding.md` and `.json` in the output folder have
the median of `--runs` runs after one that is not timed. On a CPU the model is tiny, and the figures say nothing but
that the program runs.
"""

import argparse
import statistics
from pathlib import Path

import torch
from inference import describe_machine, encode, load, make_config, make_pixels, peak_gib, reset_peak, write_results
from inference import profile as list_kernels
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)


LAYERS = r"re:.*(visual\.blocks\..*\.(qkv|proj|fc1|fc2)|\.vision_mixer\.mixer\.(in_proj|out_proj))\.weight"
FORMATS = {
    "int8": Int8DynamicActivationInt8WeightConfig,
    "float8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
}
COLUMNS = {
    "frames": ("frames", "{:,}"),
    "encode_s": ("encoding, s", "{:.3f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "note": ("", "{}"),
}


def measure(model, num_frames: int, patches: tuple[int, int], num_runs: int) -> dict:
    video = make_pixels(model, num_frames, patches, "cpu")
    encode(model, video)
    reset_peak(model)
    seconds = statistics.median(encode(model, video)[1] for _ in range(num_runs))
    return {"frames": num_frames, "encode_s": seconds, "peak_gib": peak_gib(model)}


def main(arguments: list[str] | None = None) -> None:
    is_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", default="256,1024" if is_cuda else "8,16")
    parser.add_argument("--products", default="bfloat16,float8" if is_cuda else "bfloat16,int8", help="or int8")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, for the first size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)

    device = torch.device("cuda" if is_cuda else "cpu")
    machine, rows = describe_machine(device), []
    config, patches = make_config("vamba", tiny=not is_cuda)
    sizes = [int(number) for number in args.frames.split(",")]
    for products in args.products.split(","):
        torch.manual_seed(0)
        model = load(config, "sdpa", device).to(torch.bfloat16)
        if products != "bfloat16":
            quantize_(model, FqnToConfig({LAYERS: FORMATS[products]()}), filter_fn=None)
        for num_frames in sizes:
            row = {"model": "vamba", "attention": "sdpa", "weights": products}
            rows.append(row | measure(model, num_frames, patches, args.runs))
            print(rows[-1], flush=True)
            write_results(args.output, machine, rows, "encoding", COLUMNS)
        if args.profile:
            print(list_kernels(model, sizes[0], patches), flush=True)
        del model
    print((args.output / "encoding.md").read_text())


if __name__ == "__main__":
    main()
