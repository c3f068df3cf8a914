# SPDX-License-Identifier: Apache-2.0
"""The published stages' trained parts, and the checkpoint that a killed run goes on from."""

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_config, tiny_model

from transformers_vamba import STAGE_PARTS, VambaForConditionalGeneration, last_whole_checkpoint, train_parts


LAST_MIXER = "model.language_model.layers.2.vision_mixer."


def is_trained(name: str, stage: int) -> bool:
    if name.startswith(LAST_MIXER):
        return False
    if stage == 1:
        return any(part in name for part in (".cross_attn.", ".vision_mixer.")) or name.endswith(".alpha")
    return name.startswith(("model.language_model.", "model.visual.merger."))


# Substrings of the published names that choose what the published runs train.
PUBLISHED_PARTS = {1: ("cross_attn", "vision_mixer", "alpha"), 2: ("visual.merger", "model")}


@pytest.mark.parametrize("stage", (1, 2))
def test_stages_train_what_the_published_ones_do(stage):
    """By the names of the published checkpoint; but for the last mixer, which gets no gradient there either."""
    model = tiny_model()
    trained = set(train_parts(model, STAGE_PARTS[stage]))
    for name, _ in model.named_parameters():
        published = name.removeprefix("model.language_model.")
        published = f"model.{published}" if published != name else name.removeprefix("model.")
        expected = any(part in published for part in PUBLISHED_PARTS[stage]) and not name.startswith(LAST_MIXER)
        assert (name in trained) == expected, name
    assert "lm_head.weight" not in trained


@pytest.mark.parametrize("gradient_checkpointing", (True, False))
@pytest.mark.parametrize("stage", (1, 2))
def test_each_trained_part_gets_a_gradient_and_each_frozen_one_none(stage, gradient_checkpointing):
    model = tiny_model().train()
    names = train_parts(model, STAGE_PARTS[stage])
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    input_ids = make_text(2, 10)
    model(input_ids, labels=input_ids, **make_media("video", (3, 4, 4), (2, 4, 6))).loss.backward()
    assert set(names) == {name for name, _ in model.named_parameters() if is_trained(name, stage)}
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.requires_grad and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name


def test_stages_follow_one_another():
    model = tiny_model()
    first, second = (set(train_parts(model, STAGE_PARTS[stage])) for stage in (1, 2))
    assert first < second
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == second


def test_stage_2_of_a_model_whose_head_is_its_embedding():
    config = tiny_config()
    config.tie_word_embeddings = True
    model = VambaForConditionalGeneration(config)
    names = train_parts(model, STAGE_PARTS[2])
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.requires_grad
    assert len(names) == len(set(names)) == sum(p.requires_grad for p in model.parameters())


def test_a_part_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="has no part 'cross_attention'"):
        train_parts(tiny_model(), ("alpha", "cross_attention"))


def test_last_whole_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path / "absent") is None
    for step in (8, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    for step in (8, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
