# SPDX-License-Identifier: Apache-2.0
"""Vamba, the hybrid Mamba-Transformer for hour-long video. Importing it registers the Auto classes of Transformers."""

try:
    import torchvision  # noqa: F401  # what Transformers' image and video processors need, and name less clearly
except Exception as error:  # without it, or with one that was built for another PyTorch
    raise ImportError(
        f"transformers_vamba needs torchvision for images and videos, and it cannot be imported ({error}). Install "
        "the one that fits your PyTorch: `pip install torch torchvision`."
    ) from error

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

from .cache.cache import VambaCache
from .configuration_vamba import PublishedConfig, VambaConfig, VambaTextConfig
from .generation.forecast import VambaForecast, forecast_memory
from .modeling_vamba import VambaForConditionalGeneration, VambaModel, VambaPreTrainedModel, VambaTextModel
from .processing_vamba import VambaProcessor
from .training.collator import VambaDataCollator
from .training.parts import STAGE_PARTS, last_whole_checkpoint, lora_target_modules, train_parts
from .video_processing_vamba import VambaVideoProcessor


AutoConfig.register("vamba", VambaConfig)
AutoConfig.register("vamba_text", VambaTextConfig)
AutoConfig.register("qwen2_vl", PublishedConfig, exist_ok=True)  # what the published checkpoints call themselves
AutoModel.register(VambaConfig, VambaModel)
AutoModel.register(VambaTextConfig, VambaTextModel)
AutoModelForImageTextToText.register(VambaConfig, VambaForConditionalGeneration)
if hasattr(transformers, "AutoModelForMultimodalLM"):
    transformers.AutoModelForMultimodalLM.register(VambaConfig, VambaForConditionalGeneration)
AutoImageProcessor.register(VambaConfig, image_processor_classes={"torchvision": Qwen2VLImageProcessor})
AutoVideoProcessor.register(VambaConfig, VambaVideoProcessor)
AutoProcessor.register(VambaConfig, VambaProcessor)


__version__ = "0.1.0"

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
