# SPDX-License-Identifier: Apache-2.0
"""Rows with and without media: alone, as a padded batch and as a packed row. And their gradients, compared."""

import torch
from tiny_vamba import make_media, make_text


# A batch of four: nothing, one image, two videos, a video before an image. Texts of different lengths.
ROWS = [
    {},
    make_media("image", (1, 4, 8), seed=1),
    make_media("video", (2, 4, 4), (3, 4, 6), seed=2),
    make_media("image", (1, 4, 4), seed=3) | make_media("video", (4, 6, 4), seed=4),
]
TEXTS = [make_text(length=length, seed=length)[0] for length in (5, 9, 12, 7)]
TOKEN_TYPES = [[], [1], [2, 2], [2, 1]]


def make_row(row: int) -> dict[str, torch.Tensor]:
    types = torch.zeros_like(TEXTS[row])
    types[: len(TOKEN_TYPES[row])] = torch.tensor(TOKEN_TYPES[row], dtype=torch.long)
    return {"input_ids": TEXTS[row][None], "mm_token_type_ids": types[None], **ROWS[row]}


def make_batch(padding_side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, TEXTS))
    batch = {name: torch.zeros(4, length, dtype=torch.long) for name in ("input_ids", "mm_token_type_ids")}
    batch["attention_mask"] = torch.zeros(4, length, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        place = slice(0, len(text)) if padding_side == "right" else slice(length - len(text), length)
        single = make_row(row)
        batch["input_ids"][row, place] = text
        batch["mm_token_type_ids"][row, place] = single["mm_token_type_ids"][0]
        batch["attention_mask"][row, place] = 1
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        batch[name] = torch.cat([media[name] for media in ROWS if name in media])
    batch["image_sample_ids"] = torch.tensor([1, 3])
    batch["video_sample_ids"] = torch.tensor([2, 2, 3])
    return batch


SAMPLES = (2, 0, 3, 1)  # the rows, the one without media in the middle


def pack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The samples, rows of their own, one behind the other in one row."""
    packed = {
        name: torch.cat([sample[name] for sample in samples], dim=1) for name in ("input_ids", "mm_token_type_ids")
    }
    packed["position_ids"] = torch.cat([torch.arange(sample["input_ids"].shape[1]) for sample in samples])[None]
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grid = f"{kind}_grid_thw"
        owners = [index for index, sample in enumerate(samples) if grid in sample for _ in sample[grid]]
        if owners:
            packed[f"{kind}_sample_ids"] = torch.tensor(owners)
            packed |= {name: torch.cat([s[name] for s in samples if name in s]) for name in (pixels, grid)}
    return packed


def doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected):
    """To rounding: norms and rotary angles are float32 in every dtype."""
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm() + 1e-9, name
