# SPDX-License-Identifier: Apache-2.0
"""
Evaluation with `lmms-eval`, which finds the model by the entry point that this package declares:

    lmms_eval --model vamba --model_args pretrained=PATH --tasks lvbench --batch_size 16

Only [`lmms_eval_model`] and the task files need `lmms-eval`.
"""

from pathlib import Path


# Task files in lmms-eval's format, for its `--include_path`.
TASKS = str(Path(__file__).parent / "tasks")


def manifest():
    """What lmms-eval reads from the entry point: the names of the model's classes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__name__}.lmms_eval_model"
    return ModelManifest("vamba", simple_class_path=f"{module}.VambaSimple", chat_class_path=f"{module}.VambaChat")
