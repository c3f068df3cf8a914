# SPDX-License-Identifier: Apache-2.0
import io
import json
import sys
import time

import ask_video
import demo
import pytest
import stream_video
import torch
import train_tiny
from ask_video import answer, encode, load
from synthetic_videos import STORIES, pack_videos, render_frames, sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT


@pytest.fixture(scope="module")
def tiny():
    return load(TINY_CHECKPOINT, "cpu")


@pytest.fixture
def video_file(tmp_path):
    """Writes a video of the given seed, length and story, and returns it with the path of its file."""

    def write(*args):
        video, path = sample_video(*args), tmp_path / "video.mp4"
        write_mp4(path, video)
        return video, str(path)

    return write


def test_answers_about_video_files_are_right(tiny, video_file):
    results = {}
    for i in range(21):
        video, path = video_file([77, i], 8 + 4 * (i % 7), STORIES[i % 3])
        cache = encode(*tiny, path)
        for question in video.questions:
            results[i, question.text] = (answer(*tiny, cache, question.text), question.answer)
    wrong = {key: (given, expected) for key, (given, expected) in results.items() if given != expected}
    assert len(results) > 60
    assert len(wrong) <= 0.1 * len(results), wrong


def test_encoding_ahead_and_in_one_call_give_the_same_answer(tiny, video_file):
    model, processor = tiny
    for seed in range(3):
        video, path = video_file([78, seed], 24)
        question = video.questions[0].text
        content = [{"type": "video", "path": path}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, do_sample=False)
        reply = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert reply == answer(model, processor, encode(model, processor, path), question)


def test_questions_in_a_batch_get_the_answers_that_they_get_alone(tiny, video_file):
    model, processor = tiny
    video, path = video_file([79, 0], 32, "movement")
    cache = encode(model, processor, path)
    questions = [question.text for question in video.questions]
    inputs = processor(
        text=[train_tiny.PROMPT.format(question=question) for question in questions], padding=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, cache=cache.fork(), do_sample=False)
    replies = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert replies == [answer(model, processor, cache, question) for question in questions]


def test_checkpoint_is_small_and_was_evaluated(tiny):
    assert sum(file.stat().st_size for file in TINY_CHECKPOINT.iterdir()) <= 8e6
    results = json.loads((TINY_CHECKPOINT / "evaluation.json").read_text())
    assert len(results) == 4
    assert next(iter(results.values()))["all"] >= 0.95


def test_ask_video_prints_each_answer(video_file, monkeypatch, capsys):
    video, path = video_file([80, 0], 16, "start_end")
    questions = [question.text for question in video.questions]
    monkeypatch.setattr(sys, "argv", ["ask_video.py", path, *questions, "--device", "cpu"])
    ask_video.main()
    printed = capsys.readouterr().out
    assert all(f"Question: {question}\nAnswer:   " in printed for question in questions)


def test_stream_is_answered_while_it_plays(tiny, video_file, monkeypatch, capsys):
    video, path = video_file([82, 0], 36, "sequence")
    question = next(question.text for question in video.questions if question.kind == "order")
    expected = answer(*tiny, encode(*tiny, path), question)
    start = time.perf_counter()
    seconds, replies, _ = zip(*stream_video.watch(*tiny, path, question, fps=2.0, every=4.0, speed=18.0))
    assert time.perf_counter() - start > 1.0
    assert seconds == (4.0, 8.0, 12.0, 16.0, 18.0)
    assert replies[-1] == expected != replies[0]
    # Stretches of a second, the shortest at this rate: no question comes again at the end.
    seconds, _, _ = zip(*stream_video.watch(*tiny, path, question, fps=2.0, every=0.5, speed=1000.0))
    assert seconds == tuple(range(1, 19))
    # Half of the tokens are enough for what happened.
    *_, (_, reply, _) = stream_video.watch(
        *tiny, path, question, fps=2.0, every=4.0, speed=1000.0, max_video_tokens=144
    )
    assert reply == expected

    monkeypatch.setattr(sys, "argv", ["stream_video.py", "-", question, "--every", "8", "--device", "cpu"])
    with open(path, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        stream_video.main()
    printed = capsys.readouterr().out
    assert f" 8.0 s: {replies[1]} " in printed
    assert f" 18.0 s: {expected} " in printed


def test_demo_prints_what_is_in_the_videos(capsys):
    demo.main()
    printed = capsys.readouterr().out
    assert printed.count("a white flash") >= 1
    assert printed.count("Decoded and encoded, once") == 2
    assert printed.count("Answer: ") >= 4


@pytest.fixture(scope="module")
def untrained():
    tokenizer = train_tiny.make_tokenizer()
    torch.manual_seed(0)
    return train_tiny.VambaForConditionalGeneration(train_tiny.make_config(tokenizer)), train_tiny.make_processor(
        tokenizer
    )


def test_training_pixels_are_those_of_the_processor(untrained):
    _, processor = untrained
    frames = render_frames(pack_videos([sample_video(seed, 12) for seed in range(3)]), 0, 12)
    expected = processor.video_processor(videos=list(frames), do_sample_frames=False, return_tensors="pt")
    pixel_values = train_tiny.make_pixel_values(frames.float(), processor)
    torch.testing.assert_close(pixel_values.flatten(0, 1), expected["pixel_values_videos"])


def test_training_prompt_is_that_of_the_processor(untrained):
    _, processor = untrained
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape moved?"}]}]
    frames = render_frames(pack_videos([sample_video(0, 8)]), 0, 8)
    inputs = processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True),
        videos=list(frames),
        do_sample_frames=False,
    )
    prompt = train_tiny.PROMPT.format(question="Which shape moved?")
    assert inputs["input_ids"][0] == processor.tokenizer(prompt).input_ids


def test_questions_of_a_training_row_do_not_see_one_another(untrained):
    model, processor = untrained
    videos = [sample_video([81, seed], 8) for seed in range(3)]

    def run(videos, questions):
        batch = train_tiny.make_batch(processor.tokenizer, videos, questions)
        return batch, model.train()(**train_tiny.model_inputs(batch, processor, augmented=False)).logits[0]

    batch, logits = run(videos, [video.questions for video in videos])
    for i, question in enumerate(videos[0].questions):
        _, alone = run(videos[:1], [[question]])
        together = logits[(batch["question_ids"][0] == i) & (batch["position_ids"][0] < len(alone))]
        length = min(len(together), len(alone))
        torch.testing.assert_close(together[:length], alone[:length], rtol=0, atol=1e-5)


def test_training_runs_and_its_checkpoint_loads(tmp_path, monkeypatch, video_file):
    command = f"train_tiny.py --output {tmp_path / 'model'} --device cpu --minutes 0.02 --frames 16 --workers 0"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--eval-videos", "1", "--longest", "8"])
    train_tiny.main()
    model, processor = load(tmp_path / "model", "cpu")
    _, path = video_file(0, 8)
    assert isinstance(answer(model, processor, encode(model, processor, path), "What came first?", 2), str)
    assert set(json.loads((tmp_path / "model" / "evaluation.json").read_text())) == {
        "8 to 32 frames",
    }
