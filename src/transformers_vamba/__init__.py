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
"""Vamba, the hybrid Mamba-Transformer for hour-long video. Importing it registers the Auto classes of Transformers."""

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
    Qwen2VLImageProcessor,
)

from .cache_vamba import VambaCache
from .configuration_vamba import VambaConfig, VambaTextConfig
from .data_collator_vamba import VambaDataCollator
from .forecast_vamba import VambaForecast, forecast_memory
from .modeling_vamba import VambaForConditionalGeneration, VambaModel, VambaPreTrainedModel, VambaTextModel
from .processing_vamba import VambaProcessor
from .training_vamba import STAGE_PARTS, last_whole_checkpoint, lora_target_modules, train_parts
from .video_processing_vamba import VambaVideoProcessor


AutoConfig.register("vamba", VambaConfig)
AutoConfig.register("vamba_text", VambaTextConfig)
AutoModel.register(VambaConfig, VambaModel)
AutoModel.register(VambaTextConfig, VambaTextModel)
AutoModelForImageTextToText.register(VambaConfig, VambaForConditionalGeneration)
if hasattr(transformers, "AutoModelForMultimodalLM"):
    transformers.AutoModelForMultimodalLM.register(VambaConfig, VambaForConditionalGeneration)
AutoImageProcessor.register(VambaConfig, image_processor_classes={"torchvision": Qwen2VLImageProcessor})
AutoVideoProcessor.register(VambaConfig, VambaVideoProcessor)
AutoProcessor.register(VambaConfig, VambaProcessor)


__all__ = [
    "STAGE_PARTS",
    "VambaCache",
    "VambaConfig",
    "VambaDataCollator",
    "VambaForConditionalGeneration",
    "VambaForecast",
    "VambaModel",
    "VambaPreTrainedModel",
    "VambaProcessor",
    "VambaTextConfig",
    "VambaTextModel",
    "VambaVideoProcessor",
    "forecast_memory",
    "last_whole_checkpoint",
    "lora_target_modules",
    "train_parts",
]
