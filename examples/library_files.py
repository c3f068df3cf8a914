# SPDX-License-Identifier: Apache-2.0
"""The files of `ask_library.py`: the table of questions that it reads, and the folder of answers that it writes."""

import csv
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from transformers_vamba.video.sources import is_data_url, is_remote


VIDEO_SUFFIXES = {
    ".avi",
    ".flv",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
}
COLUMNS = ("video", "question")
RESULTS = {
    "answer": pa.string(),
    "error": pa.string(),
    "video_seconds": pa.float64(),
    "num_frames": pa.int64(),
    "num_video_tokens": pa.int64(),
    "num_answer_tokens": pa.int64(),
}
PART_SCHEMA = pa.schema({**dict.fromkeys(COLUMNS, pa.string()), **RESULTS})
MAX_ATTEMPTS = 3  # with a video whose worker is killed each time


def read_questions(library: Path, questions: list[str]) -> pa.Table:
    """The table of questions: that of a file, or each of `questions` about each video in a folder."""
    if library.is_dir():
        table = ask_each(library, questions)
        check_columns(library, table)
        return table
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": pq.read_table}
    if library.suffix.lower() not in readers:
        raise SystemExit(f"{library} is neither a folder of videos nor a table: {', '.join(readers)}.")
    if questions:
        raise SystemExit(f"{library} has the questions already. Those of the command line go with a folder of videos.")
    try:
        table = readers[library.suffix.lower()](library)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise SystemExit(f"{library} could not be read: {error}") from error
    check_columns(library, table)
    return table


def ask_each(folder: Path, questions: list[str]) -> pa.Table:
    if not questions:
        raise SystemExit(f'{folder} is a folder of videos. Name the questions about each after it: "What happens?"')
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not found:
        raise SystemExit(f"{folder} has no videos, by the ends of their names: {', '.join(VIDEO_SUFFIXES)}.")
    videos = [path.relative_to(folder).as_posix() for path in found]
    pairs = [(video, question) for video in videos for question in questions]
    try:
        return pa.table(list(zip(*pairs)), names=list(COLUMNS))
    except UnicodeError as error:
        raise SystemExit(
            f"The name of a file in {folder}, or a question, is not UTF-8, and cannot stand in a table: {error}"
        ) from error


def read_csv(path: Path) -> pa.Table:
    """All columns as text, as they stand in the file."""
    with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark before the first column
        reader = csv.reader(file, strict=True)  # a quote without its end would take all rows after it
        try:
            names = next(reader, [])
            rows = [row for row in reader if row]
        except csv.Error as error:
            raise SystemExit(
                f"{path}: line {reader.line_num} could not be read: {error}. Is a quote left open before it?"
            ) from error
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise SystemExit(f"{path}: row {number} has {len(row)} fields, and there are {len(names)} columns: {row}")
    columns = zip(*rows) if rows else [[]] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], names=names)


def read_jsonl(path: Path) -> pa.Table:
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SystemExit(
                    f"{path}: line {number} is not JSON: {error.msg}, at character {error.pos + 1}"
                ) from error
            except (ValueError, RecursionError) as error:  # numbers of too many digits, or too many brackets
                raise SystemExit(f"{path}: line {number} cannot be read: {error}") from error
            if not isinstance(rows[-1], dict):
                raise SystemExit(f"{path}: line {number} is not a JSON object: {line.strip()[:100]}")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise SystemExit(f"{path}: column {name!r} does not have values of one type: {error}") from error
    return pa.table(columns)


def check_columns(path: Path, table: pa.Table) -> None:
    """Ends the program unless a table has the columns that are needed, and none that the answers will have."""
    names = table.column_names
    found = f"{path} has the columns {', '.join(map(repr, names)) or '(none)'}"
    if missing := [name for name in COLUMNS if names.count(name) != 1]:
        raise SystemExit(f"{found}. Expected 'video' and 'question' once each; see {', '.join(map(repr, missing))}.")
    if taken := [name for name in names if name in RESULTS]:
        raise SystemExit(f"{found}. This program writes {', '.join(map(repr, taken))} itself: give it another name.")
    if double := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"{found}. Each must have a name of its own, and there are several {sorted(double)}.")
    if not len(table):
        raise SystemExit(f"{found}, and no rows.")
    for name in COLUMNS:
        for number, value in enumerate(table[name].to_pylist(), start=1):
            if not isinstance(value, str) or not value.strip():
                raise SystemExit(f"{path}: row {number} needs text as its {name!r}, got {value!r}.")
    check_can_be_kept(path, table)


def check_can_be_kept(path: Path, table: pa.Table) -> None:
    """Ends the program if parquet does not know the type of a column: it would be written after the last answer."""
    file = pa.BufferOutputStream()
    try:
        pq.write_table(table.slice(0, 0), file)
        pq.read_schema(pa.BufferReader(file.getvalue()))
    except (OSError, pa.ArrowException) as error:
        raise SystemExit(f"{path} has a column that cannot be kept in parquet: {error}") from error


def locate_source(video: str, folder: Path) -> str:
    """The URL or the absolute path of a video; a path is one from `folder`."""
    is_url = is_remote(video) or is_data_url(video) or video.lower().startswith("file://")
    return video if is_url else str(folder.resolve() / video)


class VideoError(Exception):
    """Why there are no answers about a video."""


class AnswerFolder:
    """
    The folder of a run. `parts/` has a file for each video with the answers that are known, `answers.parquet` is the
    whole table, and `run.json` says what the answers depend on beside video and question.
    """

    def __init__(self, path: Path):
        self.path = Path(path).resolve()
        self.described = self.path / "run.json"
        self.parts, self.attempts = self.path / "parts", self.path / "attempts"

    def check_is_ours(self, settings: dict) -> None:
        """Ends the program if the folder is of another run, or of something else."""
        if self.described.exists():
            try:
                earlier = dict(json.loads(self.described.read_text()))
            except (OSError, TypeError, ValueError, RecursionError) as error:
                raise SystemExit(
                    f"{self.described} does not say what the answers in {self.path} depend on ({error}). Name another "
                    "--output."
                ) from error
            changed = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
            if changed:
                lines = [f"    {name}: {earlier.get(name)!r} there, {settings.get(name)!r} now" for name in changed]
                raise SystemExit(
                    "\n".join([f"{self.path} has the answers of another run:", *lines, "Name another --output."])
                )
        elif self.path.exists() and not self.path.is_dir():
            raise SystemExit(f"{self.path} is a file. Name a folder as --output.")
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise SystemExit(f"{self.path} holds something else. Name a new folder as --output, or an earlier run's.")

    @contextmanager
    def opened(self, settings: dict):
        """Makes the folder, or goes on with it, and keeps other runs out of it within the block."""
        self.check_is_ours(settings)
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SystemExit(
                f"Another run is writing to {self.path}. Wait for it, or name another --output."
            ) from error
        except OSError as error:
            raise SystemExit(f"{self.path} cannot be written to: {error.strerror}. Name another --output.") from error
        try:
            for left_over in self.path.rglob(".*.partial"):
                left_over.unlink()
            shutil.rmtree(self.attempts, ignore_errors=True)
            write_whole(self.described, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))
            for folder in (self.parts, self.attempts):
                folder.mkdir(exist_ok=True)
            yield
            shutil.rmtree(self.attempts)
        finally:
            lock.release()

    def part(self, video: str) -> Path:
        return self.parts / f"{self.key(video)}.parquet"

    @staticmethod
    def key(video: str) -> str:
        """The name of a file for a video, which begins as the video's own does."""
        digest = hashlib.sha256(video.encode()).hexdigest()[:16]
        return re.sub(r"[^\w-]+", "_", Path(video).stem)[:40] + "-" + digest

    def read(self) -> dict[tuple[str, str], dict]:
        """All rows that are known, by video and question."""
        rows = []
        for path in self.parts.glob("*.parquet"):
            rows += read_part(path)
        return {(row["video"], row["question"]): row for row in rows}

    def unanswered(self, questions: pa.Table, root: Path) -> list[dict]:
        """
        A row for each video that has questions without an answer: `video`, `source` (its URL or path, where `root` is
        what relative paths start from), and `questions`, each once.
        """
        known, asked = self.read(), {}
        for video, question in zip(questions["video"].to_pylist(), questions["question"].to_pylist()):
            row = known.get((video, question))
            if row is None or row["error"] is not None:
                asked.setdefault(video, {})[question] = None
        return [
            {"video": video, "source": locate_source(video, root), "questions": list(of_video)}
            for video, of_video in asked.items()
        ]

    def write(self, video: str, rows: list[dict]) -> None:
        """Adds rows to those of a video. Rows about the same questions are replaced."""
        path, questions = self.part(video), {row["question"] for row in rows}
        kept = [row for row in read_part(path) if row["question"] not in questions] if path.exists() else []
        table = pa.Table.from_pylist(kept + rows, schema=PART_SCHEMA)
        write_whole(path, lambda partial: pq.write_table(table, partial))

    def finish(self, questions: pa.Table) -> pa.Table:
        """Writes the whole table: a row for each question, in their order, with all of their columns."""
        known = self.read()
        keys = zip(questions["video"].to_pylist(), questions["question"].to_pylist())
        rows = [known[key] for key in keys]
        for name, dtype in RESULTS.items():
            questions = questions.append_column(name, pa.array([row[name] for row in rows], dtype))
        write_whole(self.path / "answers.parquet", lambda partial: pq.write_table(questions, partial))
        return questions

    @contextmanager
    def attempt(self, video: str, stage: str):
        """
        Counts, in a file, how often a worker was killed within the block: by a decoder's crash, or because memory ran
        out. Ray starts it again and again. After `MAX_ATTEMPTS` this raises a `VideoError`.
        """
        path = self.attempts / f"{self.key(video)}.{stage}"
        num_killed = path.stat().st_size if path.exists() else 0
        if num_killed >= MAX_ATTEMPTS:
            raise VideoError(
                f"The process {stage} it was killed {num_killed} times: by a crash, or as no memory was left."
            )
        with open(path, "ab") as file:
            file.write(b".")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def read_part(path: Path) -> list[dict]:
    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise SystemExit(f"{path} is damaged: remove it, and its video is asked again ({error})") from error


def write_whole(path: Path, write) -> None:
    """Has a file written under another name first, so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write(partial)
    os.replace(partial, path)
