# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks of the paper whose data lmms-eval has: their questions in the prompts of the published evaluation, word
for word and line for line, and its reading of the answers. See the YAML files; HourVideo is in `hourvideo.py`.
"""

import os
import re
import string
from pathlib import Path

from datasets import Dataset
from lmms_eval.tasks._task_utils.video_loader import get_video

from transformers_vamba.evaluation.multiple_choice import SELECT, accuracy_of, letter_lines, respond_with


HOME = Path(os.getenv("HF_HOME", "~/.cache/huggingface")).expanduser()

# HourEval: the least length of a video, and the kinds of MLVU's questions.
LEAST_SECONDS = 1800
HOUREVAL_MLVU_TASKS = ("needle", "count", "order", "anomaly_reco")


def letter_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Of LVBench, Video-MME and MLVU, whose answers are letters."""
    return accuracy_of(results[0], doc["answer"])


def lvbench_doc_to_visual(doc: dict) -> list[str]:
    return [str(HOME / "lvbench" / doc["video_path"])]


def lvbench_doc_to_text(doc: dict) -> str:
    # The question brings its options, as lines "(A) ...", unless they are in a column of their own.
    options = [f"({letter}) {option}" for letter, option in zip(string.ascii_uppercase, doc.get("options") or ())]
    return "\n".join([SELECT, respond_with(4), doc["question"], *options])


def videomme_doc_to_text(doc: dict) -> str:
    return "\n".join([SELECT, respond_with(4), doc["question"], " ".join(doc["options"])])


def mlvu_doc_to_text(doc: dict) -> str:
    # lmms-eval's copy of MLVU has the options in the question, as lines "(A) ...", the original as a list.
    question = re.sub(r"^\(([A-Z])\) *", r"\1. ", doc["question"], flags=re.MULTILINE)
    return "\n".join([f"{SELECT} {respond_with(4)}", question])


def longvideobench_doc_to_text(doc: dict) -> str:
    options = [doc[f"option{i}"] for i in range(5)]
    options = [option for option in options if option not in (None, "N/A")]
    # Of four letters, however many the options are.
    return "\n".join([f"{SELECT} {respond_with(4)}", doc["question"], *letter_lines(options)])


def longvideobench_doc_to_target(doc: dict) -> str:
    return string.ascii_uppercase[doc["correct_choice"]]


def longvideobench_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], longvideobench_doc_to_target(doc))


def mvbench_doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    # lmms-eval passes what is there for `doc_to_visual`.
    instruction = "Answer with the option's letter from the given choices directly."
    return "\n".join([f"Question: {doc['question']}", *letter_lines(doc["candidates"]), instruction])


def mvbench_doc_to_target(doc: dict) -> str:
    return string.ascii_uppercase[doc["candidates"].index(doc["answer"])]


def mvbench_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], mvbench_doc_to_target(doc))


def nextqa_doc_to_visual(doc: dict) -> list[str]:
    return [get_video(str(HOME / "nextqa" / "NExTVideo"), doc["video"])]


def nextqa_doc_to_text(doc: dict) -> str:
    options = letter_lines(doc[f"a{i}"] for i in range(5))
    return "\n".join([f"{SELECT} {respond_with(5)}", doc["question"], *options])


def nextqa_doc_to_target(doc: dict) -> str:
    return string.ascii_uppercase[doc["answer"]]


def nextqa_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], nextqa_doc_to_target(doc))


def houreval_videomme_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] == "long")  # 30 minutes or more


def houreval_mlvu_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] >= LEAST_SECONDS and doc["task_type"] in HOUREVAL_MLVU_TASKS)


def houreval_longvideobench_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] >= LEAST_SECONDS)
