# SPDX-License-Identifier: Apache-2.0
"""Questions that wait for the model: those about one video that can go together are answered as one batch."""

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..cache.cache import VambaCache
from ..processing_vamba import VambaProcessor


MAX_ROWS = 16  # questions that are answered at a time
# Those who got their answers together ask again at nearly the same time: how long a batch waits for the next of them,
# and for all of them.
GATHERING_SECONDS, LONGEST_GATHERING = 0.05, 0.2


class Question:
    """
    A question, and its answer as it comes. Iterate over it for the pieces of the answer.

    Args:
        input_ids (`list[int]`): The prompt.
        cache ([`VambaCache`], *optional*): The images and videos that it is about.
        config ([`GenerationConfig`]): How it is answered, `max_new_tokens` included.
        stop_strings (`list[str]`): The answer ends before the first of them.
        seed (`int`, *optional*): Of the random numbers. A question with a seed is answered alone.
    """

    def __init__(
        self,
        input_ids: list[int],
        cache: VambaCache | None,
        config: GenerationConfig,
        stop_strings: list[str],
        seed: int | None = None,
    ):
        self.input_ids, self.cache, self.config = input_ids, cache, config
        self.stop_strings, self.seed = stop_strings, seed
        self.num_tokens = 0
        self.finish_reason: str | None = None  # "stop" or "length"
        self.is_cancelled = False
        # Questions of one topic can be one batch. Each has a length of its own.
        self.topic = (id(cache), config.to_dict() | {"max_new_tokens": None})
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self._held = ""  # text that may be the beginning of a stop string
        self._decoding = DecodeStream([], skip_special_tokens=True)

    @property
    def is_done(self) -> bool:
        return self.is_cancelled or self.finish_reason is not None

    def can_go_with(self, other: "Question") -> bool:
        """Whether one call of `generate` can answer both."""
        return self.seed is None and other.seed is None and self.topic == other.topic

    def cancel(self) -> None:
        """Ends the answer: nobody reads it."""
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[str]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def take(self, token: int, tokenizer, eos_token_ids: set[int]) -> None:
        """The next token of the answer, on the thread of the model. What comes after the end is padding."""
        if self.is_done:
            return
        self.num_tokens += 1
        if token in eos_token_ids:
            self.finish("stop")
            return
        self._held += self._decoding.step(tokenizer, token) or ""
        starts = [self._held.find(stop) for stop in self.stop_strings if stop in self._held]
        if starts:
            self._held = self._held[: min(starts)]
            self.finish("stop")
            return
        num_held = max((overlap(self._held, stop) for stop in self.stop_strings), default=0)
        end = len(self._held) - num_held
        piece, self._held = self._held[:end], self._held[end:]
        if piece:
            self._put(piece)
        if self.num_tokens == self.config.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self._held:
            self._put(self._held)
        self._put(None)

    def fail(self, error: Exception) -> None:
        if not self.is_done:
            self.is_cancelled = True
            self._put(error)

    def _put(self, piece: str | Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


class RowsStreamer(BaseStreamer):
    """Hands each row's tokens to its question."""

    def __init__(self, questions: list[Question], tokenizer, eos_token_ids: set[int]):
        self.questions, self.tokenizer, self.eos_token_ids = questions, tokenizer, eos_token_ids

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompts come first, in two dimensions
            for question, token in zip(self.questions, value.tolist()):
                question.take(token, self.tokenizer, self.eos_token_ids)

    def end(self) -> None:
        """Each row has ended by itself."""


class RowsDone(StoppingCriteria):
    """Ends the rows whose questions are done or cancelled."""

    def __init__(self, questions: list[Question]):
        self.questions = questions

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        is_done = [question.is_done for question in self.questions]
        is_done += [True] * (len(input_ids) - len(is_done))
        return torch.tensor(is_done, device=input_ids.device)


class Answering:
    """
    Answers questions, on the thread of the model, in the order in which they come.

    Args:
        model ([`VambaForConditionalGeneration`]): The model.
        processor ([`VambaProcessor`]): Its processor.
        submit (`Callable`): Runs a function on the thread of the model.
    """

    def __init__(self, model: PreTrainedModel, processor: VambaProcessor, submit: Callable):
        self.model, self.tokenizer, self.submit = model, processor.tokenizer, submit
        self._waiting: list[Question] = []
        # Of the last batch: what it was about, and its questions with those that waited for the same at its end.
        self._last_topic: tuple | None = None
        self._num_expected = 1
        self._changed = threading.Condition()

    def ask(self, question: Question) -> None:
        with self._changed:
            self._waiting.append(question)
            self._changed.notify_all()
        self.submit(self._answer_next)

    def _answer_next(self) -> None:
        """Answers the question that has waited for longest, and what can go with it."""
        with self._changed:
            self._waiting = [question for question in self._waiting if not question.is_cancelled]
            if not self._waiting:  # answered with another one
                return
            first = self._waiting[0]
            if first.topic == self._last_topic:
                self._gather(first)
            batch = self._batch_of(first)
            self._waiting = [question for question in self._waiting if question not in batch]
        self._answer_or_fail(batch)
        with self._changed:
            self._last_topic = first.topic
            self._num_expected = min(MAX_ROWS, len(batch) + sum(map(first.can_go_with, self._waiting)))

    def _gather(self, first: Question) -> None:
        """Waits until as many questions as expected can be answered with this one, or none comes for a moment."""
        deadline = time.monotonic() + LONGEST_GATHERING
        while len(self._batch_of(first)) < self._num_expected and time.monotonic() < deadline:
            if not self._changed.wait(GATHERING_SECONDS):
                break

    def _answer_or_fail(self, batch: list[Question]) -> None:
        try:
            self._answer(batch)
        except Exception as error:
            is_too_large = isinstance(error, torch.OutOfMemoryError) and len(batch) > 1
            if is_too_large and not any(question.num_tokens for question in batch):
                for question in batch:
                    self._answer_or_fail([question])
                return
            for question in batch:
                question.fail(error)

    def _batch_of(self, first: Question) -> list[Question]:
        return [question for question in self._waiting if question is first or first.can_go_with(question)][:MAX_ROWS]

    def _answer(self, batch: list[Question]) -> None:
        first, device = batch[0], self.model.device
        prompts = [question.input_ids for question in batch]
        if device.type == "cuda":
            # Rows are filled up to a power of two, so that few numbers of rows record a graph of their own.
            prompts += [[self.tokenizer.pad_token_id]] * ((1 << (len(batch) - 1).bit_length()) - len(batch))
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        config = copy.deepcopy(first.config)
        config.max_new_tokens = max(question.config.max_new_tokens for question in batch)
        # What a request does not say is the model's; `generate` looks there as well.
        eos = config.eos_token_id if config.eos_token_id is not None else self.model.generation_config.eos_token_id
        eos_token_ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        options = {} if first.cache is None else {"cache": first.cache.fork()}
        # The random numbers of questions without a seed go on as if no other had one.
        has_seed, devices = first.seed is not None, [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=has_seed):
            if has_seed:
                torch.manual_seed(first.seed)
            self.model.generate(
                **inputs,
                **options,
                generation_config=config,
                streamer=RowsStreamer(batch, self.tokenizer.backend_tokenizer, eos_token_ids),
                stopping_criteria=StoppingCriteriaList([RowsDone(batch)]),
            )
        for question in batch:
            question.fail(RuntimeError("the answer has no end"))  # never, unless `generate` stops early
