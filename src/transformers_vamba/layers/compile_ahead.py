# SPDX-License-Identifier: Apache-2.0
"""
Compiles the Triton kernels of a model before they are needed, beside what the user waits for anyway.

Which kernels these are follows from the configuration and the dtype, not from the length of a video. So the parts of
the model that launch kernels run once on the meta device, in a thread of their own, where a launch compiles. What is
compiled is kept on the disk by Triton, as always. If something fails here, kernels are compiled when they are used.
"""

import threading
from typing import NamedTuple

import torch
from transformers.utils import logging

from ..configuration_vamba import VambaConfig, VambaTextConfig
from ..ops.flash_decoding import can_flash_decode, flash_decode, log_sums_of_steps
from ..ops.gelu_linear import can_fuse_gelu
from ..ops.quantized_attention import quantize
from ..ops.rotary import rotate_text
from ..ops.step_kernels import can_fuse, mix_and_norm
from ..ops.triton_support import compiled_launches, recorded_launches
from .decoder import VambaMLP
from .mixer import VambaVisionMixer
from .vision import VambaVisionBlock


logger = logging.get_logger(__name__)

NUM_PATCHES = 4096
NUM_TOKENS = 128  # a multiple of 16, as the sizes of large models are: Triton compiles anew for others


class Purpose(NamedTuple):
    """
    What a model is about to do.

    Args:
        dtype (`torch.dtype`): The dtype that it computes in.
        device (`torch.device`): Where.
        is_training (`bool`): Whether it trains, or encodes videos and answers questions.
        is_quantized (`bool`): Whether the videos are kept in 8 bits.
    """

    dtype: torch.dtype
    device: torch.device
    is_training: bool = False
    is_quantized: bool = False


def start_compiling(config: VambaConfig, purpose: Purpose) -> threading.Thread:
    """Compiles in the background. The thread that is returned ends when it is known what, which takes milliseconds."""
    # What runs on the meta device is in a thread of its own, with PyTorch's defaults whatever the caller's modes are.
    thread = threading.Thread(target=_compile, args=(config, purpose), name="compiles-ahead")
    thread.start()
    return thread


def _compile(config: VambaConfig, purpose: Purpose) -> None:
    with compiled_launches(purpose.device), torch.device("meta"):
        run_parts(config, purpose)


def run_parts(config: VambaConfig, purpose: Purpose) -> None:
    """All parts that launch kernels for this purpose, in the order in which they will be needed."""
    for run in (_encode_frames, _mix, _read_text):
        try:
            with torch.set_grad_enabled(purpose.is_training):
                run(config, purpose)
        except Exception as error:  # such as for the kernels of `mamba-ssm`, which do not run here
            logger.debug(f"Some kernels will be compiled at their first use, instead of ahead: {error}")


@torch.no_grad()
def _encode_frames(config: VambaConfig, purpose: Purpose) -> None:
    """A block of the vision tower, which is seldom trained."""
    vision = config.vision_config
    block = VambaVisionBlock(vision).to(purpose.dtype)
    angles = torch.empty(NUM_PATCHES, vision.embed_dim // vision.num_heads, dtype=torch.float32)
    patches = torch.empty(NUM_PATCHES, vision.embed_dim, dtype=purpose.dtype)
    block(patches, cu_seqlens=None, position_embeddings=(angles, angles), frame_length=NUM_PATCHES)
    if can_fuse_gelu(patches, block.mlp.fc1):  # which has its activation within for so many patches alone
        block.mlp(patches[:NUM_TOKENS])


def _mix(config: VambaConfig, purpose: Purpose) -> None:
    """The mixer of a layer."""
    mixer = VambaVisionMixer(config.text_config).to(purpose.dtype)
    tokens = torch.empty(1, NUM_TOKENS, config.text_config.hidden_size, dtype=purpose.dtype)
    outputs, _ = mixer(tokens, [NUM_TOKENS])
    if purpose.is_training:
        outputs.sum().backward()


@recorded_launches()
def _read_text(whole_config: VambaConfig, purpose: Purpose) -> None:
    """A layer of the decoder: the rotation, and in a recorded step everything else that is launched for one row."""
    config: VambaTextConfig = whole_config.text_config
    num_heads = config.num_attention_heads
    num_keys = config.num_key_value_heads or num_heads
    head_dim = config.hidden_size // num_heads
    dtype = purpose.dtype
    angles = torch.empty(1, 1, head_dim, dtype=dtype)
    query, key = (torch.empty(1, 1, heads, head_dim, dtype=dtype) for heads in (num_heads, num_keys))
    rotate_text(query, key, angles, angles)
    if purpose.is_training:
        return
    query = query.view(1, num_keys, num_heads // num_keys, head_dim)
    if can_flash_decode(query):
        # Two strides of the scales in 8 bits are the number of tokens, which may be a multiple of 16 or not.
        for num_tokens in (NUM_TOKENS, NUM_TOKENS + 1) if purpose.is_quantized else (NUM_TOKENS,):
            video = torch.empty(1, num_keys, num_tokens, head_dim, dtype=dtype)
            if purpose.is_quantized:
                video = quantize(video, torch.empty(1, num_keys, 1, head_dim, dtype=torch.float32))
            flash_decode(query, video, video, head_dim**-0.5)
        # What the prompt has read, for `video_read_share` and `locate`.
        bounds = torch.empty(NUM_TOKENS + 1, dtype=torch.long)
        log_sums_of_steps(query[0], video, bounds, head_dim**-0.5)
    hidden_states = torch.empty(1, 1, config.hidden_size, dtype=dtype)
    norm = torch.nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    if can_fuse(hidden_states, norm):
        alpha = torch.empty(1, dtype=dtype)
        mix_and_norm(hidden_states, hidden_states, hidden_states, alpha, norm)
        VambaMLP(config).to(dtype)(hidden_states)
