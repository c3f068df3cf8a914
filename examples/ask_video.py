# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Ask a Vamba model questions about a video. The video is encoded once, whatever the number of questions.

python examples/ask_video.py movie.mp4 "What happens in this video?" "How does it end?" --model PATH_OR_NAME
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_vamba  # noqa: F401 (registers Vamba with the Auto classes)


TINY_MODEL = Path(__file__).parent.parent / "checkpoints" / "vamba-tiny"


def load(path, device):
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").to(device).eval()
    return model, AutoProcessor.from_pretrained(path)


def encode(model, processor, video):
    """Everything that the model needs of a video (a path, an URL, or frames), before any question is known."""
    cache = None
    # Decoded and encoded a segment at a time: whatever the length, only the cache grows.
    for segment in processor.iter_video_segments(video):
        cache = model.encode_video(**segment, past_key_values=cache)
    return cache


def answer(model, processor, cache, question, max_new_tokens=128):
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    # The video is in the cache already: no pixels come with the text, so nothing stands for them in it.
    inputs = processor(text=prompt.replace(processor.video_token, ""), return_tensors="pt").to(model.device)
    # The fork shares the video, and keeps the text of this question to itself.
    tokens = model.generate(**inputs, past_key_values=cache.fork(), max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description="Ask a Vamba model questions about a video.")
    parser.add_argument("video", help="path or URL of a video file")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument(
        "--model", default=TINY_MODEL, help="folder or Hub name of a checkpoint (default: the tiny one)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model, processor = load(args.model, args.device)
    start = time.perf_counter()
    cache = encode(model, processor, args.video)
    print(f"{args.video}: encoded in {time.perf_counter() - start:.2f} s\n")
    for question in args.questions:
        start = time.perf_counter()
        reply = answer(model, processor, cache, question)
        print(f"Question: {question}\nAnswer:   {reply}   ({time.perf_counter() - start:.2f} s)\n")


if __name__ == "__main__":
    main()
