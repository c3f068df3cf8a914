# SPDX-License-Identifier: Apache-2.0
"""Ask a Vamba model questions about thousands of videos, on all CPUs and GPUs of one machine or of a Ray cluster.

    python examples/ask_library.py videos/ "What happens?" "How does it end?" --output answers --model PATH_OR_NAME
    python examples/ask_library.py questions.csv --output answers --model PATH_OR_NAME

The first asks the same of each video in a folder. The second reads a table, .csv, .jsonl or .parquet, that has a row
for each question: `video` (a path from where the table lies, or a URL), `question`, and other columns, which are kept.
It needs Ray: `pip install '.[library]'`.

CPUs decode the next videos while the models, one on each GPU, encode a video once and answer all of its questions. The
answers of a video are kept as soon as they are known, so the same command, given again, goes on where it was stopped.
At the end `answers/answers.parquet` has a row for each question. A video that is missing or broken costs the questions
about it their answers, and nothing else.
"""

import argparse
import hashlib
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.data
import torch
from ask_video import add_model_arguments, check_sampling, encode, encoding_options, load
from library_files import AnswerFolder, VideoError, read_questions
from tqdm.auto import tqdm
from transformers.utils import cached_file

from transformers_vamba import VambaCache, VambaConfig, VambaProcessor
from transformers_vamba.video.reading import check_video, normalize_video


class Decoder:
    """An actor on a CPU: the frames of a video that are looked at, resized, as bytes."""

    def __init__(self, model: str, folder: AnswerFolder, sampling: dict):
        self.processor, self.folder = VambaProcessor.from_pretrained(model), folder
        self.sampling = sampling

    def __call__(self, row: dict) -> dict:
        """Adds `frames`, uint8 of shape (frames, channels, height, width), or the `error`."""
        try:
            with self.folder.attempt(row["video"], "decoding"):
                frames, seconds = self.decode(row["source"])
        except VideoError as error:
            return row | {"frames": None, "video_seconds": None, "error": str(error)}
        return row | {"frames": frames, "video_seconds": seconds, "error": None}

    def decode(self, source: str):
        processor = self.processor.video_processor
        try:
            video = normalize_video(source)
            check_video(video, processor.source_limits)
            frames, metadata = processor.read_sampled(video, None, processor.complete_kwargs(self.sampling))
        except (OSError, ValueError) as error:
            raise VideoError(f"{type(error).__name__}: {error}") from error
        return frames.numpy(), metadata.duration


class Answerer:
    """An actor with a model, on a GPU if there is one: encodes a video once, answers and keeps all about it."""

    def __init__(self, folder: AnswerFolder, model: str, device: str, weight_bits, encoding: dict, generation: dict):
        self.model, self.processor = load(model, device, weight_bits)
        self.folder, self.encoding, self.generation = folder, encoding, dict(generation)
        self.batch_size = self.generation.pop("batch_size")

    def __call__(self, row: dict) -> dict:
        """The number of questions with and without an answer."""
        try:
            if row["error"] is not None:
                raise VideoError(row["error"])
            with self.folder.attempt(row["video"], "answering"):
                results = self.answer(row["frames"], list(row["questions"]))
        except VideoError as error:
            results = [{"error": str(error)}] * len(row["questions"])
        known = {"video": row["video"], "video_seconds": row["video_seconds"]}
        rows = [known | {"question": question} | result for question, result in zip(row["questions"], results)]
        self.folder.write(row["video"], rows)
        return {"num_answers": sum("answer" in result for result in results), "num_rows": len(rows)}

    def answer(self, frames, questions: list[str]) -> list[dict]:
        try:
            cache = encode(
                self.model, self.processor, frames, do_sample_frames=False, do_resize=False, **self.encoding
            )
            known = {"num_frames": len(frames), "num_video_tokens": sum(cache.video_lengths)}
            batches = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
            return [known | result for batch in batches for result in self.answer_batch(cache, batch)]
        except torch.OutOfMemoryError as error:
            raise VideoError(f"It does not fit on the GPU: {error}") from error

    def answer_batch(self, cache: VambaCache, questions: list[str]) -> list[dict]:
        inputs = self.processor.prepare_question(questions).to(self.model.device)
        tokens = self.model.generate(**inputs, cache=cache.fork(), do_sample=False, **self.generation)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        lengths = (tokens != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        return [{"answer": text, "num_answer_tokens": length} for text, length in zip(texts, lengths)]


def identify(model: str) -> str:
    """The name of a checkpoint, and what changes with its files: a few stretches of each, or the commit on the Hub."""
    if not Path(model).is_dir():
        return f"{model}@{Path(cached_file(model, 'config.json')).parent.name}"
    digest = hashlib.sha256()
    for path in sorted(Path(model).iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for offset in range(0, size, max(size // 256, 4096)):
                    file.seek(offset)
                    digest.update(file.read(4096))
    return f"{Path(model).resolve().name}@{digest.hexdigest()[:16]}"


@dataclass
class Workers:
    """How many there are of each kind, and what one of them takes of the cluster."""

    device: str
    num_models: int
    num_decoders: int
    model_resources: dict
    decoder_resources: dict

    @classmethod
    def share_out(cls, cluster: dict, args):
        num_cpus, num_gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
        device = args.device or ("cuda" if num_gpus else "cpu")
        num_models = args.models or (num_gpus if device == "cuda" else 1)
        num_decoders = args.decoders or max(num_models, num_cpus // 4)
        if device == "cuda":
            if not 0 < num_models <= num_gpus:
                raise SystemExit(
                    f"--device cuda needs a GPU for each of --models {args.models or 1}: Ray has {num_gpus}."
                )
            return cls(device, num_models, num_decoders, {"num_gpus": 1}, {"num_cpus": 1})
        # Workers share CPUs if there are fewer. PyTorch takes as many threads as Ray gives it CPUs.
        share = min(1, int(1000 * num_cpus / (num_models + num_decoders)) / 1000)
        of_a_model = max(share, (num_cpus - num_decoders) // num_models)
        return cls(device, num_models, num_decoders, {"num_cpus": of_a_model}, {"num_cpus": share})


def start_ray(address: str) -> None:
    """A Ray of this machine alone (`"local"`), or the cluster at an address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray itself tries for many minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise SystemExit(f"No Ray cluster answers at {address}: {error}") from error
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, logging_level="WARNING", **options)
    except ConnectionError as error:
        raise SystemExit(f"No Ray cluster for --address {address}: {error}") from error
    for name, level in {"ray.data": "WARNING", "ray.data._internal.progress": "ERROR"}.items():
        logging.getLogger(name).setLevel(level)  # the progress that is shown is our own
    ray.data.DataContext.get_current().enable_progress_bars = False


def answer_all(unanswered: list[dict], workers: Workers, decoder: dict, answerer: dict) -> None:
    """Answers the questions about each video. A block is a video: what is decoded waits in Ray's object store."""
    pool = ray.data.ActorPoolStrategy
    answered = (
        ray.data.from_items(unanswered, override_num_blocks=len(unanswered))
        .map(
            Decoder,
            fn_constructor_kwargs=decoder,
            compute=pool(min_size=1, max_size=workers.num_decoders),
            **workers.decoder_resources,
        )
        .map(
            Answerer,
            fn_constructor_kwargs=answerer | {"device": workers.device},
            compute=pool(size=workers.num_models),
            **workers.model_resources,
        )
    )
    with tqdm(total=len(unanswered), desc="videos") as bar:
        for _ in answered.iter_rows():
            bar.update()


def build_parser():
    parser = argparse.ArgumentParser(description="Ask a Vamba model questions about many videos, with Ray.")
    parser.add_argument("library", type=Path, help="folder of videos, or table of questions: .csv, .jsonl, .parquet")
    parser.add_argument("questions", nargs="*", metavar="question", help="what to ask about each video of a folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the answers, new or of an earlier run")
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="the most tokens of an answer")
    parser.add_argument("--batch-size", type=int, default=16, help="questions about a video that are answered at once")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of the models (default: cuda if there is a GPU)")
    parser.add_argument("--models", type=int, help="how many work at once (default: one on each GPU, or one)")
    parser.add_argument("--decoders", type=int, help="at most (default: one for each model, or for four CPUs)")
    parser.add_argument(
        "--address", default="local", help="of a Ray cluster: auto or host:port (default: this machine)"
    )
    return parser


def prepare(args) -> tuple[dict, dict, dict]:
    """
    What decoders and what models are made with, and what the answers depend on beside video and question. Options that
    no video can be read or kept with are a `ValueError`.
    """
    for name in ("max_new_tokens", "batch_size", "models", "decoders"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    model = str(Path(args.model).resolve() if Path(args.model).is_dir() else args.model)
    processor = VambaProcessor.from_pretrained(model)
    encoding = encoding_options(args, processor)
    sampling = {name: encoding.pop(name, None) for name in ("num_frames", "fps", "size")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    check_sampling(processor, segment_frames=encoding["segment_frames"], **sampling)
    kept = {name: encoding[name] for name in ("video_pruning_rate", "max_video_tokens")}
    VambaCache(VambaConfig.from_pretrained(model), video_cache_implementation=encoding["video_cache"], **kept)
    settings = {"model": identify(model), "weight_bits": args.weight_bits, "max_new_tokens": args.max_new_tokens}
    settings |= sampling | kept | {"video_cache": encoding["video_cache"]}
    generation = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    answerer = {"model": model, "weight_bits": args.weight_bits, "encoding": encoding, "generation": generation}
    return {"model": model, "sampling": sampling}, answerer, settings


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    questions = read_questions(args.library, args.questions)
    try:
        decoder, answerer, settings = prepare(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    folder = AnswerFolder(args.output)
    with folder.opened(settings):
        root = args.library if args.library.is_dir() else args.library.parent
        unanswered = folder.unanswered(questions, root)
        num_left = sum(len(row["questions"]) for row in unanswered)
        print(f"{len(questions)} questions, {num_left} to answer, about {len(unanswered)} videos.", flush=True)
        if unanswered:
            start_ray(args.address)
            try:
                workers = Workers.share_out(ray.cluster_resources(), args)
                print(f"Models: {workers.num_models}, on {workers.device}. Decoders: {workers.num_decoders} at most.")
                answer_all(unanswered, workers, decoder | {"folder": folder}, answerer | {"folder": folder})
            except KeyboardInterrupt:
                print(f"\nStopped. What is answered is in {folder.parts}; the same command goes on.", file=sys.stderr)
                sys.exit(130)
            finally:
                ray.shutdown()
        table = folder.finish(questions)
    num_errors = len(table) - table["error"].null_count
    print(f"{args.output / 'answers.parquet'}: {len(table)} rows, {num_errors} with an error instead of an answer.")


if __name__ == "__main__":
    main()
