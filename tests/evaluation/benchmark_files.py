# SPDX-License-Identifier: Apache-2.0
"""Small files in the layouts of the benchmarks, as lmms-eval's tasks and ours expect them."""

import json
from pathlib import Path

from datasets import Dataset


OPTIONS = ("a red circle", "a green square", "a blue cross", "an orange triangle")
LETTERED = [f"{letter}. {option}" for letter, option in zip("ABCD", OPTIONS)]
FIVE = (*OPTIONS, "nothing")


def write_benchmarks(hub: Path, home: Path, questions: list[tuple[str, str]], write_video) -> None:
    """
    Writes every benchmark with the same questions. The right answer is always C. The last question is about a video
    called short, the others about one of half an hour; MLVU's first is of a kind that HourEval leaves out.

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
        "mvbench_video/star/Charades_segment": "",
        "nextqa/NExTVideo": "",
        "hourvideo/videos": "",
    }
    for folder in folders:
        (home / folder).mkdir(parents=True)
        for video in dict.fromkeys(videos):
            write_video(video, home / folder / f"{video}.mp4")

    _write(
        hub / "lmms-eval/LVBench/data/train.parquet",
        [row | {"video_path": f"{video}.mp4", "options": OPTIONS} for row, video in zip(rows, videos)],
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
            {"question": "\n".join([row["question"], *LETTERED]), "answer": "C"}
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
    _write(
        hub / "OpenGVLab/MVBench/json/action_sequence.json",
        [
            {"video": f"{video}.mp4", "question": row["question"], "candidates": OPTIONS, "answer": OPTIONS[2]}
            for row, video in zip(rows, videos)
        ],
        "action_sequence",
        "train",
    )
    answers = {f"a{i}": option for i, option in enumerate(FIVE)}
    _write(
        hub / "lmms-eval/NExTQA/MC/test-00000-of-00001.parquet",
        [{"video": video, "question": row["question"], "answer": 2, **answers} for row, video in zip(rows, videos)],
        "MC",
        "test",
    )
    annotations = {video: {"video_metadata": {"duration": 1800}, "benchmark_dataset": []} for video in videos}
    for i, (video, question) in enumerate(questions[:-1]):
        annotations[video]["benchmark_dataset"].append(
            {"qid": f"q{i}", "task": "perception/tracking", "question": question, "correct_answer_label": "C"}
            | {"mcq_test": "\n".join(f"{letter}) {option}" for letter, option in zip("ABCDE", FIVE))}
        )
    (home / "hourvideo/dev_v1.0_annotations.json").write_text(json.dumps(annotations))


def _write(path: Path, rows: list[dict], config: str | None = None, split: str | None = None) -> None:
    path.parent.mkdir(parents=True)
    dataset = Dataset.from_list(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        dataset.to_parquet(path)
    if config is not None:
        root = path.parent.parent
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:", f"  - split: {split}"]
        (root / "README.md").write_text("\n".join([*lines, f"    path: {path.relative_to(root)}", "---", ""]))
