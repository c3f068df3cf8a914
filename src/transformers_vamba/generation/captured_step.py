# SPDX-License-Identifier: Apache-2.0
"""
One decoding step as a CUDA graph: the host launches it as a whole, instead of some thousand kernels one by one.

`generate` takes it by itself (see [`plan_step`]); `disable_compile=True`, the switch of Transformers' own automatic
compilation, turns it off. The graph records the model's ordinary `forward` for one token per row, with a text cache of
fixed size. The text's keys and values are copied into it before the first step, and back after the last.
"""

import copy
import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerationMode
from transformers.utils import logging

from ..cache.cache import VambaCache
from ..compat import CACHE_NAME
from ..ops.triton_support import recorded_launches
from ..parallel.ranks import is_distributed


logger = logging.get_logger(__name__)


MIN_NEW_TOKENS = 8  # fewer are answered before the capture has paid off
LENGTH_STEP = 256  # text lengths are rounded up to multiples, so that questions of similar length share a graph
MAX_TEXT_BYTES = 2**28  # of the text's keys and values; a longer text decodes without a graph
MAX_IDLE_STEPS = 2  # graphs that a model keeps for later questions

CAPTURED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class StepPlan:
    """
    What a cache carries from the preparation of `generate` to its end: the graph, from the first step on.

    Args:
        model (`nn.Module`): A [`VambaForConditionalGeneration`].
        length (`int`): The most text that the cache will hold.
    """

    def __init__(self, model: PreTrainedModel, length: int):
        self._model = weakref.ref(model)
        self._length = -(-length // LENGTH_STEP) * LENGTH_STEP
        self._finalizer: weakref.finalize | None = None
        self.step: CapturedStep | None = None

    def takes(self, cache: VambaCache, input_ids: torch.Tensor | None, others: Iterable) -> bool:
        """Whether these arguments of `forward` are one token per row, and nothing besides, and nobody watches."""
        is_one_token = input_ids is not None and input_ids.shape[1] == 1 and cache.watcher is None
        return is_one_token and all(other is None or other is False for other in others)

    def run(
        self,
        cache: VambaCache,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        One step.

        Args:
            cache ([`VambaCache`]): The cache that carries this plan.
            input_ids, position_ids (`torch.LongTensor` of shape `(batch_size, 1)`): One token per row.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_tokens + 1)`, *optional*):
                0 for padding. Read before the first step; what is generated is attended to.

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, vocab_size)`: The logits, which the next step overwrites.
        """
        if self.step is None:
            self.step = borrow_step(self._model(), cache, self._length, len(input_ids))
            self._finalizer = weakref.finalize(cache, self.step.set_idle)  # of a cache that nobody keeps
            self.step.take_text(cache, attention_mask)
        return self.step(cache, input_ids, position_ids)

    def finish(self, cache: VambaCache) -> None:
        """Gives the text back to the cache, and the graph to the next who can use it."""
        if self.step is not None and self._finalizer is not None:
            self.step.give_text(cache)
            self._finalizer.detach()
            self.step.set_idle()
            self.step = None


class CapturedStep:
    """
    A graph with its buffers.

    Args:
        model (`nn.Module`): A [`VambaForConditionalGeneration`].
        cache ([`VambaCache`]): Holds the videos that the graph reads, and some text.
        length (`int`): Tokens of text for which there is room.
        batch_size (`int`): Number of rows.
        key (`tuple`): What another use must have in common with this one.
    """

    def __init__(self, model: PreTrainedModel, cache: VambaCache, length: int, batch_size: int, key: tuple):
        self.key, self.is_idle = key, False
        self.layers = [StaticLayer(length) for _ in cache.layers]
        device = cache.layers[0].keys.device
        with torch.inference_mode(False):
            for layer, text in zip(self.layers, cache.layers):
                layer.lazy_initialization(text.keys[:, :, :0], text.values[:, :, :0])
            self.input_ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            self.position_ids = torch.zeros_like(self.input_ids)
            # Added to the scores; each layer would convert a mask of booleans.
            self.mask = cache.layers[0].keys.new_full((batch_size, 1, 1, length), -torch.inf)
        self.num_tokens = 0
        self.logits: torch.Tensor  # of the last step
        self._replay: Callable[[], None] | None = None
        self._forward = weakref.WeakMethod(model.forward)

    def set_idle(self) -> None:
        """Lets others take the step."""
        self.is_idle = True

    def take_text(self, cache: VambaCache, attention_mask: torch.Tensor | None) -> None:
        """Copies the text that the cache holds; the mask is that of [`StepPlan.run`]."""
        self.num_tokens = num_tokens = cache.layers[0].keys.shape[2]
        for layer, text in zip(self.layers, cache.layers):
            layer.keys[:, :, :num_tokens] = text.keys
            layer.values[:, :, :num_tokens] = text.values
            layer.cumulative_length.fill_(num_tokens)
        self.mask.fill_(-torch.inf)
        self.mask[..., :num_tokens] = 0
        if attention_mask is not None:
            is_padding = attention_mask[:, None, None, :num_tokens].to(self.mask.device) == 0
            self.mask[..., :num_tokens].masked_fill_(is_padding, -torch.inf)

    def give_text(self, cache: VambaCache) -> None:
        """Copies all text to the cache."""
        for layer, text in zip(self.layers, cache.layers):
            text.keys = layer.keys[:, :, : self.num_tokens].clone()
            text.values = layer.values[:, :, : self.num_tokens].clone()

    def reorder(self, beam_idx: torch.LongTensor) -> None:
        """Selects rows, as beam search does, in place."""
        for tensor in itertools.chain([self.mask], *((layer.keys, layer.values) for layer in self.layers)):
            tensor.copy_(tensor.index_select(0, beam_idx))

    def __call__(self, cache: VambaCache, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)
        if self._replay is None:
            self._replay = self._record(cache)
        self._replay()
        self.num_tokens += 1
        return self.logits

    def _step(self, cache: VambaCache) -> None:
        """What the graph records."""
        text_length = self.layers[0].cumulative_length
        self.mask.index_fill_(3, text_length.view(1), 0)
        forward: Any = self._forward()
        outputs = forward(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask={"full_attention": self.mask},
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        self.logits = outputs.logits

    def _twin(self, cache: VambaCache) -> VambaCache:
        """A cache with the text of this step that reads what the given one reads of its videos."""
        twin = copy.copy(cache)
        twin.layers, twin.excerpts = self.layers, cache.excerpts
        return twin

    def _record(self, cache: VambaCache) -> Callable[[], None]:
        """The replay of a graph of `_step`."""
        twin = self._twin(cache)
        device = self.input_ids.device  # which need not be the current one
        stream, current = take_stream(self, device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), recorded_launches():
            # Once without recording: what is loaded or compiled for its first use cannot be part of a graph.
            self._step(twin)
            for layer in self.layers:
                layer.cumulative_length.sub_(1)
            # `torch.cuda.graph` would wait for the whole device and empty its cache, which other threads use.
            with _capture_lock:
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._step(twin)
                finally:
                    graph.capture_end()
        current.wait_stream(stream)
        return graph.replay


_free_streams: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def take_stream(step: CapturedStep, device: torch.device) -> torch.cuda.Stream:
    """
    A stream that is this step's as long as it lives. cuBLAS takes a workspace on each stream and keeps it for good:
    graphs that may run at once must not share one, and later ones take those of before.
    """
    free = _free_streams[device]
    try:
        stream = free.pop()
    except IndexError:
        stream = torch.cuda.Stream(device)
    weakref.finalize(step, free.append, stream)
    return stream


_idle_steps: "weakref.WeakKeyDictionary[PreTrainedModel, list[CapturedStep]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_capture_lock = threading.Lock()  # a device records one graph at a time


def borrow_step(model: PreTrainedModel, cache: VambaCache, length: int, batch_size: int) -> CapturedStep:
    """A step that nobody uses and that reads the same videos with the same weights, or a new one."""
    key = (length, batch_size, tuple(cache.rows or ()), *_addresses(model, cache))
    with _lock:
        steps = _idle_steps.setdefault(model, [])
        for step in steps:
            if step.is_idle and step.key == key:
                step.is_idle = False
                return step
        idle = [step for step in steps if step.is_idle]
        for step in idle[: len(steps) + 1 - MAX_IDLE_STEPS]:
            steps.remove(step)
        steps.append(CapturedStep(model, cache, length, batch_size, key))
        return steps[-1]


def _addresses(model: PreTrainedModel, cache: VambaCache) -> tuple:
    """What a graph has noted of the world outside it, and must find again: where its inputs lie, and the settings."""
    read = sorted({*(cache.rows or ())} - {None})
    layers = itertools.chain.from_iterable(cache.layers_to_read(video) for video in read)
    videos = (tensor for layer in layers for tensor in layer.state_dict().values())
    adapters = tuple(
        (id(module), str(module.active_adapters), str(module.merged_adapters), module.disable_adapters)
        for module in model.modules()
        if hasattr(module, "merged_adapters")
    )
    settings = (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
    )
    weights = tuple(id(parameter) for parameter in model.parameters())
    storages = tuple(p.data_ptr() for p in model.parameters() if type(p) is nn.Parameter)
    return tuple((tensor.data_ptr(), tensor.shape) for tensor in videos), weights, storages, adapters, settings


def plan_step(
    model: PreTrainedModel,
    cache: VambaCache,
    generation_config,
    generation_mode: GenerationMode,
    prompt_length: int | None,
    max_cache_length: int,
) -> StepPlan | None:
    """
    A plan for a captured step, if `generate` can take one; else `None`, and it decodes as it always has.

    Args:
        model (`nn.Module`): A [`VambaForConditionalGeneration`].
        cache ([`VambaCache`]): The cache of this generation, with its videos.
        generation_config ([`GenerationConfig`]): What was asked for.
        generation_mode (`GenerationMode`): How tokens are chosen.
        prompt_length (`int`, *optional*): Tokens of the prompt, if they are known.
        max_cache_length (`int`): The most text that the cache will hold.
    """
    if generation_mode not in CAPTURED_MODES or not can_capture(model, cache):
        return None
    is_asked_otherwise = (
        generation_config.disable_compile
        or generation_config.compile_config is not None
        or generation_config.cache_implementation is not None
        or generation_config.use_cache is False
        or generation_config.output_hidden_states
        or generation_config.output_attentions
    )
    num_new_tokens = max_cache_length + 1 - (prompt_length or 0)
    config = model.config.text_config
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * model.dtype.itemsize
    bytes_per_token *= config.hidden_size // config.num_attention_heads * len(cache.rows or ())
    if is_asked_otherwise or num_new_tokens < MIN_NEW_TOKENS or max_cache_length * bytes_per_token > MAX_TEXT_BYTES:
        return None
    return StepPlan(model, max_cache_length)


def can_capture(model: PreTrainedModel, cache: VambaCache) -> bool:
    """Whether nothing of the model or the cache has to be done by the host in each step."""
    if model.device.type != "cuda" or model.training or is_distributed() or cache.reads_from_host:
        return False
    if model.config.text_config._attn_implementation != "sdpa":
        return False
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    return (quantizer is None or quantizer.is_compileable) and not any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") for module in model.modules()
    )
