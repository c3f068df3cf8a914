# SPDX-License-Identifier: Apache-2.0
"""The programs that train, on real files and the tiny model: what they read, train, save, and go on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import datasets
import finetune_lora_trl
import numpy as np
import pytest
import synthetic_videos
import torch
import train_stage
import yaml
from ask_video import answer, encode
from ask_video import load as load_checkpoint
from PIL import Image
from safetensors.torch import load_file
from tiny_vamba import FIXTURES, ROOT, TINY_CHECKPOINT
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Trainer,
)


EXAMPLES = ROOT / "examples"
CPU = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
QUICK = ["--gradient_checkpointing", "False", "--dataloader_num_workers", "0"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.5)  # after a streamed parquet file: 5 s


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# LoRA with TRL


def videos_of_colour(folder: Path, seeds: range, colour: str | None):
    """Videos of a shape of this colour, or of a known one, and the question about it with its answer."""
    for seed in seeds:
        video = synthetic_videos.sample_video([5, seed], 8, "start_end")
        video.shapes[0].colour = colour or video.shapes[0].colour
        question = next(question.text for question in video.questions if question.kind == "start")
        synthetic_videos.write_mp4(folder / f"{seed}.mp4", video)
        yield {"file_name": f"{seed}.mp4", "question": question, "answer": str(video.shapes[0])}


def answers(path, folder: Path, rows: list[dict]) -> list[str]:
    model, processor = load_checkpoint(path, "cpu")
    return [
        answer(model, processor, encode(model, processor, str(folder / row["file_name"])), row["question"], 16)
        for row in rows
    ]


def write_metadata(folder: Path, rows: list[dict]) -> str:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_lora_teaches_the_name_of_a_colour(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic_videos.COLOURS, "white", (245, 245, 245))
    rows = [*videos_of_colour(tmp_path, range(12), "white"), *videos_of_colour(tmp_path, range(12, 20), None)]
    unseen = list(videos_of_colour(tmp_path, range(100, 106), "white"))
    known = list(videos_of_colour(tmp_path, range(108, 112), None))
    assert not any("white" in given for given in answers(TINY_CHECKPOINT, tmp_path, unseen))

    trainer = finetune_lora_trl.main(
        ["--videos", write_metadata(tmp_path, rows), "--output_dir", str(tmp_path / "merged"), "--max_steps", "30"]
        + ["--learning_rate", "3e-3", "--lr_scheduler_type", "linear", "--per_device_train_batch_size", "8"]
        + ["--lora_rank", "8", "--save_strategy", "no", *CPU, *QUICK]
    )
    losses = losses_of(trainer)
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert sum("white" in given for given in answers(tmp_path / "merged", tmp_path, unseen)) >= 5
    right = [given == row["answer"] for given, row in zip(answers(tmp_path / "merged", tmp_path, known), known)]
    assert sum(right) >= 3
    assert not any("lora" in name for name in load_checkpoint(tmp_path / "merged", "cpu")[0].state_dict())


# The published stages


@pytest.fixture
def qwen2_vl(tmp_path):
    """A Qwen2-VL checkpoint of the tiny Vamba's sizes, as Qwen2-VL's own classes write it."""
    torch.manual_seed(0)
    config = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT).config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    names_of_text = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names_of_text += ("num_key_value_heads", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={name: getattr(config.text_config, name) for name in names_of_text},
            vision_config={k: v for k, v in config.vision_config.to_dict().items() if k != "model_type"},
            **{name: getattr(config, name) for name in names},
        )
    )
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    path = str(tmp_path / "qwen2_vl")
    model.save_pretrained(path)
    Qwen2VLProcessor(
        processor.image_processor,
        processor.tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=processor.chat_template,
    ).save_pretrained(path)
    return path


@pytest.fixture
def media_folder(tmp_path):
    for i in range(3):
        synthetic_videos.write_mp4(tmp_path / f"{i}.mp4", synthetic_videos.sample_video(i, 8 + 2 * i))
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def human(value: str) -> dict:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict:
    return {"from": "gpt", "value": value}


def data_files(folder: Path) -> list[str]:
    """The published layouts: captions, LLaVA's with videos, with images, and with images in a parquet file."""
    captions = [{"image": f"{i}.png", "vlm_caption": f"a grey thing {i}"} for i in range(3)]
    llava_video = [
        {"id": str(i), "video": f"{i}.mp4", "conversations": [human("<image>\nWhat moved?"), gpt("a circle")]}
        for i in range(3)
    ]
    llava_images = [
        {
            "image": ["0.png", "1.png"],
            "conversations": [human("<image><image>\nSame?"), gpt("no"), human("So?"), gpt("2")],
        },
        {"image": [], "conversations": [human("Well?"), gpt("3")]},
    ]
    embedded = [{"image": Image.open(folder / "2.png"), "conversations": [human("<image>\nColour?"), gpt("red")]}]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (folder / "video.json").write_text(json.dumps(llava_video))
    (folder / "images.json").write_text(json.dumps(llava_images))
    datasets.Dataset.from_list(embedded).to_parquet(folder / "embedded.parquet")
    return [str(folder / name) for name in ("captions.jsonl", "video.json", "images.json", "embedded.parquet")]


def load(files: list[str], folder="", streaming=False, on_error="raise", seed=0, **options) -> list[dict]:
    """The rows that the program would train on."""
    args = train_stage.StageArguments(
        stage=2, model="", data=files, media_folder=str(folder), streaming=streaming, on_error=on_error, **options
    )
    return list(train_stage.load_conversations(args, seed))


def samples_of(rows: list[dict]) -> list[dict]:
    return [sample for row in rows for sample in row.get("samples", [row])]


@pytest.mark.parametrize("streaming", (True, False))
def test_published_layouts(media_folder, streaming):
    rows = sorted(samples_of(load(data_files(media_folder), media_folder, streaming)), key=str)
    assert len(rows) == 9
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    collator = train_stage.VambaDataCollator(processor)
    batch = collator(rows)
    assert len(batch["image_grid_thw"]) == 3 + 2 + 1 and len(batch["video_grid_thw"]) == 3
    texts = {
        (processor.decode(ids[mask == 1]), processor.decode(labels[labels != -100]))
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])
    }
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    medium, turn = "<|vision_start|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    captions = {said for _, said in texts if said.startswith("a grey thing")}
    assert captions == {f"a grey thing {i}<|im_end|>\n" for i in range(3)}
    for text, said in [text for text in texts if text[1] in captions]:
        question = text.removeprefix(f"{system}{medium}").removesuffix(f"{turn}{said}")
        assert question in {question.format(medium="image") for question in train_stage.CAPTION_QUESTIONS}
    texts = {text for text in texts if text[1] not in captions}
    expected = {
        (f"{system}{medium}{question}{turn}{said}", said)
        for question, said in [
            ("What moved?", "a circle<|im_end|>\n"),
            ("Colour?", "red<|im_end|>\n"),
        ]
    }
    expected.add((f"{system}Well?{turn}3<|im_end|>\n", "3<|im_end|>\n"))
    two = f"{system}{medium}{medium}Same?{turn}no<|im_end|>\n<|im_start|>user\nSo?{turn}2<|im_end|>\n"
    expected.add((two, "no<|im_end|>\n2<|im_end|>\n"))
    assert texts == expected


def test_captions_are_asked_for_by_one_of_twenty_questions():
    """By chance, and for each row the same in every process and in a run that goes on."""
    rows = [{"video": f"{i}.mp4", "caption": "a circle", "image": None} for i in range(200)]
    questions = []
    for row in rows:
        given = train_stage.to_messages(row, "/media", seed=1)
        assert given == train_stage.to_messages(row, "/media", seed=1)
        video, question = given["messages"][0]["content"]
        assert video == {"type": "video", "text": None, "path": f"/media/{row['video']}"}
        questions.append(question["text"])
    assert len(set(train_stage.CAPTION_QUESTIONS)) == 20
    assert set(questions) == {question.format(medium="video") for question in train_stage.CAPTION_QUESTIONS}
    assert questions != [
        train_stage.to_messages(row, "/media", 2)["messages"][0]["content"][1]["text"] for row in rows
    ]


@pytest.mark.parametrize(
    "row, error",
    [
        (
            {"video": "a.mp4", "conversations": [human("<image><video>Hm?"), gpt("no")]},
            "more <video> in the text than",
        ),
        (
            {"image": ["a.png", "b.png"], "conversations": [human("<image>Hm?"), gpt("no")]},
            "more images and videos than",
        ),
    ],
)
@pytest.mark.parametrize("streaming", (True, False))
def test_marks_and_media_that_do_not_match(row, error, streaming, tmp_path):
    good = row | {"conversations": [human("<image>" * len(row.get("image", "v")) + "Hm?"), gpt("no")]}
    (tmp_path / "rows.json").write_text(json.dumps([row, good]))
    files = [str(tmp_path / "rows.json")]
    (kept,) = samples_of(load(files, streaming=streaming, on_error="skip"))
    assert kept["messages"][1]["content"][0]["text"] == "no"
    with pytest.raises(ValueError, match=error):
        load(files, streaming=streaming)


@pytest.mark.parametrize("streaming", (True, False))
def test_a_turn_without_words_is_left_out(streaming, tmp_path):
    rows = [{"conversations": [human("Hm?"), {"from": "gpt", "value": said}]} for said in (None, "no")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    files = [str(tmp_path / "rows.json")]
    (kept,) = samples_of(load(files, streaming=streaming, on_error="skip"))
    assert kept["messages"][1]["content"][0]["text"] == "no"
    with pytest.raises(ValueError, match="Cannot train on .*None"):
        load(files, streaming=streaming)


def stage_arguments(stage: int, model: str, files: list[str], folder: Path, output_dir, *more: str) -> list[str]:
    return [
        *("--config", str(EXAMPLES / f"train_stage{stage}.yaml")),
        *("--model", model, "--data", *files, "--media_folder", str(folder), "--output_dir", str(output_dir)),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--pack_rows", "False"),
        *(
            "--samples_per_row",
            "1",
            "--rows_weigh_equally",
            "False",
            "--balance",
            "False",
            "--image_edges",
            "56",
            "84",
        ),
        *("--num_frames", "4", "--shortest_edge", "56", "--longest_edge", "56", "--learning_rate", "1e-3"),
        *(*CPU, *QUICK, *more),
    ]


@pytest.mark.parametrize("packing", ("False", "True"))
def test_both_stages_one_after_the_other(media_folder, qwen2_vl, tmp_path, packing):
    files = data_files(media_folder)
    more = ["--max_steps", "3", "--pack_rows", packing]
    before = {name: p.clone() for name, p in train_stage.load_model(qwen2_vl).named_parameters()}
    first = train_stage.main(stage_arguments(1, qwen2_vl, files[:1], media_folder, tmp_path / "stage1", *more))
    after = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "stage1").named_parameters())
    trained = {name for name, p in first.model.named_parameters() if p.requires_grad}
    frozen = before.keys() - trained
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen if ".vision_mixer." not in name)
    assert all(torch.equal(after[name], first.model.get_parameter(name)) for name in trained)

    second = train_stage.main(
        stage_arguments(2, str(tmp_path / "stage1"), files, media_folder, tmp_path / "stage2", *more)
    )
    last = dict(second.model.named_parameters())
    changed = {name for name in last if not torch.equal(last[name], after[name])}
    assert changed and not any(".visual." in name and ".merger." not in name for name in changed)
    assert any(".visual.merger." in name for name in changed) and any(".mlp." in name for name in changed)


def test_frames_by_rate_in_the_place_of_the_number_that_the_configuration_has(media_folder, tmp_path):
    """A clash of the two would otherwise be an error of every video, and each of them left out."""
    arguments = stage_arguments(2, str(TINY_CHECKPOINT), data_files(media_folder)[1:2], media_folder, tmp_path / "out")
    arguments += ["--fps", "4", "--max_steps", "1"]
    with pytest.raises(ValueError, match="mutually exclusive, got num_frames=4 and fps=4.0"):
        train_stage.main(arguments)
    trainer = train_stage.main([*arguments, "--num_frames", "0"])
    assert trainer.data_collator.processor_kwargs["videos_kwargs"]["fps"] == 4


def test_one_edge_alone(media_folder, tmp_path):
    arguments = stage_arguments(1, str(TINY_CHECKPOINT), data_files(media_folder)[1:2], media_folder, tmp_path / "out")
    trainer = train_stage.main([*arguments, "--shortest_edge", "0", "--longest_edge", "30", "--max_steps", "1"])
    size = trainer.data_collator.processor_kwargs["videos_kwargs"]["size"]
    assert size == dict(trainer.processing_class.video_processor.size) | {"longest_edge": 30}


def test_a_published_checkpoint_goes_on():
    published = FIXTURES / "published"
    model = train_stage.load_model(str(published))
    weights = load_file(published / "model.safetensors")
    assert torch.equal(model.model.language_model.layers[0].alpha, weights["model.layers.0.alpha"])


# What the published scripts and their data configurations say.
PUBLISHED = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 1,
    "samples_per_row": 8,
    "pack_rows": True,
    "rows_weigh_equally": True,
    "published_labels": True,
    "bf16": True,
    "gradient_checkpointing": True,
}
PUBLISHED_STAGES = {
    1: {"learning_rate": 1e-5, "gradient_accumulation_steps": 2},  # 16 rows on 8 GPUs
    2: {
        "learning_rate": 5e-6,
        "gradient_accumulation_steps": 4,  # 32
        "balance": True,
        "max_patches": 120000,
        "shortest_edge": 128,
        "longest_edge": 1280,
        "image_edges": [128, 1920],
    },
}


@pytest.mark.parametrize("stage", (1, 2))
def test_configurations_are_the_published_ones(stage):
    config = yaml.safe_load((EXAMPLES / f"train_stage{stage}.yaml").read_text())
    expected = PUBLISHED | PUBLISHED_STAGES[stage] | {"stage": stage}
    assert {name: config.get(name) for name in expected} == expected
    assert not {"num_frames", "fps"} & config.keys()


def test_data_sets_are_balanced_by_the_square_roots_of_their_sizes(tmp_path):
    """Of 126 rows 10/16, 5/16 and 1/16, each a tenth more."""
    sizes = {"large": 100, "middle": 25, "small": 1}
    for name, size in sizes.items():
        rows = [{"conversations": [human("Hm?"), gpt(f"{name} {i}")]} for i in range(size)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [str(tmp_path / f"{name}.json") for name in sizes]
    said = [s["messages"][1]["content"][0]["text"] for s in samples_of(load(files, balance=True))]
    counts = [int(126 * 1.1 * root / 16) for root in (10, 5, 1)]
    assert counts == [86, 43, 8]
    expected = [f"large {i}" for i in range(86)] + [f"middle {i % 25}" for i in range(43)] + ["small 0"] * 8
    assert said == expected
    assert len(load(files)) == 126 and len(load(files[:1], balance=True)) == 100


def test_rows_of_eight_images_or_of_all_questions_about_a_video(media_folder):
    images = [{"image": f"{i % 3}.png", "conversations": [human("<image>Hm?"), gpt(str(i))]} for i in range(9)]
    texts = [{"conversations": [human("Hm?"), gpt("text")]}]
    videos = [
        {"video": f"{name}.mp4", "conversations": [human("<video>Hm?"), gpt(f"{name} {i}")]}
        for i, name in enumerate("0100")
    ]
    for name, rows in (("images", images + texts), ("videos", videos)):
        (media_folder / f"{name}.json").write_text(json.dumps(rows))
    files = [str(media_folder / "images.json"), str(media_folder / "videos.json")]
    rows = load(files, media_folder, samples_per_row=8)
    said = [[s["messages"][1]["content"][0]["text"] for s in row["samples"]] for row in rows]
    assert said == [list("01234567"), ["8", "text"], ["0 0", "0 2", "0 3"], ["1 1"]]
    processor = AutoProcessor.from_pretrained(TINY_CHECKPOINT)
    batch = train_stage.VambaDataCollator(processor, packing=True)([rows[2]])
    assert len(batch["video_grid_thw"]) == 1 and batch["video_sample_ids"].tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="cannot be combined with `streaming`"):
        load(files, media_folder, streaming=True, samples_per_row=8)


def test_a_data_set_of_several_files(tmp_path):
    for i in range(3):
        rows = [{"conversations": [human("Hm?"), gpt(str(i))]}] * (i + 1)
        (tmp_path / f"part-{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other.json").write_text(json.dumps([{"conversations": [human("Hm?"), gpt("other")]}] * 6))
    files = [str(tmp_path / "part-*.jsonl"), str(tmp_path / "other.json")]
    said = [s["messages"][1]["content"][0]["text"] for s in samples_of(load(files, balance=True))]
    assert len(said) == 12 and said.count("other") == 6  # two data sets of 6: 1.1 * 12 * 1/2


@pytest.mark.parametrize("stage", (1, 2))
def test_the_stages_train_as_configured(media_folder, tmp_path, stage):
    """Two steps with the files as they are, but for what a CPU lacks."""
    arguments = ["--config", str(EXAMPLES / f"train_stage{stage}.yaml"), "--model", str(TINY_CHECKPOINT)]
    arguments += ["--data", *data_files(media_folder), "--media_folder", str(media_folder)]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--save_strategy", "no"]
    arguments += ["--longest_edge", "128", *CPU, "--dataloader_num_workers", "0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpointing.*", category=FutureWarning)
        trainer = train_stage.main(arguments)
    assert np.isfinite(losses_of(trainer)).all() and len(losses_of(trainer)) == 2
    assert trainer.rows_weigh_equally and trainer.data_collator.published_labels
    assert trainer.model.is_gradient_checkpointing
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in decayed}
    assert names and not any(part in name for name in names for part in ("A_log", ".D", "conv1d", "alpha", "dt_bias"))


def test_an_adapter_trains_without_a_deprecated_name(tmp_path):
    rows = list(videos_of_colour(tmp_path, range(2), None))
    arguments = ["--videos", write_metadata(tmp_path, rows), "--output_dir", str(tmp_path / "out"), *CPU]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpointing.*", category=FutureWarning)
        trainer = finetune_lora_trl.main([*arguments, "--max_steps", "1", "--save_steps", "1"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None" not in card and str(TINY_CHECKPOINT) in card and '"type": "video"' in card
    assert f'from_pretrained("{tmp_path / "out"}"' in card
    assert "PeftModel.from_pretrained" in (tmp_path / "out" / "checkpoint-1" / "README.md").read_text()
    assert trainer.args.gradient_checkpointing


@pytest.mark.parametrize("source", ("teacher", "stored"))
def test_stage_1_with_distillation(media_folder, qwen2_vl, tmp_path, source):
    (file, *_) = data_files(media_folder)
    more = ["--distill", "--max_steps", "2"]
    if source == "teacher":
        more += ["--teacher", qwen2_vl]
    else:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        tokenizer = AutoProcessor.from_pretrained(TINY_CHECKPOINT).tokenizer
        for row in rows:
            count = len(tokenizer(f"\n<|im_start|>assistant\n{row['vlm_caption']}<|im_end|>").input_ids)
            row |= {"top_k_values": [[2.0, 1.0]] * count, "top_k_indices": [[5, 7]] * count}
        Path(file).write_text("\n".join(map(json.dumps, rows)))
    trainer = train_stage.main(stage_arguments(1, qwen2_vl, [file], media_folder, tmp_path / "out", *more))
    assert isinstance(trainer, train_stage.VambaDistillationTrainer) and (trainer.teacher is None) == (
        source != "teacher"
    )
    assert len(losses_of(trainer)) == 2 and np.isfinite(losses_of(trainer)).all()


# Killed and called again


RUN = ["--max_steps", "6", "--save_steps", "2", "--save_total_limit", "5"]


def assert_same_run(resumed, whole):
    assert resumed.state.global_step == 6
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-6) and len(losses_of(whole)) == 6
    torch.testing.assert_close(
        dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()), atol=1e-6, rtol=0
    )


def test_a_killed_process_loses_nothing(media_folder, qwen2_vl, tmp_path):
    files = data_files(media_folder)
    whole = train_stage.main(stage_arguments(2, str(TINY_CHECKPOINT), files, media_folder, tmp_path / "whole", *RUN))

    arguments = stage_arguments(2, str(TINY_CHECKPOINT), files, media_folder, tmp_path / "killed", *RUN)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "killed_datasets"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "train_stage.py"), *arguments], env=environment)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    # What is left where the kill comes in the middle of saving.
    shutil.copytree(tmp_path / "killed" / "checkpoint-2", tmp_path / "killed" / "checkpoint-5")
    (tmp_path / "killed" / "checkpoint-5" / "trainer_state.json").unlink()
    assert_same_run(train_stage.main(arguments), whole)


def stop_at(step: int, monkeypatch):
    """The next run stops in the middle of this step, as if it were killed."""
    training_step, count = Trainer.training_step, 0

    def training_step_or_stop(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step_or_stop)


def test_a_streamed_run_goes_on_where_it_was(media_folder, tmp_path, monkeypatch):
    files = data_files(media_folder)[:3]
    more = ["--streaming", *RUN]
    whole = train_stage.main(stage_arguments(1, str(TINY_CHECKPOINT), files, media_folder, tmp_path / "whole", *more))
    arguments = stage_arguments(1, str(TINY_CHECKPOINT), files, media_folder, tmp_path / "stopped", *more)
    stop_at(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_stage.main(arguments)
    assert_same_run(train_stage.main(arguments), whole)


def test_an_adapter_and_its_alpha_go_on_where_they_were(tmp_path, monkeypatch):
    rows = list(videos_of_colour(tmp_path, range(5), None))
    options = ["--videos", write_metadata(tmp_path, rows), "--learning_rate", "1e-3", "--dora", *RUN, *CPU, *QUICK]
    options += ["--per_device_train_batch_size", "2"]
    whole = finetune_lora_trl.main([*options, "--output_dir", str(tmp_path / "whole")])
    arguments = [*options, "--output_dir", str(tmp_path / "stopped")]
    stop_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune_lora_trl.main(arguments)
    resumed = finetune_lora_trl.main(arguments)
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-5)
    models = [AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "stopped")]
    parameters, expected = (dict(model.named_parameters()) for model in models)
    torch.testing.assert_close(parameters, expected, atol=1e-6, rtol=0)
    base = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    assert all(not torch.equal(p, base.get_parameter(name)) for name, p in expected.items() if name.endswith(".alpha"))
