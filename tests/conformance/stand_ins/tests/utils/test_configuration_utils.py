# Arguments that every configuration takes, at values other than their defaults.
config_common_kwargs = {
    "architectures": ["VambaForConditionalGeneration"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "label"},
    "is_encoder_decoder": True,
    "label2id": {"label": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
