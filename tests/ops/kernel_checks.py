# SPDX-License-Identifier: Apache-2.0
"""
What the Triton kernels give, and their gradients, against the definitions in float64: a scan, a convolution, a gated
norm, the tower's activation, rotations, branches of a residual stream, attention of few queries, what is read of each
time step, and parts of a decoding step.

As a program it checks the Triton kernels on a CPU, with Triton's interpreter: `TRITON_INTERPRET=1` must be set before
Triton is imported, hence a process of its own.
"""

import torch
from reference_vamba import reference_scan
from torch.nn.functional import conv1d, layer_norm, rms_norm, silu, softplus
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision

from transformers_vamba.ops import (
    activation,
    branch,
    convolution_kernels,
    flash_decoding,
    float8,
    gated_norm,
    gelu_linear,
    rotary,
    scan_kernels,
    step_kernels,
    triton_support,
)
from transformers_vamba.ops.activation import quick_gelu
from transformers_vamba.ops.branch import can_fuse_branch, close_branch, open_branch
from transformers_vamba.ops.convolution import convolve
from transformers_vamba.ops.flash_decoding import can_flash_decode, flash_decode
from transformers_vamba.ops.float8 import round_gated_norm, round_rows
from transformers_vamba.ops.gated_norm import gated_rms_norm
from transformers_vamba.ops.gelu_linear import quick_gelu_linear
from transformers_vamba.ops.quantized_attention import quantize
from transformers_vamba.ops.rotary import rotate_patches, rotate_text
from transformers_vamba.ops.scan import scan
from transformers_vamba.ops.step_kernels import can_fuse, gate_and_up, mix_and_norm
from transformers_vamba.ops.time_steps import log_weights_of_steps


# Lengths of the sequences, whether the first has begun before, and heads, head size, state size and groups.
SCANS = [
    ([1], True, (1, 16, 16, 1)),
    ([50], False, (4, 16, 16, 2)),
    ([128], True, (2, 16, 16, 1)),
    ([200], True, (2, 16, 32, 1)),
    ([7, 130, 1, 12], True, (4, 16, 32, 2)),
    ([70, 3], False, (6, 24, 20, 3)),
]
# Lengths, whether the first has begun before, channels, taps, and whether there is a bias.
CONVOLUTIONS = [
    ([50], False, 40, 4, True),
    ([150], True, 130, 4, True),
    ([1, 70, 2, 5], True, 72, 4, True),
    ([2, 3], True, 64, 3, False),
    ([5], False, 64, 1, True),
]
TOWERS = [(5, 2, 16), (3, 3, 40), (30, 16, 80)]  # patches, heads, head size
TEXTS = [(1, 1, 7, 16), (3, 5, 4, 24), (2, 30, 28, 128)]  # rows, tokens, heads, head size
# Heads, queries per head, tokens, head size, whether in 8 bits, and whether the tokens of a head lie apart.
DECODINGS = [
    (2, 3, 1, 16, False, False),
    (4, 7, 1000, 32, False, True),
    (2, 130, 200, 16, False, False),
    (4, 7, 1000, 32, True, True),
    (2, 130, 65, 16, True, False),
]
# Heads, queries per head, tokens of each time step, head size, whether in 8 bits, and whether tokens lie apart.
READINGS = [
    (2, 3, (1,), 16, False, False),
    (2, 130, (5, 0, 64, 65, 130, 0), 16, False, True),
    (4, 14, (200, 0, 1, 63), 32, True, True),
    (2, 129, (0, 7, 7, 100), 16, True, False),
]
STEPS = [(1, 1, 64, 96), (3, 1, 40, 200), (2, 8, 256, 70)]  # rows, tokens, hidden size, size of the MLP
# Rows, tokens, channels, channels within the branch, whether there is a LayerNorm, and whether the product has a bias.
BRANCHES = [(1, 7, 96, 40, True, True), (2, 3, 64, 130, False, False), (1, 5, 40, 16, True, False)]
ACTIVATED = [(37, 40, 72), (300, 64, 136)]  # rows, inputs, outputs
ROUNDINGS = [(7, 96), (3, 64), (30, 1280), (2, 7168)]  # tokens, channels
NORMS = [(20, 96, 48), (3, 64, 64), (600, 40, 40)]  # tokens, channels, channels per group


def has_capability(*capability: int) -> bool:
    """Whether there is a GPU of this generation or a later one: Ada (8, 9) has float8, Hopper (9, 0) tensor maps."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= capability


def worst(found: list[float]) -> float:
    """Of `scan_errors`. The gradients of A, D and dt_bias are sums over tokens that mostly cancel: a tenth counts."""
    return max(error / 10 if index in (4, 7, 8) else error for index, error in enumerate(found))


def errors(outputs, inputs, expected, expected_inputs) -> list[float]:
    """Relative errors of outputs, and of the gradients of inputs for the same random gradients of the outputs."""
    outputs, expected = list(outputs), list(expected)
    grads = [torch.randn_like(output, dtype=torch.float64) for output in expected]
    device = outputs[0].device
    found = torch.autograd.grad(outputs, inputs, [grad.to(output) for grad, output in zip(grads, outputs)])
    expected_grads = torch.autograd.grad(expected, expected_inputs, grads)
    pairs = zip([*outputs, *found], [*expected, *expected_grads])
    return [((y.double() - x.to(device)).norm() / x.norm().clamp(min=1e-9)).item() for y, x in pairs]


def draw(tensors, device, dtypes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors with a gradient, as they are to be checked and, rounded like these, in float64 on the CPU."""
    rounded = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes)]
    ours = [tensor.detach().to(device).requires_grad_() for tensor in rounded]
    return ours, [tensor.detach().double().requires_grad_() for tensor in rounded]


def scan_errors(lengths, has_state, sizes, device="cpu", dtype=torch.float32, implementation=None) -> list[float]:
    """Of y, the last state, x, dt, A, B, C, D, dt_bias and the first state."""
    torch.manual_seed(0)
    (num_heads, head_dim, state_size, num_groups), num_tokens = sizes, sum(lengths)
    groups_size = num_groups * state_size
    # As the mixer has them: x, B and C lie in rows of one tensor, with room between them.
    widths = [num_heads * head_dim, groups_size, groups_size, num_heads + 3]
    x, B, C, dt = torch.randn(num_tokens, sum(widths)).split(widths, dim=-1)
    tensors = [x.unflatten(-1, (num_heads, head_dim)), dt[:, :num_heads] - 2, -torch.rand(num_heads) * 3 - 0.1]
    tensors += [y.unflatten(-1, (num_groups, state_size)) for y in (B, C)]
    tensors += [torch.randn(num_heads), 0.3 * torch.randn(num_heads)]
    full = torch.promote_types(dtype, torch.float32)
    dtypes = [dtype, dtype, full, dtype, dtype, dtype, dtype]
    if has_state:
        tensors.append(torch.randn(num_heads, head_dim, state_size))
        dtypes.append(full)
    ours, inputs = draw(tensors, device, dtypes)
    outputs = scan(*ours[:7], lengths, *(ours[7:] or [None]), implementation)

    x, dt, A, B, C, D, dt_bias, *state = inputs
    dt = softplus(dt + dt_bias)
    pieces = []
    for piece in zip(*(y.split(lengths) for y in (x, dt, B, C))):
        x_piece, dt_piece, B_piece, C_piece = piece
        y, last_state = reference_scan(x_piece, dt_piece, A, B_piece, C_piece, D, *state)
        pieces.append(y)
        state = []
    return errors(outputs, ours, (torch.cat(pieces), last_state), inputs)


def convolution_errors(
    lengths, has_history, num_channels, num_taps, has_bias, device="cpu", dtype=torch.float32
) -> list[float]:
    torch.manual_seed(0)
    rows = torch.randn(sum(lengths), num_channels + 8)[:, :num_channels]
    tensors = [rows, torch.randn(num_channels, num_taps), torch.randn(num_channels)][: 3 if has_bias else 2]
    tensors += [torch.randn(num_taps - 1, num_channels)] * has_history
    ours, inputs = draw(tensors, device, [dtype] * len(tensors))

    def arguments(tensors):
        rest = list(tensors[2:])
        return *tensors[:2], rest.pop(0) if has_bias else None, rest.pop() if has_history else None

    inputs_, weight, bias, history = arguments(ours)
    outputs = convolve(inputs_, weight, bias, lengths, history)
    rows, weight, bias, history = arguments(inputs)
    pieces = []
    for piece in rows.split(lengths):
        before = rows.new_zeros(num_taps - 1, num_channels) if history is None else history
        pieces.append(conv1d(torch.cat([before, piece]).T, weight[:, None], bias, groups=num_channels).T)
        history = None
    return errors([outputs], ours, [silu(torch.cat(pieces))], inputs)


def norm_errors(num_tokens, num_channels, group_size, device="cpu", dtype=torch.float32) -> list[float]:
    torch.manual_seed(0)
    gate = torch.randn(num_tokens, 2 * num_channels)[:, :num_channels]
    ours, inputs = draw([torch.randn(num_tokens, num_channels), gate, torch.randn(num_channels)], device, [dtype] * 3)
    outputs = gated_rms_norm(*ours, group_size, 1e-5)
    states, gate, weight = inputs
    gated = (states * silu(gate)).unflatten(-1, (-1, group_size))
    expected = (gated * torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten(1) * weight
    return errors([outputs], ours, [expected], inputs)


def tower_errors(num_patches, num_heads, head_dim, device="cpu", dtype=torch.float32) -> list[float]:
    torch.manual_seed(0)
    angles = torch.randn(num_patches, head_dim // 2).repeat(1, 2)
    qkv = torch.randn(num_patches, 3, num_heads, head_dim)
    ours, (hidden_states, reference) = draw([torch.randn(num_patches, 80), qkv], device, [dtype] * 2)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    outputs = [quick_gelu(ours[0]), torch.stack(rotate_patches(ours[1], cos, sin), 1)]
    query, key, value = reference.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, angles.double().cos(), angles.double().sin())
    expected = [hidden_states * torch.sigmoid(1.702 * hidden_states), torch.stack([query, key, value], dim=1)]
    return errors(outputs, ours, expected, [hidden_states, reference])


@torch.no_grad()
def branch_errors(
    num_rows, num_tokens, num_channels, num_inner, is_layer_norm, has_bias, device="cpu", dtype=torch.float32
) -> list[float]:
    """Of the normed states, and of the whole branch."""
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    norm = (torch.nn.LayerNorm if is_layer_norm else torch.nn.RMSNorm)(num_channels, eps=1e-5, **options)
    linear = torch.nn.Linear(num_inner, num_channels, bias=has_bias, **options)
    for parameter in norm.parameters():
        parameter.normal_(1, 0.3)
    states = 2 + torch.randn(num_rows, num_tokens, num_channels, **options)
    inner = torch.randn(num_rows, num_tokens, num_inner, **options)
    before = states.clone()
    assert can_fuse_branch(states, torch.nn.Sequential(linear), norm, linear)
    normed, total = open_branch(states, norm, linear)
    outputs = close_branch(total, inner, linear)
    assert torch.equal(states, before) and outputs.dtype == dtype
    expected = before.double() + inner.double() @ linear.weight.double().T
    if has_bias:
        expected += linear.bias.double()
    pairs = [(normed, norm.double()(before.double())), (outputs, expected)]
    return [((found.double() - expected).norm() / expected.norm()).item() for found, expected in pairs]


@torch.no_grad()
def activated_errors(num_rows, num_inputs, num_outputs, device="cpu", dtype=torch.float16) -> list[float]:
    """Of a linear layer with the activation after it."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(num_inputs, num_outputs, device=device, dtype=dtype)
    states = 2 * torch.randn(num_rows, num_inputs, device=device, dtype=dtype)
    found = quick_gelu_linear(states, linear)
    expected = states.double() @ linear.weight.double().T + linear.bias.double()
    expected = expected * torch.sigmoid(1.702 * expected)
    assert found.dtype == dtype
    return [((found.double() - expected).norm() / expected.norm()).item()]


@torch.no_grad()
def rounding_errors(num_tokens, num_channels, device="cpu", dtype=torch.bfloat16) -> list[float]:
    """Of states in float8 as they are, and after a LayerNorm, an RMSNorm, the activation and the gated norm."""
    torch.manual_seed(0)
    states = 2 + torch.randn(num_tokens, num_channels, dtype=dtype)
    gate = torch.randn(num_tokens, 2 * num_channels, dtype=dtype)[:, :num_channels]
    weight, bias = torch.randn(2, num_channels, dtype=dtype)
    full, weights, shape = states.double(), weight.double(), (num_channels,)
    cases: list[tuple] = [
        (round_rows, [], {}, full),
        (round_rows, [torch.nn.LayerNorm(shape)], {}, layer_norm(full, shape, weights, bias.double(), 1e-5)),
        (round_rows, [torch.nn.RMSNorm(shape, eps=1e-5)], {}, rms_norm(full, shape, weights, 1e-5)),
        (round_rows, [], {"function": "quick_gelu"}, full * torch.sigmoid(1.702 * full)),
    ]
    gated = full * silu(gate.double())
    norm = torch.nn.RMSNorm(shape, eps=1e-5)
    cases.append((round_gated_norm, [gate.to(device), norm], {}, rms_norm(gated, shape, weights, 1e-5)))
    found_errors = []
    for function, arguments, options, expected in cases:
        for module in arguments:
            if isinstance(module, torch.nn.Module):
                module.load_state_dict({"weight": weight, "bias": bias}, strict=isinstance(module, torch.nn.LayerNorm))
                module.to(device, dtype)
        rows = function(states.to(device), *arguments, **options)
        scales = expected.abs().amax(1, keepdim=True) / 448
        found_errors.append(((rows.scales.cpu().double() - scales).norm() / scales.norm()).item())
        # A few numbers lie between two of the format, and may fall the other way.
        expected = (expected / scales).float().to(torch.float8_e4m3fn).float()
        codes = rows.codes.cpu().to(torch.float8_e4m3fn).float()
        found_errors.append(((codes - expected).norm() / expected.norm()).item())
    return found_errors


def text_errors(num_rows, num_tokens, num_heads, head_dim, device="cpu", dtype=torch.float32) -> list[float]:
    """Of queries and keys, of which there are fewer, with one row of positions for all."""
    torch.manual_seed(0)
    angles = torch.randn(1, num_tokens, head_dim // 2).repeat(1, 1, 2)
    tensors = [torch.randn(num_rows, num_tokens, heads, head_dim) for heads in (num_heads, 2)]
    ours, inputs = draw(tensors, device, [dtype] * 2)
    with triton_support.recorded_launches():
        outputs = rotate_text(*ours, angles.cos().to(ours[0]), angles.sin().to(ours[0]))
    cos, sin = (x.to(dtype).double() for x in (angles.cos(), angles.sin()))
    return errors(outputs, ours, apply_rotary_pos_emb(*inputs, cos, sin, unsqueeze_dim=2), inputs)


def draw_states(shape, is_quantized, is_token_major, device, dtype) -> tuple:
    """Keys or values of this shape, and the same in float64."""
    states = torch.randn(shape, dtype=dtype, device=device)
    if not is_quantized:
        return tokens_first(states) if is_token_major else states, states.double()
    states = quantize(states, states.float().mean(2, keepdim=True))
    full = states.codes.double() * states.scales + states.centre
    if is_token_major:
        states = states._replace(codes=tokens_first(states.codes), scales=tokens_first(states.scales))
    return states, full


def decoding_errors(
    num_heads, num_queries, num_tokens, head_dim, is_quantized, is_token_major, device="cpu", dtype=torch.float16
) -> list[float]:
    torch.manual_seed(0)
    shape = (1, num_heads, num_tokens, head_dim)
    query = 3 * torch.randn(1, num_heads, num_queries, head_dim, dtype=dtype, device=device)
    states = [draw_states(shape, is_quantized, is_token_major, device, dtype) for _ in range(2)]
    (keys, full_keys), (values, full_values) = states
    assert can_flash_decode(query)
    expected = ((query.double() @ full_keys.mT / head_dim**0.5).softmax(-1) @ full_values).transpose(1, 2)
    found = flash_decode(query, keys, values, head_dim**-0.5)
    assert found.dtype == dtype
    return [((found.double() - expected).norm() / expected.norm()).item()]


def reading_errors(
    num_heads, num_queries, num_tokens, head_dim, is_quantized, is_token_major, device="cpu", dtype=torch.float16
) -> list[float]:
    """Of the weights of the time steps: of all together, and the largest of any single one."""
    torch.manual_seed(0)
    query = 3 * torch.randn(num_heads, num_queries, head_dim, dtype=dtype, device=device)
    shape = (1, num_heads, sum(num_tokens), head_dim)
    keys, full = draw_states(shape, is_quantized, is_token_major, device, dtype)
    weights = (query.double() @ full[0].mT / head_dim**0.5).softmax(-1)
    expected = torch.stack([each.sum(-1) for each in weights.split(num_tokens, -1)], -1)
    found = log_weights_of_steps(query, keys, torch.tensor(num_tokens), head_dim**-0.5)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    found, is_empty = found.double().exp(), torch.tensor(num_tokens) == 0
    assert (found[..., is_empty] == 0).all()
    difference, norm = (found - expected)[..., ~is_empty], expected.norm()
    return [(difference.norm() / norm).item(), (difference / expected[..., ~is_empty]).abs().max().item()]


@torch.no_grad()
def step_errors(num_rows, num_tokens, hidden_size, mlp_size, device="cpu", dtype=torch.float16) -> list[float]:
    """Of the MLP's gate and up, and of what is added to the text and its norm, with the share cut off and as it is."""
    torch.manual_seed(0)
    residual, attention, cross = torch.randn(3, num_rows, num_tokens, hidden_size, dtype=dtype, device=device)
    gate, up = (torch.nn.Linear(hidden_size, mlp_size, bias=False, device=device, dtype=dtype) for _ in range(2))
    norm = torch.nn.RMSNorm(hidden_size, eps=1e-6, device=device, dtype=dtype)
    norm.weight.normal_(1, 0.1)
    with triton_support.recorded_launches():
        assert can_fuse(residual, gate, up, norm)
    gated = silu(residual.double() @ gate.weight.double().T) * (residual.double() @ up.weight.double().T)
    pairs = [(gate_and_up(residual, gate, up), gated)]
    for share in (0.3, -2.0, 1.5):
        alpha = torch.tensor([share], dtype=dtype, device=device)
        found, normed = mix_and_norm(residual, attention, cross, alpha, norm)
        alpha = alpha.double().clamp(0, 1)
        expected = residual.double() + alpha * attention.double() + (1 - alpha) * cross.double()
        scale = torch.rsqrt(expected.pow(2).mean(-1, keepdim=True) + 1e-6)
        pairs += [(found, expected), (normed, expected * scale * norm.weight.double())]
    return [((found.double() - expected).norm() / expected.norm()).item() for found, expected in pairs]


def tokens_first(states: torch.Tensor) -> torch.Tensor:
    """The same tensor, with all heads of a token side by side in memory."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def main():
    modules = (activation, branch, convolution_kernels, flash_decoding, float8, gated_norm, rotary, scan_kernels)
    for module in (*modules, step_kernels, triton_support):
        module.is_usable = lambda device: True
    gelu_linear.BLOCK = (16, 32, 16)
    float8.FLOAT8 = torch.float32  # the interpreter rounds 7.9 to 4: the check rounds
    checks = [
        (scan_errors, SCANS, 1e-4),
        (convolution_errors, CONVOLUTIONS, 1e-4),
        (norm_errors, NORMS, 1e-4),
        (tower_errors, TOWERS, 1e-4),
        (branch_errors, BRANCHES, 1e-6),
        (rounding_errors, ROUNDINGS, 2e-3),
        (activated_errors, ACTIVATED, 1e-3),
        (text_errors, TEXTS, 1e-4),
        (decoding_errors, DECODINGS, 2e-3),  # in float16
        (reading_errors, READINGS, 1e-4),
        (step_errors, STEPS, 2e-3),
    ]
    for check, cases, tolerance in checks:
        for case in cases:
            found = check(*case)
            print(check.__name__, case, " ".join(f"{error:.0e}" for error in found), flush=True)
            assert max(found) < tolerance


if __name__ == "__main__":
    main()
