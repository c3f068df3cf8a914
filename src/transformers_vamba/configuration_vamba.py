# SPDX-License-Identifier: Apache-2.0
"""Vamba configuration: Qwen2-VL's, with a Mamba-2 mixer for the video tokens in every decoder layer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig, Qwen2VLTextConfig, Qwen2VLVisionConfig


MAX_LAYERS = 1024  # each takes memory before any weight is there: a larger number is a mistake

_POSITIVE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "mamba_d_state")
_POSITIVE += ("mamba_d_conv", "mamba_expand", "mamba_d_head", "mamba_n_groups", "mamba_chunk_size")


def _check_number_of_layers(name: str, number: int) -> None:
    if number > MAX_LAYERS:
        raise ValueError(f"`{name}` must be at most {MAX_LAYERS}, got {number}.")


@strict
class VambaTextConfig(Qwen2VLTextConfig):
    r"""
    Configuration of the decoder: [`Qwen2VLTextConfig`] plus the Mamba-2 mixer that updates the video tokens. The
    defaults are the shapes of Vamba-Qwen2-VL-7B.

    Args:
        mamba_d_state (`int`, *optional*, defaults to 128): Size of the SSM state per channel.
        mamba_d_conv (`int`, *optional*, defaults to 4): Kernel size of the causal convolution, in tokens.
        mamba_expand (`int`, *optional*, defaults to 2): The mixer's inner width as a multiple of `hidden_size`.
        mamba_d_head (`int`, *optional*, defaults to 64): Channels per SSM head; divides the inner width.
        mamba_n_groups (`int`, *optional*, defaults to 1): Groups that share B and C; divides the number of SSM heads.
        mamba_chunk_size (`int`, *optional*, defaults to 256): Tokens per chunk of the scan, in the
            published code. Ours chooses its own. Changes no result.
        mamba_conv_bias (`bool`, *optional*, defaults to `True`): Whether the convolution has a bias.
        mamba_proj_bias (`bool`, *optional*, defaults to `False`): Whether `in_proj` and `out_proj` have biases.
        mamba_implementation (`str`, *optional*):
            What computes the mixers' scan: `"triton"`, `"torch"` or `"mamba_ssm"`, see [`ops.scan.IMPLEMENTATIONS`].
            By default the fastest for the tensor's device that needs no tuning. Changes no result.
    """

    model_type = "vamba_text"
    base_model_tp_plan = {
        **Qwen2VLTextConfig.base_model_tp_plan,
        "layers.*.cross_attn.q_proj": "colwise",
        "layers.*.cross_attn.k_proj": "colwise",
        "layers.*.cross_attn.v_proj": "colwise",
        "layers.*.cross_attn.o_proj": "rowwise",
    }

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    rms_norm_eps: float = 1e-06
    mamba_d_state: int = 128
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_d_head: int = 64
    mamba_n_groups: int = 1
    mamba_chunk_size: int = 256
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_implementation: str | None = None

    def __post_init__(self, **kwargs):
        self._check_sizes()
        super().__post_init__(**kwargs)
        # Text positions are 1-D (the three M-RoPE axes are equal), so any split of the frequencies gives the same
        # rotation; Qwen2-VL's proportions (16/24/24 of 64) fill in for a configuration without one.
        half = self.hidden_size // self.num_attention_heads // 2
        height = 3 * half // 8
        self.rope_parameters.setdefault("mrope_section", [half - 2 * height, height, height])

    def _check_sizes(self) -> None:
        """Before anything is computed from them: a configuration may come from a stranger."""
        for name in _POSITIVE:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        _check_number_of_layers("num_hidden_layers", self.num_hidden_layers)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes that have to divide each other."""
        self._check_sizes()
        inner_size = self.mamba_expand * self.hidden_size
        divisible: tuple[tuple[str, int, str, Any], ...] = (
            ("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads),
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads),
            ("mamba_expand * hidden_size", inner_size, "mamba_d_head", self.mamba_d_head),
            (
                "mamba_expand * hidden_size / mamba_d_head",
                inner_size // self.mamba_d_head,
                "mamba_n_groups",
                self.mamba_n_groups,
            ),
        )
        for name, value, divisor_name, divisor in divisible:
            if value % divisor:
                raise ValueError(f"`{name}` ({value}) must be a multiple of `{divisor_name}` ({divisor}).")
        head_dim = self.hidden_size // self.num_attention_heads
        section = self.rope_parameters.get("mrope_section") if self.rope_parameters else None
        if section is not None and 2 * sum(section) != head_dim:
            raise ValueError(
                f"`mrope_section` {list(section)} must sum to half of the attention head size "
                f"({head_dim} / 2 = {head_dim // 2}), got {sum(section)}."
            )


@strict
class VambaConfig(Qwen2VLConfig):
    r"""
    Configuration of a Vamba model: Qwen2-VL's vision tower (`vision_config`) and a [`VambaTextConfig`]
    (`text_config`). A `config.json` of the published research code (flat `qwen2_vl` text fields with a
    `vision_mamba_mixer_config`) is recognised and translated by `from_pretrained`, `from_dict` and the constructor.

    Args:
        text_config (`dict` or [`VambaTextConfig`], *optional*): Configuration of the decoder.
        vision_config (`dict` or [`Qwen2VLVisionConfig`], *optional*): Configuration of the vision tower.
        image_token_id (`int`, *optional*, defaults to 151655): Placeholder of an image in the chat template. The
            processor removes it: no placeholder enters the model.
        video_token_id (`int`, *optional*, defaults to 151656): Placeholder of a video, likewise.
        vision_start_token_id (`int`, *optional*, defaults to 151652): Token in front of a medium.
        vision_end_token_id (`int`, *optional*, defaults to 151653): Token behind a medium.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether `lm_head` shares the embedding's weight.

    Raises:
        ValueError: where sizes do not divide each other, or a published configuration sets a switch that changes the
            architecture in a way that this package does not support.

    Example:

    ```python
    >>> from transformers_vamba import VambaConfig, VambaForConditionalGeneration

    >>> configuration = VambaConfig()  # the shapes of Vamba-Qwen2-VL-7B
    >>> model = VambaForConditionalGeneration(configuration)
    ```"""

    model_type = "vamba"
    sub_configs = {"vision_config": Qwen2VLVisionConfig, "text_config": VambaTextConfig}
    sub_configs_defaults = sub_configs  # what newer versions of Transformers call the same thing

    def __post_init__(self, **kwargs):
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
        if "vision_mamba_mixer_config" in kwargs:
            kwargs = _translate_published_config(kwargs)
            self.architectures = ["VambaForConditionalGeneration"]  # the published code's class has Qwen2-VL's name
            # The published code gives its vision configuration Qwen2-VL's own model type, among other leftovers.
            known = {name: value for name, value in self.vision_config.items() if hasattr(Qwen2VLVisionConfig, name)}
            known.pop("model_type", None)
            self.vision_config: Any = known
        super().__post_init__(**kwargs)
        _check_number_of_layers("vision_config.depth", self.vision_config.depth)
        if self.vision_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"The vision tower's output size `vision_config.hidden_size` ({self.vision_config.hidden_size}) must "
                f"equal `text_config.hidden_size` ({self.text_config.hidden_size})."
            )

    def to_dict(self) -> dict[str, Any]:
        config_dict = super().to_dict()
        if config_dict.get("auto_map") == _AUTO_MAP:
            del config_dict["auto_map"]
        return config_dict

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if "vision_mamba_mixer_config" in config_dict:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs


class PublishedConfig(Qwen2VLConfig):
    """
    What `AutoConfig` makes of a `config.json` that says `qwen2_vl`: a [`VambaConfig`] if it has Vamba's mixer, as the
    published checkpoints do, and else the library's own [`Qwen2VLConfig`]. There are no instances of this class.
    """

    # With `trust_remote_code=True`, a repository's own code goes before a class of the library, but not before a class
    # that a user registered. A Qwen2-VL with code of its own shall run it as if this package were not here.
    __module__ = Qwen2VLConfig.__module__

    def __new__(cls, *args, **kwargs):
        return cls._class_for(kwargs)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return cls._class_for(config_dict).from_dict(config_dict, **kwargs)

    @staticmethod
    def _class_for(fields: dict[str, Any]) -> type[Qwen2VLConfig]:
        return VambaConfig if "vision_mamba_mixer_config" in fields else Qwen2VLConfig


# The Auto class of the model, which TRL asks of an architecture that is not in the namespace of `transformers`. It is
# never written: a checkpoint with code of its own has another.
_AUTO_MAP = {"AutoModelForImageTextToText": "transformers_vamba.VambaForConditionalGeneration"}

# Fields of a published `vision_mamba_mixer_config` and what they are called here.
_PUBLISHED_MIXER_FIELDS = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "expand": "mamba_expand",
    "headdim": "mamba_d_head",
    "ngroups": "mamba_n_groups",
    "chunk_size": "mamba_chunk_size",
    "conv_bias": "mamba_conv_bias",
    "bias": "mamba_proj_bias",
}
# Switches of the published code that change the architecture, with the one value that the released model uses.
_PUBLISHED_SWITCHES = {
    "use_alpha_balancing": True,
    "cross_attn_use_position_embeddings": False,
    "cross_attn_use_layer_norm": False,
}
_PUBLISHED_MIXER_SWITCHES = {
    "enable": True,
    "norm_type": "rmsnorm",
    "residual_in_fp32": False,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "dt_limit": [0.0, float("inf")],
}


def _translate_published_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Translates the extra fields of a published `config.json` (those that [`Qwen2VLConfig`] does not know) into those
    of a [`VambaTextConfig`]. The mixer's other fields only concern the initialisation or the kernels.
    """
    kwargs = dict(kwargs)
    mixer = dict(kwargs.pop("vision_mamba_mixer_config"))
    hidden_size = kwargs.get("hidden_size", VambaTextConfig.hidden_size)
    expand = mixer.get("expand", VambaTextConfig.mamba_expand)
    sized_switches = {"hidden_dim": hidden_size, "d_ssm": expand * hidden_size}
    # A size of None means the default, which is the one supported value.
    sized = {name: mixer[name] for name in sized_switches if mixer.get(name) is not None}

    for found, supported, where in (
        (kwargs, _PUBLISHED_SWITCHES, ""),
        (mixer, _PUBLISHED_MIXER_SWITCHES, "vision_mamba_mixer_config."),
        (sized, sized_switches, "vision_mamba_mixer_config."),
    ):
        for name, value in supported.items():
            given = found.get(name, value)
            if isinstance(value, list):
                given = [float(number) for number in given]
            if given != value:
                raise ValueError(
                    f"Unsupported switch in a published Vamba configuration: `{where}{name}` is {given!r}, and only "
                    f"{value!r} is supported."
                )
    for name in (*_PUBLISHED_SWITCHES, "distill_coeff", "model_type"):
        kwargs.pop(name, None)
    kwargs.update({new: mixer[old] for old, new in _PUBLISHED_MIXER_FIELDS.items() if old in mixer})
    return kwargs
