# SPDX-License-Identifier: Apache-2.0
"""
The task group `vamba`: the published evaluation's prompts, frames, reading of answers and scores, against values
written down from the published scripts.
"""

import importlib.util

import av
import numpy as np
import pytest
import torch
from benchmark_files import MVBENCH, evaluate, samples_of
from tiny_vamba import TINY_CHECKPOINT, levels_of


if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("needs lmms-eval: `pip install --no-deps -r tests/lmms-eval.txt`", allow_module_level=True)


from transformers.video_utils import VideoMetadata

from transformers_vamba.evaluation import TASKS
from transformers_vamba.evaluation.frames import EvaluationVideoProcessor
from transformers_vamba.evaluation.multiple_choice import accuracy_of, letter_of
from transformers_vamba.evaluation.questions import Prompt, VideoQuestionAnswering, VideoSettings


TINY_MODEL = str(TINY_CHECKPOINT)

# The published prompt of each benchmark's second question. Video-MME's options are on one line.
SELECT = "Select the best answer to the following multiple-choice question based on the video."
RESPOND = "Respond with only the letter (A, B, C, or D) of the correct option."
QUESTION = "How many flashes were there?"
FOUR = "A. a red circle\nB. a green square\nC. a blue cross\nD. an orange triangle"
VIDEOMME = f"{SELECT}\n{RESPOND}\n{QUESTION}\nA. a red circle B. a green square C. a blue cross D. an orange triangle"
PROMPTS = {
    "vamba_lvbench": (
        f"{SELECT}\n{RESPOND}\n{QUESTION}\n(A) a red circle\n(B) a green square\n(C) a blue cross\n"
        "(D) an orange triangle"
    ),
    "vamba_hourvideo": (
        f"{SELECT}\n{QUESTION}\nA) a red circle\nB) a green square\nC) a blue cross\nD) an orange triangle\n"
        "E) nothing\nRespond with only the letter (A, B, C, D, or E) of the correct option."
    ),
    "vamba_videomme": VIDEOMME,
    "vamba_mlvu": f"{SELECT} {RESPOND}\n{QUESTION}\n{FOUR}",
    "vamba_longvideobench": f"{SELECT} {RESPOND}\n{QUESTION}\n{FOUR}",
    "vamba_mvbench_action_sequence": (
        f"Question: {QUESTION}\n{FOUR}\nAnswer with the option's letter from the given choices directly."
    ),
    "vamba_nextqa": (
        f"{SELECT} Respond with only the letter (A, B, C, D, or E) of the correct option.\n{QUESTION}\n{FOUR}\n"
        "E. nothing"
    ),
    "vamba_houreval_videomme": VIDEOMME,
    "vamba_houreval_mlvu": f"{SELECT} {RESPOND}\n{QUESTION}\n{FOUR}",
    "vamba_houreval_longvideobench": f"{SELECT} {RESPOND}\n{QUESTION}\n{FOUR}",
}
ONE_QUESTION = [f"vamba_mvbench_{name}" for name in MVBENCH if name != "action_sequence"]

# Of the benchmarks' videos, which have 16 frames of 112x112: the six that are taken, and the patches of a frame.
FRAMES, FRAMES_OF_MVBENCH = [1, 3, 6, 9, 11, 14], [1, 3, 6, 9, 11, 13]
RAISED, AS_THEY_ARE = (18, 18), (8, 8)


def decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def run(benchmarks, task_manager):
    """The group with the tiny model and six frames: results, what was encoded and the arguments of generation."""
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    lm = VambaChat(TINY_MODEL, batch_size=4, device="cpu", num_frames=6)
    encode, generate = lm.model.encode_video, lm.model.generate
    encoded, generation = [], []

    def record_video(**inputs):
        encoded.append(inputs)
        return encode(**inputs)

    def record_generation(**arguments):
        generation.append(arguments)
        # The tiny model seldom comes to an end by itself about prompts that it was not trained on.
        return generate(**arguments | {"max_new_tokens": 8})

    lm.model.encode_video, lm.model.generate = record_video, record_generation
    return evaluate(lm, task_manager, ["vamba"]), encoded, generation


def expected_pixels(processor, path, indices, settings):
    video = decode(path)[indices]
    return processor.video_processor([video], do_sample_frames=False, size=settings, return_tensors="pt")


def test_the_group_has_every_benchmark_of_the_paper(task_manager):
    group = task_manager._get_config("vamba")["task"]
    names = ("lvbench", "hourvideo", "houreval", "videomme", "mlvu", "longvideobench", "mvbench", "nextqa")
    assert group == [f"vamba_{name}" for name in names]
    assert len(task_manager._get_config("vamba_mvbench")["task"]) == 20


def test_prompts_are_the_published_ones(run):
    results, _, _ = run
    asked = set(results["samples"])
    assert asked == {*PROMPTS, *ONE_QUESTION}
    for task, expected in PROMPTS.items():
        question = next(sample for sample in samples_of(results, task) if QUESTION in sample["arguments"][0])
        assert question["arguments"][0] == expected, task


def load_functions(name):
    """A module beside the task files, as lmms-eval loads it."""
    spec = importlib.util.spec_from_file_location(name, f"{TASKS}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prompts_of_other_forms_of_questions():
    benchmarks = load_functions("benchmarks")
    options = {f"option{i}": option for i, option in enumerate(["yes", "no", "N/A", "N/A", None])}
    expected = f"{SELECT} {RESPOND}\nIs it?\nA. yes\nB. no"  # of four letters all the same
    assert benchmarks.longvideobench_doc_to_text({"question": "Is it?", **options}) == expected
    options |= {f"option{i}": f"{i}" for i in range(5)}
    expected = f"{SELECT} {RESPOND}\nHow many?\nA. 0\nB. 1\nC. 2\nD. 3\nE. 4"
    assert benchmarks.longvideobench_doc_to_text({"question": "How many?", **options}) == expected

    expected = f"{SELECT} {RESPOND}\nWhich (A) is it?\nA. this (B)\nB. that"
    for question in ("Which (A) is it?\n(A) this (B)\n(B) that", "Which (A) is it?\nA. this (B)\nB. that"):
        assert benchmarks.mlvu_doc_to_text({"question": question}) == expected
    expected = f"{SELECT}\n{RESPOND}\nWhich?\n(A) this\n(B) that"
    for doc in ({"question": "Which?\n(A) this\n(B) that"}, {"question": "Which?", "options": ["this", "that"]}):
        assert benchmarks.lvbench_doc_to_text(doc) == expected


def test_a_question_of_hourvideo_without_options_counts_as_wrong():
    hourvideo = load_functions("hourvideo")
    doc = {"mcq_test": "A) this\nB) that", "correct_answer_label": "B"}
    assert hourvideo.process_results(doc, ["B"]) == {"accuracy": 1.0}
    assert hourvideo.process_results({**doc, "mcq_test": ""}, ["B"]) == {"accuracy": 0.0}


def test_frames_and_answers_are_those_by_hand(run, benchmarks, model_and_processor):
    """Each video is encoded from the frames that the published scripts take, and the answers are about those."""
    results, encoded, _ = run
    model, processor = model_and_processor
    raised, as_they_are = {"shortest_edge": 256, "longest_edge": 480}, {"shortest_edge": 1, "longest_edge": 1000}
    videos = {
        "vamba_lvbench": ("lvbench/a.mp4", FRAMES, raised, RAISED),
        "vamba_videomme": ("videomme/data/a.mp4", FRAMES, raised, RAISED),
        "vamba_houreval_mlvu": ("mlvu/a.mp4", FRAMES, raised, RAISED),
        "vamba_longvideobench": ("datasets/longvideobench/videos/a.mp4", FRAMES, raised, RAISED),
        "vamba_mvbench_action_sequence": (
            "mvbench_video/star/Charades_segment/a.mp4",
            FRAMES_OF_MVBENCH,
            raised,
            RAISED,
        ),
        "vamba_mvbench_episodic_reasoning": (
            "mvbench_video/tvqa/video_fps3_hq_segment/a.mp4",
            FRAMES_OF_MVBENCH,
            as_they_are,
            AS_THEY_ARE,
        ),
        "vamba_nextqa": ("nextqa/NExTVideo/a.mp4", FRAMES, as_they_are, AS_THEY_ARE),
    }
    for task, (path, indices, size, grid) in videos.items():
        inputs = expected_pixels(processor, benchmarks / path, indices, size)
        assert inputs["video_grid_thw"].tolist() == [[3, *grid]], task
        matching = [
            torch.equal(given["pixel_values_videos"], inputs["pixel_values_videos"])
            for given in encoded
            if given["video_grid_thw"].tolist() == [[3, *grid]]
        ]
        assert any(matching), task

        sample = next(s for s in samples_of(results, task) if QUESTION in s["arguments"][0] or task in ONE_QUESTION)
        tokens = processor.prepare_question(sample["arguments"][0])
        answer = model.generate(**tokens, **inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(answer[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        assert sample["filtered_resps"][0] == answer, task


def test_every_answer_is_scored(run):
    """The scores of the tiny model's own answers, by the published reading: few of them are letters."""
    results, _, _ = run
    for task, samples in results["samples"].items():
        expected = []
        for sample in samples:
            response = sample["filtered_resps"][0].lower()
            first = next((character for character in response if character.isalpha()), "")
            expected.append(float(first == "c"))
        assert results["results"][task]["accuracy,none"] == pytest.approx(np.mean(expected)), task
    for task in PROMPTS:
        unanswered = [sample["filtered_resps"][0] == "" for sample in samples_of(results, task)]
        assert sum(unanswered) == 2, task  # the missing video and the broken one
    assert results["throughput"]["avg_unanswered"] == 2 * len(PROMPTS)


def test_generation_is_the_published_one(run, task_manager):
    _, _, generation = run
    kinds = []
    for arguments in generation:
        kind = {name: value for name, value in arguments.items() if name in SAMPLED or name == "max_new_tokens"}
        if kind not in kinds:
            kinds.append(kind)
    assert sorted(kinds, key=len) == [{"max_new_tokens": 512, "do_sample": False}, {"max_new_tokens": 512, **SAMPLED}]

    # Answers are not cut: without `until`, lmms-eval would end them at an empty line.
    tasks = task_manager.load_task_or_group(["vamba_lvbench", "vamba_hourvideo", "vamba_mvbench_moving_count"], "chat")
    assert all(task.config.generation_kwargs["until"] == [] for task in tasks.values())


SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}


def test_hourvideo_samples_whatever_the_checkpoint_says(benchmarks, model_and_processor):
    """The published checkpoint's `top_k` of 1 would leave nothing to sample."""
    model, processor = model_and_processor
    answering = VideoQuestionAnswering(model, processor, batch_size=16)
    content = [{"type": "video", "path": str(benchmarks / "hourvideo/videos/a.mp4")}, {"type": "text", "text": "Why?"}]
    settings = VideoSettings(6, None, 112, 112)
    messages = [{"role": "user", "content": content}]

    def answers(generation):
        torch.manual_seed(0)
        prompts = [Prompt(messages, settings, {"max_new_tokens": 8, **generation})] * 16
        return {answer.text for answer in answering.answer(prompts)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "top_k", 1)
        hot = SAMPLED | {"temperature": 5.0}
        assert len(answers({name: value for name, value in hot.items() if name != "top_k"})) == 1
        assert len(answers(hot)) > 1


def test_scores_of_crafted_answers(benchmarks, task_manager):
    from lmms_eval.api.model import lmms

    answers = ["C", "The answer is C.", "(B)", "(D)", "I think C", "C"]

    class Scripted(lmms):
        is_simple = False

        def generate_until(self, requests):
            return [answers[request.doc_id] for request in requests]

        loglikelihood = generate_until_multi_round = None

    own = ["lvbench", "videomme", "mlvu_dev", "longvideobench_val_v", "mvbench_action_sequence", "nextqa_mc_test"]
    results = evaluate(Scripted(), task_manager, ["vamba", *own])["results"]
    # The published reading takes the first letter: that of "I think C" is I.
    for name in ("lvbench", "videomme", "mlvu", "longvideobench", "mvbench_action_sequence", "nextqa"):
        assert results[f"vamba_{name}"]["accuracy,none"] == pytest.approx(3 / 6), name
    for name in ("hourvideo", "houreval_videomme", "houreval_longvideobench"):
        assert results[f"vamba_{name}"]["accuracy,none"] == pytest.approx(2 / 5), name
    assert results["vamba_houreval_mlvu"]["accuracy,none"] == pytest.approx(2 / 4)
    assert results["vamba_houreval"]["accuracy,none"] == pytest.approx(6 / 14)
    assert results["vamba_mvbench"]["accuracy,none"] == pytest.approx((3 + 19) / 25)  # over questions, not tasks

    # lmms-eval's own metrics: MLVU's is the mean of seven kinds of questions, of which five have none here.
    assert results["lvbench"]["lvbench_score,none"] == pytest.approx(4 / 6)
    assert results["videomme"]["videomme_perception_score,none"] == pytest.approx(400 / 6)
    assert results["mlvu_dev"]["mlvu_percetion_score,none"] == pytest.approx((100 + 300 / 5) / 7)
    assert results["longvideobench_val_v"]["lvb_acc,none"] == pytest.approx(4 / 6, abs=1e-4)
    assert results["mvbench_action_sequence"]["mvbench_accuracy,none"] == pytest.approx(400 / 6)
    assert results["nextqa_mc_test"]["exact_match,none"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("C", "C"),
        ("c.", "C"),
        ("(C) a blue cross", "C"),
        ("I would say: the answer is B, not A", "B"),
        ("Answer: D", "D"),
        ("So the option is e", "E"),
        ("The option is: B", "T"),  # the published scripts look for this one with a space, and else take all
        ("The answer is (A). Answer: B", "A"),
        ("Answer: A. The answer is B", "B"),
        ("The answer is A. No, the answer is C", "C"),
        ("2", ""),
        ("The answer is", ""),
        ("", ""),
    ],
)
def test_the_published_reading_of_answers(response, letter):
    assert letter_of(response) == letter
    assert accuracy_of(response, "B") == {"accuracy": float(letter == "B")}


@pytest.mark.parametrize(
    "num_frames, total, indices",
    [
        (4, 8, [1, 3, 5, 7]),  # the demo takes 0, 2, 4, 6
        (4, 10, [1, 3, 6, 8]),
        (6, 16, FRAMES),
        (8, 30, [1, 5, 9, 13, 16, 20, 24, 28]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 5, [0, 1, 2, 3]),  # all there are, but that the model takes them by two
        (512, 1, [0]),
    ],
)
def test_frames_are_in_the_middle_of_linearly_spaced_bounds(num_frames, total, indices):
    video_processor = EvaluationVideoProcessor()
    sampled = video_processor.sample_frames(VideoMetadata(total_num_frames=total), num_frames=num_frames)
    assert sampled.tolist() == indices


@pytest.mark.parametrize("num_frames", (128, 512, 1024))
def test_the_middle_is_that_of_torch_linspace(num_frames):
    """With which the published scripts compute the bounds."""
    video_processor = EvaluationVideoProcessor()
    for total in (*range(num_frames + 1, num_frames + 200), 54_001, 107_892, 216_000):
        bounds = torch.linspace(0, total, num_frames + 1, dtype=torch.int64)
        expected = (bounds[:-1] + bounds[1:]) // 2
        sampled = video_processor.sample_frames(VideoMetadata(total_num_frames=total), num_frames=num_frames)
        assert sampled.tolist() == expected.tolist()


def test_a_rate_is_sampled_as_elsewhere():
    metadata = VideoMetadata(total_num_frames=40, fps=10.0)
    assert EvaluationVideoProcessor().sample_frames(metadata, fps=2.0).tolist() == [2, 7, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize(
    "num_frames, total, indices",
    [
        (8, 4, [0, 0, 1, 1, 2, 2, 2, 3]),
        (8, 1, [0] * 8),
        (6, 16, FRAMES_OF_MVBENCH),
        (4, 24, [2, 8, 14, 19]),
    ],
)
def test_mvbench_repeats_the_frames_of_a_short_clip(num_frames, total, indices, model_and_processor, write_video):
    path = write_video(f"{total}.mp4", num_frames=total, height=56, width=56)
    answering = VideoQuestionAnswering(*model_and_processor)
    segments = list(answering._read(path, VideoSettings(num_frames, None, None, None, repeat=True)))
    levels = torch.cat([levels_of(segment, answering.processor.video_processor) for segment in segments])
    assert ((levels - 16) / 4).round().int().tolist() == indices


def test_mvbench_always_has_512_frames(model_and_processor, write_video, monkeypatch):
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    settings = VambaChat(TINY_MODEL, device="cpu").settings_of("vamba_mvbench_state_change")
    answering = VideoQuestionAnswering(*model_and_processor)
    path = write_video("clip.mp4", num_frames=20, height=56, width=56)
    cache = answering.encode([path], settings._replace(shortest_edge=56, longest_edge=56))
    assert cache.video_lengths == [256 * 4]
    # Beside an image, where the pixels come with the text.
    content = [{"type": "video", "path": path}, {"type": "image", "image": torch.zeros(3, 56, 56)}]
    prompt = Prompt([{"role": "user", "content": content}], settings._replace(shortest_edge=56, longest_edge=56))
    assert answering._preprocess([prompt])["video_grid_thw"].tolist() == [[256, 4, 4]]


def test_published_settings_of_tasks():
    from transformers_vamba.evaluation.lmms_eval_model import VambaChat

    lm = VambaChat(TINY_MODEL, device="cpu")
    elsewhere, mvbench = VideoSettings(512, None, 256, 480), VideoSettings(512, None, 256, 480, repeat=True)
    expected = {
        "lvbench": VideoSettings(1024, None, 256, 560),
        "lvbench_no_visual": VideoSettings(1024, None, 256, 560),
        "vamba_lvbench": VideoSettings(1024, None, 256, 560),
        "vamba_hourvideo": VideoSettings(128, None, 256, 360),
        "mvbench_moving_count": mvbench,
        "vamba_mvbench_moving_count": mvbench,
        "vamba_mvbench_episodic_reasoning": VideoSettings(512, None, None, None, repeat=True),
        "nextqa_mc_test": VideoSettings(512, None, None, None),
        "vamba_nextqa": VideoSettings(512, None, None, None),
    }
    names = ("videomme", "mlvu_dev", "longvideobench_val_v", "vamba_houreval_mlvu", "vamba_videomme", "x_lvbench")
    expected |= {name: elsewhere for name in names}
    assert {task: lm.settings_of(task) for task in expected} == expected

    # NExT-QA's frames are brought to edges where that is asked for.
    lm = VambaChat(TINY_MODEL, device="cpu", shortest_edge=256, longest_edge=480)
    assert lm.settings_of("vamba_nextqa") == elsewhere
