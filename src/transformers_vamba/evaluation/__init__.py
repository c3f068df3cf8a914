# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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


__all__ = ["TASKS", "manifest"]
