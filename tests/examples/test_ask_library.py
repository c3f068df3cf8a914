# SPDX-License-Identifier: Apache-2.0
"""Many questions about many videos: what is read, what is written, and a run that is killed and goes on."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ask_video import answer, encode, load
from filelock import FileLock
from library_files import MAX_ATTEMPTS, RESULTS, AnswerFolder, VideoError, locate_source, read_questions
from synthetic_videos import STORIES, sample_video, write_mp4
from tiny_vamba import ROOT, TINY_CHECKPOINT


pytest.importorskip("ray", reason="the extra 'library' is not installed")
import ask_library  # noqa: E402


SETTINGS = {"model": "tiny", "max_new_tokens": 8}
NUM_VIDEOS = 14


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of videos, one of them broken and one missing, and `questions.csv` with three questions about each."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "videos").mkdir()
    rows = []
    for number in range(NUM_VIDEOS):
        video = sample_video([5, number], 12 + 4 * (number % 4), STORIES[number % 3])
        name = f"videos/{number}.mp4"
        write_mp4(folder / name, video)
        texts = [question.text for question in video.questions[:2]] + ["What appeared?"]
        rows += [(f"{number:03d}-{i}", name, text) for i, text in enumerate(texts)]
    whole = (folder / "videos" / "3.mp4").read_bytes()
    (folder / "videos" / "3.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "videos" / "8.mp4").unlink()
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "video", "question"), *rows])
    return folder


@pytest.fixture(scope="module")
def expected(library):
    """The answers that `ask_video.py` gives, by the rows' `id`; `None` for the videos that cannot be read."""
    model, processor = load(TINY_CHECKPOINT, "cpu")
    answers, caches = {}, {}
    for row in read_questions(library / "questions.csv", []).to_pylist():
        video = row["video"]
        if video in ("videos/3.mp4", "videos/8.mp4"):
            answers[row["id"]] = None
            continue
        if video not in caches:
            caches[video] = encode(model, processor, str(library / video))
        answers[row["id"]] = answer(model, processor, caches[video], row["question"])
    return answers


@pytest.fixture
def folder(tmp_path):
    folder = AnswerFolder(tmp_path / "answers")
    with folder.opened(SETTINGS):
        yield folder


@pytest.fixture
def write_table(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return path

    return write


def program(library, output, *arguments):
    code = [sys.executable, ROOT / "examples" / "ask_library.py", library / "questions.csv", "--output", output]
    return [*map(str, code), "--device", "cpu", "--max-new-tokens", "32", *arguments]


def test_killed_and_resumed(library, expected, tmp_path):
    """Killed by `kill -9` and started again with a second model: the answers of `ask_video.py`, every row once."""
    output = tmp_path / "answers"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        # Paths of sockets have to be short, and the token need not be kept.
        environ = os.environ | {"RAY_TMPDIR": ray_folder, "RAY_AUTH_TOKEN": "0" * 64}
        environ.pop("RAY_USAGE_STATS_ENABLED", None)
        command = program(library, output)
        log = tmp_path / "log"
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=environ, stdout=file, stderr=subprocess.STDOUT)
        children = []
        try:
            deadline = time.monotonic() + 500
            while len(list(output.glob("parts/*.parquet"))) < 2:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
            (raylet,) = (child for child in children if child.name() == "raylet")
            assert raylet.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
        finally:
            process.kill()
            process.wait()
            end(children)  # Ray's agents take half a minute to notice
        parts = {path: path.stat().st_mtime_ns for path in output.glob("parts/*.parquet")}
        assert 2 <= len(parts) < NUM_VIDEOS and not (output / "answers.parquet").exists()
        known = [row for path in parts for row in pq.read_table(path).to_pylist()]
        failed = {path for path in parts if any(row["error"] for row in pq.read_table(path).to_pylist())}

        command += ["--models", "2", "--decoders", "1"]
        again = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500)
        assert again.returncode == 0, again.stderr[-3000:]
        assert not [process for process in psutil.process_iter() if ray_folder in command_of(process)]

    table = pq.read_table(output / "answers.parquet")
    assert {row["id"]: row["answer"] for row in table.to_pylist()} == expected and len(table) == len(expected)
    assert table["id"].to_pylist() == sorted(expected)
    errors = {row["video"]: row["error"] for row in table.to_pylist() if row["error"]}
    assert "3.mp4' as a video" in errors.pop("videos/3.mp4") and "FileNotFoundError" in errors.pop("videos/8.mp4")
    assert not errors
    # What was answered before is not answered again.
    num_left = len(expected) - sum(row["error"] is None for row in known)
    assert f"{len(expected)} questions, {num_left} to answer" in again.stdout
    assert all((path.stat().st_mtime_ns == parts[path]) != (path in failed) for path in parts)


def end(processes) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not psutil.wait_procs(processes, timeout=60)[1]


def command_of(process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@pytest.fixture(scope="module")
def answerer():
    """Without a folder: each test has its own."""
    generation = {"max_new_tokens": 8, "batch_size": 2}
    return ask_library.Answerer(None, str(TINY_CHECKPOINT), "cpu", None, {}, generation)


def ask(answerer, folder, questions, root, **sampling):
    """A run in this process."""
    answerer.folder = folder
    decoder = ask_library.Decoder(str(TINY_CHECKPOINT), folder, sampling)
    return [answerer(decoder(row)) for row in folder.unanswered(questions, root)]


def test_each_video_is_encoded_once_and_each_question_answered_once(library, folder, answerer, monkeypatch):
    """Also with rows that are the same, and with more questions than a batch has."""
    encoded, asked = [], []
    monkeypatch.setattr(answerer.model, "encode_video", record(answerer.model.encode_video, encoded))
    monkeypatch.setattr(answerer.model, "generate", record(answerer.model.generate, asked))
    texts = ["What appeared?", "What came first?", "What appeared?", "What came last?"]
    table = pa.table({"video": ["videos/0.mp4"] * 4, "question": texts, "id": [3, 1, 4, 2]})
    assert ask(answerer, folder, table, library) == [{"num_answers": 3, "num_rows": 3}]
    assert len(encoded) == 1 and [len(each["input_ids"]) for each in asked] == [2, 1]
    rows = folder.finish(table).to_pylist()
    assert [row["id"] for row in rows] == [3, 1, 4, 2]
    assert rows[0]["answer"] == rows[2]["answer"] and all(row["num_answer_tokens"] > 1 for row in rows)
    cache = encode(answerer.model, answerer.processor, str(library / "videos" / "0.mp4"))
    assert {row["num_video_tokens"] for row in rows} == {sum(cache.video_lengths)}
    assert {(row["num_frames"], row["video_seconds"]) for row in rows} == {(12, 6.0)}
    # A further question is answered alone, and a table without the others has its row only.
    more = pa.table({"video": ["videos/0.mp4"] * 2, "question": ["What came last?", "What could be seen?"]})
    assert ask(answerer, folder, more, library) == [{"num_answers": 1, "num_rows": 1}]
    assert len(folder.finish(more)) == 2 and len(folder.read()) == 4


def record(function, calls):
    def recording(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return recording


def test_what_could_not_be_read_is_tried_again(library, folder, answerer, tmp_path):
    table = pa.table({"video": ["late.mp4"], "question": ["What appeared?"]})
    assert ask(answerer, folder, table, tmp_path) == [{"num_answers": 0, "num_rows": 1}]
    assert "FileNotFoundError" in folder.finish(table)["error"][0].as_py()
    os.link(library / "videos" / "0.mp4", tmp_path / "late.mp4")
    assert ask(answerer, folder, table, tmp_path, num_frames=4) == [{"num_answers": 1, "num_rows": 1}]
    (row,) = folder.finish(table).to_pylist()
    assert row["error"] is None and row["answer"] and row["num_frames"] == 4
    assert not ask(answerer, folder, table, tmp_path)


def test_a_video_that_does_not_fit_on_the_gpu(library, folder, answerer, monkeypatch):
    def full(**kwargs):
        raise torch.OutOfMemoryError("tried to allocate 99 GiB")

    monkeypatch.setattr(answerer.model, "encode_video", full)
    table = pa.table({"video": ["videos/0.mp4"], "question": ["What appeared?"]})
    assert ask(answerer, folder, table, library) == [{"num_answers": 0, "num_rows": 1}]
    assert "99 GiB" in folder.finish(table)["error"][0].as_py()


def test_a_video_that_kills_its_worker_is_given_up(folder):
    """Of a worker that was killed its mark is left, and of one that failed it is not."""
    with pytest.raises(KeyError), folder.attempt("a.mp4", "decoding"):
        raise KeyError
    for _ in range(MAX_ATTEMPTS):
        with folder.attempt("b.mp4", "decoding"), folder.attempt("a.mp4", "answering"):
            pass
        if (child := os.fork()) == 0:
            with folder.attempt("a.mp4", "decoding"):
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(VideoError, match="decoding it was killed 3 times"), folder.attempt("a.mp4", "decoding"):
        raise AssertionError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.csv", "\ufeffid,video,question\n007,a.mp4,\"What, then?\"\n008,b.mp4,Who?\n\n"),
        ("q.jsonl", '{"video": "a.mp4", "question": "What, then?", "id": "007"}\n\n'
                    '{"question": "Who?", "id": "008", "video": "b.mp4"}\n'),
    ],
)  # fmt: skip
def test_tables(write_table, name, content):
    rows = read_questions(write_table(name, content), []).to_pylist()
    first = {"video": "a.mp4", "question": "What, then?", "id": "007"}
    assert rows == [first, {"video": "b.mp4", "question": "Who?", "id": "008"}]


def test_columns_of_a_parquet_file_keep_their_types(tmp_path, folder):
    table = pa.table({"video": ["a.mp4"], "question": ["Who?"], "tags": [["x"]], "score": pa.array([1], pa.int8())})
    pq.write_table(table, tmp_path / "q.parquet")
    read = read_questions(tmp_path / "q.parquet", [])
    folder.write("a.mp4", [{"video": "a.mp4", "question": "Who?", "answer": "Ann"}])
    folder.finish(read)
    written = pq.read_table(folder.path / "answers.parquet")
    assert written.schema.names == [*table.schema.names, *RESULTS] and written.select(table.schema.names) == table


@pytest.mark.parametrize(
    ("video", "source"),
    [
        ("films/a b.mp4", "/library/films/a b.mp4"),
        ("/elsewhere/a.mp4", "/elsewhere/a.mp4"),
        ("https://example.org/a.mp4", "https://example.org/a.mp4"),
        ("file:///elsewhere/a.mp4", "file:///elsewhere/a.mp4"),
        ("data:video/mp4;base64,AAAA", "data:video/mp4;base64,AAAA"),
    ],
)
def test_what_is_opened(video, source):
    assert locate_source(video, Path("/library")) == source


def test_a_folder_of_videos(library):
    table = read_questions(library / "videos", ["What?", "Who?"])
    assert len(table) == 2 * (NUM_VIDEOS - 1) and table["video"][0].as_py() == "0.mp4"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        (
            "q.csv",
            "file,question\na.mp4,Who?\n",
            "has the columns 'file', 'question'. Expected 'video' and 'question'",
        ),
        ("q.csv", "video;question\na.mp4;Who?\n", "has the columns 'video;question'. Expected"),
        ("q.csv", "", r"the columns \(none\)"),
        ("q.csv", "video,question\n", "and no rows"),
        ("q.csv", "video,question\na.mp4,Who, then?\n", "row 1 has 3 fields, and there are 2 columns"),
        ("q.csv", "video,question\na.mp4,\n", "row 1 needs text as its 'question', got ''"),
        ("q.csv", "video,question,answer\na.mp4,Who?,Ann\n", "writes 'answer' itself: give it another name"),
        ("q.csv", "video,question,x,x\na.mp4,Who?,1,2\n", r"several \['x'\]"),
        ("q.csv", b"video,question\na.mp4,\xff?\n", "could not be read: 'utf-8'"),
        ("q.csv", "video,question\na.mp4,%s\n" % ("?" * 200_000), "field larger than field limit"),
        (
            "q.csv",
            'video,question\na.mp4,"Who?\nb.mp4,Who?\n',
            "line 3 could not be read: unexpected end of data. Is a quote",
        ),
        ("q.jsonl", '{"video": "a.mp4", "x": 1%s}\n' % ("0" * 5000), "line 1 cannot be read: Exceeds the limit"),
        ("q.jsonl", '{"video": "a.mp4", "x": %s}\n' % ("[" * 10**6), "line 1 cannot be read: maximum recursion"),
        ("q.jsonl", '{"video": "a", "question": "b", "x": {}}\n', "a column that cannot be kept in parquet: .*'x'"),
        ("q.jsonl", '{"video": "a.mp4", "question": "Who?"}\n{"video": \n', "line 2 is not JSON: .*, at character 12"),
        ("q.jsonl", '["a.mp4", "Who?"]\n', "line 1 is not a JSON object"),
        ("q.jsonl", '{"video": "a.mp4", "question": 1}\n', "row 1 needs text as its 'question', got 1"),
        (
            "q.jsonl",
            '{"video": "a", "question": "b", "x": 1}\n{"video": "a", "question": "b", "x": {}}\n',
            "column 'x'",
        ),
        ("q.parquet", "PAR", "could not be read"),
        ("q.txt", "video,question\n", "neither a folder of videos nor a table: .csv, .jsonl, .parquet"),
    ],
)
def test_tables_that_are_wrong(write_table, name, content, error):
    with pytest.raises(SystemExit, match=error):
        read_questions(write_table(name, content), [])


def test_questions_that_are_wrong(library, tmp_path):
    with pytest.raises(SystemExit, match="has the questions already"):
        read_questions(library / "questions.csv", ["Who?"])
    with pytest.raises(SystemExit, match="Name the questions about each"):
        read_questions(library / "videos", [])
    with pytest.raises(SystemExit, match="row 1 needs text as its 'question', got ' '"):
        read_questions(library / "videos", [" "])
    with pytest.raises(SystemExit, match="has no videos"):
        read_questions(tmp_path, ["Who?"])
    (tmp_path / "\udcff.mp4").touch()
    with pytest.raises(SystemExit, match="The name of a file in .* is not UTF-8"):
        read_questions(tmp_path, ["Who?"])
    with pytest.raises(SystemExit, match="could not be read.*No such file"):
        read_questions(tmp_path / "q.csv", [])


OTHER_RUN = """
import json, pathlib, sys
from library_files import AnswerFolder
with AnswerFolder(pathlib.Path(sys.argv[1])).opened(json.loads(sys.argv[2])):
    pass
"""


def test_the_folder_of_another_run(folder, tmp_path):
    other = [sys.executable, "-c", OTHER_RUN, str(folder.path), json.dumps(SETTINGS)]
    run = subprocess.run(other, capture_output=True, text=True)
    assert run.returncode == 1 and "Another run is writing" in run.stderr, run.stderr
    with pytest.raises(SystemExit, match="max_new_tokens: 8 there, 16 now\n.*fps: None there, 1.0 now"):
        folder.check_is_ours(SETTINGS | {"max_new_tokens": 16, "fps": 1.0})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match="holds something else"):
        AnswerFolder(tmp_path).check_is_ours(SETTINGS)
    with pytest.raises(SystemExit, match="is a file"):
        AnswerFolder(tmp_path / "notes.txt").check_is_ours(SETTINGS)
    for path in (tmp_path / "notes.txt" / "answers", Path("/proc/answers")):
        with pytest.raises(SystemExit, match=f"{path} cannot be written to: .*. Name another --output."):
            with AnswerFolder(path).opened(SETTINGS):
                pass
    for content in (b"", b"[1]", b"null", b"\xff"):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(SystemExit, match="run.json does not say what the answers in .* depend on"):
            AnswerFolder(tmp_path).check_is_ours(SETTINGS)
    (folder.parts / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit, match="a.parquet is damaged: remove it"):
        folder.read()


def test_what_a_killed_run_leaves(tmp_path):
    folder = AnswerFolder(tmp_path / "answers")
    with folder.opened(SETTINGS):
        folder.write("a.mp4", [{"video": "a.mp4", "question": "Who?", "answer": "Ann"}])
        (folder.attempts / "a.decoding").touch()
    (folder.parts / ".b.parquet.7.partial").write_bytes(b"PAR1")
    FileLock(folder.path / ".lock").acquire(timeout=0)  # and is given up with its process
    with folder.opened(SETTINGS):
        assert [path.name for path in folder.parts.iterdir()] == [folder.part("a.mp4").name]
        assert not list(folder.attempts.iterdir())


def test_a_checkpoint_is_told_from_another(tmp_path):
    """By its weights too, in a folder of the same name."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TINY_CHECKPOINT / name).read_bytes())
    named = ask_library.identify(str(tmp_path))
    assert named == ask_library.identify(str(tmp_path)) and named.startswith(tmp_path.name + "@")
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    assert ask_library.identify(str(tmp_path)) != named


@pytest.mark.parametrize(
    ("cluster", "arguments", "expected"),
    [
        ({"CPU": 16, "GPU": 1}, [], ("cuda", 1, 4, {"num_gpus": 1}, {"num_cpus": 1})),
        ({"CPU": 64, "GPU": 8}, ["--models", "2"], ("cuda", 2, 16, {"num_gpus": 1}, {"num_cpus": 1})),
        ({"CPU": 2}, [], ("cpu", 1, 1, {"num_cpus": 1}, {"num_cpus": 1})),
        ({"CPU": 2}, ["--models", "2"], ("cpu", 2, 2, {"num_cpus": 0.5}, {"num_cpus": 0.5})),
        ({"CPU": 16, "GPU": 1}, ["--device", "cpu"], ("cpu", 1, 4, {"num_cpus": 12}, {"num_cpus": 1})),
    ],
)
def test_workers(cluster, arguments, expected):
    args = ask_library.build_parser().parse_args(["videos", "--output", "answers", *arguments])
    assert ask_library.Workers.share_out(cluster, args) == ask_library.Workers(*expected)


@pytest.mark.parametrize(("num_gpus", "num_models"), [(2, 3), (0, 1)])
def test_more_models_than_gpus(num_gpus, num_models):
    arguments = ["videos", "--output", "answers", "--device", "cuda", *(["--models", "3"] if num_models == 3 else [])]
    args = ask_library.build_parser().parse_args(arguments)
    with pytest.raises(SystemExit, match=f"a GPU for each of --models {num_models}: Ray has {num_gpus}"):
        ask_library.Workers.share_out({"CPU": 8, "GPU": num_gpus}, args)


def test_a_cluster_that_is_not_there(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "127.0.0.1:{1}".format(*server.getsockname())
    with pytest.raises(SystemExit, match=f"No Ray cluster answers at {address}"):
        ask_library.start_ray(address)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--fps", "1", "--num-frames", "8"], "mutually exclusive"),
        (["--pruning-rate", "1"], "video_pruning_rate"),
        (["--longest-edge", "0"], "--longest-edge: must be at least 1, got 0"),
        (["--model", "checkpoints/nothing"], "checkpoints/nothing"),
        (["--models", "0"], "--models must be at least 1, got 0"),
        (["--segment-frames", "3"], "multiple of 2"),
    ],
)
def test_options_that_are_wrong(library, tmp_path, capsys, arguments, error):
    """Said before anything is started or written."""
    with pytest.raises(SystemExit):
        ask_library.main(program(library, tmp_path / "answers", *arguments)[2:])
    assert error in capsys.readouterr().err and not (tmp_path / "answers").exists()


def test_all_is_answered(library, tmp_path, capsys):
    """Then nothing is started, and the table is written anew."""
    output = tmp_path / "answers"
    args = ask_library.build_parser().parse_args(program(library, output)[2:])
    folder, table = AnswerFolder(output), read_questions(library / "questions.csv", [])
    with folder.opened(ask_library.prepare(args)[-1]):
        for row in folder.unanswered(table, library):
            known = {"video": row["video"], "answer": "a red cross"}
            folder.write(row["video"], [known | {"question": question} for question in row["questions"]])
    ask_library.main(program(library, output)[2:])
    assert json.loads((output / "run.json").read_text())["max_new_tokens"] == 32
    assert f"{len(table)} questions, 0 to answer" in capsys.readouterr().out
    assert set(pq.read_table(output / "answers.parquet")["answer"].to_pylist()) == {"a red cross"}
