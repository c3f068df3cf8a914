# SPDX-License-Identifier: Apache-2.0
"""What Vamba's trainers add to Transformers': weight decay, rows that weigh equally, the model card."""

import ast
import copy
import re

import numpy as np
import peft
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny_vamba import TINY_CHECKPOINT, tiny_model
from transformers import TrainingArguments

from transformers_vamba import STAGE_PARTS, VambaDataCollator, lora_target_modules, train_parts
from transformers_vamba.training.distillation import VambaDistillationTrainer
from transformers_vamba.training.peft import VambaPeftModel
from transformers_vamba.training.trainer import VambaTrainer, VambaTrainerMixin


TEXT_ROWS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]}]
)


class SFTTrainer(VambaTrainerMixin, trl.SFTTrainer):
    pass


@pytest.fixture
def rows():
    """Answers of very different lengths about videos of different lengths."""
    rng = np.random.default_rng(0)
    answers = ["2", "a green circle, then a blue square, then a red triangle"]
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": rng.integers(0, 256, (4 + 2 * i, 56, 56, 3), dtype=np.uint8)},
                        {"type": "text", "text": "What moved?"},
                    ],
                },
                {"role": "assistant", "content": answer},
            ]
        }
        for i, answer in enumerate(answers)
    ]


def make_trainer(trainer_class, model, tiny_processor, rows, output_dir, config=TrainingArguments, **options):
    given = {"rows_weigh_equally": options.pop("rows_weigh_equally")} if "rows_weigh_equally" in options else {}
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    if config is trl.SFTConfig:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return trainer_class(
        model,
        args=config(str(output_dir), **arguments | options),
        train_dataset=rows,
        data_collator=VambaDataCollator(
            tiny_processor, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}}
        ),
        processing_class=tiny_processor,
        **given,
    )


# Weight decay


def decays(model, trainer) -> dict[str, float]:
    """The weight decay of each parameter that the optimizer holds."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("trainer_class", (VambaTrainer, VambaDistillationTrainer))
@pytest.mark.parametrize("stage", (1, 2))
def test_weight_decay_of_the_stages(model, tiny_processor, rows, tmp_path, stage, trainer_class):
    trained = train_parts(model, STAGE_PARTS[stage])
    decay = decays(model, make_trainer(trainer_class, model, tiny_processor, rows, tmp_path, weight_decay=0.01))
    assert decay.keys() == set(trained)
    for name, value in decay.items():
        is_matrix = name.endswith(("_proj.weight", "embed_tokens.weight", "mlp.0.weight", "mlp.2.weight"))
        assert value == (0.01 if is_matrix else 0.0), name


def test_weight_decay_beside_an_adapter(model, tiny_processor, rows, tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=lora_target_modules(model.config), modules_to_save=["conv1d"], inference_mode=False
    )
    model = VambaPeftModel(model, config)
    decay = decays(
        model,
        make_trainer(SFTTrainer, model, tiny_processor, TEXT_ROWS, tmp_path, config=trl.SFTConfig, weight_decay=0.1),
    )
    assert {name for name, value in decay.items() if value} == {name for name in decay if ".lora_" in name}
    assert any(name.endswith(".alpha") for name in decay) and any(".conv1d." in name for name in decay)


# What a row weighs


@pytest.mark.parametrize("trainer_class", (VambaTrainer, VambaDistillationTrainer))
@pytest.mark.parametrize("equally", (True, False))
def test_rows_weigh_equally_or_by_their_tokens(model, tiny_processor, rows, tmp_path, equally, trainer_class):
    if trainer_class is VambaDistillationTrainer:
        collator = VambaDataCollator(tiny_processor, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}})
        for i, row in enumerate(rows):
            count = int((collator([row])["labels"] != -100).sum())
            row |= {"top_k_values": [[2.0, 1.0]] * count, "top_k_indices": [[5 + i, 7]] * count}
    trainer = make_trainer(
        trainer_class,
        model,
        tiny_processor,
        rows,
        tmp_path,
        rows_weigh_equally=equally,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    expected_model = copy.deepcopy(model).train()
    batches = [trainer.data_collator([row]) for row in rows]
    counts = torch.tensor([float((batch["labels"] != -100).sum()) for batch in batches])
    weights = torch.full((2,), 0.5) if equally else counts / counts.sum()
    for batch, weight in zip(batches, weights):
        (weight * trainer.compute_loss(expected_model, dict(batch))).backward()
    trainer.train()
    for name, parameter in expected_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                model.get_parameter(name).data, parameter.data - parameter.grad, atol=2e-5, rtol=1e-4, msg=name
            )


def test_rows_that_weigh_equally_come_one_by_one(model, tiny_processor, rows, tmp_path):
    with pytest.raises(ValueError, match="set `per_device_train_batch_size=1`, got 2"):
        make_trainer(
            VambaTrainer, model, tiny_processor, rows, tmp_path, rows_weigh_equally=True, per_device_train_batch_size=2
        )


# The model card


def read_card(folder) -> tuple[ModelCard, list[str]]:
    """The card, and what its example loads, by name."""
    card = ModelCard.load(folder / "README.md")
    assert "None" not in card.content and "[More Information Needed]" not in card.content
    (example,) = re.findall("```python\n(.*?)```", card.content, re.DOTALL)
    ast.parse(example)
    assert '"type": "video"' in example
    return card, re.findall(r'from_pretrained\((?:model, )?"([^"]+)"', example)


def test_card_of_an_adapter(model, tiny_processor, rows, tmp_path):
    model = VambaPeftModel(model, peft.LoraConfig(r=4, target_modules=lora_target_modules(model.config)))
    trainer = make_trainer(
        SFTTrainer,
        model,
        tiny_processor,
        TEXT_ROWS,
        tmp_path,
        config=trl.SFTConfig,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        card, loaded = read_card(folder)
        assert loaded == [str(TINY_CHECKPOINT), str(folder), str(TINY_CHECKPOINT)]
        assert card.data.library_name == "peft" and str(TINY_CHECKPOINT) in card.text
    trainer.model.save_pretrained(tmp_path / "checkpoint-1")
    assert read_card(tmp_path / "checkpoint-1")[1] == loaded


def test_card_of_a_whole_model(model, tiny_processor, rows, tmp_path):
    trainer = make_trainer(VambaTrainer, model, tiny_processor, rows, tmp_path)
    trainer.create_model_card(model_name="mine", tags="cats")
    card, loaded = read_card(tmp_path)
    assert loaded == [str(tmp_path)] * 2
    assert {"vamba", "cats"} <= set(card.data.tags) and str(TINY_CHECKPOINT) in card.text


def test_card_of_an_adapter_of_a_model_without_a_name(tmp_path):
    model = tiny_model()
    VambaPeftModel(model, peft.LoraConfig(r=4, target_modules=lora_target_modules(model.config))).save_pretrained(
        tmp_path
    )
    assert "was not loaded from a checkpoint" in read_card(tmp_path)[0].text
