import unittest

import upstream  # noqa: F401
from tests import test_tensor_parallel_mixin
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from vamba_tester import VambaModelTester

from transformers_vamba import VambaConfig, VambaTextConfig


class VambaTests:
    model_tester = None
    all_model_classes = VambaModelTester.all_model_classes

    def setUp(self):
        self.model_tester = VambaModelTester(self)


class ConfigTest(VambaTests, unittest.TestCase):
    def test_config(self):
        ConfigTester(self, config_class=VambaConfig, has_text_modality=False).run_common_tests()

    def test_text_config(self):
        ConfigTester(self, config_class=VambaTextConfig, **VambaModelTester.text_config).run_common_tests()


class ModelTest(VambaTests, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    _is_composite = True
    # The mixer of the last layer feeds nothing.
    test_all_params_have_gradient = False
    # A patch is a row of `pixel_values`, so their first dimension is not the number of images.
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True

    def test_reverse_loading_mapping(self):
        # As for Llava: the base model's parameters have no prefix that the mapping could change on the way out.
        super().test_reverse_loading_mapping(skip_base_model=True)


class TrainingTest(VambaTests, TrainingTesterMixin, unittest.TestCase):
    def setUp(self):
        self.model_tester = FlatVocabularyTester(self)


class FlatVocabularyTester(VambaModelTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = config.text_config.vocab_size  # where the mixin looks
        return config


# Otherwise the mixin only runs on some of the models that have a plan.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


@unittest.skipUnless(
    hasattr(TensorParallelTesterMixin, "_skip_if_distributed_not_supported"),
    "older versions need a flat configuration",
)
class TensorParallelTest(VambaTests, TensorParallelTesterMixin, unittest.TestCase):
    pass
