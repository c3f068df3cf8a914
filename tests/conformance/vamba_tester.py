"""A tiny Vamba and its inputs, in the form that Transformers' common tests ask for."""

import torch
from tests.test_modeling_common import floats_tensor, ids_tensor
from transformers.testing_utils import torch_device

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaModel


class VambaModelTester:
    """One image of 4x4 patches and one video of 2x4x4 patches a row: 4 and 8 tokens."""

    base_model_class = VambaModel
    conditional_generation_class = VambaForConditionalGeneration
    causal_lm_class = VambaForConditionalGeneration
    all_model_classes = (VambaModel, VambaForConditionalGeneration)

    batch_size = 3
    seq_length = 7
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    pad_token_id = 0
    image_grid = (1, 4, 4)
    video_grid = (2, 4, 4)
    # Token ids below this one are special.
    first_text_id = 10

    text_config = {
        "vocab_size": 99,
        "hidden_size": hidden_size,
        "intermediate_size": 37,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": pad_token_id,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 4,
    }
    vision_config = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": hidden_size,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
    }

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return VambaConfig(
            text_config=self.text_config,
            vision_config=self.vision_config,
            vision_start_token_id=1001,  # in no random text
            vision_end_token_id=1002,
            image_token_id=5,
            video_token_id=6,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], config.text_config.vocab_size)
        input_ids = input_ids.clamp(min=self.first_text_id)
        pixel_values, image_grid_thw = self.media(config.vision_config, self.image_grid)
        pixel_values_videos, video_grid_thw = self.media(config.vision_config, self.video_grid)
        rows = torch.arange(self.batch_size, device=torch_device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": pixel_values,
            "image_grid_thw": image_grid_thw,
            "image_sample_ids": rows,
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "video_sample_ids": rows,
        }
        return config, inputs

    def media(self, vision_config, grid):
        """Patches of one image or video a row, and their grids."""
        time, height, width = grid
        patch_dim = vision_config.in_channels * vision_config.temporal_patch_size * vision_config.patch_size**2
        pixel_values = floats_tensor([self.batch_size * time * height * width, patch_dim])
        return pixel_values, torch.tensor([grid] * self.batch_size, device=torch_device)
