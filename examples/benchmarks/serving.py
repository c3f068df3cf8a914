# SPDX-License-Identifier: Apache-2.0
"""Requests to the server: a further question, many at once about one video, and a long mixed load.

    python examples/benchmarks/serving.py --frames 1024 --clients 16 --output results

Starts `python -m transformers_vamba serve` in a process of its own, on a port of the loopback, and asks it with
OpenAI's client. On a GPU the model has random weights of the 7B shapes, and a tokenizer with a word for each token;
its video has frames of 640x360. On a CPU it is the tiny model that comes with the repository. Every answer has
`--new-tokens` tokens.

"Further" are questions about a video that has been asked about before, streamed; times are medians. The mixed load is
of questions about that video, four short ones, an image and nothing, half of them streamed. "Failed" are answers that
are missing or too short. Memory is that of the server's process, and of the whole GPU, after a fifth of the load and
at its end. `serving.md` and `.json` go to the output folder.
"""

import argparse
import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import PIL.Image
import torch
from inference import describe_machine, load, make_config, write_results
from transformers import Qwen2VLImageProcessor

from transformers_vamba import VambaProcessor, VambaVideoProcessor


TINY_MODEL = Path(__file__).parents[2] / "checkpoints" / "vamba-tiny"
NUM_SHORT_VIDEOS = 4
COLUMNS = {
    "load": ("requests", "{}"),
    "frames": ("frames", "{:,}"),
    "clients": ("clients", "{}"),
    "requests": ("number", "{:,}"),
    "failed": ("failed", "{}"),
    "requests_s": ("requests per second", "{:.2f}"),
    "tokens_s": ("tokens per second", "{:.0f}"),
    "first_token_s": ("first token, s", "{:.3f}"),
    "answer_s": ("answer, s", "{:.2f}"),
    "process_mib": ("process, MiB", "{}"),
    "gpu_gib": ("GPU, GiB", "{}"),
    "note": ("", "{}"),
}


def make_processor(vocab_size: int, num_frames: int) -> VambaProcessor:
    """Qwen2-VL's settings, and a tokenizer with a word for each token of the model."""
    tokenizer = VambaProcessor.from_pretrained(TINY_MODEL).tokenizer
    tokenizer.add_tokens([f" word{number}" for number in range(len(tokenizer), vocab_size)])
    return VambaProcessor(Qwen2VLImageProcessor(), tokenizer, VambaVideoProcessor(num_frames=num_frames))


def run_server(device: str, port: int, folder: Path, num_frames: int) -> None:
    """The command `serve`, with a model that ends no answer by itself."""
    from transformers.cli.serving import model_manager

    from transformers_vamba.__main__ import register
    from transformers_vamba.serving.command import serve

    is_random = torch.device(device).type == "cuda"
    config, _ = make_config("vamba", tiny=False)

    class ModelManager(model_manager.ModelManager):
        def _load_model(self, *args, **kwargs):
            if is_random:
                return load(config, "sdpa", torch.device(device))
            model = super()._load_model(*args, **kwargs)
            model.generation_config.eos_token_id = None
            return model

        def _load_processor(self, *args, **kwargs):
            if is_random:
                return make_processor(config.text_config.vocab_size, num_frames)
            return super()._load_processor(*args, **kwargs)

    model_manager.ModelManager = ModelManager
    register()
    serve("random" if is_random else str(TINY_MODEL), device=device, host="127.0.0.1", port=port, media_root=folder)


def write_video(path: Path, num_frames: int, size: tuple[int, int], seed: int) -> None:
    """A camera that moves over squares of many colours, two frames per second."""
    import av

    width, height = size
    squares = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    picture = squares.repeat(8, axis=0).repeat(8, axis=1)  # twice as wide and as high as a frame
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            frame = np.ascontiguousarray(picture[number % height :, 2 * number % width :][:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


class Client:
    """
    Asks a server.

    Args:
        url (`str`): Where it is.
        num_frames (`int`): Taken of the long video.
        num_new_tokens (`int`): Of each answer.
    """

    def __init__(self, url: str, num_frames: int, num_new_tokens: int):
        self.num_frames, self.num_new_tokens = num_frames, num_new_tokens
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.model = self.client.models.list().data[0].id

    def ask(self, number: int, media: list[dict], stream: bool = True) -> dict:
        """Seconds until the first token and the end of the answer to a question that nobody has asked before."""
        start = time.perf_counter()
        content = [*media, {"type": "text", "text": f"Question {number}: what happens then?"}]
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=self.num_new_tokens,
            stream=stream,
        )
        first_token_s, usage = None, None
        for chunk in answer if stream else ():
            if first_token_s is None and any(choice.delta.content for choice in chunk.choices):
                first_token_s = time.perf_counter() - start
            usage = chunk.usage or usage
        usage = usage if stream else answer.usage
        return {
            "first_token_s": first_token_s,
            "answer_s": time.perf_counter() - start,
            "is_whole": usage is not None and usage.completion_tokens == self.num_new_tokens,
        }

    def movie(self) -> list[dict]:
        return [{"type": "video_url", "video_url": {"url": "movie.mp4"}, "num_frames": self.num_frames}]

    def ask_mixed(self, number: int) -> bool:
        """One request of the mixed load; whether it was answered."""
        png = io.BytesIO()
        PIL.Image.new("RGB", (112, 112), ("red", "green", "blue")[number % 3]).save(png, "PNG")
        image = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        shorts = [[{"type": "video_url", "video_url": f"{short}.mp4"}] for short in range(NUM_SHORT_VIDEOS)]
        choices = [self.movie(), *shorts, [{"type": "image_url", "image_url": image}], []]
        try:
            return self.ask(number, choices[number % len(choices)], stream=number // len(choices) % 2 == 0)["is_whole"]
        except openai.APIError as error:
            print(f"Request {number}: {error}")
            return False


def process_mib(process: subprocess.Popen) -> int | None:
    """Resident memory of a process."""
    try:
        pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    except OSError:  # elsewhere than on Linux
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE") // 2**20


def gpu_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / 2**30, 2)


def start_server(args, folder: Path) -> tuple[subprocess.Popen, str]:
    """The server's process, once it answers, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--device", args.device, "--frames", str(args.frames), "--serve", str(port), str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        while process.poll() is None:
            try:
                client.models.list()
                return process, url
            except openai.APIError:
                time.sleep(0.2)
    raise RuntimeError(f"The server has ended:\n{(folder / 'log').read_text()[-3000:]}")


def summarize(answers: list[dict], seconds: float, num_new_tokens: int) -> dict:
    first = [answer["first_token_s"] for answer in answers if answer["first_token_s"] is not None]
    return {
        "requests": len(answers),
        "failed": sum(not answer["is_whole"] for answer in answers),
        "requests_s": len(answers) / seconds,
        "tokens_s": num_new_tokens * len(answers) / seconds,
        "first_token_s": statistics.median(first) if first else None,
        "answer_s": statistics.median(answer["answer_s"] for answer in answers),
    }


def measure(args, process: subprocess.Popen, url: str, record) -> None:
    """Hands each row of the table to `record`."""
    device = torch.device(args.device)
    client = Client(url, args.frames, args.new_tokens)
    numbers = iter(range(10**9))

    def ask_all(num_requests: int, num_clients: int) -> dict:
        start = time.perf_counter()
        with ThreadPoolExecutor(num_clients) as threads:
            asked = [threads.submit(client.ask, next(numbers), client.movie()) for _ in range(num_requests)]
            answers = [each.result() for each in asked]
        return summarize(answers, time.perf_counter() - start, args.new_tokens)

    record("first about a video", 1, ask_all(1, 1))
    ask_all(2, 1)  # what the first steps of a size load is not measured
    ask_all(2 * args.clients, args.clients)
    record("further, one after another", 1, ask_all(args.questions, 1))
    record("further, at once", args.clients, ask_all(args.questions, args.clients))

    start, answered, memory = time.perf_counter(), [], []
    with ThreadPoolExecutor(args.clients) as threads:
        for part in (args.requests // 5, args.requests - args.requests // 5):
            answered += threads.map(client.ask_mixed, [next(numbers) for _ in range(part)])
            memory.append((process_mib(process), gpu_gib(device)))
    seconds = time.perf_counter() - start
    row = {"requests": len(answered), "failed": answered.count(False), "requests_s": len(answered) / seconds}
    row["tokens_s"] = args.new_tokens * row["requests_s"]
    for name, (before, after) in zip(("process_mib", "gpu_gib"), zip(*memory)):
        row[name] = None if before is None else f"{before:,} to {after:,}"
    record("mixed load", args.clients, row)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=16, help="at a time")
    parser.add_argument("--questions", type=int, default=64, help="further ones about the video")
    parser.add_argument("--requests", type=int, default=500, help="of the mixed load")
    parser.add_argument("--new-tokens", type=int, default=33, help="of each answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "FOLDER"), help=argparse.SUPPRESS)  # the server's process
    args = parser.parse_args(arguments)
    if args.serve:
        run_server(args.device, int(args.serve[0]), Path(args.serve[1]), args.frames)
        return
    device = torch.device(args.device)
    rows: list[dict] = []

    def record(load: str, num_clients: int, row: dict) -> None:
        sizes = {"frames": args.frames, "clients": num_clients}
        rows.append({"model": "vamba", "attention": "sdpa", "load": load, **sizes, **row})
        write_results(args.output, describe_machine(device), rows, "serving", COLUMNS)

    with tempfile.TemporaryDirectory() as folder:
        size = (640, 360) if device.type == "cuda" else (112, 112)
        write_video(Path(folder) / "movie.mp4", args.frames, size, seed=0)
        for short in range(NUM_SHORT_VIDEOS):
            write_video(Path(folder) / f"{short}.mp4", 32, size, seed=short + 1)
        process, url = start_server(args, Path(folder))
        try:
            measure(args, process, url, record)
        finally:
            process.terminate()
            process.wait(30)
    print((args.output / "serving.md").read_text())


if __name__ == "__main__":
    main()
