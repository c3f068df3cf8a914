# SPDX-License-Identifier: Apache-2.0
"""What a cache holds of one video in one decoder layer."""

import copy

import torch

from ..inputs.checks import video_device_error, video_dtype_error
from ..ops.quantized_attention import QuantizedStates, quantize
from ..ops.state import MambaState
from .storage import DeviceStorage, HostStorage


# Keys or values, as the cross-attention takes them.
VideoStates = torch.Tensor | QuantizedStates

# Tokens, which bounds the memory that it takes to change from one form to another.
_CONVERTED_AT_ONCE = 2**16


class VambaVideoLayer:
    """
    One decoder layer's part of one video: the keys and values that its cross-attention reads, of shape
    `(1, num_key_value_heads, num_video_tokens, head_dim)`, and the state with which its mixer goes on.

    Args:
        offloading (`bool`, *optional*, defaults to `False`):
            Whether keys and values are kept in the host's memory, and brought to the device when they are read.
    """

    # Names of the tensors that grow with the video, and of those that do not.
    token_tensors: tuple[str, ...] = ("keys", "values")
    other_tensors: tuple[str, ...] = ()

    def __init__(self, offloading: bool = False):
        self._mixer_state: tuple[torch.Tensor, ...] = ()
        self._storage = HostStorage() if offloading else DeviceStorage()

    @property
    def mixer_state(self) -> MambaState | None:
        """The state after the last token, `None` before there is one."""
        if self._mixer_state and self._mixer_state[0].is_inference() and not torch.is_inference_mode_enabled():
            # Autograd takes no tensor that was made in inference mode.
            self._mixer_state = tuple(tensor.clone() for tensor in self._mixer_state)
        return MambaState(*self._mixer_state) if self._mixer_state else None

    @mixer_state.setter
    def mixer_state(self, state: MambaState | None) -> None:
        # Transformers' exporters rebuild tuples from an iterator, which a named one does not take.
        self._mixer_state = tuple(state or ())

    @property
    def keys(self) -> torch.Tensor:
        return self._storage.read()[0]

    @property
    def values(self) -> torch.Tensor:
        return self._storage.read()[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self._storage.nbytes

    def get_seq_length(self) -> int:
        return self._storage.num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Sizes the memory, once it is allocated, for `num_tokens` more tokens than are held now."""
        self._storage.reserve(num_tokens)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Appends keys and values, `(1, num_key_value_heads, num_tokens, head_dim)`."""
        self._check_kind(key_states)
        if isinstance(self._storage, HostStorage):
            self._refuse_gradient(key_states)
        self._storage.append((key_states, value_states))

    def crop(self, num_tokens: int, mixer_state: MambaState | None) -> None:
        """Goes back to the first tokens, after which the mixer was in this state."""
        self._storage.crop(num_tokens)
        self.mixer_state = mixer_state

    def select(self, indices: torch.Tensor) -> None:
        """Keeps some of the tokens, in memory of their own. The mixer goes on from the state that it had."""
        self._storage.select(indices)

    def _check_kind(self, states: torch.Tensor) -> None:
        # The last of the tensors that are kept, values or their scales, has the dtype of what came.
        if self._storage.dtype not in (None, states.dtype):
            raise video_dtype_error(self._storage.dtype, states.dtype, "appended to")
        if self._storage.device not in (None, states.device):
            raise video_device_error(self._storage.device, states.device, "appended to")

    def _refuse_gradient(self, states: torch.Tensor) -> None:
        if states.requires_grad:
            raise ValueError(
                "A quantized or offloaded video takes no gradient: run under `torch.no_grad()`, or leave out "
                "`video_cache_implementation`."
            )

    def read(self) -> tuple[VideoStates, VideoStates]:
        """Keys and values on the device, as the cross-attention takes them."""
        keys, values = self._storage.read()
        return keys, values

    def to(self, device: torch.device) -> None:
        """Moves all tensors to a device, or lets those in the host's memory be read there."""
        self._storage.to(device)
        for name in self.other_tensors:
            setattr(self, name, getattr(self, name).to(device))
        if self.mixer_state is not None:
            self.mixer_state = MambaState(*(tensor.to(device) for tensor in self.mixer_state))

    def prefetch(self) -> None:
        """If keys and values are kept in the host's memory, starts copying them to the device."""
        self._storage.prefetch()

    def fork(self) -> "VambaVideoLayer":
        """
        A second view of the same keys, values and state. What either appends is not seen by the other.
        """
        fork = copy.copy(self)
        fork._storage = self._storage.fork()
        return fork

    def excerpt(self, states: tuple[VideoStates, VideoStates], indices: torch.Tensor) -> "VambaVideoLayer":
        """Some of the tokens in memory of their own, on the device, to be read alone. `states` is what `read` gave."""
        excerpt = type(self)()
        for name in self.other_tensors:
            setattr(excerpt, name, getattr(self, name))
        tensors = [tensor for each in states for tensor in (each[:2] if isinstance(each, QuantizedStates) else [each])]
        device = tensors[0].device
        indices = indices.to(device)
        excerpt._storage.load(tuple(tensor.index_select(2, indices) for tensor in tensors), device)
        return excerpt

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as they are kept."""
        tensors = dict(zip(self.token_tensors, self._storage.save()))
        tensors |= {name: getattr(self, name) for name in self.other_tensors}
        return tensors | ({} if self.mixer_state is None else self.mixer_state._asdict())

    def load_state_dict(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Takes over what `state_dict` has given, for a model on `device`. Raises a `KeyError` for what is missing."""
        self._storage.load(tuple(tensors[name] for name in self.token_tensors), device)
        for name in self.other_tensors:
            setattr(self, name, tensors[name].to(device))
        if "ssm" in tensors:
            self.mixer_state = MambaState(tensors["conv"].to(device), tensors["ssm"].to(device))

    @classmethod
    def convert(cls, layer: "VambaVideoLayer", offloading: bool) -> "VambaVideoLayer":
        """The content of a layer that keeps it in another way."""
        converted = cls(offloading)
        converted.mixer_state = layer.mixer_state
        converted.reserve(layer.get_seq_length())
        for keys, values in zip(layer.keys.split(_CONVERTED_AT_ONCE, 2), layer.values.split(_CONVERTED_AT_ONCE, 2)):
            converted.update(keys, values)
        return converted


class VambaQuantizedVideoLayer(VambaVideoLayer):
    """
    A [`VambaVideoLayer`] in 8 bits, with one scale per token and head. The centre of keys and values, which is kept
    beside the 8 bits, is the mean of the first tokens that come.
    """

    token_tensors = ("key_codes", "key_scales", "value_codes", "value_scales")
    other_tensors = ("key_centre", "value_centre")

    def __init__(self, offloading: bool = False):
        super().__init__(offloading)
        self.key_centre: torch.Tensor | None = None
        self.value_centre: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor:
        return self.read()[0].dequantize()

    @property
    def values(self) -> torch.Tensor:
        return self.read()[1].dequantize()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._check_kind(key_states)
        self._refuse_gradient(key_states)
        if self.key_centre is None or self.value_centre is None:
            self.key_centre, self.value_centre = (
                states.mean(dim=2, keepdim=True, dtype=torch.float32) for states in (key_states, value_states)
            )
        keys, values = quantize(key_states, self.key_centre), quantize(value_states, self.value_centre)
        self._storage.append((keys.codes, keys.scales, values.codes, values.scales))

    def read(self) -> tuple[QuantizedStates, QuantizedStates]:
        key_codes, key_scales, value_codes, value_scales = self._storage.read()
        assert self.key_centre is not None and self.value_centre is not None  # with the first tokens
        return (
            QuantizedStates(key_codes, key_scales, self.key_centre),
            QuantizedStates(value_codes, value_scales, self.value_centre),
        )


# The ways to keep a video: the class of a layer, and whether it is offloaded to the host's memory.
_IMPLEMENTATIONS = {
    "dynamic": (VambaVideoLayer, False),
    "quantized": (VambaQuantizedVideoLayer, False),
    "offloaded": (VambaVideoLayer, True),
    "offloaded_quantized": (VambaQuantizedVideoLayer, True),
}


def resolve_implementation(video_cache_implementation: str) -> tuple[type[VambaVideoLayer], bool]:
    """
    The class of the layers that keep a video in this way, and whether they are offloaded to the host's memory.

    Raises:
        ValueError: for a way that does not exist.
    """
    if video_cache_implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"`video_cache_implementation` must be one of {', '.join(map(repr, _IMPLEMENTATIONS))}, got "
            f"{video_cache_implementation!r}."
        )
    return _IMPLEMENTATIONS[video_cache_implementation]
