# SPDX-License-Identifier: Apache-2.0
"""What training keeps in memory and where, which changes neither the loss nor any gradient."""

import functools

import pytest
import torch
from batches import SAMPLES, assert_same_gradients, doubled, gradients, make_batch, make_row, pack
from tiny_vamba import make_media, make_text, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments

from transformers_vamba import modeling_vamba
from transformers_vamba.inputs.media import Medium
from transformers_vamba.layers.video_context import VideoContext
from transformers_vamba.parallel import gradient_checkpointing as gradient_checkpointing


# Arguments of `activation_checkpointing_enable`, or `gradient_checkpointing_enable`, and the most tokens a part.
FORMS = {
    "parts": ({}, {}, 2**14),
    "parts of 5 tokens": ({}, {}, 5),
    "parts of 1 token": ({}, {}, 1),
    "whole layers": ({"use_reentrant": True}, {}, 2**14),
    "every second layer": ({}, {"every_n_layers": 2}, 5),
    "two layers": ({"layers_per_checkpoint": 2}, {}, 5),
    "all layers": ({"layers_per_checkpoint": 28}, {}, 2**14),
    "offload": ({}, {"offload": True}, 5),
    "offload among the rest": ({"offload": True, "layers_per_checkpoint": 2}, {}, 5),
    "offload whole layers": ({"use_reentrant": True}, {"offload": True}, 5),
    "offload every second layer": ({}, {"offload": True, "every_n_layers": 2}, 5),
    "offload two layers": ({"layers_per_checkpoint": 2}, {"offload": True}, 5),
}


def enable(model, kwargs, options):
    call = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    call(kwargs or None, **options)


def with_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return doubled(batch) | {"labels": labels, "num_items_in_batch": 7}


INPUTS = {
    "padded": with_labels(make_batch("right")),
    "packed": with_labels(pack([make_row(row) for row in SAMPLES])),
    "text": with_labels({"input_ids": make_text(2)}),
}


@functools.cache
def expected(inputs):
    model = tiny_model(dtype=torch.float64).train()
    loss = model(**INPUTS[inputs]).loss
    return loss.detach(), gradients(model, [loss])


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kwargs, options, max_tokens", FORMS.values(), ids=FORMS)
def test_the_gradient_is_that_without(monkeypatch, kwargs, options, max_tokens, inputs):
    monkeypatch.setattr("transformers_vamba.layers.mixer.MAX_TOKENS_PER_PART", max_tokens)
    monkeypatch.setattr("transformers_vamba.parallel.gradient_checkpointing.OffloadedCheckpoint.min_bytes", 0)
    model = tiny_model(dtype=torch.float64).train()
    enable(model, kwargs, options)
    assert model.is_gradient_checkpointing
    for _ in range(2):  # a second step finds what the first has left
        loss = model(**INPUTS[inputs]).loss
        grads = gradients(model, [loss])
        torch.testing.assert_close(loss.detach(), expected(inputs)[0])
        assert_same_gradients(grads, expected(inputs)[1])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_same_gradients(gradients(model, [model(**INPUTS[inputs]).loss]), grads)


@pytest.mark.parametrize("form", ("parts of 5 tokens", "offload", "offload two layers"))
def test_backward_twice(monkeypatch, form):
    kwargs, options, max_tokens = FORMS[form]
    monkeypatch.setattr("transformers_vamba.layers.mixer.MAX_TOKENS_PER_PART", max_tokens)
    monkeypatch.setattr("transformers_vamba.parallel.gradient_checkpointing.OffloadedCheckpoint.min_bytes", 0)
    model = tiny_model(dtype=torch.float64).train()
    enable(model, kwargs, options)
    loss = model(**INPUTS["packed"]).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: 2 * gradient for name, gradient in expected("packed")[1].items()}
    assert_same_gradients({name: model.get_parameter(name).grad for name in twice}, twice)


VIDEO = make_media("video", (20, 4, 6))
VIDEO_BYTES = 20 * 6 * 64 * 4


def kept_video_states(model) -> int:
    """How many tensors as large as the video's hidden states a forward pass through the decoder keeps."""
    storages = {}
    video_states = model.model.embed_media([Medium(VIDEO["pixel_values_videos"], (20, 4, 6))]).detach()

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.detach()  # alive, so that no other takes its address
        return tensor.detach()  # itself, it could hold the graph that holds it

    context = VideoContext([0], [12], lengths=[120])
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model.language_model(
            input_ids=make_text(),
            video_states=video_states,
            video_context=context,
            use_cache=False,
        )
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() >= VIDEO_BYTES for tensor in storages.values())


def test_one_input_is_kept_for_each_checkpoint(monkeypatch):
    monkeypatch.setattr("transformers_vamba.layers.mixer.MAX_TOKENS_PER_PART", 32)
    model = tiny_model(num_hidden_layers=6).train()
    without = kept_video_states(model)
    kept = {}
    for layers_per_checkpoint in (1, 2, 3, 6):
        enable(model, {"layers_per_checkpoint": layers_per_checkpoint}, {})
        kept[layers_per_checkpoint] = kept_video_states(model)
    assert kept == {1: 6, 2: 3, 3: 2, 6: 1} and without > 30


def test_each_layers_input_goes_to_the_host_once(monkeypatch):
    monkeypatch.setattr("transformers_vamba.layers.mixer.MAX_TOKENS_PER_PART", 32)
    monkeypatch.setattr(
        "transformers_vamba.parallel.gradient_checkpointing.OffloadedCheckpoint.min_bytes", VIDEO_BYTES
    )
    monkeypatch.setattr("transformers_vamba.parallel.gradient_checkpointing.HostCopy._PIECE_BYTES", 1000)
    model = tiny_model().train()
    model.model.visual.requires_grad_(False)
    enable(model, {}, {"offload": True})
    assert kept_video_states(model) == 0  # by the graph itself
    offload = model.model.language_model._gradient_checkpointing_func.func
    assert len(offload._copies) == 0
    loss = model(input_ids=make_text(), labels=make_text(), **VIDEO).loss
    copies = list(offload._copies.values())
    # The text and four stretches read it; the last layer has no mixer.
    assert [copy.num_readers for copy in copies] == [5, 5, 1]
    assert all(sum(piece.nbytes for piece in copy._pieces) == VIDEO_BYTES for copy in copies)
    loss.backward()
    assert all(copy.num_readers == 0 and copy._on_device is None for copy in copies)
    del copies, loss
    assert len(offload._copies) == 0


def test_a_storage_that_changed_is_copied_again():
    offload = gradient_checkpointing.OffloadedCheckpoint()
    offload.min_bytes = 0
    tensor = torch.arange(8.0)
    first = offload._pack(tensor[2:6])
    tensor += 1
    second = offload._pack(tensor[::2])
    assert offload._pack(tensor)[0] is second[0] is not first[0]
    assert offload._unpack(first).tolist() == [2, 3, 4, 5]
    assert offload._unpack(second).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("checkpointing", ({}, {"use_reentrant": True}, {"use_reentrant": False}))
@pytest.mark.parametrize("trained", ("none of the tower", "merger", "all of the tower"))
def test_a_frozen_tower_keeps_nothing(monkeypatch, trained, checkpointing):
    monkeypatch.setattr(modeling_vamba, "SEGMENT_FRAMES", 6)
    model = tiny_model(dtype=torch.float64).train()
    everything = expected("padded")[1]
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(trained.startswith("all") or trained in name)
    if checkpointing:
        enable(model, checkpointing, {})
    model.enable_input_require_grads()  # the patches' embedding among them
    num_kept = 0

    def keep(tensor):
        nonlocal num_kept
        num_kept += 1
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.visual.encode_with_gradient([Medium(VIDEO["pixel_values_videos"].double(), (20, 4, 6))])
    # A checkpoint keeps the input of the merger in each of seven segments, and a dummy.
    most = {"none of the tower": 0, "merger": 14 if checkpointing else 10**3, "all of the tower": 10**3}[trained]
    assert num_kept <= most and (num_kept > 0) == (most > 0)
    grads = gradients(model, [model(**INPUTS["padded"]).loss])
    assert grads.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad} - {
        name for name in model.state_dict() if "layers.2.vision_mixer" in name
    }
    assert_same_gradients(grads, {name: everything[name] for name in grads})


@pytest.mark.parametrize(
    "kwargs, options, message",
    [
        ({"layers_per_checkpoint": 0}, {}, "at least 1, got 0"),
        ({"layers_per_checkpoint": "2"}, {}, "at least 1, got '2'"),
        ({"layers_per_checkpoint": 2, "use_reentrant": True}, {}, "`use_reentrant=True`"),
        ({"layers_per_checkpoint": 2}, {"every_n_layers": 2}, "`every_n_layers=2`"),
        ({"offload": True, "use_reentrant": True}, {}, "needs `use_reentrant=False`"),
    ],
)
def test_bad_options(kwargs, options, message):
    with pytest.raises(ValueError, match=message):
        enable(tiny_model(), kwargs, options)


def test_trainer(tmp_path):
    """The options go through `Trainer`, and the run is the same with and without."""
    rows = [
        {"input_ids": row["input_ids"], "labels": row["input_ids"], **make_media("video", (4, 4, 6), seed=seed)}
        for seed, row in enumerate(make_row(1) for _ in range(4))
    ]
    options = {"layers_per_checkpoint": 2, "offload": True}
    weights = []
    for kwargs in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "options": options}):
        kwargs["gradient_checkpointing_kwargs"] = kwargs.pop("options", None)
        arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to="none", optim="sgd", **kwargs)
        arguments = arguments.set_dataloader(train_batch_size=1)
        model = tiny_model()
        Trainer(model, arguments, train_dataset=rows, data_collator=lambda rows: rows[0]).train()
        weights.append(model.state_dict())
        depth = model.model.language_model.layers_per_checkpoint
        assert depth == (2 if kwargs["gradient_checkpointing_kwargs"] else 1)
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])
