# SPDX-License-Identifier: Apache-2.0
"""README and documentation: their Python runs as printed, commands have such options, links lead somewhere."""

import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
from tiny_vamba import ROOT, TINY_CHECKPOINT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<comment><!-- not run: .+ -->\n)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# In blocks for the shell, in the text, and at the top of programs. A line goes on after a backslash.
COMMAND = re.compile(r"(?:^ *|`)((?:python|torchrun|accelerate launch) (?:[^\n`\\]|\\\n)+)", re.MULTILINE)
PROGRAMS = [
    path for folder in ("examples", "examples/benchmarks", "hub_upload") for path in (ROOT / folder).glob("*.py")
]
LINK = re.compile(r"\]\((?!http|#)([^)#]+)")
# What stands for what a test does not have: a large checkpoint, and a GPU.
STAND_INS = {
    '"TIGER-Lab/Vamba-Qwen2-VL-7B"': repr(str(TINY_CHECKPOINT)),
    '"checkpoints/vamba-tiny"': repr(str(TINY_CHECKPOINT)),
    '"cuda"': '"cpu"',
    "remove_unused_columns=False,": "remove_unused_columns=False, use_cpu=True, bf16=False,",
}


def blocks(page) -> list[tuple[str, bool]]:
    """The Python blocks of a page, and whether each can run in a test."""
    return [(match["code"], match["comment"] is None) for match in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page, video_file, tmp_path):
    """Those of a page one after another, in one fresh interpreter, beside a `movie.mp4`."""
    shutil.copy(video_file, tmp_path / "movie.mp4")
    code = ""
    for block, can_run in blocks(page):
        compile(block, str(page), "exec")
        code += block if can_run else ""
    for name, stand_in in STAND_INS.items():
        code = code.replace(name, stand_in)
    completed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-3000:]


def test_notebook():
    """It prints what is saved in it."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout == "".join(line for cell in cells for output in cell["outputs"] for line in output["text"])


def commands(path) -> list[list[str]]:
    """The words of each command that starts a program of the repository."""
    found = [shlex.split(command, comments=True) for command in COMMAND.findall(path.read_text())]
    return [words for words in found if any(word.endswith(".py") and "/" in word for word in words)]


@functools.cache
def describe_options(program: str) -> str:
    """What a program prints for `--help`."""
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as printed:
        patch.setattr("sys.argv", [program, "--help"])
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        return printed.getvalue()


@pytest.mark.parametrize("path", [path for path in PAGES + PROGRAMS if commands(path)], ids=lambda path: path.name)
def test_commands_have_such_options(path):
    for words in commands(path):
        place = next(index for index, word in enumerate(words) if word.endswith(".py") and "/" in word)
        options = {word.partition("=")[0] for word in words[place + 1 :] if word.startswith("--")}
        known = {"--config", *re.findall(r"--[\w-]+", describe_options(words[place]))}  # that one is read by TRL
        assert options <= known, (words, options - known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link
