# SPDX-License-Identifier: Apache-2.0
"""Synthetic videos of coloured shapes, with questions and answers, for the tiny model.

Every video is 112x112 pixels, and tells one of three stories. White flashes (0 to 5) may come in between.

- movement: two or three shapes stand still all the time; one of them moves once, in a straight line.
- sequence: one, two or three shapes appear one after another, each for a short time.
- start_end: one shape stands there at the start and goes away, another one stands there at the end.

A video can have any number of frames. The events keep their durations (a shape shows for 3 to 8 frames, a move takes
4 to 10, a flash 2 or 3) and fall at random times: a longer video has longer stretches in which nothing happens.
Between two events there are at least 2 frames. So every question can be answered from every frame, two at a time.

    video = sample_video(seed=7, num_frames=32)
    print(video.describe(), video.questions)
    write_mp4("video.mp4", video)

As a program it writes one such video, by default of two minutes, and says what is in it:

    python examples/synthetic_videos.py movie.mp4
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch


FRAME_SIZE = 112
FRAME_RATE = 2.0  # frames per second of the files; the tiny model's processor samples at the same rate

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 220, 50),
    "purple": (165, 50, 185),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STORIES = ("movement", "sequence", "start_end")

SHAPE_FRAMES = (3, 8)
MOVE_FRAMES = (4, 10)
FLASH_FRAMES = (2, 3)
MIN_GAP = 2
MAX_FLASHES = 5
MAX_SHAPES = 3

QUESTIONS = {
    "moved_colour": (
        "Which colour moved?",
        "What colour is the shape that moved?",
        "What is the color of the moving shape?",
        "One shape moved. Which colour does it have?",
        "Tell me the colour of the shape that moved.",
    ),
    "moved_shape": (
        "Which shape moved?",
        "What kind of shape moved?",
        "One thing moved. What shape does it have?",
        "Name the shape that moved.",
        "The others stood still. Which shape moved?",
    ),
    "direction": (
        "In which direction did it move?",
        "Which way did the shape move?",
        "Where did the moving shape go?",
        "What was the direction of the movement?",
        "Did it move left, right, up or down?",
    ),
    "order": (
        "In which order did the colours come?",
        "In what order did the shapes appear?",
        "Which colours appeared, in order?",
        "List the colors in the order in which they appeared.",
        "What came first, and what came after it?",
    ),
    "first": (
        "What came first?",
        "Which shape appeared first?",
        "What was the first thing to appear?",
        "What did you see first?",
    ),
    "last": (
        "What came last?",
        "Which shape appeared last?",
        "What was the last thing to appear?",
        "What did you see last?",
    ),
    "appeared": (
        "What appeared?",
        "Which shape appeared?",
        "What could be seen in the video?",
        "Something appeared. What was it?",
    ),
    "start": (
        "What stood there at the start?",
        "What was there at the beginning?",
        "What does the video start with?",
        "Which shape was there at the start of the video?",
    ),
    "end": (
        "What stood there at the end?",
        "What was there in the end?",
        "What does the video end with?",
        "Which shape was there at the end of the video?",
    ),
    "flashes": (
        "How many flashes were there?",
        "How often did it flash?",
        "How many times did the screen flash?",
        "Count the flashes.",
        "How many white flashes did you see?",
    ),
}


@dataclass
class Shape:
    """A shape, visible in the frames `start` to `stop` (exclusive). It stands at (x, y), its centre in pixels, until
    `move_start`, and from there moves by (dx, dy) until `move_stop`."""

    kind: str
    colour: str
    radius: float
    x: float
    y: float
    start: int = 0
    stop: int = 0
    move_start: int = 0
    move_stop: int = 0
    dx: float = 0.0
    dy: float = 0.0

    def __str__(self):
        return f"a {self.colour} {self.kind}" if self.colour[0] not in "aeiou" else f"an {self.colour} {self.kind}"


@dataclass
class Question:
    kind: str
    text: str
    answer: str


@dataclass
class SyntheticVideo:
    num_frames: int
    story: str
    background: tuple[int, int, int]
    texture: float  # amplitude of the background's grain, in grey levels
    texture_seed: int
    shapes: list[Shape]
    flashes: list[tuple[int, int]]  # first frame and one past the last
    questions: list[Question] = field(default_factory=list)

    def describe(self) -> str:
        """What happens in the video, in words, for people to read."""
        lines = []
        for shape in self.shapes:
            line = f"frames {shape.start} to {shape.stop - 1}: {shape}"
            if shape.dx or shape.dy:
                direction = next(name for name, (x, y) in DIRECTIONS.items() if x * shape.dx + y * shape.dy > 0)
                line += f", which moves {direction} in frames {shape.move_start} to {shape.move_stop - 1}"
            lines.append(line)
        lines += [f"frames {start} to {stop - 1}: a white flash" for start, stop in self.flashes]
        return "\n".join(lines)


def sample_video(seed, num_frames: int, story: str | None = None) -> SyntheticVideo:
    """A random video with all of its questions. `seed` is whatever `numpy.random.default_rng` takes; the same seed,
    length and story give the same video. Eight frames are the fewest that hold any story."""
    if num_frames < 8:
        raise ValueError(f"num_frames is {num_frames}, but a story needs at least 8 frames")
    rng = np.random.default_rng(seed)
    story = story or rng.choice(STORIES)
    grey = rng.integers(15, 105)
    video = SyntheticVideo(
        num_frames=num_frames,
        story=str(story),
        background=tuple(int(grey + tint) for tint in rng.integers(-8, 9, size=3)),
        texture=float(rng.uniform(0, 8)),
        texture_seed=int(rng.integers(2**31)),
        shapes=[],
        flashes=[],
    )
    {"movement": _movement, "sequence": _sequence, "start_end": _start_end}[video.story](video, rng)
    return video


def ask(video: SyntheticVideo, kind: str, answer: str, rng) -> None:
    """Add a question of this kind, in a random wording, to the video."""
    video.questions.append(Question(kind, str(rng.choice(QUESTIONS[kind])), answer))


def _movement(video, rng):
    count = rng.integers(2, MAX_SHAPES + 1)
    direction = str(rng.choice(list(DIRECTIONS)))
    move, *flashes = _timeline(video, rng, [MOVE_FRAMES])
    shapes = _sample_shapes(rng, count)
    # The frame is cut into three lanes along the direction of the move, one shape in each: no shape covers another.
    horizontal = direction in ("left", "right")
    for shape, lane in zip(shapes, rng.permutation(3), strict=False):
        shape.radius = rng.uniform(13, 17)
        along = rng.uniform(20, FRAME_SIZE - 20)
        across = 19 + 37 * lane + rng.uniform(-2, 2)
        shape.x, shape.y = (along, across) if horizontal else (across, along)
        shape.stop = video.num_frames
    mover = shapes[0]
    sign_x, sign_y = DIRECTIONS[direction]
    distance = rng.uniform(36, 60)
    along = rng.uniform(16, FRAME_SIZE - 16 - distance)
    if sign_x + sign_y < 0:
        along = FRAME_SIZE - along
    mover.x, mover.y = (along, mover.y) if horizontal else (mover.x, along)
    mover.dx, mover.dy = sign_x * distance, sign_y * distance
    mover.move_start, mover.move_stop = move
    video.shapes = [shapes[i] for i in rng.permutation(count)]
    video.flashes = flashes
    ask(video, "moved_colour", mover.colour, rng)
    ask(video, "moved_shape", mover.kind, rng)
    ask(video, "direction", direction, rng)
    ask(video, "flashes", str(len(flashes)), rng)


def _sequence(video, rng):
    fits = (video.num_frames + MIN_GAP) // (SHAPE_FRAMES[0] + MIN_GAP)
    count = int(rng.integers(1, min(MAX_SHAPES, fits) + 1))
    times = _timeline(video, rng, [SHAPE_FRAMES] * count)
    video.shapes, video.flashes = _sample_shapes(rng, count), times[count:]
    for shape, time in zip(video.shapes, times, strict=False):
        shape.start, shape.stop = time
    if count == 1:
        ask(video, "appeared", str(video.shapes[0]), rng)
    else:
        ask(video, "order", ", then ".join(shape.colour for shape in video.shapes), rng)
        ask(video, "first", str(video.shapes[0]), rng)
        ask(video, "last", str(video.shapes[-1]), rng)
    ask(video, "flashes", str(len(video.flashes)), rng)


def _start_end(video, rng):
    first, last = (int(n) for n in rng.integers(SHAPE_FRAMES[0], SHAPE_FRAMES[1] + 1, size=2))
    if first + last + MIN_GAP > video.num_frames:
        first = last = SHAPE_FRAMES[0]
    start, stop = first + MIN_GAP, video.num_frames - last - MIN_GAP
    passing = int(rng.integers(2)) if stop - start >= SHAPE_FRAMES[0] else 0  # a third shape, in between
    times = _timeline(video, rng, [SHAPE_FRAMES] * passing, start, stop)
    visible = [(0, first), (video.num_frames - last, video.num_frames), *times[:passing]]
    video.shapes, video.flashes = _sample_shapes(rng, len(visible)), times[passing:]
    for shape, time in zip(video.shapes, visible, strict=True):
        shape.start, shape.stop = time
    ask(video, "start", str(video.shapes[0]), rng)
    ask(video, "end", str(video.shapes[1]), rng)
    ask(video, "flashes", str(len(video.flashes)), rng)


def _sample_shapes(rng, count) -> list[Shape]:
    """Shapes of different colours and kinds, somewhere in the frame."""
    colours, kinds = rng.permutation(list(COLOURS))[:count], rng.permutation(SHAPES)[:count]
    return [
        Shape(str(kind), str(colour), rng.uniform(14, 20), *rng.uniform(20, FRAME_SIZE - 20, size=2))
        for kind, colour in zip(kinds, colours, strict=True)
    ]


def _timeline(video, rng, events, start=0, stop=None) -> list[tuple[int, int]]:
    """Random times, between frames `start` and `stop`, for the events (given as their shortest and longest durations)
    and for as many flashes as a random draw wants of those that fit. Events keep their order; flashes come in between.
    Returns the frames (first, one past the last) of the events, then those of the flashes."""
    stop = video.num_frames if stop is None else stop
    room = stop - start + MIN_GAP - sum(shortest + MIN_GAP for shortest, _ in events)
    num_flashes = int(rng.integers(min(MAX_FLASHES, max(0, room // (FLASH_FRAMES[0] + MIN_GAP))) + 1))
    kinds = rng.permutation([0] * len(events) + [1] * num_flashes)  # 1 for a flash
    remaining = iter(events)
    bounds = [FLASH_FRAMES if kind else next(remaining) for kind in kinds]
    slack = stop - start - MIN_GAP * (len(bounds) - 1)
    durations = [int(rng.integers(shortest, longest + 1)) for shortest, longest in bounds]
    if sum(durations) > slack:
        durations = [shortest for shortest, _ in bounds]
    delays = np.sort(rng.integers(0, slack - sum(durations) + 1, size=len(bounds)))
    times = []
    for i, (duration, delay) in enumerate(zip(durations, delays, strict=True)):
        begin = start + int(delay) + sum(durations[:i]) + MIN_GAP * i
        times.append((begin, begin + duration))
    order = np.argsort(kinds, kind="stable")
    return [times[i] for i in order]


def pack_videos(videos: list[SyntheticVideo]) -> dict[str, torch.Tensor]:
    """The videos as small tensors, which `render_frames` draws from: `shapes` (videos, shapes, 13), `flashes` (videos,
    flashes, 2), `background` (videos, 3), `texture` (videos, 2). Absent shapes and flashes are visible in no frame."""
    shapes = torch.zeros(len(videos), MAX_SHAPES, 13)
    flashes = torch.zeros(len(videos), MAX_FLASHES, 2)
    for i, video in enumerate(videos):
        for j, shape in enumerate(video.shapes):
            numbers = (SHAPES.index(shape.kind), *COLOURS[shape.colour], shape.radius, shape.x, shape.y)
            times = (shape.start, shape.stop, shape.move_start, shape.move_stop, shape.dx, shape.dy)
            shapes[i, j] = torch.tensor(numbers + times)
        for j, flash in enumerate(video.flashes):
            flashes[i, j] = torch.tensor(flash)
    return {
        "shapes": shapes,
        "flashes": flashes,
        "background": torch.tensor([video.background for video in videos], dtype=torch.float32),
        "texture": torch.tensor([(video.texture, video.texture_seed) for video in videos], dtype=torch.float64),
    }


def render_frames(scenes: dict[str, torch.Tensor], start: int, stop: int) -> torch.Tensor:
    """Draw the frames `start` to `stop` (exclusive) of all packed videos at once, on the device that `scenes` is on.

    Returns: uint8 frames of shape (videos, frames, 3, 112, 112)."""
    device = scenes["shapes"].device
    time = torch.arange(start, stop, device=device).view(1, -1, 1, 1)
    rows = torch.arange(FRAME_SIZE, device=device).view(1, 1, -1, 1)
    columns = torch.arange(FRAME_SIZE, device=device).view(1, 1, 1, -1)

    frames = scenes["background"][:, :, None, None] + _texture(scenes["texture"], rows, columns)
    frames = frames.round().to(torch.uint8)[:, None].expand(-1, stop - start, -1, -1, -1)
    for shape in scenes["shapes"].unbind(1):
        kind, *colour, radius, x, y, first, last, move_start, move_stop, dx, dy = shape[:, :, None, None, None].unbind(
            1
        )
        moved = ((time - move_start) / (move_stop - move_start).clamp(min=1)).clamp(0, 1)
        right = (columns - x - moved * dx).abs() / radius  # distance from the centre, in radii
        below = (rows - y - moved * dy) / radius
        visible = (first <= time) & (time < last)
        inside = torch.where(kind == 0, right**2 + below**2 <= 1, torch.maximum(right, below.abs()) <= 0.85)
        inside = torch.where(kind == 2, (right <= (below + 1) / 1.75) & (below <= 0.75), inside)
        inside &= (kind != 3) | (torch.minimum(right, below.abs()) <= 0.3)
        colour = torch.stack(colour, dim=2).to(torch.uint8)
        frames = torch.where((inside & visible)[:, :, None], colour, frames)
    first, last = scenes["flashes"][:, :, :, None, None, None, None].unbind(2)
    flash = ((first <= time[..., None]) & (time[..., None] < last)).any(1)
    return frames.masked_fill(flash, 255)


def _texture(texture, rows, columns):
    """Grain that stays the same in all frames of a video: an integer hash of the pixel, equal on every device."""
    amplitude, seed = texture[:, :, None, None, None].unbind(1)
    bits = rows * 374761393 + columns * 668265263 + seed.long()
    bits = (bits ^ (bits >> 13)) % 2**31 * 1274126177 % 2**31
    return amplitude.float() * (((bits ^ (bits >> 16)) % 1024) / 512 - 1)


def iter_frames(video: SyntheticVideo, frames_at_a_time: int = 256) -> Iterator[np.ndarray]:
    """The frames of one video, (112, 112, 3) uint8, drawn a stretch at a time: a video of hours needs no memory."""
    scene = pack_videos([video])
    for start in range(0, video.num_frames, frames_at_a_time):
        stop = min(start + frames_at_a_time, video.num_frames)
        yield from render_frames(scene, start, stop)[0].permute(0, 2, 3, 1).numpy()


def write_mp4(path, video: SyntheticVideo, frame_rate: float = FRAME_RATE) -> None:
    """Write the video as an H.264 file (yuv420p, quality 23: what cameras and players use)."""
    import av  # only files need it: training draws its frames on the GPU

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(frame_rate), options={"crf": "23", "preset": "fast"})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        for frame in iter_frames(video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main():
    parser = argparse.ArgumentParser(description="Write a synthetic video, and say what is in it.")
    parser.add_argument("path", help="the file, such as movie.mp4")
    parser.add_argument("--num-frames", type=int, default=240, help=f"frames, {FRAME_RATE:g} per second")
    parser.add_argument("--story", choices=STORIES, default="sequence")
    parser.add_argument("--seed", type=int, default=500, help="another number makes another video")
    args = parser.parse_args()
    video = sample_video(args.seed, args.num_frames, args.story)
    write_mp4(args.path, video)
    print(video.describe())


if __name__ == "__main__":
    main()
