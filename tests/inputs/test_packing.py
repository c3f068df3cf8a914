# SPDX-License-Identifier: Apache-2.0
"""Samples packed in one row: none sees the text or the media of another, and gradients are those of each alone."""

from unittest.mock import call, patch

import pytest
import torch
from batches import SAMPLES, TEXTS, assert_same_gradients, gradients, make_row, pack
from tiny_vamba import make_media, make_text, tiny_model

from transformers_vamba import modeling_vamba


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize(
    "attn_implementation, dtype", [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
)
def test_packed_samples_give_what_each_gives_alone(attn_implementation, dtype, training):
    model = tiny_model(attn_implementation, dtype).train(training)
    samples = [make_row(row) for row in SAMPLES]
    with torch.set_grad_enabled(training):
        logits = model(**pack(samples)).logits[0]
        alone = [model(**sample, use_cache=False).logits[0] for sample in samples]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("skip_logits", (False, True))
@pytest.mark.parametrize("row_order", ((2, 0, 3, 1), (0, 1), (0, 0), (3,), (1, 1)))
def test_packed_samples_give_the_gradient_of_each_alone(row_order, skip_logits):
    model = tiny_model(dtype=torch.float64).train()
    samples = [make_row(row) for row in row_order]
    packed = pack(samples)
    # The labels are the text, the first token of each sample included: it must not be predicted from the one before.
    kwargs = {"num_items_in_batch": 7, "skip_logits": skip_logits}
    loss = model(**packed, labels=packed["input_ids"], **kwargs).loss
    losses = [model(**sample, labels=sample["input_ids"], num_items_in_batch=7).loss for sample in samples]
    torch.testing.assert_close(loss, sum(losses))
    assert_same_gradients(gradients(model, [loss]), gradients(model, losses))


def test_one_length_each():
    """As many videos as samples, all of one length, and so the texts: one call of the cross-attention."""
    model = tiny_model(dtype=torch.float64)
    samples = [{"input_ids": make_text(seed=seed), **make_media("video", (3, 4, 6), seed=seed)} for seed in range(3)]
    packed = pack([sample | {"mm_token_type_ids": torch.zeros(1, 12, dtype=torch.long)} for sample in samples])
    attention = model.model.language_model.layers[0].cross_attn
    with patch.object(attention, "forward", wraps=attention.forward) as forward:
        logits = model(**packed).logits[0]
    assert len(forward.call_args.args[1]) == 1
    torch.testing.assert_close(logits, torch.cat([model(**sample).logits[0] for sample in samples]))


def test_sample_ids_left_out():
    """The marks in the text say whose the media are."""
    model = tiny_model(dtype=torch.float64)
    packed = pack([make_row(row) for row in SAMPLES])
    expected = model(**packed).logits
    del packed["image_sample_ids"], packed["video_sample_ids"]
    torch.testing.assert_close(model(**packed).logits, expected)


def test_three_axes_of_positions():
    model = tiny_model(dtype=torch.float64)
    packed = pack([make_row(row) for row in SAMPLES])
    expected = model(**packed).logits
    packed["position_ids"] = packed["position_ids"].expand(3, 1, -1)
    torch.testing.assert_close(model(**packed).logits, expected)


BAD = {
    "sample id too large": ({"video_sample_ids": torch.tensor([0, 0, 4])}, r"`video_sample_ids`.*0\.\.3.*\[0, 0, 4\]"),
    "of another sample": ({"image_sample_ids": torch.tensor([2, 2])}, r"row 2 has 1 images.*2 images"),
    "positions go on": ({"position_ids": torch.arange(33)[None]}, r"0\.\.0, the rows.*start anew"),
    "a mask": ({"attention_mask": torch.ones(1, 33, dtype=torch.long)}, r"0\.\.0, the rows.*start anew"),
    "a cache": ({"use_cache": True}, r"0\.\.0, the rows.*start anew"),
    "marks too short": ({"mm_token_type_ids": torch.zeros(1, 5, dtype=torch.long)}, r"`mm_token_type_ids`.*33.*5"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_packing(changes, message):
    packed = pack([make_row(row) for row in SAMPLES])
    assert packed["input_ids"].shape[1] == sum(len(text) for text in TEXTS) == 33
    with pytest.raises(ValueError, match=message):
        tiny_model()(**packed | changes)


def test_generate_does_not_look_at_the_positions():
    """Which would wait for the device at every token."""
    model = tiny_model()
    inputs = make_row(3)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with patch.object(modeling_vamba, "lengths_of_samples", wraps=modeling_vamba.lengths_of_samples) as looked:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert looked.call_args_list == [call(None)] * 4


@pytest.mark.parametrize("num_items_in_batch", (None, 5))
def test_loss_without_logits(monkeypatch, num_items_in_batch):
    monkeypatch.setattr("transformers_vamba.layers.loss.CHUNK_SIZE", 3)
    model = tiny_model(dtype=torch.float64).train()
    inputs = make_row(2) | {"num_items_in_batch": num_items_in_batch}
    labels = inputs["input_ids"].masked_fill(torch.arange(12) % 4 == 1, -100)
    expected = model(**inputs, labels=labels)
    outputs = model(**inputs, labels=labels, skip_logits=True)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(gradients(model, [outputs.loss]), gradients(model, [expected.loss]))
    with pytest.raises(ValueError, match="needs `labels`"):
        model(**inputs, skip_logits=True)


def test_no_logits_where_there_is_no_label():
    model = tiny_model()
    inputs = make_row(2)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 5] = 3
    with patch.object(model.lm_head, "forward", wraps=model.lm_head.forward) as forward:
        model(**inputs, labels=labels, skip_logits=True)
    assert forward.call_args.args[0].shape == (1, 64)
