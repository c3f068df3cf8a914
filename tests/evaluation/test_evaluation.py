# SPDX-License-Identifier: Apache-2.0
"""The model and the tasks for lmms-eval, run by lmms-eval itself on small files in each benchmark's own layout."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_files import evaluate, responses_of, samples_of
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vamba import TINY_CHECKPOINT


if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("needs lmms-eval: `pip install --no-deps -r tests/lmms-eval.txt`", allow_module_level=True)


from synthetic_videos import sample_video, write_mp4

from transformers_vamba import VambaCache
from transformers_vamba.evaluation import TASKS
from transformers_vamba.evaluation.questions import Prompt, VideoQuestionAnswering, VideoSettings


TINY_MODEL = str(TINY_CHECKPOINT)
SETTINGS = VideoSettings(16, None, 112, 112)
SMALL = {"device": "cpu", "num_frames": 16, "shortest_edge": 112, "longest_edge": 112}

THEIRS = ("lvbench", "videomme", "mlvu_dev", "longvideobench_val_v", "mvbench_action_sequence", "nextqa_mc_test")

EMPTY = "ValueError: The answer to score is empty."

# A task that scores each option.
BY_LOSSES = """
task: by_losses
dataset_path: by_losses
dataset_kwargs:
  load_from_disk: True
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_choice: options
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def answering(model_and_processor):
    return VideoQuestionAnswering(*model_and_processor, batch_size=4)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Paths of three videos."""
    paths = [tmp_path_factory.mktemp("videos") / f"{seed}.mp4" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_mp4(path, sample_video([85, seed], 16, "sequence"))
    return [str(path) for path in paths]


def prompt(question, *media, **kwargs):
    content = [
        {"type": "video", "path": medium} if isinstance(medium, str) else {"type": "image", "image": medium}
        for medium in media
    ]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return Prompt(messages, SETTINGS, {"max_new_tokens": 16}, **kwargs)


def generate_at_once(model, processor, prompt):
    """The answer without any cache made ahead: pixels and text go to `generate` together."""
    inputs = processor.apply_chat_template(
        prompt.messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": prompt.settings.videos_kwargs},
    )
    tokens = model.generate(**inputs, **prompt.generation, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_lmms_evals_own_tasks_run_with_the_tiny_model(benchmarks, task_manager, model_and_processor):
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    results = evaluate(VambaChat(TINY_MODEL, batch_size=4, **SMALL), task_manager, THEIRS)
    for task in THEIRS:
        unanswered = [response == "" for response in responses_of(results, task)]
        assert unanswered == [
            False,
            False,
            False,
            True,
            True,
            False,
        ]  # of a video that is missing, of one that is none
    assert results["throughput"]["avg_unanswered"] == 2 * len(THEIRS)

    # What the model was asked is the task's prompt, about the right video.
    path = str(benchmarks / "lvbench" / "b.mp4")
    text = samples_of(results, "lvbench")[2]["arguments"][0]
    assert "What came last?" in text
    assert responses_of(results, "lvbench")[2] == generate_at_once(*model_and_processor, prompt(text, path))


def test_answers_in_a_group_are_those_of_each_alone(answering, model_and_processor, videos, monkeypatch):
    encoded = []
    encode = VideoQuestionAnswering.encode

    def count(self, paths, settings):
        encoded.append(tuple(paths))
        return encode(self, paths, settings)

    monkeypatch.setattr(VideoQuestionAnswering, "encode", count)
    texts = ["What came first?", "In which order did the colours come?", "How many flashes were there?"]
    prompts = [prompt(text, path) for text in texts for path in videos]
    prompts += [prompt("What came first, and what came after it?", videos[1], videos[0]), prompt("Hello!")]
    grouped = answering.answer(prompts)
    assert encoded == [(path,) for path in videos] + [(videos[1], videos[0])]
    assert [answering.answer([prompt])[0] for prompt in prompts] == grouped
    assert [generate_at_once(*model_and_processor, prompt) for prompt in prompts] == [a.text for a in grouped]
    assert len({answer.text for answer in grouped}) > 4


def test_images_and_mixed_prompts_go_in_batches(answering, model_and_processor, videos):
    red, blue = Image.new("RGB", (112, 112), "red"), Image.new("RGB", (112, 112), "blue")
    prompts = [prompt("What is it?", red), prompt("And this?", blue, red), prompt("Which?", blue, videos[0])]
    answers = answering.answer(prompts)
    assert [answer.text for answer in answers] == [generate_at_once(*model_and_processor, p) for p in prompts]

    prompts.insert(1, prompt("What is it?", videos[0], "https://localhost:1/nothing.mp4"))
    prompts.insert(1, prompt("What is it?", "nowhere.mp4", red))
    again = answering.answer(prompts)
    assert again[:1] + again[3:] == answers
    assert "nowhere.mp4" in again[1].error and "nothing.mp4" in again[2].error


def test_scores_are_those_of_the_logits(answering, model_and_processor, videos):
    model, processor = model_and_processor
    continuations = ("a red circle", "a green square", "purple, then blue")
    prompts = [prompt("What came first?", videos[0], continuation=text) for text in continuations]
    for scored, answer in zip(prompts, answering.score(prompts)):
        inputs = processor.apply_chat_template(
            scored.messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"videos_kwargs": SETTINGS.videos_kwargs},
        )
        ids = processor.tokenizer(scored.continuation, return_tensors="pt").input_ids
        inputs = {name: value for name, value in inputs.items() if name not in ("mm_token_type_ids", "attention_mask")}
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -ids.shape[1] - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0])
        assert answer.loss == pytest.approx(loss.item(), rel=1e-4)
        assert answer.is_greedy == (logits.argmax(-1) == ids[0]).all()
    greedy = answering.answer([prompt("What came first?", videos[0])])[0].text
    assert answering.score([prompt("What came first?", videos[0], continuation=greedy)])[0].is_greedy


def test_an_empty_answer_to_score_costs_itself(answering, videos):
    prompts = [prompt("What came first?", videos[0], continuation=text) for text in ("red", "", "a green square")]
    prompts += [prompt("Which?", continuation=text) for text in ("", "red")]
    answers = answering.score(prompts)
    assert [answer.error for answer in answers] == [None, EMPTY, None, EMPTY, None]
    assert [answer.loss == float("inf") for answer in answers] == [False, True, False, True, False]
    alone = [answering.score([prompt])[0] for prompt in prompts]
    assert [answer.loss for answer in alone] == pytest.approx([answer.loss for answer in answers], rel=1e-4)


def test_an_answer_whose_beginning_joins_the_prompts_last_token(model_and_processor):
    """Two newlines may be one token: then it is this one that is scored, and what comes after it."""
    model, processor = model_and_processor
    processor = copy.copy(processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.add_tokens(["\n\n"])
    answering = VideoQuestionAnswering(model, processor)
    for continuation, length in (("\n\nred", 3), ("\nred", 2), ("red", 1)):
        scored = prompt("Which?", Image.new("RGB", (112, 112)), continuation=continuation)
        ids = answering._preprocess([scored])["input_ids"][0].tolist()
        assert answering._continuation_length(scored, ids) == length


def test_a_folder_keeps_processed_videos(model_and_processor, videos, tmp_path, monkeypatch):
    path = str(shutil.copy(videos[0], tmp_path / "movie.mp4"))
    folder = tmp_path / "processed"
    asked = [prompt("What came first?", path), prompt("How many flashes were there?", path)]

    def answer(prompts=asked):
        """The answers of a new run, and how many videos it encoded."""
        count = 0

        def encode(**kwargs):
            nonlocal count
            count += 1
            return type(model).encode_video(model, **kwargs)

        model, processor = model_and_processor
        monkeypatch.setattr(model, "encode_video", encode, raising=False)
        answers = VideoQuestionAnswering(model, processor, 2, folder).answer(prompts)
        return answers, count

    first, count = answer()
    assert count == 1
    assert answer() == (first, 0)
    (kept,) = folder.iterdir()
    assert VambaCache.from_pretrained(kept).video_lengths == [8 * 16]

    other = [Prompt(p.messages, SETTINGS._replace(num_frames=8), p.generation) for p in asked]
    assert answer(other)[1] == 1
    with torch.no_grad():
        bias = model_and_processor[0].model.visual.merger.ln_q.bias
        original = bias.clone()
        bias += 1
        assert answer()[1] == 1
        bias.copy_(original)
    assert answer() == (first, 0)
    os.utime(path, (0, 0))
    assert answer() == (first, 1)


def set_field(name, value):
    def change(folder):
        content = json.loads((folder / "cache_config.json").read_text())
        content = {**content, name: value} if value is not None else {k: v for k, v in content.items() if k != name}
        (folder / "cache_config.json").write_text(json.dumps(content))

    return change


def take_layer_of_another_video(folder):
    tensors = load_file(folder / "layer-00001.safetensors")
    shorter = {name: t[:, :, :16].contiguous() if name in ("0.keys", "0.values") else t for name, t in tensors.items()}
    save_file(shorter, folder / "layer-00001.safetensors")


def replace_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"no folder")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "layer-00001.safetensors").write_bytes(b"damaged"),
        lambda folder: (folder / "layer-00002.safetensors").write_bytes(b""),
        lambda folder: os.truncate(folder / "layer-00003.safetensors", 1000),
        lambda folder: (folder / "layer-00000.safetensors").unlink(),
        lambda folder: save_file({"0.other": torch.zeros(1)}, folder / "layer-00000.safetensors"),
        take_layer_of_another_video,
        lambda folder: (folder / "cache_config.json").unlink(),
        lambda folder: (folder / "cache_config.json").write_text(""),
        lambda folder: (folder / "cache_config.json").write_text("[]"),
        lambda folder: (folder / "cache_config.json").write_bytes(b"\xff\xfe"),
        *(set_field(name, None) for name in ("num_videos", "rows", "text_config", "video_cache_implementation")),
        set_field("num_videos", 0),
        set_field("num_videos", 2),
        set_field("num_videos", "one"),
        set_field("rows", [0, 0, 0]),
        set_field("text_config", {}),
        set_field("text_config", {"num_hidden_layers": 2}),
        set_field("video_cache_implementation", "elsewhere"),
        replace_by_a_file,
    ],
)
def test_a_damaged_processed_video_is_made_anew(model_and_processor, videos, tmp_path, damage):
    asked = [prompt("What came first?", path) for path in videos[:2]]
    answering = VideoQuestionAnswering(*model_and_processor, 2, tmp_path)
    first = answering.answer(asked)
    kept = tmp_path / answering._name(videos[:1], SETTINGS)
    keys = VambaCache.from_pretrained(kept).videos[0][1].keys.clone()  # no memory map, which damage would reach
    damage(kept)
    assert answering.answer(asked) == first
    assert torch.equal(VambaCache.from_pretrained(kept).videos[0][1].keys, keys)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_video_costs_its_own_questions_and_a_full_disk_ends_the_run(answering, videos, tmp_path, monkeypatch):
    for name, error in (
        ("missing.mp4", "FileNotFoundError: .*missing.mp4"),
        ("broken.mp4", "ValueError: .*broken.mp4"),
    ):
        path = tmp_path / name
        if name == "broken.mp4":
            path.write_bytes(Path(videos[0]).read_bytes()[:3000])
        for folder in (None, tmp_path / "processed"):
            again = VideoQuestionAnswering(answering.model, answering.processor, 2, folder)
            answers = again.answer([prompt("What came first?", video) for video in (str(path), videos[1])])
            assert re.match(error, answers[0].error) and answers[0].text == ""
            assert answers[1].error is None and answers[1].text

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(VambaCache, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        again.answer([prompt("What came first?", videos[2])])


def test_arguments_go_before_the_published_settings():
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    lm = VambaChat(TINY_MODEL, device="cpu", fps=0.5, longest_edge=640)
    assert lm.settings_of("lvbench") == VideoSettings(1024, 0.5, 256, 640)
    assert lm.settings_of("lvbench").videos_kwargs == {"fps": 0.5, "size": {"shortest_edge": 256, "longest_edge": 640}}
    with pytest.raises(ValueError, match="not both: got 8 and 1.0"):
        VambaChat(TINY_MODEL, num_frames=8, fps=1.0)
    with pytest.raises(NotImplementedError, match="--force_simple"):
        lm.loglikelihood([])


def test_generation_arguments_of_tasks():
    from transformers_vamba.evaluation.lmms_eval_model import _to_generation

    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert _to_generation(greedy) == {"generation": {"max_new_tokens": 16, "num_beams": 1}, "stop": ()}
    assert _to_generation({"until": ["\n\n"], "image_aspect_ratio": None}) == {"generation": {}, "stop": ("\n\n",)}
    sampled = {"do_sample": True, "temperature": 1, "top_p": 0.9}
    assert _to_generation(sampled | {"until": "."}) == {"generation": sampled, "stop": (".",)}
    assert _to_generation({"until": ["", "\n"]}) == {"generation": {}, "stop": ("\n",)}


def test_an_answer_ends_where_the_task_says(answering, videos):
    full, cut = (answering.answer([prompt("What came first?", videos[0], stop=s)])[0].text for s in ((), (" ",)))
    assert full.startswith(f"{cut} ")


def test_multiple_choice_by_losses(benchmarks, videos, tmp_path):
    from datasets import Dataset, DatasetDict
    from lmms_eval.tasks import TaskManager

    from transformers_vamba.evaluation.lmms_eval_model import VambaSimple

    lm = VambaSimple(TINY_MODEL, batch_size=4, **SMALL)
    question = "What came first?"
    best = lm.answering.answer([prompt(question, videos[0])])[0].text
    options = ["a green elephant", best, "no"]
    rows = [{"video": path, "question": question, "options": options, "answer": 1} for path in (videos[0], "gone.mp4")]
    rows.append({**rows[0], "options": ["", best, "no"]})
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk("by_losses")
    (tmp_path / "utils.py").write_text("def doc_to_visual(doc):\n    return [doc['video']]\n")
    (tmp_path / "by_losses.yaml").write_text(BY_LOSSES)
    results = evaluate(lm, TaskManager(include_path=str(tmp_path), include_defaults=False), ["by_losses"])
    assert results["results"]["by_losses"]["acc,none"] == pytest.approx(2 / 3)
    assert (
        results["throughput"]["avg_unanswered"] == 4
    )  # three options about the video that is gone, and the empty one


def test_two_processes_give_the_same_answers(benchmarks, task_manager, tmp_path):
    """The command line, the entry point, and Accelerate: documents of a video are on both processes."""
    names = [entry.name for entry in importlib.metadata.entry_points(group="lmms_eval.models")]
    if "vamba" not in names:
        pytest.skip("needs the package installed, for its entry point")
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    processed = tmp_path / "processed"
    arguments = ",".join(f"{name}={value}" for name, value in SMALL.items() if name != "device")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "lmms_eval"]
    command += ["--model", "vamba", "--model_args", f"pretrained={TINY_MODEL},video_cache={processed},{arguments}"]
    command += ["--tasks", "vamba_hourvideo", "--include_path", TASKS, "--batch_size", "4"]
    command += ["--gen_kwargs", "do_sample=False"]
    command += ["--log_samples", "--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "1"}
    for _ in range(3):
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        # Now and then Gloo's threads abort a process that ends; torchrun then ends the other as well.
        if "terminate called without an active exception" not in run.stderr:
            break
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (tmp_path / "results").rglob("*_results.json")
    results = json.loads(path.read_text())
    assert results["throughput"]["avg_unanswered"] == 2
    (path,) = (tmp_path / "results").rglob("*_samples_vamba_hourvideo.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    responses = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    alone = evaluate(VambaChat(TINY_MODEL, **SMALL), task_manager, ["vamba_hourvideo"], gen_kwargs="do_sample=False")
    assert responses == dict(enumerate(responses_of(alone, "vamba_hourvideo")))
    assert (
        results["results"]["vamba_hourvideo"]["accuracy,none"] == alone["results"]["vamba_hourvideo"]["accuracy,none"]
    )
    assert len(list(processed.iterdir())) == 2
