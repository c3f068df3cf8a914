import numpy as np
from PIL import Image
from transformers.pipelines import ImageTextToTextPipeline


class ImageTextToTextPipelineTests:
    """What `PipelineTesterMixin` runs for its task."""

    pipeline_class = ImageTextToTextPipeline

    def get_test_pipeline(self, model, tokenizer, processor, image_processor=None, dtype="float32"):
        parts = {"model": model, "tokenizer": tokenizer, "processor": processor, "image_processor": image_processor}
        pipeline = self.pipeline_class(**parts, dtype=dtype, max_new_tokens=5)
        pixels = np.random.default_rng(0).integers(256, size=(4, 56, 84, 3), dtype=np.uint8)
        text = f"<|vision_start|>{processor.image_token}<|vision_end|>"
        return pipeline, [{"images": Image.fromarray(image), "text": f"{text} What is this?"} for image in pixels]

    def run_pipeline_test(self, pipeline, examples):
        one_by_one = [pipeline(**example) for example in examples]
        for example, (output,) in zip(examples, one_by_one, strict=True):
            assert output["input_text"] == example["text"]
            assert output["generated_text"].startswith(example["text"])
        assert list(pipeline((example for example in examples), batch_size=len(examples))) == one_by_one

        content = [{"type": "image", "image": examples[0]["images"]}, {"type": "text", "text": "What is this?"}]
        (output,) = pipeline(text=[{"role": "user", "content": content}], return_full_text=False)
        assert isinstance(output["generated_text"], str)
