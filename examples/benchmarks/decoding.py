# SPDX-License-Identifier: Apache-2.0
"""Tokens about an encoded video: the captured step that `generate` takes by itself, and kernel by kernel.

    python examples/benchmarks/decoding.py --frames 1024 --output results
    python examples/benchmarks/decoding.py --frames 3600 --shares 1,0.25,0.1,0.05 --repeats 2 --output results

One model with random weights of the 7B shapes in one process. A video is encoded once; each question is a further one
about it, in a fork of its cache. The first question of each kind and number of rows records the graph, which the row
"first" of the table includes, and is dropped from the others.

With `--shares`, of a video on the device and in the host's memory in 8 bits: questions that read a share of it
for each token of the answer (`video_read_share`), beside those that read all of it. The cache is filled with random
keys and values: what they say changes no time. `--memory-gb 24` asks as on a card of that size as well, with the
weights in 8 bits by torchao.

`decoding.md` and `.json`, or `read_share.md` and `.json`, go to the output folder. On a CPU the shapes are tiny, no
graph is recorded, and the figures say nothing but that the program runs.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
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
    small_card,
    write_results,
)
from locating import fill


NUM_NEW_TOKENS = 33
STEPS = {"kernel by kernel": {"disable_compile": True}, "captured": {}}
STEP_COLUMNS = {
    "step": ("step", "{}"),
    "frames": ("frames", "{:,}"),
    "rows": ("questions at once", "{}"),
    "first_s": (f"first, {NUM_NEW_TOKENS} tokens, s", "{:.2f}"),
    "further_s": ("further question, s", "{:.2f}"),
    "token_ms": ("ms per token", "{:.1f}"),
    "tokens_s": ("tokens per second", "{:.0f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "note": ("", "{}"),
}
SHARE_COLUMNS = {
    "frames": ("frames", "{:,}"),
    "video_read_share": ("read", "{:.0%}"),
    "first_token_s": ("first token of a further question, s", "{:.2f}"),
    "token_s": ("s per token", "{:.4f}"),
    "further_s": (f"further question, {NUM_NEW_TOKENS} tokens, s", "{:.2f}"),
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


def measure_share(model, cache, share: float, repeats: int) -> dict[str, float]:
    """Seconds and memory of questions about a video that read a share of it, after one that is not counted."""
    reset_peak(model)
    options = {} if share == 1 else {"video_read_share": share}
    answers = []
    for _ in range(1 + repeats):
        answers.append(generate(model, make_text(model), NUM_NEW_TOKENS, cache=cache.fork(), **options))
    return {
        "first_token_s": statistics.median(times[0] for times in answers[1:]),
        "token_s": statistics.median(milliseconds_a_token(times) / 1e3 for times in answers[1:]),
        "further_s": statistics.median(times[-1] for times in answers[1:]),
        "peak_gib": peak_gib(model),
    }


def measure_steps(model, patches: tuple[int, int], args) -> Iterator[dict]:
    """The rows of the table of decoding steps."""
    cache, _ = encode(model, make_pixels(model, args.frames, patches, "cpu"))
    generate(model, make_text(model), 3, cache=cache.fork())  # what any first answer of a process loads
    for num_rows in map(int, args.rows.split(",")):
        for step, options in STEPS.items():
            row = {"step": step, "frames": args.frames, "rows": num_rows}
            yield row | measure(model, cache, num_rows, options, args.repeats)


def measure_shares(model, patches: tuple[int, int], args) -> Iterator[dict]:
    """The rows of the table of shares."""
    vision_config = model.config.vision_config
    num_steps = args.frames // vision_config.temporal_patch_size
    tokens_per_step = patches[0] * patches[1] // vision_config.spatial_merge_size**2

    def measure_cache(video_cache: str) -> Iterator[dict]:
        cache = fill(model, num_steps, tokens_per_step, video_cache)
        for share in map(float, args.shares.split(",")):
            row = {"video_cache": video_cache, "frames": args.frames, "video_read_share": share}
            yield row | measure_share(model, cache, share, args.repeats)

    yield from measure_cache("dynamic")
    yield from measure_cache("offloaded_quantized")
    if args.memory_gb:
        with small_card(model, args.memory_gb):
            for row in measure_cache("offloaded_quantized"):
                yield row | {"weights": "int8", "note": f"capped at {args.memory_gb:g} GB"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--rows", default="1,16", help="questions at once")
    parser.add_argument("--repeats", type=int, default=5, help="further questions, of which the median is taken")
    parser.add_argument("--shares", default="", help="read such shares of the video instead, 1 for all of it")
    parser.add_argument("--memory-gb", type=float, help="ask with shares as on a GPU with so much memory as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    if args.memory_gb and not args.shares:
        parser.error("--memory-gb is for --shares.")
    device = torch.device(args.device)
    config, patches = make_config("vamba", tiny=device.type != "cuda")
    model = load(config, "sdpa", device)
    name, columns, measured = "decoding", STEP_COLUMNS, measure_steps
    if args.shares:
        name, columns, measured = "read_share", SHARE_COLUMNS, measure_shares
    rows = []
    for row in measured(model, patches, args):
        rows.append({"model": "vamba", "attention": "sdpa"} | row)
        write_results(args.output, describe_machine(device), rows, name, columns)
    print((args.output / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
