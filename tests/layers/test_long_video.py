# SPDX-License-Identifier: Apache-2.0
"""A million video tokens: one mixer layer of the 7B shapes against a recurrence in float64, at sampled positions."""

import copy
import math
import random
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest
import torch
from reference_vamba import reference_mixer
from tiny_vamba import tiny_config
from torch.nn.functional import silu, softplus
from transformers.utils import is_mamba_2_ssm_available

from transformers_vamba import VambaTextConfig
from transformers_vamba.layers.mixer import VambaVisionMixer


TOKENS_OF_THREE_HOURS = 10_800 // 2 * 299  # at one frame a second, 640x360


def make_layer(config: VambaTextConfig, device: str, dtype: torch.dtype) -> VambaVisionMixer:
    """
    A mixer as initialised for training, save that every eighth head decays some thousand times more slowly: it
    remembers up to a million tokens, so a state that were lost on the way, or wrong, would show long after.
    """
    torch.manual_seed(0)
    with torch.device(device):
        layer = VambaVisionMixer(config)
        mixer = layer.mixer
        time_step = torch.empty(mixer.num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        decay = torch.empty(mixer.num_heads).uniform_(1, 16)
        time_step[::8] /= 30
        decay[::8] /= 30
        with torch.no_grad():
            mixer.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))
            mixer.A_log.copy_(decay.log())
            for weight in (mixer.D, mixer.norm.weight, layer.norm.weight):
                torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    return layer.to(dtype)


@torch.no_grad()
def reference_at(
    layer: VambaVisionMixer, video_states: torch.Tensor, positions: list[int], max_piece: int = 8192
) -> torch.Tensor:
    """
    `mixer(norm(v))` of the tokens at the given positions, in ascending order, of one sequence
    `(num_tokens, hidden_size)`: all of it in float64, `(len(positions), hidden_size)`.

    The state after n tokens is the sum of what each has put in, decayed since. It is carried from one piece of the
    sequence to the next; a piece ends at a position, where the output is read off the state, or after `max_piece`
    tokens.
    """
    layer = copy.deepcopy(layer).double()
    mixer, groups = layer.mixer, (layer.mixer.n_groups, -1)
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    groups_size = mixer.n_groups * mixer.state_size
    taps = mixer.conv1d.weight[:, 0].unbind(-1)
    A = -mixer.A_log.exp()

    state = video_states.new_zeros((mixer.num_heads, mixer.head_dim, mixer.state_size), dtype=torch.float64)
    last_inputs = video_states.new_zeros((len(taps) - 1, mixer.conv_dim), dtype=torch.float64)
    outputs = []
    start = 0
    for position in positions:
        while start <= position:
            end = min(start + max_piece, position + 1)
            normed = video_states[start:end].double()
            normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
            gate, conv_inputs, dt = mixer.in_proj(normed).split(sizes, -1)
            conv_inputs = torch.cat([last_inputs, conv_inputs])
            last_inputs = conv_inputs[-len(last_inputs) :]
            convolved = sum(conv_inputs[i : i + end - start] * tap for i, tap in enumerate(taps))
            x, B, C = silu(convolved + mixer.conv1d.bias).tensor_split([mixer.intermediate_size, -groups_size], -1)
            x, B = x.unflatten(-1, (mixer.num_heads, mixer.head_dim)), B.unflatten(-1, groups)
            dt = softplus(dt + mixer.dt_bias)
            log_decay = (dt * A).cumsum(0)
            added = x * (dt * (log_decay[-1] - log_decay).exp())[..., None]
            added = torch.einsum("tghp,tgn->ghpn", added.unflatten(1, groups), B).flatten(0, 1)
            state = state * log_decay[-1].exp()[:, None, None] + added
            start = end
        C = C[-1].view(groups).repeat_interleave(mixer.num_heads // mixer.n_groups, 0)
        y = torch.einsum("hpn,hn->hp", state, C) + mixer.D[:, None] * x[-1]
        y = (y.flatten() * silu(gate[-1])).view(groups)
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten() * mixer.norm.weight
        outputs.append(mixer.out_proj(y))
    return torch.stack(outputs)


def errors_at(mixed: torch.Tensor, video_states: torch.Tensor, expected: torch.Tensor, positions: list[int]):
    """Relative error of what the mixer has added to the tokens, at each position."""
    added = (mixed[0, positions].double() - video_states[0, positions].double()).to(expected.device)
    return (added - expected).norm(dim=-1) / expected.norm(dim=-1)


def sample_positions(num_tokens: int, boundaries: list[int], num_samples: int) -> list[int]:
    """The ends, both sides of each boundary, and random positions, in ascending order."""
    near = {0, num_tokens - 1, *(edge + side for edge in boundaries for side in (-1, 0))}
    return sorted(near & set(range(num_tokens)) | set(random.Random(0).sample(range(num_tokens), num_samples)))


def test_reference_is_the_recurrence():
    layer = make_layer(tiny_config().text_config, "cpu", torch.float32)
    video_states = torch.randn(50, 64)
    with torch.no_grad():
        expected = reference_mixer(layer, video_states) - video_states
    for positions, max_piece in ((list(range(50)), 8), ([0, 7, 8, 31, 49], 8), ([49], 100), ([3, 40], 1)):
        found = reference_at(layer, video_states, positions, max_piece)
        torch.testing.assert_close(found, expected[positions], atol=1e-7, rtol=1e-7)


def test_long_sequence_in_stretches(monkeypatch):
    """The check below at a small size, and that it sees a state which is lost on the way."""
    layer = make_layer(tiny_config().text_config, "cpu", torch.float32)
    monkeypatch.setattr(type(layer.mixer), "max_tokens", lambda self, device: 64)
    video_states = 0.1 * torch.randn(1, 1000, 64)
    positions = sample_positions(1000, [64, 512], num_samples=20)
    expected = reference_at(layer, video_states[0], positions, max_piece=100)
    with torch.no_grad():
        mixed, _ = layer(video_states, [1000])
        forgetful, _ = layer(video_states, [512, 488])
    assert errors_at(mixed, video_states, expected, positions).max() < 1e-5
    errors = errors_at(forgetful, video_states, expected, positions)
    late = torch.tensor(positions) >= 512
    assert errors[~late].max() < 1e-5
    assert errors[late].min() > 1e-4


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("implementation", ("triton", "mamba_ssm"))
@pytest.mark.parametrize("num_tokens", (300_000, 1_000_000, TOKENS_OF_THREE_HOURS))
def test_long_sequence_on_the_kernels(num_tokens, implementation):
    """
    In bfloat16, with every projection, convolution, scan and norm of the layer, through `in_proj` rows of 14,704
    numbers. The float64 side takes the same bfloat16 weights and tokens, so the error is that of the arithmetic alone.
    """
    if implementation == "mamba_ssm":
        skip_without_mamba_ssm()
    layer = make_layer(VambaTextConfig(mamba_implementation=implementation), "cuda", torch.bfloat16)
    # Small tokens: the residual that they are does not round away what the mixer adds.
    video_states = torch.empty(1, num_tokens, 3584, device="cuda", dtype=torch.bfloat16).normal_(std=0.1)
    stretch = layer.mixer.max_tokens(video_states.device)
    boundaries = [stretch, num_tokens // stretch * stretch, 2**31 // layer.mixer.in_proj.out_features]
    positions = sample_positions(num_tokens, boundaries, num_samples=48)
    with torch.no_grad():
        mixed, _ = layer(video_states, [num_tokens])
    assert all(piece.isfinite().all() for piece in mixed.split(2**16, dim=1))
    errors = errors_at(mixed, video_states, reference_at(layer, video_states[0], positions), positions)
    print(
        f"{num_tokens} tokens, {len(positions)} positions: relative error {errors.mean():.1e}, largest "
        f"{errors.max():.1e}, of the last ten {errors[-10:].mean():.1e}"
    )
    assert errors.max() < 2e-2


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_one_call_beyond_32_bits(monkeypatch):
    """300,000 tokens at once, in rows of 14,704 numbers (4.4e9 together), give what stretches give."""
    layer = make_layer(VambaTextConfig(), "cuda", torch.bfloat16)
    video_states = torch.empty(1, 300_000, 3584, device="cuda", dtype=torch.bfloat16).normal_(std=0.1)
    with torch.no_grad():
        expected, _ = layer(video_states, [300_000])
        monkeypatch.setattr(type(layer.mixer), "max_tokens", lambda self, device: 300_000)
        mixed, _ = layer(video_states, [300_000])
    for found, right in zip(mixed.split(2**15, dim=1), expected.split(2**15, dim=1)):
        assert ((found - right).float().norm() / right.float().norm()) < 1e-3


def skip_without_mamba_ssm() -> None:
    if not is_mamba_2_ssm_available():
        pytest.skip("mamba-ssm is not installed")


def compare_scans(num_tokens: int, stretch: int = 32768) -> float:
    """
    Largest relative error, over stretches, of one call of the public kernel for all tokens against a call a stretch;
    infinite where it crashes. It reads the tokens in the rows, 14,704 numbers wide, that `in_proj` gives.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    mixer = make_layer(VambaTextConfig(), "cuda", torch.bfloat16).mixer
    rows = torch.empty(1, num_tokens, mixer.in_proj.out_features, device="cuda", dtype=torch.bfloat16).normal_()
    sizes = [mixer.intermediate_size, mixer.intermediate_size, mixer.state_size, mixer.state_size, mixer.num_heads]
    _, x, B, C, dt = rows.split(sizes, dim=-1)
    x, B, C = x.unflatten(-1, (mixer.num_heads, mixer.head_dim)), B.unsqueeze(2), C.unsqueeze(2)
    A = -mixer.A_log.float().exp()

    def scan(tokens: slice, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return mamba_chunk_scan_combined(
            x[:, tokens],
            dt[:, tokens],
            A,
            B[:, tokens],
            C[:, tokens],
            chunk_size=256,
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            initial_states=state,
            return_final_states=True,
        )

    largest, state = 0.0, None
    try:
        with torch.no_grad():
            whole, _ = scan(slice(0, num_tokens), None)
            for start in range(0, num_tokens, stretch):
                tokens = slice(start, min(start + stretch, num_tokens))
                expected, state = scan(tokens, state)
                error = (whole[:, tokens].float() - expected.float()).norm() / expected.float().norm()
                largest = max(largest, error.nan_to_num(math.inf).item())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as crash:
        print(str(crash).splitlines()[0])
        return math.inf
    return largest


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_public_kernel_needs_stretches():
    """
    Within 2^31 numbers one call for all tokens gives what stretches give; beyond, it crashes or is wrong, silently.
    A crash takes the CUDA context with it, hence the process of its own.
    """
    skip_without_mamba_ssm()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        within = pool.submit(compare_scans, 140_000).result()
        try:
            beyond = pool.submit(compare_scans, 200_000).result()
        except BrokenProcessPool:
            beyond = math.inf
    print(f"one call against stretches, relative error: {within:.1e} at 140,000 tokens, {beyond:.1e} at 200,000")
    assert within < 1e-2
    assert beyond > 0.1, "the public kernel has been mended: stretches may be as long as memory allows"
