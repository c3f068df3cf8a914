# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 mixer against a recurrence in float64, one token after the other."""

import pytest
import torch
from reference_vamba import reference_mixer
from tiny_vamba import make_block

from transformers_vamba import VambaTextConfig
from transformers_vamba.layers.mixer import VambaVisionMixer, split_into_stretches
from transformers_vamba.ops.scan import CHUNK_SIZE


# Lengths of the sequences, and the most tokens that run at once.
LAYOUTS = [
    ([50], None),
    ([50], 16),
    ([1], None),
    ([2, 3, 1], None),
    ([7, 30, 1, 12], None),
    ([7, 30, 1, 12], 16),
    ([16, 16], 16),
    ([17, 2, 40], 18),
]


def check_against_reference(block, lengths, max_tokens, tolerance, monkeypatch):
    device, dtype = block.norm.weight.device, block.norm.weight.dtype
    if max_tokens is not None:
        monkeypatch.setattr(type(block.mixer), "max_tokens", lambda self, device: max_tokens)
    video_states = torch.randn(1, sum(lengths), 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.no_grad():
        mixed, _ = block(video_states, lengths)
        expected = torch.cat([reference_mixer(block, states) for states in video_states[0].split(lengths)])
    error = (mixed[0].cpu().double() - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("lengths, max_tokens", LAYOUTS)
@pytest.mark.parametrize("groups", (1, 2))
def test_matches_the_recurrence(lengths, max_tokens, groups, monkeypatch):
    check_against_reference(make_block(mamba_n_groups=groups), lengths, max_tokens, 1e-6, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths, max_tokens", LAYOUTS + [([700], None), ([700, 300, 1], 256)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-3), (torch.bfloat16, 1e-2)])
def test_kernels_match_the_recurrence(lengths, max_tokens, dtype, tolerance, monkeypatch):
    check_against_reference(make_block("cuda", dtype), lengths, max_tokens, tolerance, monkeypatch)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 50], [20], [49], list(range(1, 50))])
def test_state_hands_on(cuts):
    """A sequence in pieces, each going on from the state behind the one before."""
    block = make_block()
    video_states = torch.randn(1, 50, 64)
    with torch.no_grad():
        expected, expected_state = block(video_states, [50])
        state, pieces = None, []
        for piece in video_states.tensor_split(cuts, dim=1):
            if piece.shape[1]:
                mixed, state = block(piece, [piece.shape[1]], state)
                pieces.append(mixed)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(state, expected_state, atol=3e-5, rtol=1e-4)


def test_gradient_is_the_same_in_stretches(monkeypatch):
    block = make_block()
    video_states = torch.randn(1, 60, 64)

    def gradients():
        block.zero_grad()
        block(video_states, [25, 35])[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in block.parameters()]

    whole = gradients()
    monkeypatch.setattr(type(block.mixer), "max_tokens", lambda self, device: 16)
    torch.testing.assert_close(gradients(), whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lengths, max_tokens", [(lengths, limit or 100) for lengths, limit in LAYOUTS])
def test_split_into_stretches(lengths, max_tokens):
    pieces = []
    continued = False
    for stretch, is_continued in split_into_stretches(lengths, max_tokens):
        assert 0 < sum(stretch) <= max_tokens and min(stretch) > 0
        if continued:
            pieces[-1] += stretch.pop(0)
        pieces += stretch
        continued = is_continued
    assert pieces == lengths and not continued


def test_projections_are_called_as_modules():
    """An adapter replaces the projections, so nothing may read their weights past them."""
    block = make_block().train()
    calls = []
    for name in ("in_proj", "out_proj"):
        getattr(block.mixer, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    block(torch.randn(1, 8, 64), [8])
    assert calls == ["in_proj", "out_proj"]


def test_full_size_scan_fits_in_memory():
    """The PyTorch scan of the 7B shapes, in stretches whose tensors stay near half a gigabyte."""
    with torch.device("meta"):
        mixer = VambaVisionMixer(VambaTextConfig()).mixer
    tokens = mixer.max_tokens(torch.device("cpu"))
    states = tokens // CHUNK_SIZE * mixer.num_heads * mixer.head_dim * mixer.state_size
    assert 1024 <= tokens and (2 * tokens * CHUNK_SIZE * mixer.num_heads + states) * 4 <= 2**29


def test_autocast_leaves_the_scan_alone():
    """Under autocast the projections are in bfloat16, and the scan's products in float32 as without it."""
    block = make_block()
    conv_inputs, dt = torch.randn(1, 40, block.mixer.conv_dim), torch.randn(1, 40, block.mixer.num_heads)
    with torch.no_grad():
        expected, _ = block.mixer._scan(conv_inputs, dt, None, [40])
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = block.mixer._scan(conv_inputs, dt, None, [40])
    torch.testing.assert_close(found, expected)
