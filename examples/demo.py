# SPDX-License-Identifier: Apache-2.0
"""Write two video files, say what is in them, and let the shipped tiny model answer questions about them."""

import tempfile
import time
from pathlib import Path

from ask_video import TINY_MODEL, answer, encode, load
from synthetic_videos import FRAME_RATE, sample_video, write_mp4


def main():
    model, processor = load(TINY_MODEL, "cpu")
    print(f"{TINY_MODEL.name}: {model.num_parameters() / 1e6:.1f} M parameters\n")
    with tempfile.TemporaryDirectory() as folder:
        for story, seed in (("sequence", 8), ("movement", 1)):
            video = sample_video(seed, num_frames=32, story=story)
            path = Path(folder) / f"{story}.mp4"
            write_mp4(path, video)
            print(f"{path.name}, H.264, {path.stat().st_size} bytes, {FRAME_RATE:g} frames per second. What is in it:")
            print("    " + video.describe().replace("\n", "\n    "))

            start = time.perf_counter()
            cache = encode(model, processor, str(path))
            print(f"Decoded and encoded, once, in {time.perf_counter() - start:.2f} s.")
            for question in video.questions:
                start = time.perf_counter()
                reply = answer(model, processor, cache, question.text)
                print(f"Question: {question.text}")
                print(f"Answer:   {reply}   (expected: {question.answer}; {time.perf_counter() - start:.2f} s)")
            print()


if __name__ == "__main__":
    main()
