# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""HourVideo: five-way questions about egocentric videos of 20 to 120 minutes. See `hourvideo.yaml`."""

import json
import os
from pathlib import Path

from datasets import Dataset
from loguru import logger

from transformers_vamba.evaluation.multiple_choice import accuracy_of


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
    return "\n".join(
        [
            "Select the best answer to the following multiple-choice question based on the video.",
            doc["question"],
            doc["mcq_test"],
            "Respond with only the letter (A, B, C, D, or E) of the correct option.",
        ]
    )


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], doc["correct_answer_label"], doc["mcq_test"])
