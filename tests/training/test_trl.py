# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers and Transformers' own train the tiny model: text, images and video files."""

from functools import lru_cache

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from synthetic_videos import iter_frames, sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import transformers_vamba
from transformers_vamba import VambaDataCollator
from transformers_vamba.training.preferences import VambaPreferenceCollator


QUESTION = "What appeared?"
ANSWERS = ["a red circle", "a green square", "a yellow triangle", "an orange cross"]
# Where a trainer gets no image or video, no gradient reaches these; nobody reads what the last mixer gives.
VIDEO_PARTS = (".visual.", ".cross_attn.", ".vision_mixer.", ".alpha")
UNREAD = ".layers.3.vision_mixer."


@pytest.fixture
def arguments(tmp_path):
    """What every trainer is given here: two steps of two rows, on the CPU, that nobody hears of."""
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def train(trainer, has_media: bool) -> set[str]:
    """
    Trains, and returns the names of the parameters that changed: all that are trained and have a part in the result.
    The loss and the parameters must be finite.
    """
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == trainer.args.max_steps and torch.isfinite(torch.tensor(losses)).all()

    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in after.values())
    changed = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
    unread = (UNREAD,) if has_media else VIDEO_PARTS
    expected = {name for name, p in after.items() if p.requires_grad and not any(part in name for part in unread)}
    # A bias of keys adds one number to all scores of a query: its gradient is nothing but rounding.
    assert {name for name in expected if not name.endswith("k_proj.bias")} <= changed <= expected
    return changed


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if len(content) == 1 else list(content)}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def message(text: str, role: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@lru_cache
def image(seed: int) -> Image.Image:
    return Image.fromarray(next(iter_frames(sample_video(seed, 8, "start_end"))))


def images(count: int, row: int) -> dict:
    return {"images": [image(10 * row + i) for i in range(count)]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """Files of 8, 10, 12 and 14 frames."""
    paths = [str(tmp_path_factory.mktemp("videos") / f"{i}.mp4") for i in range(4)]
    for i, path in enumerate(paths):
        write_mp4(path, sample_video(i, 8 + 2 * i, "start_end"))
    return paths


def video_rows(videos: list[str]) -> list[dict]:
    answers = ["a red circle", "red", "a yellow triangle, then an orange cross", "3"]
    return [
        {
            "messages": [
                user({"type": "video", "path": video}, {"type": "text", "text": QUESTION}),
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        }
        for video, answer in zip(videos, answers)
    ]


# TRL's SFT


SFT_ROWS = {
    "text": lambda row: {"messages": [user(QUESTION), assistant(ANSWERS[row])]},
    "text that is no conversation": lambda row: {"text": f"{QUESTION} {ANSWERS[row]}"},
    "prompts of text": lambda row: {"prompt": [user(QUESTION)], "completion": [assistant(ANSWERS[row])]},
    "an image": lambda row: {"image": image(row), "messages": [user(QUESTION), assistant(ANSWERS[row])]},
    "prompts with an image": lambda row: {
        "image": image(row),
        "prompt": [user(QUESTION)],
        "completion": [assistant(ANSWERS[row])],
    },
    "one or two images": lambda row: {
        **images(1 + row % 2, row),
        "messages": [user(QUESTION), assistant(ANSWERS[row]), user("And then?"), assistant("3")],
    },
    "an image or none": lambda row: {
        **images(row % 2, row),
        "prompt": [user(QUESTION)],
        "completion": [assistant(ANSWERS[row])],
    },
}


@pytest.mark.parametrize("kind", SFT_ROWS)
def test_sft(model, tiny_processor, arguments, kind):
    rows = [SFT_ROWS[kind](row) for row in range(4)]
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(**arguments), train_dataset=Dataset.from_list(rows), processing_class=tiny_processor
    )
    train(trainer, has_media="image" in kind)


def test_sft_collator_and_loss_are_those_of_each_row_alone(model, tiny_processor, arguments):
    """TRL's collator, unmodified, on rows with two images, one and none; the loss is the one of the model itself."""
    rows = [
        {**images(2 - row, row), "prompt": [user(QUESTION)], "completion": [assistant(ANSWERS[row])]}
        for row in range(3)
    ]
    args = trl.SFTConfig(**arguments | {"per_device_train_batch_size": 3})
    trainer = trl.SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_processor)
    batch = trainer.data_collator([dict(row) for row in rows])
    loss = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()

    total = count = 0
    for row in rows:
        content = [{"type": "image", "image": image} for image in row["images"]] + [{"type": "text", "text": QUESTION}]
        inputs = tiny_processor.apply_chat_template(
            [user(*content) if row["images"] else user(QUESTION), row["completion"][0]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt = tiny_processor.apply_chat_template([user(QUESTION)], add_generation_prompt=True)
        start = len(tiny_processor.tokenizer(prompt).input_ids) + 2 * len(row["images"])
        with torch.no_grad():
            log_probs = model(**inputs).logits[0, :-1].log_softmax(-1)
        labels = inputs["input_ids"][0, 1:]
        total -= log_probs[torch.arange(len(labels)), labels][start - 1 :].sum().item()
        count += len(labels) - (start - 1)
    assert (batch["labels"] != -100).sum() == count
    assert loss == pytest.approx(total / count, rel=1e-4)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL wants Transformers 5.18 for it and says so"
)
def test_sft_on_the_words_of_the_assistant_alone(model, tiny_processor, arguments):
    rows = [SFT_ROWS["one or two images"](row) for row in range(4)]
    args = trl.SFTConfig(**arguments, assistant_only_loss=True)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_processor)
    batch = trainer.data_collator([dict(row) for row in rows])
    learned = [labels[labels != -100] for labels in batch["labels"]]
    assert tiny_processor.batch_decode(learned) == [f"{answer}<|im_end|>\n3<|im_end|>\n" for answer in ANSWERS]
    train(trainer, has_media=True)


@pytest.mark.parametrize("gradient_checkpointing", (True, False))
def test_sft_with_lora(model, tiny_processor, arguments, gradient_checkpointing):
    rows = [SFT_ROWS["an image"](row) for row in range(4)]
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments, gradient_checkpointing=gradient_checkpointing),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )
    assert all(".lora_" in name for name in train(trainer, has_media=True))


@pytest.mark.parametrize("packing", (False, True))
def test_sft_on_video_files(model, tiny_processor, arguments, videos, packing):
    """The data set is left as it is for the collator."""
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments | {"max_steps": 12}, **options),
        train_dataset=Dataset.from_list(video_rows(videos)),
        processing_class=tiny_processor,
        data_collator=VambaDataCollator(tiny_processor, packing=packing),
    )
    train(trainer, has_media=True)
    losses = losses_of(trainer)
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])


# TRL's DPO and GRPO


def preferences(row: int) -> dict:
    return {
        "prompt": [user(QUESTION)],
        "chosen": [assistant(ANSWERS[row])],
        "rejected": [assistant("a purple cross, and then nothing")],
    }


@pytest.mark.parametrize("reference", ("the model's own path", "a model", "the base of an adapter"))
@pytest.mark.parametrize("kind", ("text", "image", "no, one or two images"))
def test_dpo(model, tiny_processor, arguments, kind, reference):
    counts = {"text": None, "image": [1, 1, 1, 1], "no, one or two images": [0, 2, 1, 1]}[kind]
    rows = [preferences(row) | (images(counts[row], row) if counts else {}) for row in range(4)]
    trainer = trl.DPOTrainer(
        model,
        ref_model=AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT) if reference == "a model" else None,
        args=trl.DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if "adapter" in reference else None,
    )
    train(trainer, has_media=counts is not None)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[1] != 0  # model and reference are one at first


@pytest.mark.parametrize("batch_size", (1, 2))
@pytest.mark.parametrize("reference", ("a model", "the base of an adapter"))
def test_dpo_on_video_files(model, tiny_processor, arguments, videos, reference, batch_size):
    """In the forms of `VambaDataCollator`: in the messages, and in a column."""
    rows = [
        {
            "prompt": [user({"type": "video", "path": video if i % 2 else None}, {"type": "text", "text": QUESTION})],
            "chosen": [message(ANSWERS[i], "assistant")],
            "rejected": [message("a purple cross, and then nothing", "assistant")],
            "images": [],
            "videos": [] if i % 2 else [video],
        }
        for i, video in enumerate(videos)
    ]
    trainer = trl.DPOTrainer(
        model,
        ref_model=AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT) if reference == "a model" else None,
        args=trl.DPOConfig(
            **arguments | {"per_device_train_batch_size": batch_size}, remove_unused_columns=False, max_length=None
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor,
        data_collator=VambaPreferenceCollator(tiny_processor),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear") if "adapter" in reference else None,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    answers = [
        tiny_processor.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"])
    ]
    assert answers == [f"{text}<|im_end|>\n" for text in [*ANSWERS[:2], *["a purple cross, and then nothing"] * 2]]
    train(trainer, has_media=True)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[1] != 0


def test_preferences_score_each_answer_with_its_video(model, tiny_processor, videos):
    """And of a prompt that holds an answer itself, only the new one counts."""
    prompt = [user({"type": "video", "path": videos[0]}, {"type": "text", "text": QUESTION}), assistant("red")]
    rows = [
        {"prompt": [*prompt, user("So?")], "chosen": [assistant("2")], "rejected": [assistant("a green square")]},
        {"prompt": [user("Well?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        {"prompt": [prompt[0]], "chosen": [assistant("2")], "rejected": [assistant("a green square")]},
    ]
    batch = VambaPreferenceCollator(tiny_processor)(rows)
    mask = batch.pop("completion_mask").bool()
    with torch.no_grad():
        logits = model(**batch).logits
        for i in range(6):
            answer = rows[i % 3][("chosen", "rejected")[i // 3]]
            single = VambaDataCollator(tiny_processor)([{"messages": [*rows[i % 3]["prompt"], *answer]}])
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(logits[i, :length], model(**single).logits[0], atol=1e-3, rtol=1e-3)
            assert tiny_processor.decode(batch["input_ids"][i][mask[i]]) == f"{answer[0]['content']}<|im_end|>\n"
    with pytest.raises(ValueError, match=r"lacks \['rejected'\], got \['chosen', 'prompt'\]"):
        VambaPreferenceCollator(tiny_processor)([{name: rows[0][name] for name in ("prompt", "chosen")}])
    with pytest.raises(ValueError, match="take `packing=False` and `on_error='raise'`"):
        VambaPreferenceCollator(tiny_processor, packing=True)


def reward(completions, **kwargs):
    """Of two answers to a question, always the second one is better."""
    return [float(i % 2) for i in range(len(completions))]


ONLINE = {
    "GRPO, fresh answers": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "GRPO, answers used twice": (trl.GRPOTrainer, trl.GRPOConfig, {"num_iterations": 2, "steps_per_generation": 1}),
    "GRPO, several steps for a generation": (trl.GRPOTrainer, trl.GRPOConfig, {"steps_per_generation": 2}),
    "GRPO, held near the reference": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.1}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, {}),
    "RLOO, without a reference": (trl.RLOOTrainer, trl.RLOOConfig, {"beta": 0.0}),
}


@pytest.mark.parametrize("options", ONLINE)
@pytest.mark.parametrize("kind", ("text", "image", "one or two images"))
def test_grpo_and_rloo(model, tiny_processor, arguments, kind, options):
    counts = {"text": None, "image": [1, 1, 1, 1], "one or two images": [2, 1, 2, 1]}[kind]
    rows = [{"prompt": [user(QUESTION)]} | (images(counts[row], row) if counts else {}) for row in range(4)]
    trainer_class, config_class, options = ONLINE[options]
    args = arguments | {"num_generations": 2, "max_completion_length": 6, "temperature": 5.0}
    args["per_device_train_batch_size"] = 4  # two questions, two answers to each
    trainer = trainer_class(
        model,
        reward_funcs=reward,
        args=config_class(**args, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor,
    )
    train(trainer, has_media=counts is not None)


def test_grpo_scores_answers_with_the_images_that_they_were_given_to(model, tiny_processor, arguments):
    """Log-probabilities of a training step are those of generation: the images of each row are where they belong."""
    rows = [{"prompt": [user(QUESTION)]} | images(1 + row % 2, row) for row in range(2)]
    args = arguments | {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4}
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor,
    )
    batch = trainer._prepare_inputs([row for row in rows for _ in range(2)])
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    prompt_ids, prompt_mask, completion_ids, completion_mask = (batch[name] for name in names)
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        model.eval(),
        torch.cat([prompt_ids, completion_ids], dim=1),
        torch.cat([prompt_mask, completion_mask], dim=1),
        completion_ids.shape[1],
        **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")},
    )
    for i in range(4):
        messages = trl.data_utils.prepare_multimodal_messages([user(QUESTION)], images=rows[i // 2]["images"])
        inputs = tiny_processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        completion = completion_ids[i][completion_mask[i].bool()]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], completion[None]], dim=1)
        for name in ("attention_mask", "mm_token_type_ids"):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)), value=name == "attention_mask")
        with torch.no_grad():
            expected = model(**inputs).logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        expected = expected[torch.arange(len(completion)), completion]
        torch.testing.assert_close(log_probs[i, : len(completion)].detach(), expected, atol=1e-4, rtol=1e-3)


# What TRL cannot do


@pytest.mark.parametrize("name", ("SFT", "DPO", "GRPO", "RLOO"))
def test_trl_does_not_train_on_videos_silently_without_them(model, tiny_processor, arguments, videos, name):
    """TRL's own data preparation knows images alone: of a video in the messages only the text is left."""
    question = [user({"type": "video", "path": videos[0]}, {"type": "text", "text": QUESTION})]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ANSWERS]
    row = {
        "SFT": {"prompt": question, "completion": answers[0]},
        "DPO": {"prompt": question, "chosen": answers[0], "rejected": answers[1]},
    }.get(name, {"prompt": question})
    is_online = name in ("GRPO", "RLOO")
    options = {"max_completion_length": 2, "num_generations": 2} if is_online else {}
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(**arguments, **options),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=tiny_processor,
        **({"reward_funcs": reward} if is_online else {}),
        **({"ref_model": AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)} if name == "DPO" else {}),
    )
    with pytest.raises(ValueError, match="for images or videos, but none are given.*`VambaPreferenceCollator`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_trl_loads_the_model_by_its_path(arguments):
    rows = [SFT_ROWS["an image"](row) for row in range(4)]
    trainer = trl.SFTTrainer(
        str(TINY_CHECKPOINT), args=trl.SFTConfig(**arguments), train_dataset=Dataset.from_list(rows)
    )
    assert isinstance(trainer.model, transformers_vamba.VambaForConditionalGeneration)
    train(trainer, has_media=True)


# Transformers' own Trainer


def video_trainer(model, tiny_processor, arguments, videos, **options):
    """Plain gradient descent without shuffling, so that runs can be compared number by number."""
    same = {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "remove_unused_columns": False}
    return Trainer(
        model,
        args=TrainingArguments(**arguments | same | {"train_sampling_strategy": "sequential"} | options),
        train_dataset=video_rows(videos),
        data_collator=VambaDataCollator(tiny_processor),
        processing_class=tiny_processor,
    )


def assert_same_parameters(model, expected, **tolerances):
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), rtol=0, **tolerances)


def test_trainer_on_video_files(model, tiny_processor, arguments, videos):
    trainer = video_trainer(model, tiny_processor, arguments, videos, optim="adamw_torch", max_steps=12)
    train(trainer, has_media=True)
    losses = losses_of(trainer)
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
    trainer.save_model()
    loaded = AutoModelForImageTextToText.from_pretrained(trainer.args.output_dir)
    assert_same_parameters(loaded, trainer.model, atol=0)
    assert isinstance(AutoProcessor.from_pretrained(trainer.args.output_dir), type(tiny_processor))


@pytest.mark.parametrize("batch_size, num_steps", [(1, 4), (2, 2)])
def test_gradient_accumulation_equals_a_large_batch(model, tiny_processor, arguments, videos, batch_size, num_steps):
    """Videos and answers of different lengths: every token of an answer counts the same."""
    large = video_trainer(model, tiny_processor, arguments, videos, per_device_train_batch_size=4)
    train(large, has_media=True)
    small = video_trainer(
        AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT),
        tiny_processor,
        arguments,
        videos,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=num_steps,
    )
    train(small, has_media=True)
    assert_same_parameters(small.model, large.model, atol=1e-5)
    assert losses_of(small) == pytest.approx(losses_of(large), rel=1e-4)


@pytest.mark.parametrize("gradient_checkpointing", (True, False))
def test_resume(model, tiny_processor, arguments, videos, gradient_checkpointing):
    """A run that goes on from the checkpoint of its second step ends where it ends without the interruption."""
    options = {
        "optim": "adamw_torch",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": gradient_checkpointing,
    }
    whole = video_trainer(model, tiny_processor, arguments, videos, **options)
    train(whole, has_media=True)
    resumed = video_trainer(
        AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT), tiny_processor, arguments, videos, **options
    )
    resumed.train(resume_from_checkpoint=f"{arguments['output_dir']}/checkpoint-2")
    assert resumed.state.global_step == 4
    assert_same_parameters(resumed.model, whole.model, atol=1e-6)
