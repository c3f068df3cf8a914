# SPDX-License-Identifier: Apache-2.0
"""The cache of a Vamba model: the text's keys and values per row, and each video's once, whichever rows read it."""

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .changes import VideoChanges, check_pruning, num_kept
from .excerpts import check_read_share
from .layers import VambaVideoLayer, VideoStates, resolve_implementation
from .saving import SavedVideos, load_videos, save_videos
from .steps import VideoSteps


# What a model and a cache must have in common.
_FIELDS_THAT_FIT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_d_head",
    "mamba_n_groups",
)
# The arguments of a [`VambaCache`] that say how it keeps videos, and how much of them is read.
VIDEO_OPTIONS = ("video_cache_implementation", "video_pruning_rate", "max_video_tokens", "video_read_share")


class VambaCache(Cache):
    """
    What a Vamba model remembers: `layers`, the text's keys and values as in any Transformers cache, and `videos`,
    for each video its keys and values and mixer states in every layer. A video is held once, however many beams,
    samples or questions read it: `rows` says which video each row of the batch reads.

    Everything that `Cache` says of lengths, masks, cropping and so on concerns the text alone.

    Args:
        config ([`PreTrainedConfig`]): Configuration of the model, for the number and kind of its layers.
        text_cache ([`Cache`], *optional*):
            Cache for the text, of any kind (dynamic, static, offloaded, quantised); its layers are taken over. A
            [`DynamicCache`] by default.
        video_cache_implementation (`str`, *optional*, defaults to `"dynamic"`):
            How the keys and values of the videos are kept. `"dynamic"`: as they are computed, on the device that does.
            `"quantized"`: in 8 bits, half the memory for an error of about a hundredth in what the cross-attention
            reads. `"offloaded"`: in the host's memory, and copied to the device layer by layer, ahead of use, for
            every token that is generated. `"offloaded_quantized"`: both.
        video_pruning_rate (`float`, *optional*, defaults to 0):
            The share of each time step of a video, at least 0 and below 1, that is dropped between vision tower and
            mixers: the tokens that changed least since the time step before. The first time step of a medium stays
            whole, and so does every image. A time step whose pixels equal those of the step before is dropped before
            the vision tower, also with `max_video_tokens`.
        max_video_tokens (`int`, *optional*):
            The most tokens that are kept of each video; by default all. When a video is over it, an eighth becomes
            free: its newest tokens stay, and of those that are older the ones that changed most. The mixers go on as
            if nothing had been dropped.
        video_read_share (`float`, *optional*):
            The share of each video, above 0 and at most 1, that `generate` reads for each token of an answer; by
            default all. The prompt reads all, and what it has read most, layer by layer, is what the answer reads.

    Attributes:
        is_video_offloaded (`bool`): Whether the videos are kept in the host's memory.
        videos (`list[list[VambaVideoLayer]]`): The videos, and of each its decoder layers.
        steps (`dict[int, VideoSteps]`):
            By index in `videos`: how many tokens each time step has and when it begins. Read it with `steps_of`.
        changes (`dict[int, VideoChanges]`):
            By index in `videos`: how much each token changed, of videos that are pruned or bounded.
        rows (`list[int | None]`, *optional*):
            Index in `videos` of the video that each row of the batch reads, `None` for a row without one. Unset until
            a batch of text has met the cache.
        text_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            The text that `generate` has read and written last, of which the cache holds the beginning.
        is_read (`bool`): Whether a layer has read the videos since this was last set to `False`.
        watcher (`Callable`, *optional*):
            Called with the cache, a layer's cross-attention and its inputs before that reads the videos.
        excerpts (`dict[int, list[VambaVideoLayer]]`):
            By index in `videos`: what the answer reads of a video, layer by layer, while `generate` runs. Read it with
            `layers_to_read`.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        text_cache: Cache | None = None,
        video_cache_implementation: str | None = None,
        video_pruning_rate: float | None = None,
        max_video_tokens: int | None = None,
        video_read_share: float | None = None,
    ):
        self.video_pruning_rate = 0.0 if video_pruning_rate is None else video_pruning_rate
        self.max_video_tokens = max_video_tokens
        check_pruning(self.video_pruning_rate, max_video_tokens)
        self.video_read_share = video_read_share
        check_read_share(video_read_share)
        self.video_cache_implementation = video_cache_implementation or "dynamic"
        self._video_layer_class, self.is_video_offloaded = resolve_implementation(self.video_cache_implementation)
        text_config = config.get_text_config(decoder=True)
        text_cache = DynamicCache(config=text_config) if text_cache is None else text_cache
        offloading = {"offloading": text_cache.offloading}
        if text_cache.offloading:
            offloading["offload_only_non_sliding"] = text_cache.only_non_sliding
        if text_cache.layer_class_to_replicate is not None:
            Cache.__init__(self, layer_class_to_replicate=text_cache.layer_class_to_replicate, **offloading)
            self.layers = text_cache.layers
        else:
            Cache.__init__(self, layers=text_cache.layers, **offloading)
        self.config = text_config
        self.videos: list[list[VambaVideoLayer]] = []
        self.steps: dict[int, VideoSteps] = {}
        self.changes: dict[int, VideoChanges] = {}
        self.rows: list[int | None] | None = None
        self.is_read = False
        self.watcher: Callable | None = None
        self.excerpts: dict[int, list[VambaVideoLayer]] = {}
        self.step_plan: Any = None  # of the generation that is running, see `generation.captured_step`
        self._row_marks: dict[tuple, torch.Tensor] = {}
        self.text_ids: torch.Tensor | None = None

    @classmethod
    def around(cls, config: PreTrainedConfig, text_cache: Cache | None, **video_options) -> "VambaCache":
        """A cache that takes over the layers of a text cache; itself a [`StaticCache`] if that is one."""
        if isinstance(text_cache, StaticCache):
            cls = VambaStaticCache
        return cls(config, text_cache, **video_options)

    def __getstate__(self) -> dict:
        # A copy has no part in the generation that may be running: it reads all of the videos.
        return {**vars(self), "step_plan": None, "watcher": None, "excerpts": {}}

    def __repr__(self):
        return f"{type(self).__name__}(layers={self.layers}, video_lengths={self.video_lengths}, rows={self.rows})"

    @property
    def video_lengths(self) -> list[int]:
        """The number of tokens of each video."""
        return [video[0].get_seq_length() for video in self.videos]

    @property
    def video_options(self) -> dict[str, str | float | int | None]:
        """The arguments that say how videos are kept, by name."""
        return {name: getattr(self, name) for name in VIDEO_OPTIONS}

    @property
    def follows_changes(self) -> bool:
        """Whether tokens are dropped by how much they changed."""
        return self.video_pruning_rate > 0 or self.max_video_tokens is not None

    @property
    def max_cache_len(self) -> int:
        """The most text that the cache holds, like `get_max_length`, under the name by which PEFT asks for it."""
        return self.get_max_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of text that the cache holds."""
        if self.step_plan is not None and self.step_plan.step is not None:
            return self.step_plan.step.num_tokens
        return super().get_seq_length(layer_idx)

    def finish_generation(self) -> None:
        """Lets go of what `generate` needs while it runs. After a captured step the cache has all its text again."""
        self.watcher, self.excerpts = None, {}
        if self.step_plan is not None:
            self.step_plan.finish(self)
            self.step_plan = None

    def mark_rows(self, rows: list[int | None], device: torch.device) -> torch.Tensor:
        """Which rows read a video, `(batch_size, 1, 1)`. Made once: a CUDA graph can copy nothing from the host."""
        key = (tuple(rows), device)
        if key not in self._row_marks:
            marks = torch.tensor([row is not None for row in rows], device=device)
            self._row_marks[key] = marks.view(-1, 1, 1)
        return self._row_marks[key]

    def read_ids(self) -> torch.Tensor | None:
        """The tokens of text that the cache holds, `(batch_size, sequence_length)`, as far as they are known."""
        return None if self.text_ids is None else self.text_ids[:, : self.get_seq_length()]

    def add_video(self) -> int:
        """Makes room for one more video and returns its index in `videos`."""
        self.videos.append(
            [self._video_layer_class(self.is_video_offloaded) for _ in range(self.config.num_hidden_layers)]
        )
        return len(self.videos) - 1

    def reserve(self, video: int, num_tokens: int, tokens_per_step: int, steps_at_once: int) -> None:
        """
        Sizes the memory of a video, by index in `videos`, for `num_tokens` more from the vision tower, at
        `tokens_per_step` per time step, of which at most `steps_at_once` come at a time.
        """
        num_left = num_kept(tokens_per_step, self.video_pruning_rate)
        first_step = tokens_per_step - num_left  # which may stay whole
        num_tokens = num_tokens * num_left // tokens_per_step + first_step
        if self.max_video_tokens is not None:
            most = self.max_video_tokens + steps_at_once * num_left + first_step
            num_tokens = max(0, min(num_tokens, most - self.video_lengths[video]))
        for layer in self.videos[video]:
            layer.reserve(num_tokens)

    def video_to_append_to(self, rows: list[int | None], row: int) -> int:
        """The index of the video of a row, if need be a new one. Raises a `ValueError` if other rows read it too."""
        video = rows[row]
        if video is None:
            return self.add_video()
        if rows.count(video) > 1:
            raise ValueError(
                f"Row {row} brings images or videos, but shares its video in the cache with other rows. "
                "Append to a shared video with `encode_video`, before the batch of questions."
            )
        return video

    def steps_of(self, video: int) -> VideoSteps:
        """
        The time steps of a video. Tokens that came without a record, from a folder that was saved before there was one
        say, are one step at a time that is not known.
        """
        steps = self.steps.get(video, VideoSteps())
        num_missing = self.video_lengths[video] - int(steps.num_tokens.sum())
        return steps.append(1, num_missing) if num_missing else steps

    def changes_of(self, video: int) -> VideoChanges:
        """How much the tokens of a video changed; nothing of one that is kept whole."""
        return self.changes.get(video, VideoChanges())

    @contextmanager
    def keeping_videos(self) -> Iterator[None]:
        """A block of code that adds and extends videos: if it fails or is interrupted, they are as before."""
        if self.max_video_tokens is not None:
            # What is thinned out cannot be put back: it is held for as long as the block runs.
            forks = [[layer.fork() for layer in video] for video in self.videos]
        held = [[(layer.get_seq_length(), layer.mixer_state) for layer in video] for video in self.videos]
        held_records = dict(self.steps), dict(self.changes)
        try:
            yield
        except BaseException:
            del self.videos[len(held) :]
            self.steps, self.changes = held_records
            if self.max_video_tokens is not None:
                self.videos[:] = forks
                raise
            for video, states in zip(self.videos, held):
                for layer, state in zip(video, states):
                    layer.crop(*state)
            raise

    def thin_out(self, video: int) -> None:
        """Drops tokens of a video, by index in `videos`, that is over `max_video_tokens`."""
        if self.max_video_tokens is None or self.video_lengths[video] <= self.max_video_tokens:
            return
        indices = self.changes[video].choose(self.max_video_tokens)
        self.steps[video] = self.steps_of(video).select(indices)
        self.changes[video] = self.changes[video].select(indices)
        for layer in self.videos[video]:
            layer.select(indices)

    def read_videos(self, layer_idx: int, rows: list[int | None]) -> list[tuple[VideoStates, VideoStates] | None]:
        """
        The keys and values of each video in one decoder layer, or `None` for a video that no row reads. If videos
        are offloaded, this also starts copying the next layer's.
        """
        self.is_read = True
        videos = [self.layers_to_read(video) if video in rows else None for video in range(len(self.videos))]
        states = [None if layers is None else layers[layer_idx].read() for layers in videos]
        is_last = layer_idx == self.config.num_hidden_layers - 1
        if not is_last or self.watcher is None:  # while it watches, nothing may read the first layer again
            for layers in videos:
                if layers is not None:
                    layers[(layer_idx + 1) % len(layers)].prefetch()
        return states

    def layers_to_read(self, video: int) -> list[VambaVideoLayer]:
        """What is read of a video, by index in `videos`: all of it, or after the prompt an excerpt if there is one."""
        return self.videos[video] if self.watcher is not None else self.excerpts.get(video, self.videos[video])

    @property
    def reads_from_host(self) -> bool:
        """Whether the tokens of an answer read a video from the host's memory."""
        has_excerpts = self.excerpts and {*(self.rows or ())} - {None} <= self.excerpts.keys()
        return self.is_video_offloaded and not has_excerpts

    def resolve_rows(self, batch_size: int) -> list[int | None]:
        """
        The video that each row of a batch reads: as `rows` says; else every row the only video, or each its own.

        Raises:
            ValueError: if the rows of the batch cannot be matched with the cache.
        """
        if self.rows is not None:
            if len(self.rows) != batch_size:
                raise ValueError(f"The cache was filled by {len(self.rows)} rows and is now read by {batch_size}.")
            if not set(self.rows) <= {None, *range(len(self.videos))}:
                raise ValueError(f"`cache.rows` is {self.rows}, but the cache holds {len(self.videos)} videos.")
            return self.rows
        if len(self.videos) <= 1:
            return [0 if self.videos else None] * batch_size
        if len(self.videos) != batch_size:
            raise ValueError(
                f"The cache holds {len(self.videos)} videos and is read by {batch_size} rows: give as many rows as "
                "videos, one video for all rows, or set `cache.rows`."
            )
        return list(range(batch_size))

    def mark_static_videos(self) -> None:
        """Tells `torch.compile` that the videos stay where they are: CUDA graphs then read them in place."""
        for layer in itertools.chain(*self.videos, *self.excerpts.values()):
            for tensor in layer.state_dict().values():
                torch._dynamo.mark_static_address(tensor, guard=False)

    def check_video_options(self, **asked) -> None:
        """Raises a `ValueError` unless videos are kept as these options ask for, as far as they do."""
        wrong = {name: value for name, value in asked.items() if value not in (None, getattr(self, name))}
        if wrong:
            given = ", ".join(f"`{name}` is {value!r}" for name, value in wrong.items())
            has = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            new = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
            raise ValueError(
                f"{given}, but the cache that was given keeps its videos with {has}. Leave the argument out, or "
                f"encode the videos into a cache of their own: `model.encode_video(..., {new})`."
            )

    def check_fits(self, config: PreTrainedConfig) -> None:
        """Raises a `ValueError` unless a decoder of this configuration can read and continue the videos."""
        wrong = [
            f"{name} {getattr(self.config, name)} instead of {getattr(config, name)}"
            for name in _FIELDS_THAT_FIT
            if getattr(self.config, name) != getattr(config, name)
        ]
        if wrong:
            raise ValueError(f"The cache is of another model: it has {', '.join(wrong)}.")

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Writes the videos to a folder: a `cache_config.json`, one safetensors file per decoder layer, and one of the
        time steps. The text is not kept. Videos saved there before are replaced once all is written.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, created if it is missing.
        """
        indices = range(len(self.videos))
        steps, changes = [self.steps_of(video) for video in indices], [self.changes_of(video) for video in indices]
        videos = SavedVideos(self.videos, steps, changes, self.rows, self.video_options)
        save_videos(save_directory, self.config, videos)

    @classmethod
    def from_pretrained(
        cls,
        save_directory: str | os.PathLike,
        device: torch.device | str = "cpu",
        video_cache_implementation: str | None = None,
    ) -> "VambaCache":
        """
        Reads what [`~VambaCache.save_pretrained`] has written, by memory map, straight to a device. Whether a model
        fits is checked when it first reads the cache.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where the tensors go.
            video_cache_implementation (`str`, *optional*):
                How the videos are kept, see [`VambaCache`]; by default as they were when they were saved.

        Raises:
            `FileNotFoundError`: if there is no such folder, or no processed video in it.
            `ValueError`: for files that are damaged, of different saves, or do not hold the same videos.
        """
        config, saved = load_videos(save_directory, torch.device(device), video_cache_implementation)
        cache = cls(config, **saved.options)
        cache.videos, cache.rows = saved.videos, saved.rows
        cache.steps, cache.changes = dict(enumerate(saved.steps)), dict(enumerate(saved.changes))
        return cache

    def fork(self) -> "VambaCache":
        """
        A cache that shares the videos (not a byte is copied) and has a text of its own, so that several questions can
        be asked about one video, and a stream can go on while a question is answered.
        """
        fork = copy.copy(self)
        # A dynamic layer never writes into a tensor that it holds; a static one does.
        fork.layers = [copy.deepcopy(layer) if layer.is_compileable else copy.copy(layer) for layer in self.layers]
        fork.videos = [[layer.fork() for layer in video] for video in self.videos]
        fork.steps, fork.changes = dict(self.steps), dict(self.changes)
        fork.rows = None if self.rows is None else list(self.rows)
        return fork

    def to(self, device: torch.device | str | None) -> "VambaCache":
        """
        Moves the cache to a device, in place, and returns it; `None` and its own device leave it as it is. Videos that
        are offloaded stay in the host's memory, and are read on that device from then on.
        """
        if device is None:
            return self
        for layer in self.layers:
            for name, value in vars(layer).items():
                if isinstance(value, torch.Tensor):
                    setattr(layer, name, value.to(device))
            if layer.is_initialized:
                layer.device = layer.keys.device
        for layer in itertools.chain(*self.videos):
            layer.to(torch.device(device))
        self.changes = {video: changes.to(torch.device(device)) for video, changes in self.changes.items()}
        return self

    def reset(self) -> None:
        """Forgets the text and the videos."""
        super().reset()
        self.videos, self.steps, self.changes, self.rows, self.text_ids = [], {}, {}, None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.step_plan is not None and self.step_plan.step is not None:
            self.step_plan.step.reorder(beam_idx)
        else:
            super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.text_ids = None
        if self.rows is not None:
            self.rows = [row for row in self.rows for _ in range(repeats)]

    def _select_rows(self, indices: torch.Tensor) -> None:
        self.text_ids = None
        # Where all rows read the same video, as beams do, there is nothing to look up on the device.
        if self.rows is not None and (len(set(self.rows)) > 1 or len(indices) != len(self.rows)):
            self.rows = [self.rows[index] for index in torch.arange(len(self.rows))[indices.cpu()].tolist()]


class VambaStaticCache(VambaCache, StaticCache):
    """What [`VambaCache`] makes of a [`StaticCache`] for the text, so that `generate` knows it for one."""
