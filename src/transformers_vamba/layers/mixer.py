# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 mixer that updates the video tokens, over any number of them."""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations import use_kernelized_func
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn, mamba2_chunk_scan
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated
from transformers.utils import is_causal_conv1d_available, is_mamba_2_ssm_available, logging

from ..configuration_vamba import VambaTextConfig
from ..ops.state import MambaState
from ..parallel.gradient_checkpointing import MAX_TOKENS_PER_PART


logger = logging.get_logger(__name__)


def _import_kernels() -> Callable | None:
    """
    The fused gated norm of `mamba-ssm`, where the CUDA kernels are installed and whole. Where they are not,
    Transformers quietly takes PyTorch's functions, which know no sequence boundaries.
    """
    if not (is_mamba_2_ssm_available() and is_causal_conv1d_available()):
        return None
    try:
        import causal_conv1d  # noqa: F401
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except Exception as error:
        logger.warning(
            f"The Mamba-2 kernels are installed but cannot be imported ({error}); PyTorch takes their place."
        )
        return None
    return rmsnorm_fn


_gated_rms_norm = _import_kernels()


@use_kernelized_func([causal_conv1d_fn, mamba2_chunk_scan])
class VambaMixer(nn.Module):
    """
    The Mamba-2 mixer ([Dao and Gu, 2024](https://huggingface.co/papers/2405.21060)), with the kernels of `mamba-ssm`
    and `causal-conv1d` on a CUDA device where both are installed, and Transformers' PyTorch functions otherwise.

    Unlike Transformers' own block it starts from and returns a [`MambaState`], and never takes the fused kernel that
    reads `out_proj.weight` itself: the projections are called as modules, as adapters and quantised layers need.
    """

    def __init__(self, config: VambaTextConfig):
        super().__init__()
        self.intermediate_size = config.mamba_expand * config.hidden_size
        self.num_heads = self.intermediate_size // config.mamba_d_head
        self.head_dim = config.mamba_d_head
        self.state_size = config.mamba_d_state
        self.n_groups = config.mamba_n_groups
        self.chunk_size = config.mamba_chunk_size
        self.conv_kernel_size = config.mamba_d_conv
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.state_size

        projection_size = self.intermediate_size + self.conv_dim + self.num_heads
        self.in_proj = nn.Linear(config.hidden_size, projection_size, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim,
            kernel_size=self.conv_kernel_size,
            groups=self.conv_dim,
            padding=self.conv_kernel_size - 1,
            bias=config.mamba_conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = Zamba2RMSNormGated(
            self.intermediate_size, group_size=self.intermediate_size // self.n_groups, eps=1e-5
        )
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.mamba_proj_bias)

    @torch.no_grad()
    def reset_parameters(self, output_std: float) -> None:
        """
        Mamba-2's own initialisation: A uniform in [1, 16], the time step log-uniform in [0.001, 0.1] (through the
        inverse of softplus), and a normal `out_proj` of this standard deviation.
        """
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        dt = dt.clamp(min=1e-4)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))
        init.ones_(self.D)
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        init.normal_(self.out_proj.weight, std=output_std)

    def use_kernels(self, device: torch.device) -> bool:
        """Whether tokens on `device` go through the CUDA kernels."""
        return device.type == "cuda" and _gated_rms_norm is not None

    def max_tokens(self, device: torch.device) -> int:
        """
        The most tokens to run at once on `device`, a multiple of the chunk size. The Triton kernels index in 32 bits,
        which `num_tokens * projection_size` must stay well within; the PyTorch scan holds up to `chunk_size *
        num_heads * state_size` numbers a token, which the limit keeps to half a gigabyte.
        """
        if self.use_kernels(device):
            tokens, chunk_size = 2**29 // self.in_proj.out_features, self.chunk_size
        else:
            chunk_size = self._fallback_chunk_size
            tokens = 2**27 // (chunk_size * self.num_heads * self.state_size)
        return max(1, tokens // chunk_size) * chunk_size

    @property
    def _fallback_chunk_size(self) -> int:
        # The PyTorch scan's work grows with the chunk, which changes no result.
        return min(self.chunk_size, 64)

    @force_accelerate_hooks(["conv1d", "norm"])  # their weights are read past their forward
    def forward(
        self, hidden_states: torch.Tensor, lengths: list[int], state: MambaState | None = None
    ) -> tuple[torch.Tensor, MambaState]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`):
                The tokens of one or several sequences, one behind the other; at most `max_tokens` of them.
            lengths (`list[int]`): Length of each sequence; together `num_tokens`.
            state ([`MambaState`], *optional*): Where the first sequence left off, if it has begun before.

        Returns:
            `tuple[torch.Tensor, MambaState]`: The mixed tokens, of the same shape, and the state behind the last one.
        """
        gate, conv_inputs, dt = self._project(hidden_states)
        if self.use_kernels(hidden_states.device):
            outputs, state = self._scan(conv_inputs, dt, state, lengths)
            outputs = _gated_rms_norm(
                outputs,
                self.norm.weight,
                None,
                z=gate,
                eps=self.norm.variance_epsilon,
                group_size=self.norm.group_size,
                norm_before_gate=False,
            )
        else:
            # The PyTorch functions know no sequence boundaries: one sequence after the other.
            outputs = []
            for piece in zip(conv_inputs.split(lengths, dim=1), dt.split(lengths, dim=1)):
                output, last_state = self._scan(*piece, state, [piece[1].shape[1]])
                outputs.append(output)
                state = None
            outputs, state = self.norm(torch.cat(outputs, dim=1), gate), last_state
        return self.out_proj(outputs), state

    def conv_inputs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The inputs of the convolution, `(1, num_tokens, conv_dim)`, of `(1, num_tokens, hidden_size)`."""
        return self._project(hidden_states)[1]

    @force_accelerate_hooks(["conv1d"])
    def summarize(self, hidden_states: torch.Tensor, state: MambaState) -> tuple[MambaState, torch.Tensor]:
        """
        What one sequence of `(1, num_tokens, hidden_size)` makes of a state, without its outputs.

        Returns:
            `tuple[MambaState, torch.Tensor]`: The state behind the last token, and the logarithm of the part of the
            recurrent state in front that is left in it, float32 of shape `(num_heads,)`.
        """
        _, conv_inputs, dt = self._project(hidden_states)
        _, state = self._scan(conv_inputs, dt, state, [dt.shape[1]])
        time = nn.functional.softplus(dt.float() + self.dt_bias.float()).sum(dim=(0, 1))
        return state, -torch.exp(self.A_log.float()) * time

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gate, the inputs of the convolution, and the time steps before their bias."""
        return self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

    def _scan(
        self, conv_inputs: torch.Tensor, dt: torch.Tensor, state: MambaState | None, lengths: list[int]
    ) -> tuple[torch.Tensor, MambaState]:
        """The convolution and the state space recurrence over `(1, num_tokens, conv_dim)`."""
        device = conv_inputs.device
        scan, chunk_size = mamba2_chunk_scan, self.chunk_size
        if not self.use_kernels(device):
            scan, chunk_size = inspect.unwrap(scan), self._fallback_chunk_size
        seq_idx = None
        if len(lengths) > 1:
            seq_idx = torch.repeat_interleave(
                torch.arange(len(lengths), device=device, dtype=torch.int32),
                torch.tensor(lengths, device=device),
                output_size=conv_inputs.shape[1],
            )[None]
        history = None if state is None else state.conv
        hidden_states = self._convolve(conv_inputs, history, seq_idx)
        num_kept = min(self.conv_kernel_size - 1, lengths[-1])
        conv_state = conv_inputs[:, conv_inputs.shape[1] - num_kept :]
        if (num_missing := self.conv_kernel_size - 1 - num_kept) > 0:
            if history is None or seq_idx is not None:
                history = conv_state.new_zeros(1, num_missing, self.conv_dim)
            conv_state = torch.cat([history[:, -num_missing:], conv_state], dim=1)

        groups_size = self.n_groups * self.state_size
        hidden_states, B, C = hidden_states.split([self.intermediate_size, groups_size, groups_size], dim=-1)
        outputs, ssm_state = scan(
            hidden_states.unflatten(-1, (self.num_heads, self.head_dim)),
            dt.float(),
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, self.state_size)),
            C.unflatten(-1, (self.n_groups, self.state_size)),
            chunk_size=chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=None if state is None else state.ssm,
            return_final_states=True,
            seq_idx=seq_idx,
        )
        return outputs.flatten(2).to(conv_inputs.dtype), MambaState(conv_state.clone(), ssm_state.clone())

    def _convolve(
        self, conv_inputs: torch.Tensor, history: torch.Tensor | None, seq_idx: torch.Tensor | None
    ) -> torch.Tensor:
        """The convolution of `(1, num_tokens, conv_dim)` behind the last inputs of an earlier call, if any."""
        num_tokens = conv_inputs.shape[1]
        use_kernels = self.use_kernels(conv_inputs.device)
        # Transformers prefers an installed kernel even for tensors that are not on its device.
        convolve = causal_conv1d_fn if use_kernels else inspect.unwrap(causal_conv1d_fn)
        if use_kernels and conv_inputs.stride(1) % 8:  # it reads 8 channels at once
            conv_inputs = conv_inputs.clone(memory_format=torch.contiguous_format)
        initial_states = None
        if history is not None and use_kernels and seq_idx is None:
            initial_states = history.transpose(1, 2)
        elif history is not None:
            conv_inputs = torch.cat([history, conv_inputs], dim=1)
            seq_idx = None if seq_idx is None else nn.functional.pad(seq_idx, (history.shape[1], 0))
        outputs = convolve(
            conv_inputs.transpose(1, 2),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            seq_idx=seq_idx,
            initial_states=initial_states,
        )
        # From 0 on a slice is the tensor itself; from the end on its gradient would be copied, twice transposed.
        return outputs[..., outputs.shape[-1] - num_tokens :].transpose(1, 2)


class VambaVisionMixer(nn.Module):
    """The video's half of a decoder layer: `video_states + mixer(norm(video_states))`."""

    def __init__(self, config: VambaTextConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-5)
        self.mixer = VambaMixer(config)

    def forward(
        self,
        video_states: torch.Tensor,
        lengths: list[int],
        state: MambaState | None = None,
        checkpoint: Callable | None = None,
    ) -> tuple[torch.Tensor, MambaState | None]:
        """
        Runs any number of tokens, in stretches that hand on their state.

        Args:
            video_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`): Sequences one behind the other.
            lengths (`list[int]`): Length of each sequence; together `num_tokens`.
            state ([`MambaState`], *optional*): Where the first sequence left off, if it has begun before.
            checkpoint (`Callable`, *optional*): Runs a stretch and computes it again in the backward pass.
        """
        stretches = list(split_into_stretches(lengths, self._max_tokens(video_states.device, checkpoint)))
        outputs = []
        for residual, (stretch, is_continued) in zip(
            video_states.split([sum(stretch) for stretch, _ in stretches], dim=1), stretches
        ):
            run = partial(self._mix, stretch)
            states = (residual, *(state or ()))
            output, *last_state = run(*states) if checkpoint is None else checkpoint(run, *states)
            outputs.append(output)
            state = MambaState(*last_state) if is_continued else None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), MambaState(*last_state)

    def summarize(
        self, video_states: torch.Tensor, state: MambaState, checkpoint: Callable | None = None
    ) -> tuple[MambaState, torch.Tensor]:
        """As [`VambaMixer.summarize`], of any number of tokens."""
        log_decays = []
        for stretch in video_states.split(self._max_tokens(video_states.device, checkpoint), dim=1):
            run = self._summarize if checkpoint is None else partial(checkpoint, self._summarize)
            *state, log_decay = run(stretch, *state)
            log_decays.append(log_decay)
        return MambaState(*state), sum(log_decays)

    def _max_tokens(self, device: torch.device, checkpoint: Callable | None) -> int:
        """The most tokens of a stretch."""
        max_tokens = self.mixer.max_tokens(device)
        return max_tokens if checkpoint is None else min(max_tokens, MAX_TOKENS_PER_PART)

    def _summarize(self, video_states: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, log_decay = self.mixer.summarize(self.norm(video_states), MambaState(*state))
        return *state, log_decay

    def _mix(self, lengths: list[int], residual: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens of a stretch and the two tensors of the state behind it."""
        hidden_states, last_state = self.mixer(self.norm(residual), lengths, MambaState(*state) if state else None)
        return residual + hidden_states, *last_state


def split_into_stretches(lengths: list[int], max_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """
    Groups consecutive sequences into stretches of at most `max_tokens` tokens, and cuts a sequence that is longer than
    what is left of a stretch. Yields the lengths in each stretch, and whether its last sequence goes on in the next.
    """
    stretch = []
    room = max_tokens
    for length in lengths:
        while length > room:
            yield stretch + [room], True
            length -= room
            stretch, room = [], max_tokens
        stretch.append(length)
        room -= length
        if room == 0:
            yield stretch, False
            stretch, room = [], max_tokens
    if stretch:
        yield stretch, False
