# SPDX-License-Identifier: Apache-2.0
"""Tokens about an encoded video: the captured step that `generate` takes by itself, and kernel by kernel.

    python examples/benchmarks/decoding.py --frames 1024 --output results

One model with random weights of the 7B shapes in one process. A video is encoded once; each question is a further one
about it, in a fork of its cache. The first question of each kind and number of rows records the graph, which the row
"first" of the table includes, and is dropped from the others. `decoding.md` and `.json` go to the output folder. On a
CPU the shapes are tiny, no graph is recorded, and the figures say nothing but that the program runs.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from inference import (
    describe_machine,
    encode,
    generate,
    load,
    make_config,
    make_pixels,
    make_text,
    milliseconds_a_token,
    peak_gib,
    reset_peak,
    write_results,
)


NUM_NEW_TOKENS = 33
STEPS = {"kernel by kernel": {"disable_compile": True}, "captured": {}}
COLUMNS = {
    "step": ("step", "{}"),
    "frames": ("frames", "{:,}"),
    "rows": ("questions at once", "{}"),
    "first_s": (f"first, {NUM_NEW_TOKENS} tokens, s", "{:.2f}"),
    "further_s": ("a further, s", "{:.2f}"),
    "token_ms": ("a token, ms", "{:.1f}"),
    "tokens_s": ("tokens a second", "{:.0f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "note": ("", "{}"),
}


def measure(model, cache, num_rows: int, options: dict, repeats: int) -> dict[str, float]:
    """Seconds and memory of questions about an encoded video."""
    reset_peak(model)
    seconds, token_ms = [], []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        times = generate(model, make_text(model, num_rows), NUM_NEW_TOKENS, cache=cache.fork(), **options)
        seconds.append(time.perf_counter() - start)
        token_ms.append(milliseconds_a_token(times))
    further = statistics.median(seconds[1:])
    return {
        "first_s": seconds[0],
        "further_s": further,
        "token_ms": statistics.median(token_ms[1:]),
        "tokens_s": num_rows * NUM_NEW_TOKENS / further,
        "peak_gib": peak_gib(model),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--rows", default="1,16", help="questions at once")
    parser.add_argument("--repeats", type=int, default=5, help="further questions, of which the median is taken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    config, patches = make_config("vamba", tiny=device.type != "cuda")
    model = load(config, "sdpa", device)
    cache, _ = encode(model, make_pixels(model, args.frames, patches, "cpu"))
    generate(model, make_text(model), 3, cache=cache.fork())  # what any first answer of a process loads
    rows = []
    for num_rows in map(int, args.rows.split(",")):
        for step, options in STEPS.items():
            row = {"model": "vamba", "attention": "sdpa", "step": step, "frames": args.frames, "rows": num_rows}
            rows.append(row | measure(model, cache, num_rows, options, args.repeats))
            write_results(args.output, describe_machine(device), rows, "decoding", COLUMNS)
    print((args.output / "decoding.md").read_text())


if __name__ == "__main__":
    main()
