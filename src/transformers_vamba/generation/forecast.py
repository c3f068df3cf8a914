# SPDX-License-Identifier: Apache-2.0
"""How many tokens a video has, and how much memory it takes to ask about it, before anything is loaded or run."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import requires_backends
from transformers.video_utils import VideoMetadata

from ..cache.changes import check_pruning, num_kept, num_left
from ..cache.excerpts import check_read_share, num_read
from ..cache.layers import VambaQuantizedVideoLayer, resolve_implementation
from ..configuration_vamba import VambaConfig, VambaTextConfig
from ..inputs.media import count_patch_values
from ..modeling_vamba import VambaForConditionalGeneration
from ..ops.scan_kernels import CHUNK
from ..ops.time_steps import SCORES_AT_ONCE
from ..video.patches import whole_patches
from ..video.reading import check_video, normalize_video, open_frames
from ..video.sources import describe_source, is_file
from ..video_processing_vamba import VambaVideoProcessor
from .read_share import TOKENS_WATCHED


# What a measured peak has above the tensors that are counted here: the workspace of cuBLAS and of the attention
# kernels, and the rounding of PyTorch's allocator.
LIBRARY_WORKSPACE = 2**27


@dataclass(frozen=True)
class VambaForecast:
    """
    What it takes to encode a video and to ask about it. All sizes are in bytes.

    Args:
        num_frames (`int`): Frames that are sampled.
        video_grid_thw (`tuple[int, int, int]`): The grid of the video, in patches.
        num_video_tokens (`int`): Tokens of the video, of those that are kept.
        weights (`int`): The model.
        video_cache (`int`): Keys and values of the video, wherever they are kept.
        host_memory (`int`): The part of them that is kept in the host's memory.
        text_cache (`int`): Keys and values of the text.
        encoding (`int`): The most that the device holds in addition to the weights while the video is encoded.
        answering (`int`): The most that it holds in addition to them while questions are answered.
    """

    num_frames: int
    video_grid_thw: tuple[int, int, int]
    num_video_tokens: int
    weights: int
    video_cache: int
    host_memory: int
    text_cache: int
    encoding: int
    answering: int

    @property
    def peak(self) -> int:
        """The most memory that is allocated on the device at any time."""
        return self.weights + max(self.encoding, self.answering)

    def __str__(self):
        peak, weights, encoding, answering, video_cache = map(
            format_bytes, (self.peak, self.weights, self.encoding, self.answering, self.video_cache)
        )
        where = " of the host's memory" if self.host_memory else ""
        return (
            f"{self.num_frames:,} frames, {self.num_video_tokens:,} video tokens, at most {peak}: weights {weights}, "
            f"and beside them {encoding} while encoding and {answering} while answering. The video's keys and values "
            f"take {video_cache}{where}"
        )


def format_bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def forecast_memory(
    model: VambaConfig | VambaForConditionalGeneration,
    processor,
    video,
    num_frames: int | None = None,
    fps: float | None = None,
    segment_frames: int = 64,
    video_cache_implementation: str | None = None,
    video_pruning_rate: float = 0.0,
    max_video_tokens: int | None = None,
    video_read_share: float | None = None,
    dtype: torch.dtype | None = None,
    weight_bits: int | None = None,
    batch_size: int = 1,
    num_text_tokens: int = 128,
    max_new_tokens: int = 128,
    **videos_kwargs,
) -> VambaForecast:
    """
    Forecasts the tokens of a video and the peak of the memory allocated on a CUDA device, with the mixers' Triton
    kernels, while `iter_video_segments` and `encode_video` (or `generate`, with pixel values in the host's memory)
    encode it and questions are answered. No frame is decoded and no weight is loaded.

    Args:
        model ([`VambaConfig`] or [`VambaForConditionalGeneration`]):
            The model, which may be quantized, or on the meta device, or its configuration.
        processor ([`VambaProcessor`] or [`VambaVideoProcessor`]): Says which frames are sampled, and of which size.
        video (`str`, `os.PathLike`, `BinaryIO` or [`~transformers.video_utils.VideoMetadata`]):
            A file or URL, or what is known of a video: its number of frames (`total_num_frames`), the rate (`fps`,
            if frames are sampled by rate), `height` and `width`.
        num_frames (`int`, *optional*), fps (`float`, *optional*):
            How many frames to sample, or how many per second. By default as the video processor is set.
        segment_frames (`int`, *optional*, defaults to 64): Frames that are encoded at a time.
        video_cache_implementation (`str`, *optional*), video_pruning_rate (`float`, *optional*), max_video_tokens \
        (`int`, *optional*), video_read_share (`float`, *optional*): How the video is kept, how much of it, and how
            much is read for each token of an answer, see [`VambaCache`].
        dtype (`torch.dtype`, *optional*):
            Of weights and activations. By default the model's, or that of the configuration, or bfloat16.
        weight_bits (`int`, *optional*):
            8 or 4: the linear layers except `lm_head` are loaded in this many bits, as by bitsandbytes. The
            weights of a model that is loaded are counted as they are.
        batch_size (`int`, *optional*, defaults to 1): Questions that are answered at once, or beams.
        num_text_tokens (`int`, *optional*, defaults to 128): Tokens of the longest question.
        max_new_tokens (`int`, *optional*, defaults to 128): Tokens of the longest answer.
        **videos_kwargs: Further arguments of the video processor, such as `size`.

    Raises:
        `FileNotFoundError`: for a path without a file.
        `ValueError`: for a file that is no video, a live source, whose length is not known, and options that do not
            exist.
    """
    if not isinstance(model, (VambaConfig, VambaForConditionalGeneration)):
        raise TypeError(f"`model` must be a VambaConfig or a Vamba model, got {type(model).__name__}.")
    layer_class, offloading = resolve_implementation(video_cache_implementation or "dynamic")
    check_pruning(video_pruning_rate, max_video_tokens)
    check_read_share(video_read_share)
    if weight_bits not in (None, 4, 8):
        raise ValueError(f"`weight_bits` must be 4 or 8, got {weight_bits!r}.")
    for name, value in (("segment_frames", segment_frames), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
    config = model.config if isinstance(model, PreTrainedModel) else model
    dtype = dtype or getattr(model, "dtype", None) or torch.bfloat16
    sampling = {name: value for name, value in (("num_frames", num_frames), ("fps", fps)) if value is not None}
    num_frames, grid = measure_video(getattr(processor, "video_processor", processor), video, sampling | videos_kwargs)

    kept = kept_by_segments(config, grid, segment_frames, video_pruning_rate)
    num_tokens, allocated, is_thinned = tokens_held(kept, max_video_tokens)
    text_config = config.text_config
    is_quantized = issubclass(layer_class, VambaQuantizedVideoLayer)
    video_layer = num_tokens * cache_bytes_per_token(text_config, dtype, is_quantized)
    video_cache = text_config.num_hidden_layers * video_layer
    text_layer = batch_size * (num_text_tokens + max_new_tokens) * cache_bytes_per_token(text_config, dtype, False)
    text_cache = text_config.num_hidden_layers * text_layer
    cache_on_device = 0 if offloading else video_cache * allocated // num_tokens
    thinning = 2 * cache_on_device if is_thinned else 0  # what there was before is held until it is done
    cache_on_device += mixer_state_bytes(text_config, dtype)
    encoding = encoding_bytes(config, dtype, grid, segment_frames, cache_on_device, max(kept))
    encoding = max(encoding, thinning + mixer_state_bytes(text_config, dtype))
    # With which the next time step is compared. While a segment is encoded, that of before it is held as well.
    follows_changes = video_pruning_rate > 0 or max_video_tokens is not None
    last_step = 4 * grid[1] * grid[2] * count_patch_values(config.vision_config) if follows_changes else 0
    encoding += 2 * last_step

    reading = batch_size * num_text_tokens * text_bytes_per_token(text_config, dtype)
    if is_quantized:  # one head of one layer is converted to full size
        head = cache_bytes_per_token(text_config, dtype, False) // text_config.num_key_value_heads
        reading += num_tokens * head
    num_excerpt_tokens = tokens_of_excerpt(config, grid, num_tokens, video_read_share)
    if num_excerpt_tokens:
        copies_keys = is_quantized or dtype != torch.float32
        choosing = choosing_bytes(text_config, num_tokens, copies_keys)
        choosing += batch_size * num_text_tokens * 3 * text_config.hidden_size * dtype.itemsize
        reading = max(reading, choosing)
    copied = video_layer * num_excerpt_tokens // num_tokens
    answering = cache_on_device + last_step + text_cache + reading + text_config.num_hidden_layers * copied
    if offloading:  # the layer that is read is on the device, and the next one, before the last one is copied
        answering += 2 * video_layer - copied
    return VambaForecast(
        num_frames=num_frames,
        video_grid_thw=grid,
        num_video_tokens=num_tokens,
        weights=weight_bytes(model, dtype, weight_bits),
        video_cache=video_cache,
        host_memory=video_cache if offloading else 0,
        text_cache=text_cache,
        encoding=encoding + LIBRARY_WORKSPACE,
        answering=answering + LIBRARY_WORKSPACE,
    )


def kept_by_segments(
    config: VambaConfig, grid: tuple[int, int, int], segment_frames: int, video_pruning_rate: float
) -> list[int]:
    """How many tokens of each segment of a video of this grid pass from the vision tower to the mixers."""
    num_steps, height, width = grid
    tokens_per_step = height * width // config.vision_config.spatial_merge_size**2
    steps_at_once = count_steps(config, segment_frames)
    kept = [
        min(steps_at_once, num_steps - start) * num_kept(tokens_per_step, video_pruning_rate)
        for start in range(0, num_steps, steps_at_once)
    ]
    kept[0] += tokens_per_step - num_kept(tokens_per_step, video_pruning_rate)
    return kept


def tokens_held(kept: list[int], max_video_tokens: int | None) -> tuple[int, int, bool]:
    """
    Of the tokens of each segment: how many a cache with this budget holds in the end, for how many it has memory, and
    whether it is ever thinned out.
    """
    if max_video_tokens is None or sum(kept) <= max_video_tokens:
        return sum(kept), sum(kept), False
    num_tokens = 0
    for new in kept:
        num_tokens += new
        if num_tokens > max_video_tokens:
            num_tokens = num_left(max_video_tokens)
    return num_tokens, min(sum(kept), max_video_tokens + max(kept)), True


def tokens_of_excerpt(
    config: VambaConfig,
    grid: tuple[int, int, int],
    num_tokens: int,
    video_read_share: float | None,
) -> int:
    """How many tokens of a video of this grid, of which so many are kept, an answer copies to read them alone."""
    if video_read_share is None:
        return 0
    tokens_per_step = grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
    # The first time step is the largest one of a video that is pruned.
    num_tokens_read = num_read(num_tokens, tokens_per_step, video_read_share)
    return num_tokens_read if num_tokens_read < num_tokens else 0


def choosing_bytes(config: VambaTextConfig, num_tokens: int, copies_keys: bool) -> int:
    """
    The most that lives at once while a prompt chooses what is read of a video of so many tokens, beside the text: the
    scores of some of them in float32, and their keys unless these are read as they are. A kernel on a GPU takes less.
    """
    num_queries = config.num_attention_heads * TOKENS_WATCHED
    head_dim = config.hidden_size // config.num_attention_heads
    keys = (config.num_key_value_heads or config.num_attention_heads) * head_dim if copies_keys else 0
    return 4 * (num_queries + keys) * min(num_tokens, SCORES_AT_ONCE // num_queries)


def count_steps(config: VambaConfig, segment_frames: int) -> int:
    """The time steps of a segment."""
    return max(1, segment_frames // config.vision_config.temporal_patch_size)


def encoding_bytes(
    config: VambaConfig,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    segment_frames: int,
    cache_on_device: int,
    num_mixed_tokens: int,
) -> int:
    """
    The most that cache and activations take together while a video of this grid is encoded by segments, of which at
    most `num_mixed_tokens` pass through the mixers at once.
    """
    num_steps, height, width = grid
    steps_at_once = min(num_steps, count_steps(config, segment_frames))
    num_patches = steps_at_once * height * width
    seeing = num_patches * vision_bytes_per_patch(config, dtype)
    mixing = num_mixed_tokens * mixer_bytes_per_token(config.text_config, dtype)
    # The first segment passes through the vision tower before there is a cache.
    cache_while_seeing = cache_on_device if steps_at_once < num_steps else 0
    return max(cache_while_seeing + seeing, cache_on_device + mixing)


def measure_video(
    video_processor: VambaVideoProcessor, video, videos_kwargs: dict
) -> tuple[int, tuple[int, int, int]]:
    """The number of frames that are sampled of a video, and its grid in patches."""
    kwargs = video_processor.complete_kwargs(videos_kwargs)
    if isinstance(video, VideoMetadata):
        metadata = video
        missing = [name for name in ("total_num_frames", "height", "width") if not getattr(metadata, name)]
        if missing:
            raise ValueError(f"A video is described by its `total_num_frames`, `height` and `width`; got {metadata}.")
        num_frames = metadata.total_num_frames
        if kwargs["do_sample_frames"]:
            num_frames = len(video_processor.sample_frames(**{**kwargs, "metadata": metadata}))
    else:
        requires_backends(video_processor, ["av"])
        if not is_file(video):
            raise TypeError(
                "`video` must be a path, a URL, bytes, an open binary file or a VideoMetadata, which describes frames "
                f"in memory as well, got {type(video).__name__}."
            )
        video = normalize_video(video)
        check_video(video, video_processor.source_limits)
        with open_frames(video, video_processor.source_limits, kwargs["on_damage"]) as frames:
            indices, metadata = video_processor.choose_frames(frames, kwargs)
            if not metadata.height or not metadata.width:
                raise ValueError(f"{describe_source(video)} does not tell the size of its frames.")
        num_frames = len(indices)
    height, width = metadata.height, metadata.width
    if kwargs["do_resize"]:
        height, width = video_processor.get_resized_sizes(height, width, **videos_kwargs)[-1]
    step, patch_size = kwargs["temporal_patch_size"], kwargs["patch_size"]
    return whole_patches(num_frames, step), (max(num_frames // step, 1), height // patch_size, width // patch_size)


def weight_bytes(model: VambaConfig | PreTrainedModel, dtype: torch.dtype, weight_bits: int | None) -> int:
    """Bytes of a model's weights: as they are if it is loaded, otherwise as they would be in `dtype`."""
    if isinstance(model, VambaConfig):
        with torch.device("meta"):
            model = VambaForConditionalGeneration(model)
    elif model.device.type != "meta":
        if weight_bits is not None:
            raise ValueError("`weight_bits` is for a model that is yet to be loaded; this one is counted as it is.")
        return model.get_memory_footprint()
    # bitsandbytes in 4 bits keeps a float32 scale for every 64 weights.
    quantized_size = {None: dtype.itemsize, 8: 1, 4: 0.5 + 4 / 64}[weight_bits]
    head = model.get_output_embeddings()
    linear_weights = {
        module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    }
    return int(
        sum(
            parameter.numel() * (quantized_size if parameter in linear_weights else dtype.itemsize)
            for parameter in model.parameters()
        )
    )


def cache_bytes_per_token(config: VambaTextConfig, dtype: torch.dtype, is_quantized: bool) -> int:
    """Bytes of keys and values per token in one decoder layer."""
    head_dim = config.hidden_size // config.num_attention_heads
    bytes_per_head = head_dim + dtype.itemsize if is_quantized else head_dim * dtype.itemsize  # one scale per head
    return 2 * (config.num_key_value_heads or config.num_attention_heads) * bytes_per_head


def mixer_state_bytes(config: VambaTextConfig, dtype: torch.dtype) -> int:
    """Bytes of the states of all mixers, whatever the length of the video. The last layer's mixer does not run."""
    inner_size = config.mamba_expand * config.hidden_size
    conv_dim = inner_size + 2 * config.mamba_n_groups * config.mamba_d_state
    per_layer = (config.mamba_d_conv - 1) * conv_dim * dtype.itemsize + inner_size * config.mamba_d_state * 4
    return (config.num_hidden_layers - 1) * per_layer


def vision_bytes_per_patch(config: VambaConfig, dtype: torch.dtype) -> int:
    """
    The most that lives at once in a block of the vision tower, a patch: in the MLP what has entered the block, its
    norm, what the block's output is added to, and the intermediate states before and after the activation (GPUs since
    Hopper keep those after it alone, see [`ops.gelu_linear`]); in the attention, should that be more, the same three,
    query, key and value, and what comes out, twice if it is copied. Beside them are the pixels, as they come (float32)
    and in `dtype`, and the float32 cosines and sines of the positions.
    """
    vision_config = config.vision_config
    width = vision_config.embed_dim
    mlp = 3 * width + 2 * int(width * vision_config.mlp_ratio)
    attention = 8 * width
    pixels = count_patch_values(vision_config)
    positions = 2 * width // vision_config.num_heads
    pixel_size = 4 if dtype == torch.float32 else 4 + dtype.itemsize
    return max(mlp, attention) * dtype.itemsize + pixels * pixel_size + positions * 4


def mixer_bytes_per_token(config: VambaTextConfig, dtype: torch.dtype) -> int:
    """
    Bytes per token of what lives at once in a mixer at its peak, when the scan writes its output: residual and norm,
    `in_proj`'s outputs (gate, convolution inputs and time steps), the convolution's output, time steps and decays in
    float32, each chunk's state, and the output.
    """
    inner_size = config.mamba_expand * config.hidden_size
    conv_dim = inner_size + 2 * config.mamba_n_groups * config.mamba_d_state
    num_heads = inner_size // config.mamba_d_head
    projected = inner_size + conv_dim + num_heads
    per_token = 2 * config.hidden_size + projected + conv_dim + inner_size * config.mamba_d_state // CHUNK + inner_size
    return per_token * dtype.itemsize + 2 * num_heads * 4


def text_bytes_per_token(config: VambaTextConfig, dtype: torch.dtype) -> int:
    """
    Bytes per text token of what lives at once in a decoder layer at its peak, in the MLP: the embedding, the layer's
    input, the attention's output and its sum with the residual, the norm, the MLP's output, and three times the
    intermediate states.
    """
    return (6 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize
