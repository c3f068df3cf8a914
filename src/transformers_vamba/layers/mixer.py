# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 mixer that updates the video tokens, over any number of them."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations import use_kernel_forward_from_hub
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from ..configuration_vamba import VambaTextConfig
from ..ops.branch import can_fuse_branch, close_branch, has_hooks, open_branch
from ..ops.convolution import convolve
from ..ops.float8 import Rows, apply_linear, round_gated_norm, round_rows, takes_rows
from ..ops.gated_norm import can_normalize, gated_rms_norm
from ..ops.scan import choose_implementation, max_tokens, scan
from ..ops.state import MambaState
from ..parallel.gradient_checkpointing import MAX_TOKENS_PER_PART


class VambaRMSNormGated(Zamba2RMSNormGated):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Of `(1, num_tokens, num_channels)`, by one kernel on a GPU."""
        if not can_normalize(hidden_states, self.group_size):
            return super().forward(hidden_states, gate)
        return gated_rms_norm(hidden_states[0], gate[0], self.weight, self.group_size, self.variance_epsilon)[None]


@use_kernel_forward_from_hub("mamba_chunk_scan_combined")
class VambaHubScan(nn.Module):
    """
    Where `use_kernels=True` puts the Hub's scan, instead of a `forward` that does nothing.
    [`VambaPreTrainedModel.set_use_kernels`] then notes the type of device that the kernel is for.
    """

    device_type: str | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs,
    ):
        """The arguments of Transformers' `mamba2_chunk_scan`, with which those of a kernel are compared."""
        raise NotImplementedError("No kernel from the Hub has been put here: load the model with `use_kernels=True`.")

    def on(self, device: torch.device) -> Callable | None:
        """The Hub's scan, if there is one for this device."""
        is_there = isinstance(self.forward, MethodType) and self.forward.__func__ is not type(self).forward
        return self.forward if is_there and device.type == self.device_type else None


class VambaMixer(nn.Module):
    """
    The Mamba-2 mixer ([Dao and Gu, 2024](https://huggingface.co/papers/2405.21060)).

    Unlike Transformers' own block it starts from and returns a [`MambaState`], and never takes the fused kernel that
    reads `out_proj.weight` itself: the projections are called as modules, as adapters and quantised layers need.
    """

    def __init__(self, config: VambaTextConfig):
        super().__init__()
        self.config = config
        self.intermediate_size = config.mamba_expand * config.hidden_size
        self.num_heads = self.intermediate_size // config.mamba_d_head
        self.head_dim = config.mamba_d_head
        self.state_size = config.mamba_d_state
        self.n_groups = config.mamba_n_groups
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
        self.norm = VambaRMSNormGated(
            self.intermediate_size, group_size=self.intermediate_size // self.n_groups, eps=1e-5
        )
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.mamba_proj_bias)
        self.hub_scan = VambaHubScan()

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

    def max_tokens(self, device: torch.device) -> int:
        """The most tokens to run at once on `device`."""
        sizes = (self.head_dim, self.state_size)
        name = self._implementation(device)
        # The Hub's kernels are those of `mamba-ssm`.
        name = "mamba_ssm" if callable(name) else choose_implementation(device, self.A_log.dtype, *sizes, name)
        return max_tokens(name, self.num_heads, *sizes, self.in_proj.out_features)

    def _implementation(self, device: torch.device) -> str | Callable | None:
        """What the user asks for by name, else the Hub's scan, else `None` for the fastest here."""
        return self.config.mamba_implementation or self.hub_scan.on(device)

    def forward(
        self,
        hidden_states: torch.Tensor | Rows,
        lengths: list[int],
        state: MambaState | None = None,
        total: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MambaState]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`, or [`Rows`] like it):
                The tokens of one or several sequences, one after another; at most `max_tokens` of them.
            lengths (`list[int]`): Length of each sequence; together `num_tokens`.
            state ([`MambaState`], *optional*): Where the first sequence left off, if it has begun before.
            total (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`, *optional*):
                What the mixed tokens are added to, see [`ops.branch`].

        Returns:
            `tuple[torch.Tensor, MambaState]`: The mixed tokens, of the same shape, and the state after the last one.
        """
        gate, conv_inputs, dt = self._project(hidden_states)
        outputs, state = self._scan(conv_inputs, dt, state, lengths)
        if self.n_groups == 1 and takes_rows(self.out_proj, outputs, self.norm):
            return apply_linear(self.out_proj, round_gated_norm(outputs, gate, self.norm)), state
        outputs = self.norm(outputs, gate)
        return self.out_proj(outputs) if total is None else close_branch(total, outputs, self.out_proj), state

    def conv_inputs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The inputs of the convolution, `(1, num_tokens, conv_dim)`, of `(1, num_tokens, hidden_size)`."""
        return self._project(hidden_states)[1]

    def summarize(self, hidden_states: torch.Tensor, state: MambaState) -> tuple[MambaState, torch.Tensor]:
        """
        What one sequence of `(1, num_tokens, hidden_size)` makes of a state, without its outputs.

        Returns:
            `tuple[MambaState, torch.Tensor]`: The state after the last token, and the logarithm of the part of the
            recurrent state before the first that is left in it, float32 of shape `(num_heads,)`.
        """
        _, conv_inputs, dt = self._project(hidden_states)
        _, state = self._scan(conv_inputs, dt, state, [dt.shape[1]])
        time = nn.functional.softplus(dt.float() + self.dt_bias.float()).sum(dim=(0, 1))
        return state, -torch.exp(self.A_log.float()) * time

    def _project(self, hidden_states: torch.Tensor | Rows) -> tuple[torch.Tensor, ...]:
        """The gate, the inputs of the convolution, and the time steps before their bias."""
        projected = apply_linear(self.in_proj, hidden_states)
        return projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)

    @force_accelerate_hooks(["conv1d"])  # its weight is read past its forward
    def _scan(
        self, conv_inputs: torch.Tensor, dt: torch.Tensor, state: MambaState | None, lengths: list[int]
    ) -> tuple[torch.Tensor, MambaState]:
        """The convolution and the recurrence over `(1, num_tokens, conv_dim)`."""
        history, ssm = (None, None) if state is None else (state.conv[0], state.ssm[0])
        convolved = convolve(conv_inputs[0], self.conv1d.weight.squeeze(1), self.conv1d.bias, lengths, history)
        groups_size = self.n_groups * self.state_size
        x, B, C = convolved.split([self.intermediate_size, groups_size, groups_size], dim=-1)
        outputs, ssm = scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt[0],
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, self.state_size)),
            C.unflatten(-1, (self.n_groups, self.state_size)),
            self.D,
            self.dt_bias,
            lengths,
            ssm,
            self._implementation(dt.device),
        )
        return outputs.flatten(1)[None], MambaState(self._conv_state(conv_inputs, history, lengths), ssm[None])

    def _conv_state(self, conv_inputs: torch.Tensor, history: torch.Tensor | None, lengths: list[int]) -> torch.Tensor:
        """The last inputs of the last sequence, `(1, conv_kernel_size - 1, conv_dim)`, with zeros before it."""
        num_kept = self.conv_kernel_size - 1
        last = conv_inputs[:, max(0, conv_inputs.shape[1] - min(num_kept, lengths[-1])) :]
        if (num_missing := num_kept - last.shape[1]) == 0:
            return last.clone()
        if history is None or len(lengths) > 1:
            history = last.new_zeros(num_kept, self.conv_dim)
        return torch.cat([history[None, num_kept - num_missing :], last], dim=1)


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
            video_states (`torch.Tensor` of shape `(1, num_tokens, hidden_size)`): Sequences, one after another.
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
        return MambaState(*state), torch.stack(log_decays).sum(0)

    def _max_tokens(self, device: torch.device, checkpoint: Callable | None) -> int:
        """The most tokens of a stretch."""
        max_tokens = self.mixer.max_tokens(device)
        return max_tokens if checkpoint is None else min(max_tokens, MAX_TOKENS_PER_PART)

    def _summarize(self, video_states: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, log_decay = self.mixer.summarize(self.norm(video_states), MambaState(*state))
        return *state, log_decay

    def _mix(self, lengths: list[int], residual: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens of a stretch and the two tensors of the state after it."""
        first_state = MambaState(*state) if state else None
        if can_fuse_branch(residual, self.mixer, self.norm, self.mixer.out_proj):
            normed, total = open_branch(residual, self.norm, self.mixer.out_proj)
            hidden_states, last_state = self.mixer(normed, lengths, first_state, total)
            return hidden_states, *last_state
        is_rounded = not has_hooks(self.mixer) and takes_rows(self.mixer.in_proj, residual, self.norm)
        normed = round_rows(residual, self.norm) if is_rounded else self.norm(residual)
        hidden_states, last_state = self.mixer(normed, lengths, first_state)
        return residual + hidden_states, *last_state


def split_into_stretches(lengths: list[int], max_tokens: int) -> Iterator[tuple[list[int], bool]]:
    """
    Groups consecutive sequences into stretches of at most `max_tokens` tokens, and cuts a sequence that is longer than
    what is left of a stretch. Yields the lengths in each stretch, and whether its last sequence goes on in the next.
    """
    stretch: list[int] = []
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
