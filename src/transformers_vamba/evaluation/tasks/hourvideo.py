# SPDX-License-Identifier: Apache-2.0
"""HourVideo: five-way questions about egocentric videos of 20 to 120 minutes. See `vamba_hourvideo.yaml`."""

import json
import os
from pathlib import Path

from datasets import Dataset
from loguru import logger

from transformers_vamba.evaluation.multiple_choice import SELECT, accuracy_of, respond_with


FOLDER = Path(os.getenv("HF_HOME", "~/.cache/huggingface")).expanduser() / "hourvideo"
DATA_FILES = {"dev": str(FOLDER / "dev_v1.0_annotations.json")}
COLUMNS = ("qid", "task", "question", "mcq_test", "correct_answer_label")


def process_docs(dataset: Dataset) -> Dataset:
    """One row a question, of a dataset whose only text is the annotation file: questions by video."""
    videos = json.loads(dataset[0]["text"])
    questions = [
        {"video_uid": uid, **{name: question.get(name) or "" for name in COLUMNS}}
        for uid, video in videos.items()
        for question in video["benchmark_dataset"]
    ]
    without = [question["qid"] for question in questions if not question["mcq_test"]]
    if without:
        logger.warning(f"{len(without)} questions of HourVideo have no options and count as wrong: {without[:10]}")
    return Dataset.from_list(questions)


def doc_to_visual(doc: dict) -> list[str]:
    return [str(FOLDER / "videos" / f"{doc['video_uid']}.mp4")]


def doc_to_text(doc: dict) -> str:
    return "\n".join([SELECT, doc["question"], doc["mcq_test"], respond_with(5)])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], doc["correct_answer_label"]) if doc["mcq_test"] else {"accuracy": 0.0}
