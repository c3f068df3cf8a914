# SPDX-License-Identifier: Apache-2.0
"""Error and time of the mixer's scan, convolution and gated norm at the shapes of the 7B, for each implementation.

    python examples/benchmarks/mixer_kernels.py --output results

Errors are against the recurrence in float64, token after token, on the GPU: of outputs and gradients at 4,096 tokens,
and of outputs at the end of 300,000 and 1,000,000 tokens that are scanned stretch by stretch. Times are medians over a
stretch of 9,568 tokens, 64 frames of 640x360; `first` is the first call of the process, tuning and compiling included.
`--sweep` times other warps and pipeline depths of the Triton kernels than those of `ops.scan_kernels.LAUNCH`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from inference import describe_machine
from torch.nn.functional import softplus

from transformers_vamba.ops import scan_kernels
from transformers_vamba.ops.convolution import convolve
from transformers_vamba.ops.gated_norm import gated_rms_norm
from transformers_vamba.ops.scan import IMPLEMENTATIONS, choose_implementation, scan


NUM_HEADS, HEAD_DIM, STATE_SIZE, NUM_TAPS = 112, 64, 128, 4
WIDTH = NUM_HEADS * HEAD_DIM
CONV_DIM = WIDTH + 2 * STATE_SIZE
ROW = WIDTH + CONV_DIM + NUM_HEADS  # of `in_proj`


def make_inputs(num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The arguments of `scan`, with time steps and decays as initialised for training; every eighth head is slow."""
    torch.manual_seed(0)
    rows = torch.empty(num_tokens, CONV_DIM, device=device, dtype=dtype).normal_()
    x, B, C = rows.split([WIDTH, STATE_SIZE, STATE_SIZE], dim=-1)
    dt = torch.empty(num_tokens, ROW, device=device, dtype=dtype).normal_()[:, -NUM_HEADS:]
    step = torch.exp(torch.empty(NUM_HEADS, device=device).uniform_(-6.9, -2.3))
    A = -torch.empty(NUM_HEADS, device=device).uniform_(1, 16)
    step[::8] /= 30
    A[::8] /= 30
    dt_bias = (step + torch.log(-torch.expm1(-step))).to(dtype)
    D = torch.ones(NUM_HEADS, device=device, dtype=dtype)
    return [x.unflatten(-1, (NUM_HEADS, HEAD_DIM)), dt, A, B.unsqueeze(1), C.unsqueeze(1), D, dt_bias]


def recurrence(x, dt, A, B, C, D, dt_bias, state=None):
    """One sequence in the dtype of `x`, by definition."""
    dt = softplus(dt + dt_bias)
    state = x.new_zeros(NUM_HEADS, HEAD_DIM, STATE_SIZE) if state is None else state
    decays, steps, outputs = (dt * A).exp(), x * dt[..., None], []
    for t in range(len(x)):
        state = state * decays[t][:, None, None] + steps[t][..., None] * B[t]
        outputs.append((state @ C[t, 0]) + D[:, None] * x[t])
    return torch.stack(outputs), state


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def gradients_in_float64(inputs, grad, stretch=128) -> list[torch.Tensor]:
    """Outputs and gradients by the recurrence, of which one stretch at a time is kept."""
    inputs = [tensor.detach().double() for tensor in inputs]
    states, state = [], torch.zeros(NUM_HEADS, HEAD_DIM, STATE_SIZE, device=grad.device, dtype=torch.float64)
    per_token = (0, 1, 3, 4)
    pieces = [[tensor[start : start + stretch] for start in range(0, len(grad), stretch)] for tensor in inputs]
    outputs, grads = [], [[] if index in per_token else 0 for index in range(7)]

    def arguments(index):
        return [pieces[i][index] if i in per_token else tensor for i, tensor in enumerate(inputs)]

    with torch.no_grad():
        for index in range(len(pieces[0])):
            states.append(state)
            y, state = recurrence(*arguments(index), state)
            outputs.append(y)
    grad_state = torch.zeros_like(state)
    for index in reversed(range(len(states))):
        piece = [tensor.detach().requires_grad_() for tensor in arguments(index)]
        first = states[index].requires_grad_()
        piece_grad = grad[index * stretch : (index + 1) * stretch].double()
        *found, grad_state = torch.autograd.grad(recurrence(*piece, first), [*piece, first], [piece_grad, grad_state])
        for i, tensor in enumerate(found):
            grads[i] = [tensor, *grads[i]] if i in per_token else grads[i] + tensor
    return [torch.cat(outputs), *(torch.cat(grad) if isinstance(grad, list) else grad for grad in grads)]


def gradient_errors(names: list[str], num_tokens: int, device: torch.device) -> dict[str, list[float]]:
    """Per implementation, the errors of y and of the gradients of x, dt, A, B, C, D and dt_bias."""
    inputs = make_inputs(num_tokens, device, torch.bfloat16)
    grad = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, device=device).to(torch.bfloat16)
    expected = gradients_in_float64(inputs, grad)
    found = {}
    for name in names:
        tensors = [tensor.detach().requires_grad_() for tensor in inputs]
        y, _ = scan(*tensors, [num_tokens], implementation=name)
        found[name] = [relative_error(*pair) for pair in zip([y, *torch.autograd.grad(y, tensors, grad)], expected)]
    return found


@torch.no_grad()
def long_errors(names: list[str], num_tokens: int, device: torch.device, stretch: int = 2**15, last: int = 256):
    """Per implementation, the error of the last outputs of a long sequence that is scanned by stretches."""
    A, D, dt_bias = (
        tensor for index, tensor in enumerate(make_inputs(1, device, torch.bfloat16)) if index in (2, 5, 6)
    )
    states, expected_state = dict.fromkeys(names), None
    for start in range(0, num_tokens, stretch):
        torch.manual_seed(start)
        size = min(stretch, num_tokens - start)
        x, dt, _, B, C, _, _ = make_inputs(size, device, torch.bfloat16)
        x = x.normal_(generator=torch.Generator(device).manual_seed(start))
        tokens = (x, dt, B, C)
        for name in names:
            y, states[name] = scan(x, dt, A, B, C, D, dt_bias, [size], states[name], name)
            states[name, "y"] = y[-last:]
        expected_state, expected = advance(tokens, A, D, dt_bias, expected_state, last)
    return {name: relative_error(states[name, "y"], expected) for name in names}


def advance(tokens, A, D, dt_bias, state, last: int, piece: int = 1024):
    """The state after these tokens, as the sum of what each has left in it, and the last outputs, in float64."""
    x, dt, B, C = tokens
    body = max(0, len(x) - last)
    if state is None:
        state = torch.zeros(NUM_HEADS, HEAD_DIM, STATE_SIZE, device=x.device, dtype=torch.float64)
    for start in range(0, body, piece):
        part = slice(start, min(start + piece, body))
        step = softplus(dt[part].double() + dt_bias.double())
        decay = (step * A.double()).cumsum(0)
        weighted = x[part].double() * (step * (decay[-1] - decay).exp())[..., None]
        added = (weighted.flatten(1).T @ B[part, 0].double()).view_as(state)
        state = state * decay[-1].exp()[:, None, None] + added
    rest = (tensor[body:].double() for tensor in (x, dt))
    matrices = (tensor[body:].double() for tensor in (B, C))
    y, state = recurrence(*rest, A.double(), *matrices, D.double(), dt_bias.double(), state)
    return state, y


def milliseconds(function, device: torch.device, repeats: int = 20) -> tuple[float, float]:
    """Of the first call, and the median of later ones."""
    times = []
    for _ in range(repeats + 3):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times[0], sorted(times[3:])[repeats // 2]


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timings(names: list[str], num_tokens: int, device: torch.device) -> dict[str, tuple[float, float]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = make_inputs(num_tokens, device, dtype)
    tensors = [tensor.detach().requires_grad_() for tensor in inputs]
    grad = torch.randn_like(inputs[0])
    rows = torch.randn(num_tokens, ROW, device=device, dtype=dtype)
    conv = [rows[:, WIDTH : WIDTH + CONV_DIM], torch.randn(CONV_DIM, NUM_TAPS, device=device, dtype=dtype)]
    conv.append(torch.randn(CONV_DIM, device=device, dtype=dtype))
    norm = [torch.randn(num_tokens, WIDTH, device=device, dtype=dtype), rows[:, :WIDTH]]
    norm.append(torch.randn(WIDTH, device=device, dtype=dtype))
    functions = {}
    for name in names:
        functions[f"scan, {name}"] = (lambda *args, name=name: scan(*args, [num_tokens], None, name)[0]), inputs
    functions["convolution"] = (lambda *args: convolve(*args, [num_tokens])), conv
    if choose_implementation(device, dtype, HEAD_DIM, STATE_SIZE) == "triton":
        functions["gated norm"] = (lambda *args: gated_rms_norm(*args, WIDTH, 1e-5)), norm
    found = {}
    for name, (function, arguments) in functions.items():
        with torch.no_grad():
            found[name] = milliseconds(lambda function=function, arguments=arguments: function(*arguments), device)
        tensors = [tensor.detach().requires_grad_() for tensor in arguments]
        with torch.no_grad():
            grad = torch.randn_like(function(*arguments))

        def step(function=function, tensors=tensors, grad=grad):
            torch.autograd.grad(function(*tensors), tensors, grad)

        found[f"{name}, forward and backward"] = milliseconds(step, device)
    return found


def sweep(num_tokens: int, device: torch.device):
    """Prints the time of forward, and of forward and backward, for other launches of one kernel at a time."""
    inputs = make_inputs(num_tokens, device, torch.bfloat16)
    tensors = [tensor.detach().requires_grad_() for tensor in inputs]
    grad = torch.randn_like(inputs[0])

    def forward():
        with torch.no_grad():
            scan(*inputs, [num_tokens], None, "triton")

    def both():
        torch.autograd.grad(scan(*tensors, [num_tokens], None, "triton")[0], tensors, grad)

    for kernel, chosen in list(scan_kernels.LAUNCH.items()):
        for launch in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)):
            scan_kernels.LAUNCH[kernel] = launch
            try:
                times = [f"{milliseconds(function, device)[1]:.3f}" for function in (forward, both)]
            except Exception as error:  # does not fit
                times = [type(error).__name__]
            print(kernel, launch, "(chosen)" if launch == chosen else "", *times, flush=True)
        scan_kernels.LAUNCH[kernel] = chosen


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=9568, help="of the stretch that is timed")
    parser.add_argument("--gradient-tokens", type=int, default=4096)
    parser.add_argument("--long", default="300000,1000000", help="lengths of the long sequences")
    parser.add_argument("--implementations", default="", help="by default all that take the tensors")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("."))
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    sizes = (device, torch.bfloat16, HEAD_DIM, STATE_SIZE)
    names = args.implementations.split(",") if args.implementations else None
    names = names or [name for name, (can_take, _) in IMPLEMENTATIONS.items() if can_take(*sizes)]
    results = {"machine": describe_machine(device), "tokens": args.tokens}
    print(results["machine"])

    results["milliseconds"] = timings(names, args.tokens, device)
    for name, (first, median) in results["milliseconds"].items():
        print(f"{name}: {median:.2f} ms, first {first:.0f}", flush=True)
    results["errors"] = gradient_errors(names, args.gradient_tokens, device)
    for name, found in results["errors"].items():
        print(f"{args.gradient_tokens} tokens, {name}: y x dt A B C D dt_bias", *(f"{error:.1e}" for error in found))
    results["long_errors"] = {}
    for num_tokens in filter(None, args.long.split(",")):
        results["long_errors"][num_tokens] = long_errors(names, int(num_tokens), device)
        for name, error in results["long_errors"][num_tokens].items():
            print(f"{num_tokens} tokens, {name}: last outputs {error:.1e}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "mixer_kernels.json").write_text(json.dumps(results, indent=1) + "\n")
    if args.sweep:
        sweep(args.tokens, device)


if __name__ == "__main__":
    main()
