# SPDX-License-Identifier: Apache-2.0
"""Small files in the layouts of the benchmarks, as lmms-eval's tasks and ours expect them."""

import json
from pathlib import Path

from datasets import Dataset


OPTIONS = ("a red circle", "a green square", "a blue cross", "an orange triangle")
LETTERED = [f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS)]
BRACKETED = [f"({letter}) {option}" for letter, option in zip("ABCD", OPTIONS)]
FIVE = (*OPTIONS, "nothing")

# MVBench's tasks, and where lmms-eval unpacks the videos of each.
MVBENCH = {
    "object_interaction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "action_prediction": "star/Charades_segment",
    "action_localization": "sta/sta_video_segment",
    "moving_count": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos",
    "object_shuffle": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "moving_direction": "clevrer/video_validation",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "moving_attribute": "clevrer/video_validation",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
    "counterfactual_inference": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "action_count": "perception/videos",
}


def write_benchmarks(hub: Path, home: Path, questions: list[tuple[str, str]], write_video) -> None:
    """
    Writes every benchmark with the same questions. The right answer is always C. The last question is about a video
    called short, the others about one of half an hour; MLVU's first is of a kind that HourEval leaves out. Of
    MVBench's tasks, action sequence has all questions and the others the first.

    Args:
        hub (`Path`): Where datasets lie by their names on the Hub. It has to be the working directory.
        home (`Path`): `HF_HOME`, for the videos.
        questions (`list[tuple[str, str]]`): Names of videos and questions about them.
        write_video (`Callable`): Writes the video of a name to a path.
    """
    is_long = [index < len(questions) - 1 for index in range(len(questions))]
    rows = [{"question": question, "answer": "C"} for _, question in questions]
    videos = [video for video, _ in questions]
    folders = {
        "lvbench": "",
        "videomme/data": "",
        "mlvu": "",
        "datasets/longvideobench/videos": "",
        **{f"mvbench_video/{folder}": "" for folder in MVBENCH.values()},
        "nextqa/NExTVideo": "",
        "hourvideo/videos": "",
    }
    for folder in folders:
        (home / folder).mkdir(parents=True)
        for video in dict.fromkeys(videos):
            write_video(video, home / folder / f"{video}.mp4")

    _write(
        hub / "lmms-eval/LVBench/data/train.parquet",
        [
            {"question": "\n".join([row["question"], *BRACKETED]), "answer": "C", "video_path": f"{video}.mp4"}
            for row, video in zip(rows, videos)
        ],
    )
    topic = {"domain": "Knowledge", "sub_category": "Law", "task_type": "Counting Problem", "options": LETTERED}
    _write(
        hub / "lmms-eval/Video-MME/videomme/test-00000-of-00001.parquet",
        [
            row | topic | {"videoID": video, "question_id": f"{i}", "duration": "long" if is_long[i] else "short"}
            for i, (row, video) in enumerate(zip(rows, videos))
        ],
    )
    _write(
        hub / "sy1998/MLVU_dev/data/test-00000-of-00001.parquet",
        [
            {"question": "\n".join([row["question"], *BRACKETED]), "answer": "C"}
            | {"task_type": "order" if i else "plotQA"}
            | {"video_name": f"{video}.mp4", "duration": 1800.0 if is_long[i] else 60.0}
            for i, (row, video) in enumerate(zip(rows, videos))
        ],
    )
    options = {f"option{i}": option for i, option in enumerate([*OPTIONS, "N/A"])}
    _write(
        hub / "longvideobench/LongVideoBench/validation-00000-of-00001.parquet",
        [
            {"id": f"{i}", "video_path": f"{video}.mp4", "question": row["question"], "correct_choice": 2}
            | {"duration": 1900.0 if is_long[i] else 60.0, "duration_group": 3600 if is_long[i] else 60}
            | {"question_category": "T2E", **options}
            for i, (row, video) in enumerate(zip(rows, videos))
        ],
    )
    mvbench = [
        {"video": f"{video}.mp4", "question": row["question"], "candidates": OPTIONS, "answer": OPTIONS[2]}
        for row, video in zip(rows, videos)
    ]
    for name in MVBENCH:
        _write(hub / f"OpenGVLab/MVBench/json/{name}.json", mvbench if name == "action_sequence" else mvbench[:1])
    _write_configs(hub / "OpenGVLab/MVBench", "train", {name: f"json/{name}.json" for name in MVBENCH})
    answers = {f"a{i}": option for i, option in enumerate(FIVE)}
    _write(
        hub / "lmms-eval/NExTQA/MC/test-00000-of-00001.parquet",
        [{"video": video, "question": row["question"], "answer": 2, **answers} for row, video in zip(rows, videos)],
    )
    _write_configs(hub / "lmms-eval/NExTQA", "test", {"MC": "MC/test-00000-of-00001.parquet"})
    annotations = {video: {"video_metadata": {"duration": 1800}, "benchmark_dataset": []} for video in videos}
    for i, (video, question) in enumerate(questions[:-1]):
        annotations[video]["benchmark_dataset"].append(
            {"qid": f"q{i}", "task": "perception/tracking", "question": question, "correct_answer_label": "C"}
            | {"mcq_test": "\n".join(f"{letter}) {option}" for letter, option in zip("ABCDE", FIVE))}
        )
    (home / "hourvideo/dev_v1.0_annotations.json").write_text(json.dumps(annotations))


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(path)


def _write_configs(folder: Path, split: str, files: dict[str, str]) -> None:
    lines = ["---", "configs:"]
    for name, path in files.items():
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def evaluate(model, task_manager, tasks: list[str], **kwargs) -> dict:
    """lmms-eval's results."""
    from lmms_eval.evaluator import simple_evaluate

    return simple_evaluate(model, tasks=list(tasks), task_manager=task_manager, bootstrap_iters=0, **kwargs)


def samples_of(results: dict, task: str) -> list[dict]:
    """What became of each question of a task, in their order."""
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def responses_of(results: dict, task: str) -> list[str]:
    return [sample["filtered_resps"][0] for sample in samples_of(results, task)]
