# SPDX-License-Identifier: Apache-2.0
"""Malformed arguments of `forward`, `generate` and `encode_video`: an error that names the argument."""

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_model
from transformers import DynamicCache

from transformers_vamba import VambaCache


VIDEO = make_media("video", (2, 4, 4))
TWO_VIDEOS = make_media("video", (1, 4, 4), (1, 4, 4))
IMAGE = make_media("image", (1, 4, 4))
PIXELS = VIDEO["pixel_values_videos"]


def video(batch_size=1, **kwargs):
    return batch_size, {**VIDEO, **kwargs}


def image(batch_size=1, **kwargs):
    return batch_size, {**IMAGE, **kwargs}


# Rows of text, the other arguments, and what the error says.
BAD_INPUTS = {
    "pixels, flat": (video(pixel_values_videos=PIXELS.flatten()), r"`pixel_values_videos` .*got \(37632,\)"),
    "pixels with a batch axis": (video(pixel_values_videos=PIXELS[None]), r"`pixel_values_videos` .*\(1, 32, 1176\)"),
    "frames for pixels": (video(pixel_values_videos=torch.zeros(1, 4, 3, 56, 56)), "`pixel_values_videos` must have"),
    "no pixels": (video(pixel_values_videos=PIXELS[:0]), r"`pixel_values_videos` must .*got \(0, 1176\)"),
    "too many pixels": (
        video(pixel_values_videos=torch.cat([PIXELS, PIXELS])),
        r"`pixel_values_videos` .*\(64, 1176\)",
    ),
    "grid of two": (video(video_grid_thw=torch.tensor([[2, 4]])), r"`video_grid_thw` .*3\), got \(1, 2\)"),
    "grid of four": (video(video_grid_thw=torch.tensor([[1, 2, 4, 4]])), r"`video_grid_thw` .*got \(1, 4\)"),
    "grid with a batch axis": (video(video_grid_thw=torch.tensor([[[2, 4, 4]]])), r"`video_grid_thw` .*\(1, 1, 3\)"),
    "grid, scalar": (video(video_grid_thw=torch.tensor(2)), r"`video_grid_thw` must have shape .*got \(\)"),
    "grid of no frames": (video(video_grid_thw=torch.tensor([[0, 4, 4]])), r"`video_grid_thw` .*\[0, 4, 4\]"),
    "negative grid": (video(video_grid_thw=torch.tensor([[-2, 4, -4]])), r"`video_grid_thw` .*\[-2, 4, -4\]"),
    "odd width": (video(video_grid_thw=torch.tensor([[2, 4, 5]])), r"`video_grid_thw` .*multiples of the merge size"),
    "empty grid": (video(video_grid_thw=torch.zeros(0, 3).long()), r"`video_grid_thw`, got \(32, 1176\)"),
    "huge grid": (video(video_grid_thw=torch.tensor([[2**40, 4, 4]])), r"\(17592186044416, 1176\) .*`video_grid"),
    "grid of truth values": (
        (1, {"pixel_values_videos": PIXELS[:1], "video_grid_thw": torch.ones(1, 3).bool()}),
        "`video_grid_thw` must hold integers, got torch.bool",
    ),
    "negative row": (video(video_sample_ids=torch.tensor([-1])), r"`video_sample_ids` .*0\.\.0.*got \[-1\]"),
    "row of too large a number": (video(video_sample_ids=torch.tensor([2**62])), r"`video_sample_ids` .*0\.\.0"),
    "too many rows": (video(video_sample_ids=torch.tensor([0, 0])), "`video_sample_ids` has 2 entries for the 1 of"),
    "no rows": (video(video_sample_ids=torch.zeros(0).long()), "`video_sample_ids` has 0 entries for the 1 of"),
    "nothing for two rows": (
        video(2, pixel_values_videos=PIXELS[:0], video_grid_thw=torch.zeros(0, 3).long()),
        "`video_grid_thw` describes 0 media for 2 rows: say with `video_sample_ids`",
    ),
    "image, frames": (image(pixel_values=torch.zeros(1, 3, 56, 56)), r"`pixel_values` must .*\(1, 3, 56, 56\)"),
    "image without grid": (image(image_grid_thw=None), "`pixel_values` was given without `image_grid_thw`"),
    "image grid without image": (image(pixel_values=None), "`image_grid_thw` was given without `pixel_values`"),
    "image grid of two": (image(image_grid_thw=torch.tensor([[4, 4]])), r"`image_grid_thw` .*got \(1, 2\)"),
    "image of another size": (image(image_grid_thw=torch.tensor([[1, 4, 8]])), r"`pixel_values` .*`image_grid_thw`"),
    "image's row": (image(image_sample_ids=torch.tensor([1])), r"`image_sample_ids` .*0\.\.0.*got \[1\]"),
    "image's rows": (image(image_sample_ids=torch.tensor([0, 0])), "`image_sample_ids` has 2 entries for the 1 of"),
    "images for no row": (image(3), "`image_grid_thw` describes 1 media for 3 rows: say with `image_sample_ids`"),
    "grids exchanged": (
        (1, {"pixel_values": IMAGE["pixel_values"], "video_grid_thw": VIDEO["video_grid_thw"]}),
        "`pixel_values` was given without `image_grid_thw`",
    ),
    "prompt with an image for a video": (
        video(mm_token_type_ids=torch.tensor([[1, 0, 0]])),
        r"1 images and 0 videos \(`mm_token_type_ids`\), but 0 images and 1 videos",
    ),
    "prompt with an image too many": (
        video(mm_token_type_ids=torch.tensor([[1, 2, 0]])),
        r"1 images and 1 videos \(`mm_token_type_ids`\), but 0 images and 1 videos",
    ),
    "prompt whose other row has the video": (
        (
            2,
            {
                **TWO_VIDEOS,
                "video_sample_ids": torch.tensor([0, 1]),
                "mm_token_type_ids": torch.tensor([[2, 2, 0], [0, 0, 0]]),
            },
        ),
        r"row 0 has 0 images and 2 videos \(`mm_token_type_ids`\), but 0 images and 1 videos",
    ),
    "prompt of another kind": (video(mm_token_type_ids=torch.tensor([[3, 0, 0]])), r"`mm_token_type_ids` .*got \[3\]"),
    "prompt, flat": (video(mm_token_type_ids=torch.tensor([2, 0, 0])), r"`mm_token_type_ids` must have shape \(1, "),
    "prompt of two rows": (video(mm_token_type_ids=torch.tensor([[2], [0]])), r"`mm_token_type_ids` .*got \(2, 1\)"),
    "prompt in floats": (video(mm_token_type_ids=torch.tensor([[2.0]])), "`mm_token_type_ids` must hold integers"),
    "pixels, a list": (video(pixel_values_videos=[[0.0]]), "`pixel_values_videos` must be a torch.Tensor, got list"),
    "pixels, bytes": (video(pixel_values_videos=PIXELS.byte()), "`pixel_values_videos` must hold floating .*uint8"),
    "pixels, complex": (
        video(pixel_values_videos=PIXELS + 0j),
        "`pixel_values_videos` must hold floating .*complex64",
    ),
    "pixels of another patch": (
        video(pixel_values_videos=PIXELS[:, :9]),
        r"`pixel_values_videos` .*1176\), got \(32, 9",
    ),
    "grid, a list": (video(video_grid_thw=[[2, 4, 4]]), "`video_grid_thw` must be a torch.Tensor, got list"),
    "grid in floats": (video(video_grid_thw=torch.tensor([[2.0, 4, 4]])), "`video_grid_thw` must hold integers"),
    "rows, a list": (video(video_sample_ids=[0]), "`video_sample_ids` must be a torch.Tensor, got list"),
    "rows in floats": (
        video(video_sample_ids=torch.zeros(1)),
        "`video_sample_ids` must hold integers, got torch.float",
    ),
    "rows, a table": (video(video_sample_ids=torch.zeros(1, 1).long()), r"`video_sample_ids` .*got \(1, 1\)"),
    "rows of nothing": (
        (1, {"image_sample_ids": torch.tensor([0])}),
        "`image_sample_ids` was given without `image_grid",
    ),
    "mask of another batch": (video(attention_mask=torch.ones(2, 3)), r"`attention_mask` .*\(1, .*got \(2, 3\)"),
    "mask, flat": (video(attention_mask=torch.ones(3)), r"`attention_mask` must have shape .*got \(3,\)"),
    "mask, too short": (video(attention_mask=torch.ones(1, 2)), r"`attention_mask` must have shape .*got \(1, 2\)"),
    "positions, too few": (video(position_ids=torch.arange(2)[None]), r"`position_ids` must .*3\), got \(1, 2\)"),
    "positions in floats": (video(position_ids=torch.zeros(1, 3)), "`position_ids` must hold integers"),
    "positions of two rows": (
        video(position_ids=torch.zeros(2, 3).long()),
        "`position_ids` must have one row, or one for each of the 1 of `input_ids`, got 2 rows",
    ),
    "logits of a negative number": (video(logits_to_keep=-1), "`logits_to_keep` must be at least 0 .*got -1"),
    "logits, a word": (video(logits_to_keep="all"), "`logits_to_keep` must be at least 0 .*got 'all'"),
    "cache of another model": (
        (1, {"cache": VambaCache(tiny_model(num_hidden_layers=2).config)}),
        "cache is of another model: it has num_hidden_layers 2 instead of 3",
    ),
}
# What `generate` refuses itself, in words of its own.
FORWARD_ONLY = {
    "mask of another batch",
    "mask, flat",
    "mask, too short",
    "positions, too few",
    "positions in floats",
    "positions of two rows",
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("call", ("training", "inference", "generate"))
def test_bad_inputs(model, case, call):
    (batch_size, inputs), message = BAD_INPUTS[case]
    if call == "generate" and case in FORWARD_ONLY:
        message = None
    text = make_text(batch_size, length=3)
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        if call == "generate":
            model.generate(input_ids=text, max_new_tokens=2, **inputs)
        else:
            with torch.set_grad_enabled(call == "training"):
                model(input_ids=text, use_cache=call == "inference", **inputs)


TEXT = make_text(length=3)
BAD_TEXTS = {
    "flat": ({"input_ids": TEXT[0]}, r"`input_ids` must have shape \(batch_size, sequence_length\), got \(3,\)"),
    "too deep": ({"input_ids": TEXT[None]}, r"`input_ids` must have shape .*got \(1, 1, 3\)"),
    "floats": ({"input_ids": TEXT.float()}, "`input_ids` must hold integers, got torch.float32"),
    "a list": ({"input_ids": TEXT.tolist()}, "`input_ids` must be a torch.Tensor, got list"),
    "empty": ({"input_ids": TEXT[:, :0]}, r"`input_ids` must not be empty, got shape \(1, 0\)"),
    "no rows": ({"input_ids": TEXT[:0]}, r"`input_ids` must not be empty, got shape \(0, 3\)"),
    "embeddings, flat": ({"inputs_embeds": torch.zeros(3, 64)}, r"`inputs_embeds` must .*64\), got \(3, 64\)"),
    "embeddings, too narrow": ({"inputs_embeds": torch.zeros(1, 3, 32)}, r"`inputs_embeds` must .*got \(1, 3, 32\)"),
    "embedded integers": ({"inputs_embeds": torch.zeros(1, 3, 64).long()}, "`inputs_embeds` must hold floating"),
    "labels, too short": (
        {"input_ids": TEXT, "labels": TEXT[:, 1:]},
        r"`labels` must have shape \(1, 3\), got \(1, 2",
    ),
    "labels in floats": ({"input_ids": TEXT, "labels": TEXT.float()}, "`labels` must hold integers"),
    "labels for logits left out": (
        {"input_ids": TEXT, "labels": TEXT, "logits_to_keep": 1},
        r"`labels` must have shape \(1, 1\), got \(1, 3\)",
    ),
    "cache, a tuple": ({"input_ids": TEXT, "cache": ()}, "`cache` must be a Cache, got tuple"),
    "marks without media": (
        {"input_ids": TEXT, "mm_token_type_ids": torch.tensor([[2, 0, 0]])},
        "has 1 places .* for images or videos, but none are given",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts(model, case):
    inputs, message = BAD_TEXTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        model(**inputs)


def test_places_without_media_in_training():
    """Some trainers drop videos: the text alone is not trained on without a word."""
    model = tiny_model()
    text = torch.tensor([[5, 103, 104, 6]])
    model.eval()(input_ids=text)
    model.train()(input_ids=text.flip(1))
    model.train()(input_ids=text, mm_token_type_ids=torch.zeros_like(text))  # text about these tokens
    with pytest.raises(ValueError, match="for images or videos, but none are given.*`VambaDataCollator`"):
        model.train()(input_ids=text)


@pytest.mark.parametrize(
    "inputs", ({}, VIDEO, {"input_ids": make_text(length=3), "inputs_embeds": torch.zeros(1, 3, 64)})
)
def test_text_in_neither_or_both_forms(model, inputs):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**inputs)


BAD_VIDEOS = {
    "pixels, flat": ({"pixel_values_videos": PIXELS.flatten()}, r"`pixel_values_videos` .*got \(37632,\)"),
    "pixels left out": ({"pixel_values_videos": None}, "`video_grid_thw` was given without `pixel_values_videos`"),
    "grid left out": ({"video_grid_thw": None}, "`pixel_values_videos` was given without `video_grid_thw`"),
    "grid of two": ({"video_grid_thw": torch.tensor([[4, 4]])}, r"`video_grid_thw` .*got \(1, 2\)"),
    "negative row": ({"video_sample_ids": torch.tensor([-1])}, r"`video_sample_ids` .*got \[-1\]"),
    "too many rows": ({"video_sample_ids": torch.tensor([0, 0])}, "`video_sample_ids` has 2 entries for the 1 of"),
    "row of too large a number": (
        {"video_sample_ids": torch.tensor([2**40])},
        r"`video_sample_ids` must lie in 0\.\.",
    ),
    "no rows": ({"video_sample_ids": torch.zeros(0).long()}, "`video_sample_ids` has 0 entries for the 1"),
    "half a frame": ({"segment_frames": 2.5}, "`segment_frames` must be an integer of at least 1, got 2.5"),
    "text cache": ({"cache": DynamicCache()}, "`cache` must be a VambaCache, got DynamicCache"),
    "cache of another model": (
        {"cache": VambaCache(tiny_model(num_hidden_layers=2).config)},
        "cache is of another model",
    ),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_videos_to_encode(model, case):
    inputs, message = BAD_VIDEOS[case]
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        model.encode_video(**{**VIDEO, **inputs})
