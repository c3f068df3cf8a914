from transformers.pipelines import AnyToAnyPipeline

from .test_pipelines_image_text_to_text import ImageTextToTextPipelineTests


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    pipeline_class = AnyToAnyPipeline
