# SPDX-License-Identifier: Apache-2.0

"""Random batches, paddings, streams and packed sequences against the reference in float64."""

import functools
from dataclasses import dataclass
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_vamba import reference_logits, reference_mixer
from tiny_vamba import cache_of, make_block, make_media, make_text, tiny_model

from transformers_vamba.layers.mixer import VambaMixer


# Greatest error, relative to the norm of the reference. Norms and rotary angles are float32 in every dtype.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2}
TOKEN_TYPES = {"image": 1, "video": 2}


def fixed(max_examples: int):
    """The same examples in every run, so that a failure in CI is one here."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@functools.cache
def model_of(dtype: torch.dtype, attention: str = "sdpa"):
    return tiny_model(attention, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], f"{error:.1e}"


@dataclass
class Row:
    """One row of a batch: its tokens, and its images and videos with the token at which each stands."""

    input_ids: torch.Tensor
    kinds: list[str]
    media: list[tuple[torch.Tensor, tuple[int, int, int]]]
    places: list[int]


edges = st.sampled_from((2, 4, 6))
grids = {
    "image": st.tuples(st.just(1), edges, edges),
    "video": st.tuples(st.integers(1, 4), edges, edges),
}


def pixels_of(kind, grid, seed):
    return next(iter(make_media(kind, grid, seed=seed).values()))


@st.composite
def rows(draw):
    kinds = draw(st.lists(st.sampled_from(("image", "video")), max_size=3))
    length = draw(st.integers(max(1, len(kinds)), 12))
    seed = draw(st.integers(0, 1000))
    sizes = [draw(grids[kind]) for kind in kinds]
    return Row(
        make_text(length=length, seed=seed)[0],
        kinds,
        [(pixels_of(kind, size, seed + index), size) for index, (kind, size) in enumerate(zip(kinds, sizes))],
        sorted(draw(st.permutations(range(length)))[: len(kinds)]),
    )


def collate(batch: list[Row], padding_side: str) -> dict[str, torch.Tensor]:
    """The arguments of `forward`."""
    length = max(len(row.input_ids) for row in batch)
    inputs = {
        name: torch.zeros(len(batch), length, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    media = {"image": [], "video": []}
    for index, row in enumerate(batch):
        start = length - len(row.input_ids) if padding_side == "left" else 0
        place = slice(start, start + len(row.input_ids))
        inputs["input_ids"][index, place] = row.input_ids
        inputs["attention_mask"][index, place] = 1
        for kind, medium, at in zip(row.kinds, row.media, row.places):
            inputs["mm_token_type_ids"][index, start + at] = TOKEN_TYPES[kind]
            media[kind].append((*medium, index))
    for kind, pixels_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if media[kind]:
            pixels, sizes, sample_ids = zip(*media[kind])
            inputs[pixels_name] = torch.cat(pixels)
            inputs[f"{kind}_grid_thw"] = torch.tensor(sizes)
            inputs[f"{kind}_sample_ids"] = torch.tensor(sample_ids)
    return inputs


@fixed(60)
@given(
    batch=st.lists(rows(), min_size=1, max_size=4),
    padding_side=st.sampled_from(("left", "right")),
    # Not eager in float64: Transformers' mask there is a number that its softmax, in float32, has not.
    dtype_and_attention=st.sampled_from(
        [(dtype, "sdpa") for dtype in TOLERANCES] + [(torch.float32, "eager"), (torch.bfloat16, "eager")]
    ),
    pass_through=st.sampled_from(("cache", "no cache", "both streams layer by layer")),
    marked=st.booleans(),
)
def test_batch(batch, padding_side, dtype_and_attention, pass_through, marked):
    """Each row gives what it gives alone, by the definition, whatever else is in the batch."""
    dtype, attention = dtype_and_attention
    model = model_of(dtype, attention)
    inputs = collate(batch, padding_side)
    if not marked:  # then the images of a row come before its videos
        del inputs["mm_token_type_ids"]
        for row in batch:
            row.media = [medium for _, medium in sorted(zip(row.kinds, row.media), key=lambda item: item[0])]
    with torch.set_grad_enabled(pass_through == "both streams layer by layer"):
        logits = model(**inputs, use_cache=pass_through == "cache").logits
    for index, row in enumerate(batch):
        expected = reference_logits(model, row.input_ids, row.media)
        assert_close(logits[index][inputs["attention_mask"][index].bool()].detach(), expected, dtype)


def cut(draw, length: int) -> list[int]:
    """Random positive lengths whose sum is `length`."""
    ends = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
    return [end - start for start, end in zip([0, *ends], [*ends, length])]


@fixed(40)
@given(data=st.data(), dtype=st.sampled_from(tuple(TOLERANCES)))
def test_stream(data, dtype):
    """Videos of a stream appended in random pieces, in random segments, and a question read in random pieces."""
    model = model_of(dtype)
    videos = [
        (pixels_of("video", size, seed), size)
        for seed, size in enumerate(data.draw(st.lists(grids["video"], min_size=1, max_size=3), label="videos"))
    ]
    cache = None
    for pixels, (t, h, w) in videos:
        steps = cut(data.draw, t)
        for piece, num_steps in zip(pixels.split([num_steps * h * w for num_steps in steps]), steps):
            segment_frames = data.draw(st.integers(1, 9), label="segment_frames")
            cache = model.encode_video(
                piece, torch.tensor([[num_steps, h, w]]), cache=cache, segment_frames=segment_frames
            )
    text = make_text(2, data.draw(st.integers(1, 12), label="length"))
    fork = cache.fork()
    with torch.no_grad():
        pieces = [
            model(input_ids=piece, cache=fork).logits for piece in text.split(cut(data.draw, text.shape[1]), dim=1)
        ]
    assert cache.get_seq_length() == 0
    for row, logits in zip(text, torch.cat(pieces, dim=1)):
        assert_close(logits, reference_logits(model, row, videos), dtype)


@fixed(30)
@given(data=st.data(), batch=st.lists(rows(), min_size=1, max_size=3))
def test_padded_prompt_in_pieces(data, batch):
    """A batch with images and videos whose prompt, padded on the left, is read in random pieces."""
    model = model_of(torch.float32)
    inputs = collate(batch, "left")
    mask = inputs.pop("attention_mask")
    lengths = cut(data.draw, mask.shape[1])
    del inputs["mm_token_type_ids"]
    for row in batch:
        row.media = [medium for _, medium in sorted(zip(row.kinds, row.media), key=lambda item: item[0])]
    pieces = inputs.pop("input_ids").split(lengths, dim=1)
    cache, logits, end = None, [], 0
    with torch.no_grad():
        for piece in pieces:
            end += piece.shape[1]
            outputs = model(input_ids=piece, attention_mask=mask[:, :end], cache=cache, **inputs)
            cache, inputs = cache_of(outputs), {}
            logits.append(outputs.logits)
    for row, row_logits, row_mask in zip(batch, torch.cat(logits, dim=1), mask):
        assert_close(row_logits[row_mask.bool()], reference_logits(model, row.input_ids, row.media), torch.float32)


@fixed(60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    max_tokens=st.integers(1, 50),
    begun=st.integers(0, 20),
    d_conv=st.integers(1, 4),
    groups=st.sampled_from((1, 2, 4)),
    dtype=st.sampled_from(tuple(TOLERANCES)),
)
def test_packed_mixer(lengths, max_tokens, begun, d_conv, groups, dtype):
    """Sequences one behind the other, in stretches, of which the first goes on from `begun` tokens before."""
    block = make_block(dtype=dtype, mamba_n_groups=groups, mamba_d_conv=d_conv)
    generator = torch.Generator().manual_seed(sum(lengths))
    video_states = torch.randn(1, begun + sum(lengths), 64, generator=generator).to(dtype)
    with torch.no_grad(), patch.object(VambaMixer, "max_tokens", lambda self, device: max_tokens):
        state = None
        if begun:
            _, state = block(video_states[:, :begun], [begun])
        mixed, _ = block(video_states[:, begun:], lengths, state)
        sequences = video_states[0].split([begun + lengths[0], *lengths[1:]])
        expected = torch.cat([reference_mixer(block, sequence) for sequence in sequences])[begun:]
    assert_close(mixed[0], expected, dtype)
