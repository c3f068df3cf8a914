# SPDX-License-Identifier: Apache-2.0
"""Distillation: the published loss on stored logits, and a Qwen2-VL teacher that sees the same images and videos."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_vamba import FIXTURES, TINY_CHECKPOINT
from transformers import (
    AutoModelForImageTextToText,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    TrainingArguments,
)

from transformers_vamba import VambaDataCollator, VambaForConditionalGeneration
from transformers_vamba.training.distillation import VambaDistillationTrainer, distillation_loss, qwen2_vl_samples


@pytest.fixture
def student():
    return AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture
def teacher(student):
    """A tiny Qwen2-VL of random weights with the student's vocabulary, sure of what it says."""
    torch.manual_seed(0)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": student.config.text_config.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.5,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        **{name: getattr(student.config, name) for name in names},
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def frames(seed: int, num_frames: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 112, 112, 3), dtype=np.uint8)


def conversation(media: list[dict], *turns: tuple[str, str]) -> list[dict]:
    messages = []
    for question, answer in turns:
        content = [*media, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        media = []
    return messages


@pytest.fixture
def rows():
    """A video, two images around a video, and text alone, with answers of different lengths."""
    videos = [{"type": "video", "video": frames(i, 4 + 4 * i)} for i in range(2)]
    images = [{"type": "image", "image": frames(2 + i, 1)[0]} for i in range(2)]
    return [
        {"messages": conversation([videos[0]], ("What moved?", "red"), ("Where?", "to the left"))},
        {"messages": conversation([images[0], videos[1], images[1]], ("How many?", "2"))},
        {"messages": conversation([], ("Well?", "a green circle, then a blue square"))},
    ]


def make_trainer(model, tiny_processor, output_dir, rows, packing=False, **options):
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    arguments |= {
        name: options.pop(name) for name in list(options) if name not in ("teacher", "top_k", "distill_coeff")
    }
    return VambaDistillationTrainer(
        model,
        args=TrainingArguments(
            str(output_dir),
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=rows,
        data_collator=VambaDataCollator(
            tiny_processor, packing=packing, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}}
        ),
        **options,
    )


def published_case():
    video, distill = (load_file(FIXTURES / "cases" / f"{name}.safetensors") for name in ("video", "distill"))
    names = ("input_ids", "labels", "pixel_values_videos", "video_grid_thw")
    return {name: video[name] for name in names} | {
        name: distill[name] for name in ("top_k_values", "top_k_indices")
    }, (video["loss"], distill["loss"])


def test_loss_is_the_published_one():
    inputs, (_, expected) = published_case()
    logits = load_file(FIXTURES / "cases" / "video.safetensors")["logits"][inputs["labels"] != -100]
    loss = distillation_loss(logits, inputs["top_k_values"], inputs["top_k_indices"])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_trainer_adds_the_published_loss_to_that_of_the_labels(tiny_processor, tmp_path):
    model = VambaForConditionalGeneration.from_pretrained(FIXTURES / "published").train()
    inputs, (loss, divergence) = published_case()
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(model, tiny_processor, tmp_path, [], distill_coeff=coefficient)
        given = trainer.compute_loss(model, dict(inputs))
        torch.testing.assert_close(given, loss + coefficient * divergence, atol=1e-4, rtol=0)


@pytest.mark.parametrize("packing", (True, False))
def test_teacher_is_given_what_its_own_processor_gives(tiny_processor, student, teacher, rows, packing):
    batch = VambaDataCollator(
        tiny_processor, packing=packing, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}}
    )(rows)
    kept = batch["labels"] != -100
    samples = list(qwen2_vl_samples(batch, kept, student.config))
    size = {"shortest_edge": 112 * 112, "longest_edge": 112 * 112}
    qwen2_vl_processor = Qwen2VLProcessor(
        tiny_processor.image_processor,
        tiny_processor.tokenizer,
        Qwen2VLVideoProcessor(size=size, do_sample_frames=False),
        chat_template=tiny_processor.chat_template,
    )
    assert len(samples) == len(rows)
    for row, sample in zip(rows, samples):
        expected = qwen2_vl_processor.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_tensors="pt"
        )
        del expected["attention_mask"]
        positions = sample.pop("logits_to_keep")
        assert sample.keys() == expected.keys()
        for name, value in sample.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)
        said = tiny_processor.decode(sample["input_ids"][0, positions])
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert said == "".join(f"{answer}<|im_end|>\n" for answer in answers)


def expected_loss(student, teacher, tiny_processor, rows, top_k, coefficient):
    """Row by row, each with inputs and logits of its own."""
    losses, count = 0.0, 0
    for row in rows:
        collator = VambaDataCollator(tiny_processor, processor_kwargs={"videos_kwargs": {"do_sample_frames": False}})
        batch = collator([row])
        labels = batch.pop("labels")[0, 1:]
        predicting = (labels != -100).nonzero()[:, 0]
        logits = student(**batch).logits[0, predicting]
        losses = losses + F.cross_entropy(logits, labels[predicting], reduction="sum")
        every = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        (sample,) = qwen2_vl_samples(batch, every, student.config)
        with torch.no_grad():
            guesses = teacher(**sample).logits[0, predicting]
        for student_logits, teacher_logits in zip(logits, guesses):
            likeliest = teacher_logits.argsort(descending=True)[:top_k]
            p, q = (x[likeliest].softmax(-1) for x in (teacher_logits, student_logits))
            losses = losses + coefficient * (p * (p.log() - q.log())).sum()
        count += len(predicting)
    return losses / count


@pytest.mark.parametrize("packing", (False, True))
def test_loss_with_a_teacher_is_that_of_each_row_alone(tiny_processor, student, teacher, rows, tmp_path, packing):
    student.train()
    trainer = make_trainer(
        student, tiny_processor, tmp_path, rows, packing, teacher=copy.deepcopy(teacher), top_k=7, distill_coeff=0.3
    )
    batch = trainer.data_collator(rows)
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    assert "labels" in batch  # the trainer reads them once more
    assert outputs.logits.shape[1] < batch["labels"].shape[1]
    torch.testing.assert_close(
        loss, expected_loss(student, teacher, tiny_processor, rows, 7, 0.3), atol=1e-5, rtol=1e-5
    )


def test_training_brings_the_student_to_the_teacher(tiny_processor, student, teacher, rows, tmp_path):
    trainer = make_trainer(
        student, tiny_processor, tmp_path, rows, teacher=teacher, distill_coeff=10.0, optim="adamw_torch", max_steps=10
    )
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.evaluate(rows)["eval_loss"] < 0.5 * losses[0]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())


def test_gradient_accumulation_equals_a_large_batch(tiny_processor, teacher, rows, tmp_path):
    models = []
    for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}):
        model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
        make_trainer(model, tiny_processor, tmp_path, rows, teacher=copy.deepcopy(teacher), **options).train()
        models.append(dict(model.named_parameters()))
    torch.testing.assert_close(*models, atol=1e-5, rtol=0)


def test_stored_logits_go_through_the_collator(tiny_processor, student, rows, tmp_path):
    collator = make_trainer(student, tiny_processor, tmp_path, rows).data_collator
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        count = (collator([row])["labels"] != -100).sum()
        row["top_k_values"] = torch.randn(count, 5, generator=generator).tolist()
        row["top_k_indices"] = torch.randint(0, 400, (count, 5), generator=generator).tolist()
    trainer = make_trainer(student, tiny_processor, tmp_path, rows)
    trainer.train()
    batch = trainer.data_collator(rows)
    assert batch["top_k_values"].tolist() == [k for row in rows for k in torch.tensor(row["top_k_values"]).tolist()]
    assert batch["top_k_indices"].shape == ((batch["labels"] != -100).sum(), 5)
    del rows[0]["top_k_values"]
    with pytest.raises(ValueError, match="2 of the 3 rows of a batch have `top_k_values`: all must."):
        trainer.data_collator(rows)


def test_metrics_get_a_logit_for_each_label(tiny_processor, student, teacher, rows, tmp_path):
    trainer = make_trainer(student, tiny_processor, tmp_path, rows, teacher=teacher, per_device_eval_batch_size=2)
    (logits, labels, _), batch = trainer.predict(rows), trainer.data_collator(rows)
    assert labels.shape == batch["labels"].shape == logits.shape[:2]
    expected = torch.cat([student.eval()(**trainer.data_collator([row])).logits[0, -3:] for row in rows])
    lengths = batch["attention_mask"].sum(1)
    actual = torch.cat([torch.tensor(logits[i, n - 3 : n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_wrong_arguments(tiny_processor, student, teacher, rows, tmp_path):
    trainer = make_trainer(student, tiny_processor, tmp_path, rows)
    with pytest.raises(ValueError, match="without a teacher needs `top_k_values` and `top_k_indices`"):
        trainer.train()
    teacher.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="must share a vocabulary, got 512 and 300"):
        make_trainer(student, tiny_processor, tmp_path, rows, teacher=teacher)


@pytest.mark.parametrize("source", ("teacher", "stored"))
def test_a_batch_that_cannot_be_read_changes_nothing(tiny_processor, student, teacher, rows, tmp_path, source):
    broken = {"messages": conversation([{"type": "video", "path": str(tmp_path / "missing.mp4")}], ("What?", "red"))}
    collator = make_trainer(student, tiny_processor, tmp_path, rows).data_collator
    if source == "stored":
        for row in rows:
            count = int((collator([row])["labels"] != -100).sum())
            row |= {"top_k_values": [[1.0, 0.5]] * count, "top_k_indices": [[3, 4]] * count}
    options = {"teacher": teacher} if source == "teacher" else {}
    trainer = make_trainer(
        student, tiny_processor, tmp_path, [rows[2], broken], per_device_train_batch_size=1, **options
    )
    trainer.data_collator.on_error = "skip"
    trainer.data_collator(rows[2:])
    before = {name: p.clone() for name, p in student.named_parameters()}
    batch = trainer.data_collator([broken])
    loss = trainer.compute_loss(student.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in student.parameters())
    trainer.train()
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())
