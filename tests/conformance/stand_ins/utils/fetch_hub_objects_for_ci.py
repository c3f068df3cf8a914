"""Local files in place of those that the common tests take from the Hub: a noise image or an 11-frame noise video."""

import os
from pathlib import Path

import av
import numpy as np
from PIL import Image


def url_to_local_path(url):
    path = Path(__file__).parent / Path(url).name
    write = {".jpg": write_image, ".png": write_image, ".mp4": write_video}.get(path.suffix)
    if write is None:
        return url
    if not path.exists():
        partial = path.with_stem(f"{path.stem}-{os.getpid()}")
        write(partial)
        partial.rename(path)
    return str(path)


def write_image(path):
    Image.fromarray(noise()).save(path)


def write_video(path, num_frames=11, rate=30):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, width=320, height=240, pix_fmt="yuv420p")
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise())))
        container.mux(stream.encode())


def noise():
    return np.random.default_rng(0).integers(256, size=(240, 320, 3), dtype=np.uint8)
