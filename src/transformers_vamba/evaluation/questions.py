# SPDX-License-Identifier: Apache-2.0
"""Answers to many questions about many videos, each video encoded once."""

import copy
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils import logging

from ..cache.cache import VambaCache
from ..video.sources import is_remote, local_path
from .frames import EvaluationVideoProcessor


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 512  # the published evaluation's, if a task says nothing
LARGEST_EDGE = 2**31 - 1  # in pixels, of no video


class VideoSettings(NamedTuple):
    """
    How frames are taken from a video.

    Args:
        num_frames (`int`, *optional*), fps (`float`, *optional*): Their number, or how many a second: one of the two.
        shortest_edge (`int`, *optional*), longest_edge (`int`, *optional*):
            Bounds of the edges of a frame, in pixels. Without one, an edge stays as it is on that side.
        repeat (`bool`, *optional*, defaults to `False`):
            Whether there are always `num_frames`, those of a shorter video several times.
    """

    num_frames: int | None
    fps: float | None
    shortest_edge: int | None
    longest_edge: int | None
    repeat: bool = False

    @property
    def videos_kwargs(self) -> dict:
        """The same as arguments of the video processor."""
        sampling = {"num_frames": self.num_frames} if self.fps is None else {"fps": self.fps}
        size = {"shortest_edge": self.shortest_edge or 1, "longest_edge": self.longest_edge or LARGEST_EDGE}
        return sampling | {"size": size}


@dataclass
class Prompt:
    """
    One question.

    Args:
        messages (`list[dict]`):
            A conversation for the chat template. Its videos are `{"type": "video", "path": ...}`, its images
            `{"type": "image", "image": ...}`.
        settings ([`VideoSettings`]): How its videos are read.
        generation (`dict`, *optional*): Arguments of `generate`.
        stop (`tuple[str]`, *optional*): Strings of which the first to come up ends the answer.
        continuation (`str`, *optional*): The answer to score, if there is one.
    """

    messages: list[dict]
    settings: VideoSettings
    generation: dict = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    continuation: str = ""

    def media(self, kind: str) -> list:
        """Its images (`"image"`) or paths of its videos (`"video"`), in order."""
        key = {"image": "image", "video": "path"}[kind]
        contents = itertools.chain.from_iterable(message["content"] for message in self.messages)
        return [content[key] for content in contents if content["type"] == kind]

    @property
    def encodes_ahead(self) -> bool:
        """Whether its media are videos alone, which can be encoded before any text is known."""
        return bool(self.media("video")) and not self.media("image")

    @property
    def group(self) -> tuple:
        """Prompts of the same group read the same encoded videos or, without any, can share a batch."""
        return self.settings, tuple(self.media("video")) if self.encodes_ahead else None


class Answer(NamedTuple):
    """
    What became of a [`Prompt`].

    Args:
        text (`str`, defaults to `""`): The answer.
        num_tokens (`int`, defaults to 0): The tokens generated for it.
        loss (`float`, defaults to infinity): Mean negative log-likelihood of a token of the continuation, in nats.
        is_greedy (`bool`, defaults to `False`): Whether greedy decoding would give the continuation.
        error (`str`, *optional*): Why there is no answer, if there is none.
    """

    text: str = ""
    num_tokens: int = 0
    loss: float = float("inf")
    is_greedy: bool = False
    error: str | None = None


class UnreadableVideoError(Exception):
    """A video is missing or cannot be read."""


class VideoQuestionAnswering:
    """
    Answers questions, those about the same video against one encoding of it. A video or an image that cannot be read
    costs the questions about it their answers, and nothing else.

    Args:
        model ([`VambaForConditionalGeneration`]): The model.
        processor ([`VambaProcessor`]): Its processor.
        batch_size (`int`, *optional*, defaults to 1): Questions answered at a time.
        video_cache (`str` or `os.PathLike`, *optional*):
            A folder for processed videos, kept for the next run. A video, a model or settings that have changed are
            noticed. An hour of video can take gigabytes.
    """

    def __init__(self, model, processor, batch_size: int = 1, video_cache: str | os.PathLike | None = None):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model = model
        self.processor = copy.copy(processor)
        video_processor = processor.video_processor.to_dict()
        self.processor.video_processor = EvaluationVideoProcessor.from_dict(video_processor)
        self.batch_size = batch_size
        self.video_cache = None if video_cache is None else Path(video_cache)
        self.fingerprint = b"" if video_cache is None else _fingerprint(model, self.processor)

    def answer(self, prompts: Sequence[Prompt], progress: bool = False) -> list[Answer]:
        """Generates an answer to each prompt. `progress` shows a bar."""
        return self._by_group(prompts, self._generate, progress)

    def score(self, prompts: Sequence[Prompt], progress: bool = False) -> list[Answer]:
        """Gives the loss of each prompt's continuation. `progress` shows a bar."""
        return self._by_group(prompts, self._score, progress)

    @torch.no_grad()
    def encode(self, videos: Sequence[str], settings: VideoSettings) -> VambaCache:
        """
        Encodes videos, one after another as those of one prompt, or takes them from the folder.

        Raises:
            `UnreadableVideoError`: for a video that is missing or cannot be read.
        """
        folder = None if self.video_cache is None else self.video_cache / self._name(videos, settings)
        if folder is not None and (saved := self._load(folder)) is not None:
            return saved
        cache: Any = None
        for video in videos:
            for segment in self._read(video, settings):
                cache = self.model.encode_video(**segment, cache=cache)
        if folder is not None:
            _save(cache, folder)
        return cache

    def _load(self, folder: Path) -> VambaCache | None:
        """The processed video in a folder, or `None` if there is none. A damaged one is removed."""
        if not os.path.lexists(folder):
            return None
        try:
            cache = VambaCache.from_pretrained(folder, device=self.model.device)
            cache.check_fits(self.model.config.get_text_config())
            if len(cache.videos) != 1 or cache.rows is not None:
                raise ValueError(f"expected the videos of one prompt, got those of {len(cache.videos)}")
            return cache
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # damage has no end of forms: a folder that is none, JSON of another shape
            logger.warning(f"The processed video in {str(folder)!r} is made anew: {type(error).__name__}: {error}")
            _remove(folder)
            return None

    def _read(self, video: str, settings: VideoSettings) -> Iterator[BatchFeature]:
        try:
            source, videos_kwargs = self._source(video, settings)
            yield from self.processor.iter_video_segments(source, progress=False, **videos_kwargs)
        except (OSError, ValueError) as error:
            raise UnreadableVideoError(f"{type(error).__name__}: {error}") from error

    def _source(self, video: str, settings: VideoSettings) -> tuple[str | np.ndarray, dict]:
        """What to read as a video, its path or its frames, and the arguments of the video processor."""
        videos_kwargs = settings.videos_kwargs
        if not settings.repeat or settings.fps is not None:
            return video, videos_kwargs
        frames = self.processor.video_processor.read_repeated(video, videos_kwargs.pop("num_frames"))
        return frames, videos_kwargs | {"do_sample_frames": False}

    def _name(self, videos: Sequence[str], settings: VideoSettings) -> str:
        """Name of the folder of processed videos, which changes with all that changes them."""
        digest = hashlib.sha256(self.fingerprint + repr(tuple(settings)).encode())
        for video in videos:
            digest.update(video.encode())
            if not is_remote(video) and os.path.exists(local_path(video)):
                status = os.stat(local_path(video))
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        return f"{Path(videos[0]).stem}-{digest.hexdigest()[:16]}"

    def _by_group(self, prompts: Sequence[Prompt], run: Callable, progress: bool) -> list[Answer]:
        groups: dict[tuple, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt.group, []).append(index)
        answers: dict[int, Answer] = {}
        with tqdm(total=len(prompts), desc="questions", disable=not progress) as bar:
            for indices in groups.values():
                group_answers = self._answer_group([prompts[index] for index in indices], run)
                for index, answer in zip(indices, group_answers, strict=True):
                    answers[index] = answer
                    bar.update()
        return [answers[index] for index in range(len(prompts))]

    def _answer_group(self, prompts: list[Prompt], run: Callable) -> list[Answer]:
        cache = None
        if prompts[0].encodes_ahead:
            try:
                cache = self.encode(prompts[0].media("video"), prompts[0].settings)
            except UnreadableVideoError as error:
                return [Answer(error=str(error))] * len(prompts)
        answers = []
        for _, same in itertools.groupby(prompts, key=lambda prompt: prompt.generation):
            same = list(same)
            for start in range(0, len(same), self.batch_size):
                answers += self._answer_batch(same[start : start + self.batch_size], cache, run)
        return answers

    def _answer_batch(self, prompts: list[Prompt], cache: VambaCache | None, run: Callable) -> list[Answer]:
        if cache is not None:
            return run(prompts, self._tokenize(prompts), cache.fork())
        try:
            inputs = self._preprocess(prompts)
        except (OSError, ValueError) as error:
            if len(prompts) == 1:
                return [Answer(error=f"{type(error).__name__}: {error}")]
            return [answer for prompt in prompts for answer in self._answer_batch([prompt], None, run)]
        return run(prompts, inputs, None)

    def _texts(self, prompts: list[Prompt]) -> list[str]:
        texts = self.processor.apply_chat_template([prompt.messages for prompt in prompts], add_generation_prompt=True)
        return [text + prompt.continuation for text, prompt in zip(texts, prompts, strict=True)]

    def _tokenize(self, prompts: list[Prompt]) -> BatchFeature:
        """The text of prompts whose videos are in the cache: no pixels come with it, so nothing stands for them."""
        texts = [self.processor.remove_placeholders(text) for text in self._texts(prompts)]
        return self.processor(text=texts, padding=True, return_tensors="pt")

    def _preprocess(self, prompts: list[Prompt]) -> BatchFeature:
        """The text of prompts and the pixels of their images and videos."""
        settings = prompts[0].settings
        images = [prompt.media("image") for prompt in prompts]
        videos = [[self._source(video, settings) for video in prompt.media("video")] for prompt in prompts]
        videos_kwargs = next((kwargs for row in videos for _, kwargs in row), {})
        return self.processor(
            images=images if any(images) else None,
            text=self._texts(prompts),
            videos=[[source for source, _ in row] for row in videos] if any(videos) else None,
            padding=True,
            return_tensors="pt",
            videos_kwargs=videos_kwargs,
        )

    def _generate(self, prompts: list[Prompt], inputs: BatchFeature, cache: VambaCache | None) -> list[Answer]:
        inputs = inputs.to(self.model.device)
        arguments = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | prompts[0].generation
        tokens = self.model.generate(**inputs, cache=cache, **arguments)
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers = []
        for prompt, row in zip(prompts, tokens, strict=True):
            text = self.processor.decode(row, skip_special_tokens=True)
            for stop in prompt.stop:
                text = text.split(stop)[0]
            num_tokens = int((row != self.processor.tokenizer.pad_token_id).sum())
            answers.append(Answer(text, num_tokens))
        return answers

    @torch.no_grad()
    def _score(self, prompts: list[Prompt], inputs: BatchFeature, cache: VambaCache | None) -> list[Answer]:
        inputs = inputs.to(self.model.device)
        # Padding stands on the left, and positions count from the first token.
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(**inputs, position_ids=position_ids, cache=cache).logits
        answers = []
        for prompt, row, mask, row_logits in zip(
            prompts, inputs["input_ids"], inputs["attention_mask"], logits, strict=True
        ):
            length = self._continuation_length(prompt, row[mask.bool()].tolist())
            if not length:
                answers.append(Answer(error="ValueError: The answer to score is empty."))
                continue
            log_probabilities = row_logits[-length - 1 : -1].float().log_softmax(-1)
            tokens = row[-length:, None]
            loss = -log_probabilities.gather(-1, tokens).mean()
            answers.append(Answer(loss=loss.item(), is_greedy=torch.equal(log_probabilities.argmax(-1), tokens[:, 0])))
        return answers

    def _continuation_length(self, prompt: Prompt, ids: list[int]) -> int:
        """How many of a prompt's tokens are its continuation's: those after the first that it changes."""
        (text,) = self._texts([replace(prompt, continuation="")])
        question_ids = self.processor.tokenizer(self.processor.remove_placeholders(text)).input_ids
        return len(ids) - len(os.path.commonprefix([question_ids, ids]))


def _fingerprint(model, processor) -> bytes:
    """Changes with the model's weights, by a few values of each, and with the preprocessing of videos."""
    settings = (model.config.to_dict(), processor.video_processor.to_dict())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for parameter in model.parameters():
        digest.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.digest()


def _remove(folder: Path) -> None:
    """Removes a folder, or what has taken its place. What cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.unlink()


def _save(cache: VambaCache, folder: Path) -> None:
    """Writes a processed video under another name first, so that no other process reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-partial-")
    cache.save_pretrained(partial)
    try:
        os.rename(partial, folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
