# SPDX-License-Identifier: Apache-2.0
"""Chat completions of a Vamba model, in the place of those of Transformers' server."""

import asyncio
import copy
import json
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.utils import logging

from ..modeling_vamba import VambaForConditionalGeneration
from ..video.download import SourceLimits
from ..video.sources import is_remote
from .answering import Answering, Question
from .errors import RequestError, describe_failure
from .index import VideoFolder, VideoMemory
from .media import MediaReader
from .requests import (
    ChatRequest,
    Conversation,
    describe_value,
    read_conversation,
    read_generation_options,
    read_request,
)
from .videos import ProcessedVideos, fingerprint_model


logger = logging.get_logger(__name__)

DOWNLOADS = 32  # at a time
CPU_VIDEO_BYTES = 2**32  # kept in memory by default
# Below it the likeliest token is the only one left, and scores divided by it leave the range of float32.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class ServingOptions:
    """
    What `python -m transformers_vamba serve` takes besides the options of `transformers serve`.

    Args:
        limits ([`SourceLimits`]): What may be opened.
        video_memory_bytes (`int`, *optional*):
            Of processed videos in memory. By default three quarters of what is free on the GPU once the model is
            loaded, and 4 GiB on a CPU.
        video_folder (`Path`, *optional*): Where processed videos are kept as well.
        video_folder_bytes (`int`): Of the files in that folder.
    """

    limits: SourceLimits
    video_memory_bytes: int | None = None
    video_folder: Path | None = None
    video_folder_bytes: int = 0


class VambaChatCompletionHandler(ChatCompletionHandler):
    """
    Answers `/v1/chat/completions`.

    Args:
        options ([`ServingOptions`]): What may be opened and kept.
        **kwargs: Arguments of Transformers' handler. Its model manager must have a model that it is pinned to.
    """

    def __init__(self, options: ServingOptions, **kwargs: Any):
        super().__init__(**kwargs)
        self.options, self.name = options, self.model_manager.force_model
        path = self.model_manager.process_model_name(self.name)
        self.model, self.processor = self.model_manager.load_model_and_processor(path)
        if not isinstance(self.model, VambaForConditionalGeneration):
            raise ValueError(f"{self.name!r} is a {type(self.model).__name__}, no Vamba: use `transformers serve`.")
        submit = self.generation_state.get_manager(path).submit
        self.reader = MediaReader(self.processor, options.limits)
        fingerprint = fingerprint_model(self.model, self.processor, self.name)
        memory = VideoMemory(self._video_memory_bytes())
        folder = None
        if options.video_folder is not None:
            folder = VideoFolder(options.video_folder, options.video_folder_bytes)
        self.videos = ProcessedVideos(self.model, self.reader, submit, fingerprint, memory, folder)
        self.answering = Answering(self.model, self.processor, submit)
        self._downloads = ThreadPoolExecutor(DOWNLOADS, "download")

    def _video_memory_bytes(self) -> int:
        if self.options.video_memory_bytes is not None:
            return self.options.video_memory_bytes
        if self.model.device.type == "cuda":
            return torch.cuda.mem_get_info(self.model.device)[0] * 3 // 4
        return CPU_VIDEO_BYTES

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """
        Answers a request.

        Args:
            body (`dict`): The JSON of the request, in OpenAI's form.
            request_id (`str`): The id of the answer.

        Raises:
            [`RequestError`]: if the request cannot be answered as it is.
        """
        request = read_request(body)
        if request.model not in (None, self.name):
            message = f"There is no model {describe_value(request.model)}: this server has {self.name!r}."
            raise RequestError(message, "model", "model_not_found")
        conversation = read_conversation(request, self.chat_template_kwargs)
        loop = asyncio.get_running_loop()
        input_ids = await asyncio.to_thread(self._tokenize, conversation)
        config = self._make_config(request, len(input_ids))
        cache, num_cached = None, 0
        if conversation.media:
            # Downloads have threads of their own: all others go on while they are slow.
            threads = self._downloads if any(is_remote(medium.source) for medium in conversation.media) else None
            media = await loop.run_in_executor(threads, self.reader.open, conversation.media)
            cache, num_cached = await self.videos.get(media)
        num_prompt_tokens = len(input_ids) + (0 if cache is None else sum(cache.video_lengths))
        question = Question(input_ids, cache, config, request.stop_strings, request.seed)

        def usage() -> CompletionUsage:
            return CompletionUsage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=question.num_tokens,
                total_tokens=num_prompt_tokens + question.num_tokens,
                prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
            )

        if request.stream:
            return StreamingResponse(self._stream(request_id, question, usage), media_type="text/event-stream")
        content = "".join([piece async for piece in self._answer(question)])
        reason = question.finish_reason
        return JSONResponse(self._build_completion(request_id, content, self.name, reason, usage=usage()))

    async def _answer(self, question: Question) -> AsyncGenerator[str]:
        """The pieces of an answer, which ends if nobody waits for them any more."""
        self.answering.ask(question)
        try:
            async for piece in question:
                yield piece
        finally:
            question.cancel()

    async def _stream(self, request_id: str, question: Question, usage) -> AsyncGenerator[str]:
        """The answer as server-sent events."""
        chunk = {"request_id": request_id, "model": self.name}
        try:
            yield self._build_chunk_sse(role="assistant", **chunk)
            async with aclosing(self._answer(question)) as pieces:
                async for piece in pieces:
                    yield self._build_chunk_sse(content=piece, **chunk)
            yield self._build_chunk_sse(finish_reason=question.finish_reason, usage=usage(), **chunk)
        except Exception as error:
            logger.error("A streamed answer failed.", exc_info=True)
            yield self.chunk_to_sse(json.dumps(describe_failure(error)[1]))
        yield self.chunk_to_sse("[DONE]")

    def _tokenize(self, conversation: Conversation) -> list[int]:
        """The prompt of a conversation. Its images and videos are read from a cache."""
        prompt = self.processor.apply_chat_template(
            conversation.messages, tokenize=False, add_generation_prompt=True, **conversation.template_options
        )
        return self.processor.tokenizer(self.processor.remove_placeholders(prompt))["input_ids"]

    def _make_config(self, request: ChatRequest, num_prompt_tokens: int) -> GenerationConfig:
        """How a request is answered. Without a length, as long as the text may be, but at most 1,024 tokens."""
        check_bias(request, self.model.config.text_config.vocab_size)
        given = read_generation_options(request)
        config = copy.deepcopy(self.model.generation_config)
        config.update(**given)
        fields = request.model_dump(include={"temperature", "top_p", "frequency_penalty"})
        config = self._build_generation_config(fields | {"logit_bias": request.logit_bias or None}, config)
        if request.temperature is not None or request.top_p is not None:
            config.do_sample = True
        if config.temperature is not None and config.temperature < LEAST_TEMPERATURE:
            config.do_sample = False
        if not config.do_sample:
            # Of no meaning then, and `generate` would say so each time.
            config.temperature = config.top_p = config.top_k = None
        room = self.model.config.text_config.max_position_embeddings - num_prompt_tokens
        max_tokens = request.max_completion_tokens or request.max_tokens or given.get("max_new_tokens")
        if room < (max_tokens or 1):
            raise RequestError(
                f"The text of the prompt has {num_prompt_tokens:,} tokens, which leaves room for {max(room, 0):,} "
                f"more, and {max_tokens or 1:,} were asked for. Send a shorter text, or ask for fewer.",
                "max_tokens" if max_tokens else "messages",
                "context_length_exceeded",
            )
        config.max_new_tokens = max_tokens or min(config.max_new_tokens, room)
        return config


def check_bias(request: ChatRequest, vocab_size: int) -> None:
    for token in request.logit_bias or {}:
        is_number = token.isdecimal() and len(token) <= len(str(vocab_size)) and token == str(int(token))
        if not is_number or int(token) >= vocab_size:
            message = f"`logit_bias` has a token {describe_value(token)}; tokens are numbers below {vocab_size}."
            raise RequestError(message, "logit_bias")
