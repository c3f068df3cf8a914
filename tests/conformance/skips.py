"""Which tests of Transformers' mixins do not run on Vamba, and why. (The mixins skip some more by themselves.)"""

# Regular expression found in the name of a test -> what the test is about, which Vamba does not have. Not collected.
OUT_OF_SCOPE = {
    "audio": "audio",
    "test_pipeline_(?!image_text_to_text|any_to_any)": "pipelines of other tasks",
    "test_multimodal_outputs": "outputs of the vision tower, which Vamba drops segment by segment",
    "moe_|test_ep_|router_logits|batched_and_grouped": "mixture of experts",
}
