# SPDX-License-Identifier: Apache-2.0
"""What a Vamba wants of a `Trainer`, Transformers' or TRL's."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer

from .model_card import write_model_card


# Not pulled towards zero: the mixers' rates, time steps, skips and convolution, which Mamba-2's authors leave out of
# weight decay, and `alpha`, for which zero is no neutral value.
WITHOUT_DECAY = re.compile(r"(^|\.)(A_log|D|dt_bias|conv1d|alpha)(\.|$)")


class VambaTrainerMixin:
    """
    In front of any [`Trainer`]: leaves `A_log`, `D`, `dt_bias`, `conv1d` and `alpha` out of weight decay, and writes a
    model card with the base and an example with a video.

        class VambaSFTTrainer(VambaTrainerMixin, SFTTrainer): ...
    """

    # Of the trainer.
    args: Any
    model: Any
    accelerator: Any
    is_world_process_zero: Callable[[], bool]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)  # type: ignore[misc]  # the trainer's
        return [name for name in names if not WITHOUT_DECAY.search(name)]

    def create_model_card(self, *args, tags: str | list[str] | None = None, **kwargs) -> None:
        """Writes the card. Of the arguments of the trainer's own method it takes the tags alone."""
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        write_model_card(
            self.args.output_dir,
            model.config.name_or_path,
            is_adapter=hasattr(model, "peft_config"),
            tags=[tags] if isinstance(tags, str) else tags or (),
            path=self.args.hub_model_id,
        )


class VambaTrainer(VambaTrainerMixin, Trainer):
    """
    Transformers' [`Trainer`] with [`VambaTrainerMixin`].

    Args:
        rows_weigh_equally (`bool`, *optional*, defaults to `False`):
            Take the mean loss of each batch of a process, and the mean of these over accumulated batches and
            processes, as published: with a row a batch, a short answer weighs as much as a long one. By default every
            token of a step weighs the same.
        kwargs: As for [`Trainer`].

    Raises:
        ValueError: for rows that weigh equally while a batch has several of them.
    """

    def __init__(self, *args, rows_weigh_equally: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows_weigh_equally = rows_weigh_equally
        if rows_weigh_equally and self.args.train_batch_size != 1:
            raise ValueError(
                "`rows_weigh_equally` takes the mean of a batch, so a batch must be one row (of samples that the data "
                f"or the collator packs): set `per_device_train_batch_size=1`, got {self.args.train_batch_size}."
            )

    def _get_num_items_in_batch(self, *args, **kwargs):
        return None if self.rows_weigh_equally else super()._get_num_items_in_batch(*args, **kwargs)
