# SPDX-License-Identifier: Apache-2.0
"""The collator's options: other labels, media that rows share, and the edges of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_vamba import VambaDataCollator


@pytest.fixture
def tiny_processor():
    return AutoProcessor.from_pretrained(TINY_CHECKPOINT)


def row(*turns: str, media=()) -> dict:
    """User and assistant by turns; the media come before the first question."""
    messages = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [*media, *messages[0]["content"]]
    return {"messages": messages}


def video(path: str) -> dict:
    return {"type": "video", "path": path}


def learned(processor, batch) -> list[str]:
    return [processor.decode(labels[labels != -100]) for labels in batch["labels"]]


# Labels

HEADER = "\n<|im_start|>assistant\n"


def test_published_labels(processor, video_file):
    """With the header in front, and without the newline after the end of a turn."""
    rows = [row("What?", "a dog", "And?", "a cat", media=[video(video_file)]), row("Two?", "yes")]
    batch = VambaDataCollator(processor, published_labels=True)(rows)
    said = [f"{HEADER}a dog<|im_end|>{HEADER}a cat<|im_end|>", f"{HEADER}yes<|im_end|>"]
    assert learned(processor, batch) == said
    assert learned(processor, VambaDataCollator(processor)(rows))[1] == "yes<|im_end|>\n"


def test_published_labels_between_the_ends_of_turns(processor):
    """As the published code finds them: from behind every second `<|im_end|>` to the next one."""
    rows = [
        row("What?", "a dog", "And?", "a red cat"),
        {"messages": [{"role": "system", "content": "Be short."}, *row("Two?", "yes")["messages"]]},
    ]
    end = processor.tokenizer.eos_token_id
    for each in rows:
        batch = VambaDataCollator(processor, published_labels=True)([each])
        ids = batch["input_ids"][0].tolist()
        ends = [i for i, token in enumerate(ids) if token == end]
        expected = [-100] * len(ids)
        for first, last in zip(ends[1::2], ends[2::2]):
            expected[first + 1 : last + 1] = ids[first + 1 : last + 1]
        assert batch["labels"][0].tolist() == expected


def test_published_labels_need_ends_of_turns(processor):
    processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'][0]['text'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match="ends every turn by '<|im_end|>', and message 1 or"):
        VambaDataCollator(processor, published_labels=True)([row("Two?", "yes")])


def test_logits_stored_at_published_labels(processor):
    """Those of the published code are refused with other labels, and the error says which option takes them."""
    collator = VambaDataCollator(processor, published_labels=True)
    count = int((collator([row("Two?", "yes")])["labels"] != -100).sum())
    stored = row("Two?", "yes") | {"top_k_values": [[1.0]] * count, "top_k_indices": [[3]] * count}
    assert collator([stored])["top_k_indices"].shape == (count, 1)
    with pytest.raises(ValueError, match="`top_k_values` has .* entries for .* labels. .* `published_labels=True`"):
        VambaDataCollator(processor)([stored])


# A template that marks no more than the first word, and nothing in answers that are not to be learned.
MARKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% if message['role'] == 'assistant' and part['text'] != 'Hm.' %}"
    "{% generation %}{{ part['text'].split(' ')[0] }}{% endgeneration %} "
    "{{ part['text'].split(' ')[1:] | join(' ') }}{% else %}{{ part['text'] }}{% endif %}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("packing", (True, False))
def test_generation_marks_are_used(processor, video_file, packing):
    processor.chat_template = MARKING_TEMPLATE
    image = {"type": "image", "image": Image.new("RGB", (56, 56))}
    rows = [
        row("What?", "red cats", "And?", "Hm.", "So?", "blue dogs", media=[image, video(video_file), image]),
        row("Two?", "yes indeed"),
    ]
    batch = VambaDataCollator(processor, packing=packing)(rows)
    assert "".join(learned(processor, batch)) == "redblueyes"
    assert not {"assistant_masks", "offset_mapping"} & batch.keys()
    with pytest.raises(ValueError, match="the assistant says nothing in it"):
        VambaDataCollator(processor)([row("Two?", "Hm.")])


# Media that rows share


@pytest.mark.parametrize("packing", (True, False))
@pytest.mark.parametrize("dtype, frozen", [(torch.float64, False), (torch.float32, True)])
def test_a_video_that_rows_share_is_encoded_once(tiny_processor, write_video, packing, dtype, frozen):
    """Loss and gradients are those of rows with a copy each."""
    paths = [write_video(f"shared-{i}.mp4", num_frames=8 + 2 * i, width=64) for i in range(2)]
    copies = [write_video(f"copy-{i}.mp4", num_frames=8, width=64) for i in range(2)]
    texts = [("What moved?", "a red circle"), ("Where?", "left"), ("Two?", "2"), ("How many?", "3"), ("Well?", "no")]
    media = [[video(paths[0])]] * 3 + [[], [video(paths[1])]]
    rows = [row(*text, media=own) for text, own in zip(texts, media)]
    apart = [row(*text, media=own) for text, own in zip(texts, [[video(paths[0])], *([video(c)] for c in copies)])]
    apart += rows[3:]
    options = {"packing": packing, "processor_kwargs": {"videos_kwargs": {"fps": 2.0}}}
    collator = VambaDataCollator(tiny_processor, **options)
    shared, expected = collator(rows), collator(apart)
    assert shared["video_sample_ids"].tolist() == [[0, 2], [4, 4]]
    assert expected["video_sample_ids"].tolist() == [0, 1, 2, 4] and len(shared["video_grid_thw"]) == 2
    for name in ("input_ids", "labels", "mm_token_type_ids"):
        assert torch.equal(shared[name], expected[name])

    results, num_patches = [], []
    for batch in (shared, expected):
        model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT, dtype=dtype).train()
        model.model.visual.requires_grad_(not frozen)
        model.model.visual.register_forward_pre_hook(lambda module, args: num_patches.append(len(args[0])))
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    tolerances = {"atol": 1e-7, "rtol": 1e-5} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(*results, **tolerances)
    assert sum(num_patches) == len(shared["pixel_values_videos"]) + len(expected["pixel_values_videos"])


def test_rows_share_all_of_their_media_or_none(processor, video_file):
    image = Image.new("RGB", (56, 56))
    both = [{"type": "image", "image": image}, video(video_file)]
    batch = VambaDataCollator(processor)([row("a", "b", media=m) for m in (both, both, both[::-1], both[:1], [])])
    assert batch["image_sample_ids"].tolist() == [[0, 1], [2, 2], [3, 3]]
    assert batch["video_sample_ids"].tolist() == [[0, 1], [2, 2]]
    other = {"type": "image", "image": Image.new("RGB", (56, 56), "red")}
    batch = VambaDataCollator(processor)([row("a", "b", media=[m]) for m in (both[0], other)])
    assert batch["image_sample_ids"].tolist() == [0, 1]


def test_a_broken_row_among_those_that_share(processor, video_file):
    collator = VambaDataCollator(processor, on_error="skip")
    rows = [row("a", "b", media=[video(video_file)]) for _ in range(4)]
    del rows[1]["messages"][1]  # nobody says anything in it
    batch = collator(rows)
    assert batch["video_sample_ids"].tolist() == [[0, 0], [2, 3]] and len(batch["video_grid_thw"]) == 2


def test_rows_of_samples(processor, video_file):
    samples = [row("a", "b", media=[video(video_file)]), row("c", "d", media=[video(video_file)]), row("e", "f")]
    for packing in (True, False):
        collator = VambaDataCollator(processor, packing=packing)
        given, expected = collator([{"samples": samples[:2]}, {"samples": samples[2:]}]), collator(samples)
        torch.testing.assert_close(dict(given), dict(expected), atol=0, rtol=0)


@pytest.mark.parametrize("ids", ([[0, 3]], [[1, 0]], [[-1, 0]]))
def test_rows_that_share_must_be_there(processor, video_file, ids):
    batch = VambaDataCollator(processor)([row("a", "b", media=[video(video_file)]), row("c", "d")])
    batch["video_sample_ids"] = torch.tensor(ids)
    del batch["mm_token_type_ids"]
    model = AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)
    with pytest.raises(ValueError, match="`video_sample_ids` must lie in 0..1"):
        model(**batch)


# Edges of images


@pytest.mark.parametrize("size, expected", [((400, 100), (112, 28)), ((20, 100), (28, 100)), ((60, 60), (60, 60))])
def test_edges_of_images(processor, size, expected, tmp_path):
    """As frames of a video: within the longest edge, and then up to the shortest; by path and in a column."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    resized = image.resize(expected, Image.Resampling.BICUBIC)
    wanted = VambaDataCollator(processor)([row("a", "b", media=[{"type": "image", "image": resized}])])
    collator = VambaDataCollator(processor, image_edges=(28, 112))
    for given in (
        row("a", "b", media=[{"type": "image", "path": str(tmp_path / "image.png")}]),
        row("a", "b", media=[{"type": "image"}]) | {"images": [image]},
    ):
        assert torch.equal(collator([given])["pixel_values"], wanted["pixel_values"])
