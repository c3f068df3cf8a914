# SPDX-License-Identifier: Apache-2.0
"""Ask a Vamba model questions about a video. The video is encoded once, whatever the number of questions.

    python examples/ask_video.py movie.mp4 "What happens in this video?" "How does it end?" --model PATH_OR_NAME

Before anything is loaded it says how much memory this will take. Where the GPU has less than that free, it names the
options that would make it fit, such as `--video-cache quantized` or `--weight-bits 4` (which needs bitsandbytes).
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaProcessor, forecast_memory


TINY_MODEL = Path(__file__).parent.parent / "checkpoints" / "vamba-tiny"
VIDEO_CACHES = ("dynamic", "quantized", "offloaded", "offloaded_quantized")
WEIGHT_BITS = (4, 8)
FORECAST_MARGIN = 1.05


def load(path, device, weight_bits=None):
    processor = VambaProcessor.from_pretrained(path)
    if weight_bits is None:
        return VambaForConditionalGeneration.from_pretrained(path, dtype="auto").to(device).eval(), processor
    # With 4 bits the matrix products are computed in the dtype of the checkpoint.
    dtype = VambaConfig.from_pretrained(path).dtype or torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_8bit=weight_bits == 8, load_in_4bit=weight_bits == 4, bnb_4bit_compute_dtype=dtype
    )
    model = VambaForConditionalGeneration.from_pretrained(
        path, dtype="auto", quantization_config=quantization, device_map={"": device}
    )
    return model.eval(), processor


def encode(
    model,
    processor,
    video,
    video_cache=None,
    segment_frames=64,
    video_pruning_rate=None,
    max_video_tokens=None,
    video_read_share=None,
    **sampling,
):
    """
    Everything that the model needs of a video (a path, an URL, or frames), before any question is known. `sampling`
    says how many frames are looked at (`num_frames` or `fps`) and their `size`.
    """
    cache = None
    # Decoded and encoded a segment at a time: whatever the length, only the cache grows.
    for segment in processor.iter_video_segments(video, segment_frames=segment_frames, **sampling):
        cache = model.encode_video(
            **segment,
            cache=cache,
            segment_frames=segment_frames,
            video_cache_implementation=video_cache,
            video_pruning_rate=video_pruning_rate,
            max_video_tokens=max_video_tokens,
            video_read_share=video_read_share,
        )
    return cache


def answer(model, processor, cache, question, max_new_tokens=128):
    inputs = processor.prepare_question(question).to(model.device)
    # The fork shares the video, and keeps the text of this question to itself.
    tokens = model.generate(**inputs, cache=cache.fork(), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def forecast(model, processor, video, video_cache=None, weight_bits=None, **options):
    return forecast_memory(
        model, processor, video, video_cache_implementation=video_cache, weight_bits=weight_bits, **options
    )


def ways_to_fit(model, processor, video, free, options):
    """The options that bring the forecast below `free` bytes: one change each, or where none does, two."""
    num_frames = forecast(model, processor, video, **options).num_frames
    size = processor.video_processor.size
    longest_edge = dict(options.get("size") or size)["longest_edge"]
    caches = [(f"--video-cache {cache}", {"video_cache": cache}) for cache in VIDEO_CACHES[1:]]
    weights = [(f"--weight-bits {bits}", {"weight_bits": bits}) for bits in sorted(WEIGHT_BITS, reverse=True)]
    fewer = [(f"--num-frames {n}", {"num_frames": n, "fps": None}) for n in halves(num_frames, least=2)]
    smaller = [(f"--longest-edge {n}", {"size": frame_size(processor, n)}) for n in halves(longest_edge, least=56)]
    pairs = [(f"{a} {b}", {**c, **d}) for (a, c), (b, d) in itertools.product(caches, weights)]

    def fitting(changes):
        for arguments, change in changes:
            found = forecast(model, processor, video, **{**options, **change})
            if FORECAST_MARGIN * found.peak <= free:
                yield arguments, found

    # Of fewer and of smaller frames the most that fit.
    single = [*fitting(caches), *fitting(weights)]
    single += [way for changes in (fewer, smaller) for way in itertools.islice(fitting(changes), 1)]
    return single or list(fitting(pairs))


def halves(number, least):
    while (number := number // 2) >= least:
        yield number


def frame_size(processor, longest_edge):
    shortest_edge = min(dict(processor.video_processor.size)["shortest_edge"], longest_edge)
    return {"shortest_edge": shortest_edge, "longest_edge": longest_edge}


def free_memory(device):
    """Bytes that are free on a GPU; `None` for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else None


def check_memory(path, video, device, options):
    """Prints the forecast. Ends the program, with the options that would help, where the GPU has too little memory."""
    config, processor = VambaConfig.from_pretrained(path), VambaProcessor.from_pretrained(path)
    with torch.device("meta"):  # the shapes of the model, without its weights
        model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype or torch.bfloat16)
    expected = forecast(model, processor, video, **options)
    print(f"Forecast: {expected}.")
    free = free_memory(device)
    if free is None:
        return
    print(f"Free on {device}: {free / 2**30:.2f} GiB.")
    if expected.peak > free:
        ways = ways_to_fit(model, processor, video, free, options)
        lines = [f"    {arguments:45s}{found.peak / 2**30:8.2f} GiB" for arguments, found in ways]
        raise SystemExit("\n".join(["It does not fit. What would:", *lines] if ways else ["It does not fit."]))


def at_least_one(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def check_sampling(processor, **options):
    """Raises a `ValueError` for options of `iter_video_segments` that no video can be read with."""
    processor.iter_video_segments(np.zeros((2, 28, 28, 3), np.uint8), **options)


def add_model_arguments(parser):
    """The checkpoint, how its weights are held, and what [`encoding_options`] reads."""
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub name of a checkpoint (default: the tiny one)"
    )
    parser.add_argument("--num-frames", type=int, help="how many frames to look at (default: the processor's)")
    parser.add_argument("--fps", type=float, help="or how many per second")
    parser.add_argument("--longest-edge", type=at_least_one, help="pixels to which a larger frame is shrunk")
    parser.add_argument("--segment-frames", type=int, default=64, help="frames that are encoded at a time")
    parser.add_argument("--video-cache", choices=VIDEO_CACHES, help="8 bits, or the host's memory, or both")
    parser.add_argument("--pruning-rate", type=float, default=0.0, help="share of the video's tokens to drop")
    parser.add_argument("--max-video-tokens", type=int, help="the most tokens to keep of the video")
    parser.add_argument("--read-share", type=float, help="share of the video to read for each token of an answer")
    parser.add_argument("--weight-bits", type=int, choices=WEIGHT_BITS, help="quantize the weights")


def encoding_options(args, processor):
    """Arguments of [`encode`] from those of the command line."""
    options = {"num_frames": args.num_frames, "fps": args.fps, "segment_frames": args.segment_frames}
    options |= {"video_cache": args.video_cache, "video_pruning_rate": args.pruning_rate}
    options |= {"max_video_tokens": args.max_video_tokens, "video_read_share": args.read_share}
    if args.longest_edge is not None:
        options["size"] = frame_size(processor, args.longest_edge)
    return options


def main():
    parser = argparse.ArgumentParser(description="Ask a Vamba model questions about a video.")
    parser.add_argument("video", help="path or URL of a video file")
    parser.add_argument("questions", nargs="+", metavar="question")
    add_model_arguments(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    processor = VambaProcessor.from_pretrained(args.model)
    options = encoding_options(args, processor)
    check_memory(args.model, args.video, args.device, {**options, "weight_bits": args.weight_bits})

    model, processor = load(args.model, args.device, args.weight_bits)
    start = time.perf_counter()
    cache = encode(model, processor, args.video, **options)
    print(f"{args.video}: encoded in {time.perf_counter() - start:.2f} s\n")
    for question in args.questions:
        start = time.perf_counter()
        reply = answer(model, processor, cache, question)
        print(f"Question: {question}\nAnswer:   {reply}   ({time.perf_counter() - start:.2f} s)\n")


if __name__ == "__main__":
    main()
