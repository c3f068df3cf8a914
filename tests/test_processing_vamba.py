# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from transformers_vamba import VambaProcessor, VambaVideoProcessor


VISION = "<|vision_start|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def make_image(level=0, height=56, width=56):
    return Image.fromarray(np.full((height, width, 3), level, np.uint8))


def make_video(level=0, num_frames=4, height=56, width=84):
    return np.full((num_frames, height, width, 3), level, np.uint8)


def user(*content):
    """A conversation of one user message. Strings are text, PIL images images, and the rest videos."""
    blocks = []
    for item in content:
        if isinstance(item, str):
            blocks.append({"type": "text", "text": item})
        else:
            kind = "image" if isinstance(item, Image.Image) else "video"
            blocks.append({"type": kind, kind: item})
    return [{"role": "user", "content": blocks}]


def apply(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **kwargs},
    )


def marks_of(processor, outputs):
    """For each row the marks of its `<|vision_start|>` tokens, after checking that no other token has one."""
    start_id = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    is_start = outputs["input_ids"] == start_id
    assert not outputs["mm_token_type_ids"][~is_start].any()
    return [row[starts].tolist() for row, starts in zip(outputs["mm_token_type_ids"], is_start, strict=True)]


def test_placeholders_leave_no_token(processor):
    outputs = apply(processor, user(make_image(), make_video(), "What?"))
    expected = f"{SYSTEM}<|im_start|>user\n{VISION}{VISION}What?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(outputs["input_ids"][0]) == expected
    assert outputs["input_ids"][0].tolist() == processor.tokenizer(expected)["input_ids"]
    assert outputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert outputs["video_grid_thw"].tolist() == [[2, 4, 6]]


def test_every_output_is_a_model_input(processor):
    outputs = apply(processor, user(make_image(), make_video()))
    rows = {"image_sample_ids", "video_sample_ids"}  # where they are not marked
    assert set(outputs) == set(processor.model_input_names) - rows
    text = "<|image_pad|><|video_pad|>"
    outputs = processor(text=text, images=make_image(), videos=make_video(), return_tensors="pt")
    assert set(outputs) == set(processor.model_input_names)
    assert len(processor.model_input_names) == len(set(processor.model_input_names))


def test_batch_of_all_kinds_of_rows(processor):
    images, videos = [make_image(10), make_image(20)], [make_video(30), make_video(40), make_video(50)]
    conversations = [
        user("What?"),
        user(images[0], "What happens?"),
        user(videos[0], videos[1], "Which?"),
        user(videos[2], images[1], "Which colour moved first?"),
        [{"role": "user", "content": "What?"}],
    ]
    outputs = apply(processor, conversations)
    assert not {"image_sample_ids", "video_sample_ids"} & outputs.keys()  # the marks say the same
    assert marks_of(processor, outputs) == [[], [1], [2, 2], [2, 1], []]
    assert outputs["mm_token_type_ids"].dtype == torch.int64
    levels = outputs["pixel_values_videos"].mean(dim=1).view(3, -1).mean(dim=1)
    assert levels.tolist() == sorted(levels.tolist())

    for row, conversation in enumerate(conversations):
        alone = apply(processor, conversation)
        length = alone["input_ids"].shape[1]
        assert outputs["attention_mask"][row].tolist() == [0] * (outputs["input_ids"].shape[1] - length) + [1] * length
        for name in ("input_ids", "mm_token_type_ids"):
            assert torch.equal(outputs[name][row, -length:], alone[name][0])
        for mark, medium in ((1, "image"), (2, "video")):
            assert (f"{medium}_grid_thw" in alone) == bool((outputs["mm_token_type_ids"][row] == mark).any())


def test_rows_of_media_that_are_not_marked(processor):
    images, videos = [make_image(10), make_image(20)], [make_video(30), make_video(40), make_video(50)]
    text = ["What?", f"{IMAGE} What?", f"<|video_pad|>{VIDEO}", f"{VIDEO} {IMAGE}"]
    inputs = {"text": text, "images": images, "videos": videos, "padding": True}
    for kwargs in ({}, {"return_mm_token_type_ids": False}):
        lists, arrays, tensors = (processor(**inputs, **kwargs, return_tensors=kind) for kind in (None, "np", "pt"))
        for outputs in (lists, arrays, tensors):
            assert list(map(int, outputs["image_sample_ids"])) == [1, 3]
            assert list(map(int, outputs["video_sample_ids"])) == [2, 2, 3]
        assert isinstance(arrays["image_sample_ids"], np.ndarray)
        assert tensors["image_sample_ids"].dtype == tensors["video_sample_ids"].dtype == torch.int64


def test_text_alone(processor):
    outputs = processor(text="What?", return_tensors="pt")
    assert set(outputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert not outputs["mm_token_type_ids"].any()


def test_pixels_alone(processor):
    outputs = processor(images=make_image(), videos=make_video(), return_tensors="pt")
    assert set(outputs) == {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"}


def test_types_of_outputs(processor):
    text, image = f"{IMAGE} What?", make_image()
    lists = processor(text=text, images=image)
    arrays = processor(text=text, images=image, return_tensors="np")
    tensors = processor(text=text, images=image, return_tensors="pt")
    assert isinstance(lists["mm_token_type_ids"], list)
    assert isinstance(arrays["mm_token_type_ids"], np.ndarray)
    for name in ("input_ids", "mm_token_type_ids"):
        assert tensors[name].tolist() == arrays[name].tolist() == lists[name]


def test_mm_token_type_ids_can_be_left_out(processor):
    for kwargs in ({"return_mm_token_type_ids": False}, {"text_kwargs": {"return_mm_token_type_ids": False}}):
        outputs = processor(text=f"{IMAGE} What?", images=make_image(), **kwargs)
        assert "mm_token_type_ids" not in outputs and "image_sample_ids" in outputs


def test_replacement_offsets_on_request(processor):
    inputs = {"text": f"{IMAGE} What?", "images": make_image()}
    assert "text_replacement_offsets" not in processor(**inputs)
    (row,) = processor(**inputs, return_text_replacement_offsets=True)["text_replacement_offsets"]
    assert [(item["type"], item["replacement"]) for item in row] == [("image", "")]


def test_padding_is_on_the_left_unless_asked_for(processor, tmp_path):
    text = ["What?", f"{VIDEO} What happens?"]
    for kwargs in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        right = processor(text=text, videos=[make_video()], padding=True, return_tensors="pt", **kwargs)
        assert (right["attention_mask"][0, 0], right["attention_mask"][0, -1]) == (1, 0)
        assert marks_of(processor, right) == [[], [2]]
    processor.save_pretrained(tmp_path)  # the tokenizer now saves the right side, which it used last
    for candidate in (processor, VambaProcessor.from_pretrained(tmp_path)):
        left = candidate(text=text, videos=[make_video()], padding=True, return_tensors="pt")
        assert (left["attention_mask"][0, 0], left["attention_mask"][0, -1]) == (0, 1)


@pytest.mark.parametrize(
    ("kwargs", "num_frames"), [({}, 8), ({"num_frames": 4}, 4), ({"fps": 2.0}, 6), ({"do_sample_frames": False}, 24)]
)
def test_sampling_arguments_reach_the_video_processor(processor, video_file, kwargs, num_frames):
    conversation = user(Path(video_file), "What?")
    expected = processor.video_processor(video_file, **kwargs)["pixel_values_videos"]
    assert len(expected) == num_frames // 2 * 4 * 6

    def template(**template_kwargs):
        return processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", **template_kwargs
        )

    # `apply_chat_template` writes into the dictionary that it is given
    for outputs in (
        template(**kwargs),
        template(processor_kwargs=dict(kwargs)),
        template(processor_kwargs={"videos_kwargs": dict(kwargs)}),
        processor(text=f"{VIDEO} What?", videos=video_file, **kwargs),
    ):
        assert torch.equal(outputs["pixel_values_videos"], expected)


def test_forms_of_a_video_in_a_conversation(processor, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in frames]
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = apply(processor, user(frames))
    for video in (torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()), images, list(frames), paths):
        outputs = apply(processor, [user("What?"), user(video)])
        assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"])
        assert "video_sample_ids" not in outputs


def test_path_and_url_keys_in_a_conversation(processor, video_file, tmp_path):
    expected = apply(processor, user(Path(video_file)))["pixel_values_videos"]
    make_image(7).save(tmp_path / "image.png")
    for content in ({"path": video_file}, {"url": f"file://{video_file}"}):
        image = {"type": "image", "path": str(tmp_path / "image.png")}
        conversation = [{"role": "user", "content": [{"type": "video", **content}, image]}]
        outputs = apply(processor, conversation)
        assert torch.equal(outputs["pixel_values_videos"], expected)
        assert marks_of(processor, outputs) == [[2, 1]]


@pytest.mark.parametrize("nested", [False, True])
def test_flat_and_nested_media(processor, nested):
    images = [make_image(10), make_image(20), make_image(30)]
    videos = [make_video(40), make_video(50)]
    text = [f"{IMAGE}{VIDEO}", "What?", f"{VIDEO}{IMAGE}{IMAGE}"]
    outputs = processor(
        text=text,
        images=[images[:1], [], images[1:]] if nested else images,
        videos=[videos[:1], [], videos[1:]] if nested else videos,
        padding=True,
        return_tensors="pt",
    )
    assert marks_of(processor, outputs) == [[1, 2], [], [2, 1, 1]]
    levels = outputs["pixel_values"].mean(dim=1).view(3, -1).mean(dim=1)
    assert levels.tolist() == sorted(levels.tolist())


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        (IMAGE, None, None, r"number of <\|image_pad\|> tokens .* number of images: there are 1 and 0\."),
        (VIDEO, None, None, r"number of <\|video_pad\|> tokens .* number of videos: there are 1 and 0\."),
        ("What?", [make_image()], None, r"number of <\|image_pad\|> tokens .* number of images: there are 0 and 1\."),
        ("What?", None, [make_video()], r"number of <\|video_pad\|> tokens .* number of videos: there are 0 and 1\."),
        (VISION, None, [make_video()], r"number of <\|video_pad\|> tokens .* number of videos: there are 0 and 1\."),
        (VIDEO, [make_image()], None, r"number of <\|image_pad\|> tokens .* number of images: there are 0 and 1\."),
        (
            [IMAGE, IMAGE],
            [make_image()] * 3,
            None,
            r"number of <\|image_pad\|> tokens .* number of images: there are 2 and 3\.",
        ),
        (
            [VIDEO, VIDEO + VIDEO],
            None,
            [make_video()] * 2,
            r"number of <\|video_pad\|> tokens .* number of videos: there are 3 and 2\.",
        ),
        ([IMAGE, IMAGE], [[make_image()] * 2, []], None, r"\[1, 1\] <\|image_pad\|> .* but \[2, 0\] image"),
        ([VIDEO, VIDEO], None, [[make_video()] * 2, []], r"\[1, 1\] <\|video_pad\|> .* but \[2, 0\] video"),
        ([IMAGE, "What?"], [[make_image()]], None, r"\[1, 0\] <\|image_pad\|> .* but \[1\] image"),
    ],
)
def test_media_must_match_placeholders(processor, text, images, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images, videos=videos, padding=True)


def test_text_must_be_strings(processor):
    with pytest.raises(ValueError, match="`text` must be a string or a list of strings"):
        processor(text=[["What", "?"]])
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_bare_placeholders(processor):
    image, video = make_image(), make_video()
    outputs = processor(text="<|image_pad|><|image_pad|> What?", images=[image, image], return_tensors="pt")
    assert outputs["image_sample_ids"].tolist() == [0, 0]
    assert not outputs["mm_token_type_ids"].any()
    half_bare = processor(text=f"{IMAGE}<|image_pad|> What?", images=[image, image], return_tensors="pt")
    assert not half_bare["mm_token_type_ids"].any()
    shared = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|> What?"
    assert not processor(text=shared, images=[image, image], return_tensors="pt")["mm_token_type_ids"].any()
    image_first = processor(text=f"{IMAGE}<|video_pad|>", images=[image], videos=[video], return_tensors="pt")
    assert not image_first["mm_token_type_ids"].any()  # images come first where no mark says otherwise
    with pytest.raises(ValueError, match="Row 1 has a video before an image"):
        processor(text=[IMAGE, f"<|video_pad|>{IMAGE}"], images=[image, image], videos=[video], padding=True)


def test_wrapper_without_a_medium_is_not_marked(processor):
    outputs = processor(text=f"{VISION} {VIDEO} {VISION} {IMAGE}", images=make_image(), videos=make_video())
    marks = [mark for mark in outputs["mm_token_type_ids"][0] if mark]
    assert marks == [2, 1]
    outputs = processor(text=f"{VISION} {IMAGE}", images=make_image(), return_tensors="pt")
    assert marks_of(processor, outputs) == [[0, 1]]


def test_questions_about_encoded_videos(processor):
    """The tokens that come with a video, without its pixels, one at a time and in a batch."""
    questions = ["What?", "What happens in the end?"]
    conversations = [user(make_video(), question) for question in questions]
    expected = [apply(processor, conversation)["input_ids"] for conversation in conversations]
    named = [
        {"role": "user", "content": [{"type": "video", "path": "not/there.mp4"}, {"type": "text", "text": "What?"}]}
    ]
    for question in (questions[0], conversations[0], named):
        inputs = processor.prepare_question(question)
        assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids"}
        assert torch.equal(inputs["input_ids"], expected[0])
    for batch in (questions, conversations, [questions[0], conversations[1]]):
        inputs = processor.prepare_question(batch)
        assert inputs["attention_mask"][0, 0] == 0  # on the left
        for row, ids in enumerate(expected):
            assert torch.equal(inputs["input_ids"][row, inputs["attention_mask"][row].bool()], ids[0])
    with pytest.raises(ValueError, match="Question 1 is a conversation without an image or a video"):
        processor.prepare_question([conversations[0], user("What?")])
    with pytest.raises(ValueError, match="got an empty list"):
        processor.prepare_question([])
    with pytest.raises(TypeError, match="`question` must be a string, a conversation, or a list of these, got None"):
        processor.prepare_question(None)


def test_truncation_of_a_medium_is_refused(processor):
    with pytest.raises(ValueError, match="Row 0 has 1 .* in its text but 0 in its tokens"):
        processor(text=f"What happens? {IMAGE}", images=make_image(), truncation=True, max_length=3)


def test_placeholders_written_by_the_user_as_plain_text(processor):
    conversation = user(make_image(), f"What is {VIDEO} or <|image_pad|>?")
    with pytest.raises(ValueError, match="number of <.image_pad.> tokens"):
        apply(processor, conversation)
    if not hasattr(processor.tokenizer, "_mark_chat_inputs"):
        pytest.skip("this version of Transformers cannot tell control tokens of the user from the template's")
    outputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
    )
    assert marks_of(processor, outputs) == [[1]]
    assert f"{VIDEO} or <|image_pad|>?" in processor.tokenizer.decode(outputs["input_ids"][0])


def test_errors_about_files_name_the_file(processor, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="Could not read .*broken.mp4"):
        apply(processor, user(path))
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        apply(processor, user(tmp_path / "absent.mp4"))


def test_number_of_multimodal_tokens(processor):
    sizes = {"image_sizes": [(56, 56), (100, 60)], "video_sizes": [(8, 56, 84)]}
    numbers = processor._get_num_multimodal_tokens(**sizes)
    assert numbers["num_image_tokens"] == [0, 0]
    assert numbers["num_video_tokens"] == [0]
    images = [make_image(0, *size) for size in sizes["image_sizes"]]
    grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"]
    assert numbers["num_image_patches"] == grids.prod(dim=1).tolist()
    assert processor._get_num_multimodal_tokens(video_sizes=[(8, 56, 84)])["num_video_tokens"] == [0]


def test_post_process(processor):
    ids = processor.tokenizer("What happens?<|im_end|>", return_tensors="pt")["input_ids"]
    assert processor.post_process_image_text_to_text(ids) == ["What happens?"]


def test_save_and_load(processor, tmp_path, video_file):
    processor.save_pretrained(tmp_path)
    conversation = user(make_image(9), Path(video_file), "What?")
    expected = apply(processor, conversation)
    for loaded in (VambaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VambaProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        outputs = apply(loaded, conversation)
        assert set(outputs) == set(expected)
        for name, value in outputs.items():
            assert torch.equal(value, expected[name]), name


def test_loose_arguments_join_the_others(processor, video_file):
    """In Transformers 5.17 they would take their place."""
    outputs = processor.apply_chat_template(
        user(Path(video_file), "What?"),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        num_frames=4,
        processor_kwargs={"return_video_timestamps": True},
    )
    assert outputs["video_grid_thw"][0, 0] == 2
    assert outputs["video_timestamps_ms"].shape == (2,)


def test_checkpoint_that_describes_only_an_image_processor(processor, tmp_path, video_file):
    """The published checkpoint has such files; so has Qwen2-VL's."""
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(tmp_path)
    description = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "image_mean": [0.5, 0.5, 0.5],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(description))
    loaded = VambaProcessor.from_pretrained(tmp_path)
    assert type(loaded.image_processor) is Qwen2VLImageProcessor
    expected = VambaVideoProcessor(image_mean=[0.5, 0.5, 0.5], max_pixels=12845056)
    assert loaded.video_processor.to_dict() == expected.to_dict()
    outputs = apply(loaded, user(Path(video_file), "What?"), num_frames=4)
    assert outputs["video_grid_thw"].tolist() == [[2, 18, 18]]
    # A large frame stays as large as an image would.
    large = np.zeros((2, 1280, 1280, 3), np.uint8)
    outputs = loaded(videos=[large], size={"shortest_edge": 128, "longest_edge": 1280}, return_tensors="pt")
    assert outputs["video_grid_thw"].tolist() == [[1, 92, 92]]


def test_video_processor_of_qwen2_vl_is_replaced(image_processor, tokenizer):
    for video_processor in (None, Qwen2VLVideoProcessor()):
        processor = VambaProcessor(image_processor, tokenizer, video_processor)
        assert type(processor.video_processor) is VambaVideoProcessor
