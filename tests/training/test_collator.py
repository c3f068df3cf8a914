# SPDX-License-Identifier: Apache-2.0
"""Batches of conversations: what is learned, padding, packing, and files that cannot be read."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from PIL import Image
from tiny_vamba import TINY_CHECKPOINT, level_of_frame, tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from transformers_vamba import VambaDataCollator


# A template that marks what the assistant says, with Transformers' extension of Jinja.
GENERATION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def message(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def grey_image(level: int, size: int = 56) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), level, np.uint8))


def video(path: str) -> dict:
    return {"type": "video", "path": path}


def image(level: int) -> dict:
    return {"type": "image", "image": grey_image(level)}


@pytest.fixture
def rows(write_video):
    """A video and two turns; text alone; an image, a video and two more images, of different sizes."""
    short, long = write_video("short.mp4", num_frames=8), write_video("long.mp4", num_frames=12, width=64)
    return [
        {"messages": [user(video(short), "What?"), assistant("a dog"), user("And?"), assistant("a red cat")]},
        {"messages": [user("Two?"), assistant("yes")]},
        {"messages": [user(image(10), video(long), image(20)), user(image(30), "Hm?"), assistant("no")]},
    ]


@pytest.fixture
def tiny_processor():
    return AutoProcessor.from_pretrained(TINY_CHECKPOINT)


def learned(processor, batch) -> list[str]:
    return [processor.decode(labels[labels != -100]) for labels in batch["labels"]]


def test_only_what_the_assistant_says_is_learned(processor, rows):
    batch = VambaDataCollator(processor)(rows)
    assert learned(processor, batch) == ["a dog<|im_end|>\na red cat<|im_end|>\n", "yes<|im_end|>\n", "no<|im_end|>\n"]
    is_learned = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    assert not (is_learned & (batch["attention_mask"] == 0)).any()


def test_the_words_of_the_user_are_not_learned_where_they_are_those_of_the_assistant(processor):
    rows = [{"messages": [user("a dog<|im_end|>\n<|im_start|>assistant\na dog"), assistant("a dog")]}]
    assert learned(processor, VambaDataCollator(processor)(rows)) == ["a dog<|im_end|>\n"]


@pytest.mark.parametrize("answer", ("\n\nyes", " yes", "", "é<|vision_start|><|vision_end|>", "yes\n"))
def test_answers_at_the_bounds_of_tokens(processor, answer):
    batch = VambaDataCollator(processor)([{"messages": [user("Well?"), assistant(answer)]}])
    (text,) = learned(processor, batch)
    assert text.removeprefix("\n") == f"{answer}<|im_end|>\n".removeprefix("\n")


def test_masking_is_that_of_a_template_with_generation_marks(processor):
    messages = [
        [user("What?"), assistant("a dog"), user("And?"), assistant("a red cat")],
        [{"role": "system", "content": "Be short."}, user("Two?"), assistant("yes")],
    ]
    for conversation in messages:
        for message in conversation:
            if not isinstance(message["content"], str):
                message["content"] = message["content"][0]["text"]
    processor.chat_template = GENERATION_TEMPLATE
    for conversation in messages:
        batch = VambaDataCollator(processor)([{"messages": conversation}])
        marked = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        assert torch.equal(batch["input_ids"], marked["input_ids"])
        assert torch.equal(batch["labels"] != -100, torch.as_tensor(marked["assistant_masks"]).bool())


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL wants Transformers 5.18 for it and says so"
)
def test_labels_are_those_of_trl_on_the_words_of_the_assistant_alone(tiny_processor, tmp_path):
    answers = [[assistant("red"), user("So?"), assistant("2 " * i)] for i in range(1, 4)]
    trl_rows = [{"images": [grey_image(10)], "messages": [user("What?"), *turns]} for turns in answers]
    rows = [{"messages": [user(image(10), "What?"), *turns]} for turns in answers]
    for row in trl_rows:
        row["messages"] = [
            m | {"content": m["content"][0]["text"]} if m["role"] == "user" else m for m in row["messages"]
        ]
    trainer = trl.SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT),
        args=trl.SFTConfig(str(tmp_path), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(trl_rows),
        processing_class=tiny_processor,
    )
    expected = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    batch = VambaDataCollator(tiny_processor)(rows)
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name


def assert_media_of_each_row(processor, batch, rows):
    """Pixels, grids and the places in the text are those of each row, prepared alone."""
    singles = [VambaDataCollator(processor)([row]) for row in rows]
    for medium, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        given = [i for i, single in enumerate(singles) if pixels in single]
        grids = [singles[i][f"{medium}_grid_thw"] for i in given]
        assert torch.equal(batch[pixels], torch.cat([singles[i][pixels] for i in given]))
        assert torch.equal(batch[f"{medium}_grid_thw"], torch.cat(grids))
        owners = [i for i, grid in zip(given, grids) for _ in grid]
        assert batch[f"{medium}_sample_ids"].tolist() == owners
        assert batch[f"{medium}_sample_ids"].dtype == torch.long
    return singles


def test_padding(processor, rows):
    batch = VambaDataCollator(processor)(rows)
    singles = assert_media_of_each_row(processor, batch, rows)
    fillers = {
        "input_ids": processor.tokenizer.pad_token_id,
        "labels": -100,
        "attention_mask": 0,
        "mm_token_type_ids": 0,
    }
    length = max(single["input_ids"].shape[1] for single in singles)
    for name, filler in fillers.items():
        assert batch[name].shape == (3, length) and batch[name].dtype == torch.long
        for row, single in zip(batch[name], singles):
            own = single[name].shape[1]
            assert torch.equal(row[:own], single[name][0]) and (row[own:] == filler).all()
    assert [row[row > 0].tolist() for row in batch["mm_token_type_ids"]] == [[2], [], [1, 2, 1, 1]]


def test_packing(processor, rows):
    batch = VambaDataCollator(processor, packing=True)(rows)
    singles = assert_media_of_each_row(processor, batch, rows)
    assert "attention_mask" not in batch
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles], dim=1))
    lengths = [single["input_ids"].shape[1] for single in singles]
    assert batch["position_ids"].tolist() == [[position for length in lengths for position in range(length)]]
    starts = batch["position_ids"][0] == 0
    assert starts.sum() == 3 and (batch["labels"][0][starts] == -100).all()


def packed_and_padded(processor, rows):
    """Loss and gradients of a batch, padded and packed, in float64."""
    results = []
    for packing in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, dtype=torch.float64).train()
        loss = model(**VambaDataCollator(processor, packing=packing)(rows)).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return results


def test_packed_rows_train_as_padded_ones(tiny_processor, rows):
    (loss, gradients), (packed_loss, packed_gradients) = packed_and_padded(tiny_processor, rows)
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(packed_gradients, gradients, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    "sampling, expected",
    [
        ({"num_frames": 4}, [2, 8, 14, 20]),
        ({"fps": 2.0}, [2, 6, 10, 14, 18, 22]),
        ({"fps": 2.0, "max_frames": 2}, [5, 17]),
    ],
)
def test_frames_are_sampled_evenly_or_by_rate(processor, video_file, sampling, expected):
    collator = VambaDataCollator(processor, processor_kwargs={"videos_kwargs": {**sampling, "do_normalize": False}})
    batch = collator([{"messages": [user(video(video_file), "What?"), assistant("yes")]}])
    assert batch["video_grid_thw"][0, 0] == len(expected) // 2
    # Two frames of three colours a patch.
    levels = 255 * batch["pixel_values_videos"].view(len(expected) // 2, -1, 3, 2, 196).mean((1, 2, 4)).flatten()
    assert levels.tolist() == pytest.approx([level_of_frame(i) for i in expected], abs=2)


def test_rows_of_an_arrow_table_with_media_in_columns(processor, write_video):
    """Arrow gives each part of a message the keys of all others; media without a source come from the columns."""
    path = write_video("column.mp4", num_frames=8)
    messages = [user({"type": "image"}, "See", {"type": "video"}, {"type": "image"}, "What?")]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "yes"}]})
    images = [grey_image(10), grey_image(20)]
    table = Dataset.from_list([{"messages": messages, "images": images, "videos": [path]}])
    assert table[0]["messages"][0]["content"][0] == {"type": "image", "text": None}
    from_columns = VambaDataCollator(processor)([table[0]])
    parts = [{"type": "image", "image": images[0]}, "See", video(path), {"type": "image", "image": images[1]}, "What?"]
    expected = VambaDataCollator(processor)([{"messages": [user(*parts), assistant("yes")]}])
    torch.testing.assert_close(dict(from_columns), dict(expected), atol=0, rtol=0)


def test_media_of_columns_take_the_place_of_parts_with_an_index(processor):
    """As LLaVA's data sets have them that were made for TRL."""
    parts = [{"type": "text", "text": "What?", "index": None}, {"type": "image", "text": "", "index": 0}]
    batch = VambaDataCollator(processor)(
        [{"messages": [{"role": "user", "content": parts}, assistant("yes")], "images": [grey_image(10)]}]
    )
    expected = VambaDataCollator(processor)([{"messages": [user("What?", image(10)), assistant("yes")]}])
    torch.testing.assert_close(dict(batch), dict(expected), atol=0, rtol=0)


def test_images_in_the_form_of_openai(processor, tmp_path):
    grey_image(10).save(tmp_path / "grey.png")
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "grey.png")}}
    batch = VambaDataCollator(processor)([{"messages": [user(part, "What?"), assistant("yes")]}])
    expected = VambaDataCollator(processor)([{"messages": [user(image(10), "What?"), assistant("yes")]}])
    torch.testing.assert_close(dict(batch), dict(expected), atol=0, rtol=0)


def test_an_error_does_not_print_a_whole_file(processor):
    row = {"messages": [user({"type": "image"}), assistant("yes")], "images": [{"bytes": bytes(10**5)}]}
    with pytest.raises(ValueError, match="Cannot train on a row with {'images': .*'bytes'") as error:
        VambaDataCollator(processor)([row])
    assert len(str(error.value)) < 1000


# What cannot be trained on


@pytest.fixture
def broken(tmp_path, video_file):
    """Rows that cannot be trained on, and what the error says of them."""
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.mp4").write_bytes(Path(video_file).read_bytes()[:2000])
    grey_image(10, size=400).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    files = {name: str(tmp_path / name) for name in ("missing.mp4", "text.mp4", "cut.mp4")}
    broken = {path: {"messages": [user(video(path), "?"), assistant("yes")]} for path in files.values()}
    for name in ("missing.png", "text.png", "cut.png"):
        part = {"type": "image", "path": str(tmp_path / name)}
        broken[part["path"]] = {"messages": [user(part, "?"), assistant("yes")]}
    broken["says nothing"] = {"messages": [user(video(video_file), "?")]}
    broken["more videos than the column"] = {"messages": [user(video(None), "?"), assistant("yes")]}
    broken["1 images more than the messages"] = {
        "messages": [user("?"), assistant("yes")],
        "images": [grey_image(10)],
    }
    broken["must have `messages`, got \\['text'\\]"] = {"text": "Hm?"}
    broken["`top_k_values` has 1 entries for "] = {
        "messages": [user("?"), assistant("yes")],
        "top_k_values": [[1.0, 0.5]],
    }
    openai = {"type": "video_url", "video_url": {"url": video_file}}
    broken["must be one of .*, got 'video_url'"] = {"messages": [user(openai, "?"), assistant("yes")]}
    broken["`videos` must be a list of videos, got str"] = {
        "messages": [user({"type": "video"}, "?"), assistant("yes")],
        "videos": video_file,
    }
    broken["must have `role` and `content`, got \\['role'\\]"] = {"messages": [user("?"), {"role": "assistant"}]}
    part = {**video(video_file), "fps": 2.0, "nframes": None}
    broken["nothing reads \\['fps'\\] of a part of type 'video'"] = {"messages": [user(part, "?"), assistant("yes")]}
    for medium, given in (("image", {"bytes": b"", "path": None}), ("video", {"path": video_file, "bytes": None})):
        broken[f"Cast its column to `datasets.{medium.capitalize()}\\(\\)`"] = {
            "messages": [user({"type": medium}, "?"), assistant("yes")],
            f"{medium}s": [given],
        }
    broken["no attribute"] = {"messages": [{"role": "user", "content": ["?"]}, assistant("yes")]}
    broken["does not write message 0, of the assistant"] = {"messages": [assistant("yes"), user("?")]}
    return broken


def test_a_broken_row_stops_the_run_and_is_named(processor, broken):
    for named, row in broken.items():
        with pytest.raises(ValueError, match=named):
            VambaDataCollator(processor)([row])


@pytest.mark.parametrize("packing", (True, False))
def test_broken_rows_are_left_out_with_a_warning(processor, rows, broken, packing, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers_vamba"), "propagate", True)
    mixed = [row for pair in zip(broken.values(), rows * 7) for row in pair]
    batch = VambaDataCollator(processor, packing=packing, on_error="skip")(mixed)
    good = VambaDataCollator(processor, packing=packing)((rows * 7)[: len(broken)])
    if not packing:
        # In the place of each stands a row of one token without a label.
        assert batch["attention_mask"][::2].sum(1).tolist() == [1] * len(broken)
        assert (batch["labels"][::2] == -100).all() and not batch["mm_token_type_ids"][::2].any()
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            batch[name] = batch[name][1::2]
        for name in ("image_sample_ids", "video_sample_ids"):
            assert (batch[name] % 2 == 1).all()
            batch[name] = batch[name] // 2
    assert batch.keys() == good.keys() and all(torch.equal(batch[name], good[name]) for name in good)
    warnings = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(warnings) == len(broken)


@pytest.mark.parametrize("packing", (True, False))
def test_a_batch_without_a_good_row_has_no_label(processor, rows, broken, packing):
    collator = VambaDataCollator(processor, packing=packing, on_error="skip")
    bad_rows = list(broken.values())
    with pytest.raises(ValueError, match="None of the 2 rows of the first batch .* Could not read"):
        collator(bad_rows[:2])
    collator([rows[0], bad_rows[0], rows[2], bad_rows[1]])
    batch = collator(bad_rows[:3])
    assert batch["input_ids"].shape == (1 if packing else 3, 1) and (batch["labels"] == -100).all()
    assert not any("pixel" in name or "sample_ids" in name for name in batch)


@pytest.mark.parametrize("packing", (True, False))
@pytest.mark.parametrize("num_items", (None, torch.tensor(0)))
@pytest.mark.parametrize("skip_logits", (True, False))
def test_the_loss_without_a_label_is_zero(processor, rows, broken, packing, num_items, skip_logits):
    """And no `0 / 0`, which a step would spread over all parameters."""
    collator = VambaDataCollator(processor, packing=packing, on_error="skip")
    collator(rows[:1])
    model = tiny_model(vocab_size=processor.tokenizer.pad_token_id + 10).train()
    loss = model(**collator(list(broken.values())[:2]), num_items_in_batch=num_items, skip_logits=skip_logits).loss
    loss.backward()
    assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("batch_size", (1, 2, 5))
def test_predictions_keep_to_the_data(tiny_processor, rows, broken, batch_size, tmp_path):
    """Each row of `predict` is that of the row alone, and one that cannot be read has no label."""
    bad_rows = list(broken.values())
    data = [rows[0], bad_rows[0], bad_rows[1], rows[1], rows[2]]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=batch_size,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    collator = VambaDataCollator(tiny_processor, on_error="skip")
    trainer = Trainer(model, arguments, data_collator=collator)
    logits, labels, metrics = trainer.predict(data)
    assert len(logits) == len(labels) == 5 and np.isfinite(metrics["test_loss"])
    assert [bool((row != -100).any()) for row in labels] == [True, False, False, True, True]
    for i in (0, 3, 4):
        single = VambaDataCollator(tiny_processor)([data[i]])
        with torch.no_grad():
            expected = model(**single).logits[0]
        np.testing.assert_allclose(logits[i][: len(expected)], expected, atol=1e-3)


def test_workers_prepare_batches_and_name_what_is_broken(processor, rows, broken):
    batches = [[rows[0]], [rows[1]], rows, [next(iter(broken.values()))]]
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=VambaDataCollator(processor),
        num_workers=1,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    for expected in ([rows[0]], [rows[1]], rows):
        torch.testing.assert_close(next(batches), dict(VambaDataCollator(processor)(expected)), atol=0, rtol=0)
    with pytest.raises(ValueError, match=next(iter(broken))):
        next(batches)


def test_on_error_is_checked(processor):
    with pytest.raises(ValueError, match="must be 'raise' or 'skip', got 'ignore'"):
        VambaDataCollator(processor, on_error="ignore")


@pytest.mark.parametrize("kwargs, error", [({"num_frames": 4, "fps": 1.0}, ValueError), ({"fps": 0}, ValueError)])
@pytest.mark.parametrize("nested", (True, False))
def test_sampling_is_checked_before_any_row(processor, kwargs, error, nested):
    """It would be wrong for every video, and with `on_error="skip"` all of them would be left out."""
    with pytest.raises(error, match="mutually exclusive|must be a positive number"):
        VambaDataCollator(processor, on_error="skip", processor_kwargs={"videos_kwargs": kwargs} if nested else kwargs)


@pytest.mark.parametrize("name", ("text_kwargs", "images_kwargs", "videos_kwargs"))
def test_arguments_of_a_modality_are_a_dictionary(processor, name):
    with pytest.raises(TypeError, match=f"`{name}` must be a dictionary of arguments, got None"):
        VambaDataCollator(processor, processor_kwargs={name: None})
    with pytest.raises(TypeError, match=f"`{name}` must be a dictionary of arguments, got None"):
        processor(text="Two?", **{name: None})


def test_an_answer_that_is_cut_off(processor):
    text_kwargs = {"truncation": True, "max_length": 12}
    collator = VambaDataCollator(processor, processor_kwargs={"text_kwargs": text_kwargs})
    with pytest.raises(ValueError, match="`max_length=12` cuts all off that the assistant says"):
        collator([{"messages": [user("What happens in the video?"), assistant("a dog")]}])
    with pytest.raises(ValueError, match="the assistant says nothing in it"):
        VambaDataCollator(processor)([{"messages": [user("Hm?")]}])


def test_a_stream_that_accelerate_cuts(tiny_processor, rows, tmp_path):
    """Its batches by row, and pixels have none: the error says so, and what to do."""
    arguments = {"max_steps": 1, "per_device_train_batch_size": 3, "use_cpu": True, "report_to": "none"}
    arguments |= {"remove_unused_columns": False, "disable_tqdm": True, "save_strategy": "no"}
    paths = [row["messages"][0]["content"][0]["path"] for row in rows[:1]] * 3
    stream = Dataset.from_list([{"messages": [user(video(p), "?"), message("yes")]} for p in paths])
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)

    def train(**options):
        args = TrainingArguments(str(tmp_path), **arguments, **options)
        collator = VambaDataCollator(tiny_processor)
        Trainer(model, args, train_dataset=stream.to_iterable_dataset(), data_collator=collator).train()

    with pytest.raises(ValueError, match='pass `accelerator_config={"dispatch_batches": False}` to the trainer'):
        train()
    train(accelerator_config={"dispatch_batches": False})
