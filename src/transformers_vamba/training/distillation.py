# SPDX-License-Identifier: Apache-2.0
"""Distillation from a teacher: from its stored top-k logits, as published, or from a Qwen2-VL that runs alongside."""

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..inputs.media import group_media_by_row
from ..inputs.packing import lengths_of_samples, starts_of_samples
from .trainer import VambaTrainer


def distillation_loss(
    logits: torch.Tensor,
    top_k_values: torch.Tensor,
    top_k_indices: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The published loss: KL divergence of the student from the teacher, over the teacher's k likeliest tokens only.

    Args:
        logits (`torch.Tensor` of shape `(num_tokens, vocab_size)`): The student's.
        top_k_values (`torch.Tensor` of shape `(num_tokens, k)`): The teacher's highest logits.
        top_k_indices (`torch.LongTensor` of shape `(num_tokens, k)`): The tokens that they are of.
        num_items (`torch.Tensor` or `int`, *optional*):
            What the sum over the tokens is divided by, `num_tokens` by default.
    """
    student = logits.gather(-1, top_k_indices).float().log_softmax(-1)
    teacher = top_k_values.float().log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence / (len(logits) if num_items is None else num_items)


class VambaDistillationTrainer(VambaTrainer):
    """
    A [`VambaTrainer`] whose loss is that of the labels plus `distill_coeff` times [`distillation_loss`].

    Args:
        teacher ([`Qwen2VLForConditionalGeneration`], *optional*):
            A model with the student's vocabulary. It is shown the same images and videos, patch by patch, and asked
            for the tokens that are learned. Without it, batches have to bring `top_k_values` and `top_k_indices`, of
            shape `(num_labels, k)`: the teacher's logits at the labelled positions themselves, as the published code
            stores them (so those that follow each labelled token, not those that predict it).
        top_k (`int`, *optional*, defaults to 20): How many of the likeliest tokens the teacher is asked for.
        distill_coeff (`float`, *optional*, defaults to 1.0): Weight of the distillation loss.
        kwargs: As for [`VambaTrainer`].

    Raises:
        ValueError: for a teacher of another vocabulary, and for batches without stored logits while there is no
            teacher.
    """

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel | None = None,
        top_k: int = 20,
        distill_coeff: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, compute_loss_func=self._loss_func, **kwargs)
        self.top_k, self.distill_coeff = top_k, distill_coeff
        self.teacher = teacher
        if teacher is not None:
            sizes = [model.config.get_text_config().vocab_size for model in (self.model, teacher)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"Student and teacher must share a vocabulary, got {sizes[0]} and {sizes[1]} tokens.")
            self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False), evaluation_mode=True).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        if self.teacher is not None:
            distilled = targets != -100
            top_k_values, top_k_indices = self._ask_teacher(self.teacher, inputs, distilled)
        else:
            distilled = labels != -100
            if not distilled.any():  # rows that could not be read
                inputs["top_k_values"] = inputs["top_k_indices"] = labels.new_zeros(0, self.top_k)
            if "top_k_values" not in inputs or "top_k_indices" not in inputs:
                raise ValueError(
                    "Distillation without a teacher needs `top_k_values` and `top_k_indices` in the batch, got "
                    f"{sorted(inputs)}."
                )
            top_k_values, top_k_indices = inputs.pop("top_k_values"), inputs.pop("top_k_indices")
        # Logits only for what is compared with anything; in evaluation all, as metrics compare them with the labels.
        is_compared = (distilled | (targets != -100)).any(0)
        positions = (is_compared | (not model.training)).nonzero()[:, 0]
        inputs["logits_to_keep"] = positions
        inputs["labels"] = (targets[:, positions], distilled[:, positions], top_k_values, top_k_indices)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss_func(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Both losses, of the logits at the positions that `compute_loss` keeps."""
        targets, distilled, top_k_values, top_k_indices = labels
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
            if self.rows_weigh_equally and self.model.training:
                num_items_in_batch = num_items_in_batch * self.current_gradient_accumulation_steps
        num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        divergence = distillation_loss(outputs.logits[distilled], top_k_values, top_k_indices, num_items_in_batch)
        return loss / num_items_in_batch + self.distill_coeff * divergence

    @torch.no_grad()
    def _ask_teacher(self, teacher, inputs, distilled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's `top_k` highest logits, and their tokens, at the positions marked in `distilled`, in order."""
        logits = [
            teacher(**sample, use_cache=False).logits[0]
            for sample in qwen2_vl_samples(inputs, distilled, self.model.config)
        ]
        return torch.cat(logits).topk(self.top_k, dim=-1)


def qwen2_vl_samples(inputs, kept: torch.Tensor, config) -> Iterator[dict[str, torch.Tensor]]:
    """
    Qwen2-VL's inputs for a batch of [`VambaDataCollator`], one sample at a time: the same text, with as many
    placeholders for each image or video as the vision tower makes tokens of it.

    Args:
        inputs (`dict[str, torch.Tensor]`): The batch, padded or packed.
        kept (`torch.BoolTensor` of shape `(rows, tokens)`): The positions to compute logits for.
        config ([`VambaConfig`]): The student's configuration.

    Yields:
        `dict[str, torch.Tensor]`: Arguments of `Qwen2VLForConditionalGeneration.forward`.
    """
    spans = list(_sample_spans(inputs))
    media = {}
    for mark, medium, suffix in ((1, "image", ""), (2, "video", "_videos")):
        names = (f"pixel_values{suffix}", f"{medium}_grid_thw", f"{medium}_sample_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        media[mark] = names[:2], group_media_by_row(len(spans), config.vision_config, **given)
    placeholders = {1: config.image_token_id, 2: config.video_token_id}

    for i, (row, span) in enumerate(spans):
        marks = inputs["mm_token_type_ids"][row, span]
        tokens_after = torch.zeros_like(marks)  # that the teacher reads after each of the student's
        sample: dict[str, torch.Tensor] = {}
        for mark, ((pixels_name, grid_name), media_of_samples) in media.items():
            if not media_of_samples[i]:
                continue
            media_of_sample = media_of_samples[i]
            sample[pixels_name] = torch.cat([each.pixel_values for each in media_of_sample])
            sample[grid_name] = torch.tensor([each.grid for each in media_of_sample], device=marks.device)
            tokens_after[marks == mark] = sample[grid_name].prod(1) // config.vision_config.spatial_merge_size**2
        # The student's tokens, and after each as many copies of it; then the copies become placeholders.
        positions = torch.arange(len(marks), device=marks.device).repeat_interleave(1 + tokens_after)
        is_own = F.pad(positions[1:] != positions[:-1], (1, 0), value=True)
        types = marks[positions].masked_fill(is_own, 0)
        ids = inputs["input_ids"][row, span][positions]
        for mark, placeholder in placeholders.items():
            ids = ids.masked_fill(types == mark, placeholder)
        yield {
            **sample,
            "input_ids": ids[None],
            "mm_token_type_ids": types[None],
            "logits_to_keep": is_own.nonzero()[:, 0][kept[row, span]],
        }


def _sample_spans(inputs) -> Iterator[tuple[int, slice]]:
    """Row and place in it of each sample of a batch, padded on the right or packed."""
    if "attention_mask" in inputs:
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            yield row, slice(length)
    else:
        position_ids = inputs["position_ids"]
        lengths = lengths_of_samples(starts_of_samples(position_ids, 1)) or [position_ids.shape[1]]
        for stop, length in zip(accumulate(lengths), lengths):
            yield 0, slice(stop - length, stop)
