# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, with tiny models. How fast says nothing here."""

import copy
import json
import os
import subprocess
import sys

import cold_start
import decoding
import device_map
import evaluation
import first_answer
import inference
import locating
import mixer_kernels
import pruning
import pytest
import reading
import streaming
import torch
import training
from transformers import DynamicCache, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.utils.import_utils import is_serve_available

from transformers_vamba import VambaVideoProcessor


def test_every_model_and_size_has_its_figures(tmp_path, capsys):
    inference.main(["--device", "cpu", "--frames", "4,10", "--compile-frames", "4", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "inference.json").read_text())["rows"]
    expected = [("vamba", "pieces", n) for n in (4, 10, 8, 8)]  # twice 8: kept in 8 bits, and in the host's memory
    baselines = list(inference.NAMES)[1:]
    expected += [(name, tower, n) for name in baselines for tower in ("whole", "pieces") for n in (4, 10)]
    assert [(row["model"], row["tower"], row["frames"]) for row in rows] == expected
    for row in rows:
        assert "note" not in row
        assert row["video_tokens"] == row["frames"] // 2 * 6
        expected = {"new_length_s", "first_token_s", "decode_ms", "further_question_s", "one_by_one_tokens_s"}
        expected |= {"cache_gib", "context" if row["model"] in baselines else "at_once_tokens_s"}
        expected |= {"compiled_decode_ms"} if (row["model"], row["frames"]) == ("vamba", 4) else set()
        assert all(row[name] > 0 for name in expected)
    table = (tmp_path / "inference.md").read_text()
    assert [table.count(name) for name in inference.NAMES.values()] == [4, 4, 4, 4]
    assert table in capsys.readouterr().out


def test_models_can_be_measured_one_by_one(tmp_path):
    """On one machine and day. What is measured again is replaced."""
    path = tmp_path / "inference_own_pixels.json"
    for models, towers in (("qwen3.5", "pieces"), ("qwen3-vl,qwen3.5", "whole"), ("qwen3-vl", "whole")):
        options = ["--frames", "4", "--models", models, "--towers", towers, "--own-pixels", "--output", str(tmp_path)]
        inference.main(["--device", "cpu", *options])
    expected = [("qwen3-vl", "whole"), ("qwen3.5", "pieces"), ("qwen3.5", "whole")]
    results = json.loads(path.read_text())
    assert [(row["model"], row["tower"]) for row in results["rows"]] == expected
    assert [row["size"] for row in results["rows"]] == ["640x352"] * 3
    path.write_text(json.dumps(results | {"machine": "another"}))
    assert inference.read_rows(path, results["machine"], [], []) == []
    rows = [{"model": name, "tower": "pieces"} for name in ("vamba", "qwen2-vl")]
    path.write_text(json.dumps({"machine": "this", "rows": rows}))
    assert inference.read_rows(path, "this", ["vamba", "qwen2-vl"], ["whole"]) == rows[1:]
    with pytest.raises(SystemExit):
        inference.main(["--towers", "halves"])


def test_own_pixels():
    """As the processors choose, with the sizes of the published folders."""
    own = Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824})
    for processor, name in ((Qwen2VLVideoProcessor(), "qwen2-vl"), (own, "qwen3-vl"), (own, "qwen3.5")):
        for num_frames in (4, 768, 3600):
            height, width = inference.own_patches(name, num_frames)
            expected = processor.get_num_of_video_patches(num_frames, 360, 640, {"size": processor.size})
            assert num_frames // 2 * height * width == expected, name
    assert inference.own_patches("vamba", 3600) == inference.make_config("vamba", tiny=False)[1]
    assert VambaVideoProcessor().get_resized_sizes(360, 640)[-1] == (364, 644)


@pytest.mark.parametrize("name", list(inference.NAMES)[1:])
def test_the_others_are_measured_doing_the_same(name):
    """Features with the tower in pieces are equal, and so are logits of a further question on a copy of the cache."""
    config, patches = inference.make_config(name, tiny=True)
    model = inference.load(config, "sdpa", torch.device("cpu"))
    video = inference.make_pixels(model, 150, patches, "cpu")
    inputs = {"hidden_states": video["pixel_values_videos"], "grid_thw": video["video_grid_thw"]}
    with torch.no_grad():
        whole = model.model.visual(**inputs)
        inference.run_in_pieces(model.model.visual)
        torch.testing.assert_close(dict(model.model.visual(**inputs)), dict(whole), atol=1e-6, rtol=1e-5)

    # Of a video with more time steps than a frame has rows, Transformers counts Qwen2-VL's positions otherwise
    # with a cache than without.
    video = inference.make_pixels(model, 6, patches, "cpu")
    prompt = inference.make_prompt(model, video["video_grid_thw"])
    cache = DynamicCache(config=config)
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    options["suppress_tokens"] = list(range(1000, 1100))  # those of images and videos are among them
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    first = model.generate(**video, **prompt, **options, **{inference.CACHE_NAME: cache})
    conversation = torch.cat([first.sequences, inference.make_text(model)], dim=1)
    options["attention_mask"] = torch.ones_like(conversation)
    own_cache, length = copy.deepcopy(cache), cache.get_seq_length()
    on_copy = model.generate(conversation, **options, **{inference.CACHE_NAME: own_cache})
    types = (conversation == config.video_token_id).int() * 2
    anew = model.generate(conversation, mm_token_type_ids=types, **video, **options)
    assert on_copy.sequences.equal(anew.sequences)
    torch.testing.assert_close(on_copy.scores, anew.scores, atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == length < own_cache.get_seq_length()


def test_a_failure_is_an_entry(tmp_path, monkeypatch):
    def fail(model, num_frames, patches, row):
        raise inference.torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(inference, "measure_baseline", fail)
    options = ["--models", "qwen2-vl", "--frames", "4,8", "--towers", "whole", "--output", str(tmp_path)]
    inference.main(["--device", "cpu", *options])
    notes = [row["note"] for row in json.loads((tmp_path / "inference.json").read_text())["rows"]]
    assert notes == ["out of memory", "fails at 4 frames"]


def test_a_size_beyond_the_time_is_left_out():
    done = {"model": "qwen2-vl", "frames": 64, "seconds": 3.0, "new_length_s": 1.0, "first_token_s": 1.0}
    larger = {"model": "qwen2-vl", "frames": 256}
    assert inference.reason_to_skip(larger, [], 0) is None
    assert inference.reason_to_skip(larger, [done], 70) is None
    assert inference.reason_to_skip(larger, [done], 60) == "not run: some 33 s"


def test_the_profile_names_kernels(tmp_path, capsys):
    arguments = ["--device", "cpu", "--models", "vamba", "--frames", "4", "--profile", "4", "--output", str(tmp_path)]
    inference.main(arguments)
    assert "aten::" in (tmp_path / "profile_sdpa.txt").read_text()


def test_evaluation_has_its_figures(tmp_path, capsys):
    arguments = ["--device", "cpu", "--frames", "4,6", "--questions", "3", "--output", str(tmp_path)]
    evaluation.main(arguments)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["frames"], row["questions"]) for row in rows] == [(4, 3), (6, 3)]
    assert all(row["ratio"] == row["one_by_one_s"] / row["together_s"] for row in rows)
    assert (tmp_path / "evaluation.md").read_text() in capsys.readouterr().out


@pytest.fixture
def small_video(monkeypatch):
    """A minute's file of the reading benchmarks is small, and of few frames."""
    monkeypatch.setattr(reading, "SIZE", (64, 96))
    monkeypatch.setattr(reading, "RATE", 2)


def test_first_answer(tmp_path, capsys, small_video):
    first_answer.main(["--device", "cpu", "--minutes", "2", "--repeats", "1", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "first_answer.json").read_text())["rows"]
    assert (row["codec"], row["frames"], row["peak_gib"]) == ("libx264", 120, None)
    assert row["ratio"] == row["file_s"] / row["encode_s"]
    assert row["read_s"] > 0 and row["host_gib"] >= row["host_before_gib"] > 0
    assert (tmp_path / "first_answer.md").read_text() in capsys.readouterr().out


def test_reading(tmp_path, capsys, monkeypatch, small_video):
    """The readers that are asked for; one that is not installed, and one that fails."""

    def fail(path):
        raise ValueError("no such codec")

    readers = {"plain": (reading.decode_plainly, "av"), "failing": (fail, "av"), "absent": (fail, "not_installed")}
    monkeypatch.setattr(reading, "READERS", {**reading.READERS, **readers})

    def run_here(command, **kwargs):
        try:
            reading.run_one(*command[-2:])
        except ValueError:
            return subprocess.CompletedProcess(command, 1, "")
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out)

    monkeypatch.setattr(reading.subprocess, "run", run_here)
    options = ["reading.py", "--minutes", "1", "--codecs", "libx264", "--output", str(tmp_path / "table")]
    monkeypatch.setattr(sys, "argv", [*options, "--readers", *readers, "iter_video_segments"])
    reading.main()
    results = json.loads((tmp_path / "table.json").read_text())
    rows = results["rows"]
    assert [row["reader"] for row in rows] == ["iter_video_segments(fps=1)", "plain", "failing"]
    assert [row.get("frames") for row in rows] == [60, 120, None]
    assert "Not installed: not_installed." in results["description"]
    table = (tmp_path / "table.md").read_text()
    assert "| libx264 | failing | fails | | | |" in table and table in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*options, "--readers", "nobody"])
    with pytest.raises(SystemExit):
        reading.main()


@pytest.mark.parametrize("lora", (False, True))
def test_training(tmp_path, lora):
    forms = ("parts", "offload-2")
    options = ["--device", "cpu", "--frames", "4,8", "--checkpointing", ",".join(forms), *["--lora"] * lora]
    training.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / ("training_lora.json" if lora else "training.json")).read_text())["rows"]
    expected = [("vamba", form, n) for form in forms for n in (4, 8)] + [("qwen2-vl", "layers", n) for n in (4, 8)]
    assert [(row["model"], row["checkpointing"], row["frames"]) for row in rows] == expected
    assert all(row["step_s"] > 0 and row["video_tokens"] == row["frames"] // 2 * 6 for row in rows)
    assert all("note" not in row for row in rows)


@pytest.mark.parametrize("options, shares", (((), 1), (("--sequence-parallel", "--lora"), 2)))
def test_training_on_two_processes(tmp_path, options, shares):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [training.__file__, "--device", "cpu", "--models", "vamba", "--frames", "8", "--checkpointing", "parts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options, "--output", str(tmp_path)], env=environment, check=True, timeout=240)
    (path,) = tmp_path.glob("*_2_gpus.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["gpus"] for row in rows] == [1, 2]
    assert rows[0]["video_tokens"] == rows[1]["video_tokens"]
    assert rows[1]["scaling"] == pytest.approx(rows[0]["step_s"] / rows[1]["step_s"] / shares)


def test_device_map(tmp_path, capsys):
    device_map.main(["--frames", "4", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "device_map.json").read_text())["rows"]
    assert "note" not in row and all(row[name] > 0 for name in ("load_s", "encode_s", "first_token_s", "decode_ms"))
    assert (tmp_path / "device_map.md").read_text() in capsys.readouterr().out


def test_decoding(tmp_path, capsys):
    options = ["--device", "cpu", "--frames", "4", "--rows", "1,3", "--repeats", "1", "--output", str(tmp_path)]
    decoding.main(options)
    rows = json.loads((tmp_path / "decoding.json").read_text())["rows"]
    assert [(row["rows"], row["step"]) for row in rows] == [(n, step) for n in (1, 3) for step in decoding.STEPS]
    assert all(row[name] > 0 for row in rows for name in ("first_s", "further_s", "token_ms", "tokens_s"))
    assert (tmp_path / "decoding.md").read_text() in capsys.readouterr().out


def test_decoding_with_shares(tmp_path, capsys):
    options = ["--device", "cpu", "--frames", "80", "--shares", "1,0.25", "--repeats", "1", "--output", str(tmp_path)]
    decoding.main(options)
    rows = json.loads((tmp_path / "read_share.json").read_text())["rows"]
    caches, shares = ("dynamic", "offloaded_quantized"), (1, 0.25)
    measured = [(row["video_cache"], row["video_read_share"]) for row in rows]
    assert measured == [(cache, share) for cache in caches for share in shares]
    assert all(row[name] > 0 for row in rows for name in ("first_token_s", "further_s", "token_s"))
    assert (tmp_path / "read_share.md").read_text() in capsys.readouterr().out


def test_cold_start(tmp_path, capsys, monkeypatch):
    caches = []

    def run_here(arguments, folder):
        caches.append(folder)
        cold_start.main(arguments)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    run_fresh = cold_start.run_fresh
    monkeypatch.setattr(cold_start, "run_fresh", run_here)
    options = ["--device", "cpu", "--models", "vamba,qwen2-vl", "--frames", "4", "--train-frames", "4"]
    cold_start.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "cold_start.json").read_text())["rows"]
    expected = [("vamba", "torch", "step"), ("vamba", "torch", "video"), ("qwen2-vl", None, "video")]
    assert [(row["model"], row["scan"]) for row in rows[::2]] == [run[:2] for run in expected]
    assert [row["process"] for row in rows] == ["first ever", "later"] * 3
    assert len(set(caches)) == 3  # what the first process compiles, the later one of the same kind finds
    for row, (*_, kind) in zip(rows, [run for run in expected for _ in range(2)]):
        kinds = ["video", "question"] if (row["model"], kind) == ("vamba", "video") else [kind]
        figures = [f"{which}_{each}_s" for each in kinds for which in ("first", "second")]
        assert all(row.pop(name) > 0 for name in figures)
        assert not any(name.endswith("_s") for name in row) and "note" not in row
    assert (tmp_path / "cold_start.md").read_text() in capsys.readouterr().out
    assert run_fresh(["--measure", "nothing"], str(tmp_path)) == {"note": "failed with exit code 2"}


def test_mixer_kernels(tmp_path, monkeypatch):
    """At two heads, on the CPU: errors and times of what is there."""
    for name, value in {"NUM_HEADS": 2, "WIDTH": 128, "CONV_DIM": 384, "ROW": 514}.items():
        monkeypatch.setattr(mixer_kernels, name, value)
    options = ["--device", "cpu", "--tokens", "70", "--gradient-tokens", "150", "--long", "300"]
    mixer_kernels.main([*options, "--output", str(tmp_path)])
    results = json.loads((tmp_path / "mixer_kernels.json").read_text())
    assert set(results["milliseconds"]) >= {"scan, torch", "scan, torch, forward and backward", "convolution"}
    assert max(results["errors"]["torch"]) < 1e-2 and results["long_errors"]["300"]["torch"] < 1e-2


def test_pruning_has_its_figures(tmp_path, capsys):
    pruning.main(["--device", "cpu", "--frames", "70", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "pruning.json").read_text())["rows"]
    # 35 time steps of 6 tokens: the first stays whole.
    assert [row["video_tokens"] for row in rows] == [210, 6 + 34 * 3, 6 + 34 * 2, 6 + 34, 210, 6 + 34 * 3, 210] + [
        210,
        9 * 6,  # each of them came four times, but the last
        6 + 8 * 3,
    ]
    assert all(row["encode_s"] > 0 and row["question_s"] > 0 and row["decode_ms"] > 0 for row in rows)
    assert (tmp_path / "pruning.md").read_text() in capsys.readouterr().out


def test_a_stream_stays_level(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(streaming, "POINTS", (100, 400, 2000))
    options = ["--device", "cpu", "--frames", "1000", "--budget", "512"]
    streaming.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "streaming.json").read_text())["rows"]
    assert [(row["frames"], row["seen_tokens"]) for row in rows] == [(128, 384), (448, 1344), (1024, 3072)]
    assert [row["video_tokens"] for row in rows] == [384, 448, 448]
    assert all(row["frames_per_s"] > 0 and row["question_s"] > 0 for row in rows)
    assert (tmp_path / "streaming.md").read_text() in capsys.readouterr().out


def test_locating_has_its_figures(tmp_path, capsys):
    caches = ["dynamic", "offloaded_quantized"]
    options = ["--device", "cpu", "--frames", "8,16", "--video-caches", ",".join(caches)]
    locating.main([*options, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "locating.json").read_text())["rows"]
    assert [(row["frames"], row["video_cache"]) for row in rows] == [(n, cache) for n in (8, 16) for cache in caches]
    assert [row["video_tokens"] for row in rows] == [24, 24, 48, 48] and all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "locating.md").read_text() in capsys.readouterr().out


@pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
def test_serving_has_its_figures(tmp_path, capsys):
    import serving  # which needs OpenAI's client

    sizes = ["--frames", "32", "--clients", "2", "--questions", "3", "--requests", "8", "--new-tokens", "2"]
    serving.main(["--device", "cpu", *sizes, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(row["clients"], row["requests"], row["failed"]) for row in rows] == [
        (1, 1, 0),
        (1, 3, 0),
        (2, 3, 0),
        (2, 8, 0),
    ]
    assert all(row["requests_s"] > 0 for row in rows) and all(row["first_token_s"] > 0 for row in rows[:3])
    assert (tmp_path / "serving.md").read_text() in capsys.readouterr().out


def test_encoding_has_its_figures(tmp_path, capsys):
    encoding = pytest.importorskip("encoding", exc_type=ImportError)  # without torchao
    encoding.main(["--frames", "4,8", "--runs", "1", "--profile", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "encoding.json").read_text())["rows"]
    assert [(row["weights"], row["frames"]) for row in rows] == [
        ("bfloat16", 4),
        ("bfloat16", 8),
        ("int8", 4),
        ("int8", 8),
    ]
    assert all(row["encode_s"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert (tmp_path / "encoding.md").read_text() in printed
    assert (
        "aten::_int_mm" in printed.split("Encoding 4 frames")[2]
        and "aten::_int_mm" not in printed.split("Encoding 4 frames")[1]
    )
