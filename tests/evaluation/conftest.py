# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from benchmark_files import write_benchmarks
from synthetic_videos import sample_video, write_mp4
from tiny_vamba import TINY_CHECKPOINT

from transformers_vamba import VambaForConditionalGeneration, VambaProcessor
from transformers_vamba.evaluation import TASKS


# Names of videos and questions about them; no video is named missing, and the one named broken is none.
QUESTIONS = [
    ("a", "What came first?"),
    ("a", "How many flashes were there?"),
    ("b", "What came last?"),
    ("missing", "What came first?"),
    ("broken", "What came first?"),
    ("b", "What came first?"),
]


@pytest.fixture(scope="session")
def benchmark_folders(tmp_path_factory):
    """All benchmarks: where datasets lie by their names on the Hub, and `HF_HOME`, with videos of 16 frames."""
    hub, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")

    def write_video(name, path):
        if name == "broken":
            path.write_bytes(b"not a video")
        elif name != "missing":
            write_mp4(path, sample_video([84, ord(name)], 16, "sequence"))

    write_benchmarks(hub, home, QUESTIONS, write_video)
    return hub, home


@pytest.fixture(scope="module")
def benchmarks(benchmark_folders):
    """`HF_HOME` of all benchmarks, which lmms-eval finds there and in the working directory."""
    hub, home = benchmark_folders
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hub)
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield home


@pytest.fixture(scope="module")
def task_manager(benchmarks):
    """lmms-eval's, of our tasks and of its own for the same benchmarks."""
    import lmms_eval.tasks

    folder = Path(lmms_eval.tasks.__file__).parent
    names = ("lvbench", "videomme", "mlvu", "longvideobench", "mvbench", "nextqa")
    paths = [str(folder / name) for name in names]
    return lmms_eval.tasks.TaskManager(include_path=[*paths, TASKS], include_defaults=False, model_name="vamba")


@pytest.fixture(scope="module")
def model_and_processor():
    model = VambaForConditionalGeneration.from_pretrained(TINY_CHECKPOINT).eval()
    return model, VambaProcessor.from_pretrained(TINY_CHECKPOINT)
