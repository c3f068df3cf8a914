# SPDX-License-Identifier: Apache-2.0
"""Vamba as a model of `lmms-eval`."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatContent, ChatMessages
from loguru import logger
from PIL.Image import Image

from ..modeling_vamba import VambaForConditionalGeneration
from ..processing_vamba import VambaProcessor
from .questions import Answer, Prompt, VideoQuestionAnswering, VideoSettings


# Frames, and bounds of their edges in pixels, of the published evaluation: by the beginning of a task's name, the more
# exact ones last. NExT-QA's frames, and those of the one task of MVBench that has images, are not resized before the
# model's own preprocessing.
PUBLISHED_SETTINGS = {
    "": VideoSettings(512, None, 256, 480),
    "lvbench": VideoSettings(1024, None, 256, 560),
    "hourvideo": VideoSettings(128, None, 256, 360),
    "mvbench": VideoSettings(512, None, 256, 480, repeat=True),
    "mvbench_episodic_reasoning": VideoSettings(512, None, None, None, repeat=True),
    "nextqa": VideoSettings(512, None, None, None),
}

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tiff", ".webp")


class VambaChat(lmms):
    """
    Vamba for tasks that ask for an answer, in lmms-eval's chat form.

    Questions about the same video are answered against one encoding of it, on whichever process their documents were
    dealt to. A question whose video is missing or cannot be read gets the answer `""`, which the task counts; their
    number is `avg_unanswered` in the results, and the log says why.

    Args:
        pretrained (`str`): Folder or Hub name of a checkpoint.
        device (`str`, *optional*): By default one GPU per process, if there are any.
        device_map (`str`, *optional*): Instead of `device`: how Accelerate places one model, `"auto"` for instance.
        dtype (`str`, *optional*, defaults to `"auto"`): That of the weights, by default as in the checkpoint.
        attn_implementation (`str`, *optional*): As in `from_pretrained`.
        batch_size (`int` or `str`, *optional*, defaults to 1): Questions about one video answered at a time.
        num_frames (`int`, *optional*), fps (`float`, *optional*):
            How many frames are taken of a video, or how many a second.
        shortest_edge (`int`, *optional*), longest_edge (`int`, *optional*):
            Bounds of the edges of a frame, in pixels. These and the frames are the published ones of each task, where
            they are left out.
        video_cache (`str`, *optional*): A folder that keeps processed videos between runs.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        num_frames: int | None = None,
        fps: float | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        video_cache: str | None = None,
    ):
        super().__init__()
        if num_frames is not None and fps is not None:
            raise ValueError(f"Give `num_frames` or `fps`, not both: got {num_frames} and {fps}.")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        several = self._world_size > 1
        self.device = torch.device(self.accelerator.device if several or device is None else device)
        self.model = VambaForConditionalGeneration.from_pretrained(
            pretrained,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=self.device if device_map is None else device_map,
        ).eval()
        processor = VambaProcessor.from_pretrained(pretrained)
        self.answering = VideoQuestionAnswering(self.model, processor, int(batch_size), video_cache)
        settings = {"num_frames": num_frames, "fps": fps, "shortest_edge": shortest_edge, "longest_edge": longest_edge}
        self.settings: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}

    def settings_of(self, task: str) -> VideoSettings:
        """The published settings of a task, as far as the arguments leave them."""
        task = task.removeprefix("vamba_")
        names = [name for name in PUBLISHED_SETTINGS if not name or task == name or task.startswith(f"{name}_")]
        return PUBLISHED_SETTINGS[names[-1]]._replace(**self.settings)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        answers = self._run(self.answering.answer, requests, self._generation_prompt)
        return [GenerationResult(answer.text, TokenCounts(output_tokens=answer.num_tokens)) for answer in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Tasks that score given answers need lmms-eval's simple form: add `--force_simple`.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Vamba's model for lmms-eval has no conversations of several rounds.")

    def clean(self) -> None:
        del self.answering
        super().clean()

    def _generation_prompt(self, request: Instance) -> Prompt:
        _, doc_to_messages, generation_kwargs, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        messages = [
            {"role": message.role, "content": [_from_chat(content) for content in message.content]}
            for message in chat.messages
        ]
        return Prompt(messages, self.settings_of(task), **_to_generation(generation_kwargs))

    def _run(self, run: Callable, requests: list[Instance], to_prompt: Callable) -> list[Answer]:
        start = time.perf_counter()
        answers: dict[int, Answer] = {}
        prompts: dict[int, Prompt] = {}
        for index, request in enumerate(requests):
            try:
                prompts[index] = to_prompt(request)
            # The tasks of lmms-eval say in their own ways that a video is missing: some end the program.
            except (Exception, SystemExit) as error:
                answers[index] = Answer(error=f"{type(error).__name__}: {error}")
        # Videos are asked about on one process only; images, large as they are, stay where they are.
        shared = [index for index, prompt in prompts.items() if prompt.encodes_ahead]
        own = [index for index, prompt in prompts.items() if not prompt.encodes_ahead]
        for indices, run_all in ((shared, self._run_by_video), (own, self._run_here)):
            for index, answer in zip(indices, run_all(run, [prompts[index] for index in indices]), strict=True):
                answers[index] = answer
        in_order = [answers[index] for index in range(len(requests))]
        self._report(requests, in_order, time.perf_counter() - start)
        return in_order

    def _run_here(self, run: Callable, prompts: list[Prompt]) -> list[Answer]:
        return run(prompts, progress=self.rank == 0)

    def _run_by_video(self, run: Callable, prompts: list[Prompt]) -> list[Answer]:
        """Deals the videos of all processes out anew, as lmms-eval deals out documents without regard to videos."""
        if self.world_size == 1:
            return self._run_here(run, prompts)
        start = sum(gather_object([len(prompts)])[: self.rank])
        everyones = gather_object(prompts)
        groups = list(dict.fromkeys(prompt.group for prompt in everyones))[self.rank :: self.world_size]
        indices = [index for index, prompt in enumerate(everyones) if prompt.group in groups]
        answers = dict(zip(indices, self._run_here(run, [everyones[index] for index in indices]), strict=True))
        everyones_answers: dict[int, Answer] = {}
        for share in gather_object([answers]):
            everyones_answers |= share
        return [everyones_answers[start + index] for index in range(len(prompts))]

    def _report(self, requests: list[Instance], answers: list[Answer], seconds: float) -> None:
        real = [not request.metadata.get("__padding_only__") for request in requests]
        errors = [(request, answer.error) for request, answer, is_real in zip(requests, answers, real) if is_real]
        errors = [(request, error) for request, error in errors if error is not None]
        for request, error in errors:
            logger.error(f"{request.task_name}, question {request.doc_id}: no answer. {error}")
        tokens = sum(answer.num_tokens for answer in answers)
        unanswered = sum(gather_object([len(errors)]))
        log_metrics(seconds, tokens, tokens / seconds, {"unanswered": unanswered})


class VambaSimple(VambaChat):
    """
    Vamba for lmms-eval's simple form (`--force_simple`), in which tasks also have given answers scored. Arguments as
    of [`VambaChat`].

    As with other models of lmms-eval, the likelihood of an answer is given as the mean loss of its tokens; the task
    takes the least. An answer about a video that cannot be read has an infinite one.
    """

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        answers = self._run(self.answering.score, requests, self._continuation_prompt)
        # lmms-eval 0.7.3 makes a string of a plain tuple; what a GenerationResult holds reaches the task as it is.
        return [GenerationResult((answer.loss, answer.is_greedy)) for answer in answers]

    def _generation_prompt(self, request: Instance) -> Prompt:
        context, generation_kwargs, doc_to_visual, doc_id, task, split = request.args
        messages = _to_messages(context, doc_to_visual(self.task_dict[task][split][doc_id]))
        return Prompt(messages, self.settings_of(task), **_to_generation(generation_kwargs))

    def _continuation_prompt(self, request: Instance) -> Prompt:
        context, continuation, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        if callable(continuation):
            continuation = continuation(document)
        return Prompt(
            _to_messages(context, doc_to_visual(document)), self.settings_of(task), continuation=continuation
        )


def _to_messages(context: str, visuals: list | None) -> list[dict]:
    """The images and videos, then the text, as one turn."""
    content = []
    for visual in visuals or []:
        is_image = isinstance(visual, Image) or str(visual).lower().endswith(IMAGE_SUFFIXES)
        content.append(_image(visual) if is_image else _video(visual))
    return [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]


def _from_chat(content: ChatContent) -> dict:
    if content.type == "text":
        return {"type": "text", "text": content.text}
    if content.type == "image":
        return _image(content.url)
    if content.type == "video" and content.start_time is None and content.end_time is None:
        return _video(content.url)
    raise ValueError(f"Vamba takes text, images and whole videos, got {content!r}.")


def _image(image: Image | str) -> dict:
    return {"type": "image", "image": image}


def _video(video: str) -> dict:
    if not isinstance(video, str):
        raise ValueError(f"Vamba takes the path or URL of a whole video, got {video!r}.")
    return {"type": "video", "path": video}


def _to_generation(generation_kwargs: dict) -> dict:
    """A task's `generation_kwargs` as arguments of [`Prompt`]. What they say of sampling counts if they sample."""
    names: tuple[str, ...] = ("max_new_tokens", "num_beams")
    if generation_kwargs.get("do_sample", bool(generation_kwargs.get("temperature"))):
        names += ("do_sample", "temperature", "top_p", "top_k")
    generation = {name: generation_kwargs[name] for name in names if generation_kwargs.get(name) is not None}
    stop = generation_kwargs.get("until") or ()
    return {"generation": generation, "stop": tuple(filter(None, [stop] if isinstance(stop, str) else stop))}
