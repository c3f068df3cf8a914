# SPDX-License-Identifier: Apache-2.0
"""HourEval: questions of three benchmarks about their longest videos. See `houreval.yaml`."""

import string

from datasets import Dataset

from transformers_vamba.evaluation.multiple_choice import accuracy_of, list_letters


LEAST_SECONDS = 1800
MLVU_TASKS = ("needle", "count", "order", "anomaly_reco")
LONGVIDEOBENCH_OPTIONS = tuple(f"option{i}" for i in range(5))


def videomme_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] == "long")  # 30 minutes or more


def mlvu_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] >= LEAST_SECONDS and doc["task_type"] in MLVU_TASKS)


def longvideobench_process_docs(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda doc: doc["duration"] >= LEAST_SECONDS)


def videomme_doc_to_text(doc: dict) -> str:
    return _prompt(4, doc["question"], *(doc["options"] or ()))


def mlvu_doc_to_text(doc: dict) -> str:
    return _prompt(4, doc["question"])  # its options are in the question


def longvideobench_doc_to_text(doc: dict) -> str:
    options = _longvideobench_options(doc)
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return _prompt(max(len(options), 2), doc["question"], *lines)


def longvideobench_doc_to_target(doc: dict) -> str:
    return string.ascii_uppercase[doc["correct_choice"]]


def videomme_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], doc["answer"], doc["options"])


def mlvu_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], doc["answer"], doc["question"])


def longvideobench_process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return accuracy_of(results[0], longvideobench_doc_to_target(doc), _longvideobench_options(doc))


def _longvideobench_options(doc: dict) -> list[str]:
    return [doc[name] for name in LONGVIDEOBENCH_OPTIONS if doc[name] not in (None, "N/A")]


def _prompt(num_options: int, question: str, *options: str) -> str:
    instruction = (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        f"letter ({list_letters(num_options)}) of the correct option."
    )
    return "\n".join([instruction, question, *options])
