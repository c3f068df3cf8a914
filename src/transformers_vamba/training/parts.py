# SPDX-License-Identifier: Apache-2.0
"""Which parts of a Vamba are trained, in the two published stages and by LoRA, and where a killed run resumes."""

import os
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel


# What each published stage trains, by the names that the parameters have among their own. Stage 1 trains only the new
# modules, on captions. Stage 2 trains the decoder and the vision tower's merger, on answers: neither the rest of the
# tower nor `lm_head`, unless that is the embedding.
STAGE_PARTS = {
    1: ("cross_attn", "vision_mixer", "alpha"),
    2: ("visual.merger", "language_model"),
}


def train_parts(model: PreTrainedModel, parts: tuple[str, ...]) -> list[str]:
    """
    Trains some parts of a model and freezes the rest. The last layer's mixer stays frozen in any case: nothing reads
    its output, so it would get no gradient, which is an error for `DistributedDataParallel`.

    Args:
        model ([`VambaForConditionalGeneration`]): The model, changed in place.
        parts (`tuple[str, ...]`): Names of modules or parameters, as `STAGE_PARTS` has them for the published stages.

    Returns:
        `list[str]`: The names of the parameters that are trained.

    Raises:
        ValueError: naming a part that the model does not have.
    """
    unread = f".layers.{_last_layer(model.config)}.vision_mixer."
    model.requires_grad_(False)
    trained = []
    for part in parts:
        found = False
        # Under both of its names, if `lm_head` is the embedding.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if f".{part}." in f".{name}.":
                found = True
                if unread not in name and not parameter.requires_grad:
                    parameter.requires_grad_()
                    trained.append(name)
        if not found:
            raise ValueError(f"{type(model).__name__} has no part {part!r}.")
    return trained


def lora_target_modules(config: PreTrainedConfig) -> str:
    """
    The recommended `target_modules` of a PEFT adapter, as a regular expression: every linear layer of the decoder,
    cross-attention and mixers included, except the last layer's mixer, whose output nothing reads. The vision tower
    and `lm_head` stay as they are.

    Args:
        config ([`VambaConfig`]): The model's configuration.
    """
    return (
        rf".*language_model\.layers\.(?!{_last_layer(config)}\.vision_mixer)\d+\."
        r"(self_attn|cross_attn|mlp|vision_mixer\.mixer)\.\w+_proj"
    )


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last checkpoint of a `Trainer` in a folder, for `trainer.train(resume_from_checkpoint=...)`; `None` if there is
    none. A checkpoint whose writing was interrupted is left out: it lacks the file that is written last.
    """
    checkpoints = [state.parent for state in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))) if checkpoints else None


def _last_layer(config: PreTrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers - 1
