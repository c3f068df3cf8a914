import tempfile
import unittest
from pathlib import Path
from unittest import mock

import upstream  # noqa: F401
from tests import test_pipeline_mixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "vamba-tiny"


class PipelineTest(test_pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "image-text-to-text": VambaForConditionalGeneration,
        "any-to-any": VambaForConditionalGeneration,
    }

    def setUp(self):
        """Puts the checkpoint and its classes where the mixin looks for those of Transformers' own models."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        model_folder = Path(folder.name) / "vamba" / VambaForConditionalGeneration.__name__
        model_folder.parent.mkdir()
        model_folder.symlink_to(CHECKPOINT)
        summary = {"tokenizer_classes": ["Qwen2Tokenizer"], "processor_classes": ["Qwen2VLImageProcessor"]}
        transformers_module = test_pipeline_mixin.transformers_module
        patches = (
            mock.patch.object(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder.name),
            mock.patch.dict(test_pipeline_mixin.tiny_model_summary, {model_folder.name: summary}),
            mock.patch.dict(PROCESSOR_MAPPING_NAMES, {"vamba": VambaProcessor.__name__}),
            mock.patch.object(transformers_module, VambaProcessor.__name__, VambaProcessor, create=True),
        )
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)
