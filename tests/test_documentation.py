# SPDX-License-Identifier: Apache-2.0
"""README and documentation: code runs and prints what is shown, commands have such options, links lead somewhere.

The Python blocks of a page run one after another, in one fresh interpreter, in a folder with `examples`, `checkpoints`
and the `movie.mp4` of `docs/tiny_model.md`. The published checkpoint and the GPU have stand-ins, the tiny checkpoint
and the CPU. A `text` block after a block of code, with at most a paragraph in between, is what the code prints. In it
`...` stands for any lines, and seconds with two decimals for any. Python that prints has such a block. Of the blocks
for the shell, those with such a block run. Python below a comment `not run` is only compiled. The comment says why.

With another tiny checkpoint the answers change. `REMAKE=1 pytest tests/test_documentation.py` writes what is printed
into the pages and the notebook. A block with `...` is changed by hand.
"""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_vamba import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<comment><!-- not run: [^\n]+ -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```\n"
    r"(?:\n(?:(?:(?!```)[^\n]+\n)+\n)?```text\n(?P<shown>.*?)^```)?",
    re.MULTILINE | re.DOTALL,
)
# In blocks for the shell, in the text, and at the top of programs. A line goes on after a backslash.
COMMAND = re.compile(r"(?:^ *|`)((?:python|torchrun|accelerate launch) (?:[^\n`\\]|\\\n)+)", re.MULTILINE)
PROGRAMS = [
    path for folder in ("examples", "examples/benchmarks", "hub_upload") for path in (ROOT / folder).glob("*.py")
]
LINK = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# What stands for what a test does not have: a large checkpoint, a GPU, and an environment without the package.
STAND_INS = {
    '"TIGER-Lab/Vamba-Qwen2-VL-7B"': '"checkpoints/vamba-tiny"',
    '"cuda"': '"cpu"',
    "remove_unused_columns=False,": "remove_unused_columns=False, use_cpu=True, bf16=False,",
    "make demo": "python examples/demo.py",
}
MARK = "-- the next block --\n"
REMAKE = "REMAKE" in os.environ


def blocks(page: Path) -> list[dict[str, str | None]]:
    """Code that runs, with what it is shown to print (None: nothing)."""
    found = [match.groupdict() for match in BLOCK.finditer(page.read_text())]
    return [block for block in found if block["language"] == "python" or block["shown"]]


def run(command: list[str], folder: Path) -> str:
    """What it prints. `python` is the interpreter of the tests."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return completed.stdout


def run_python(codes: list[str], folder: Path) -> list[str]:
    """What each block prints."""
    printed = run([sys.executable, "-c", "".join(f"{code}\nprint({MARK!r}, end='')\n" for code in codes)], folder)
    return printed.split(MARK)[:-1]


def looks_like(shown: str) -> str:
    """A pattern of what is shown, for any lines in place of `...`, and any times."""
    return re.sub(r"\d+\\\.\d\d\\ s", r"\\d+\\.\\d\\d s", re.escape(shown).replace(r"\.\.\." "\\\n", r"(?:.*\n)*"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What pages find in a clone, with the movie that a command of the documentation writes."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    text = (ROOT / "docs" / "tiny_model.md").read_text()
    (command,) = [match["code"] for match in BLOCK.finditer(text) if "movie.mp4" in match["code"]]
    run(["bash", "-ec", command], folder)
    return folder


@pytest.fixture
def folder(clone, tmp_path):
    """A folder with the same in it."""
    for path in clone.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page, folder):
    codes = blocks(page)
    for block in codes:
        for name, stand_in in STAND_INS.items():
            block["code"] = block["code"].replace(name, stand_in)
    shell = [block for block in codes if block["language"] == "bash"]
    python = [block for block in codes if block["language"] == "python" and block["comment"] is None]
    for block in codes:
        if block["language"] == "python":
            compile(block["code"], str(page), "exec")
            assert block["shown"] or block["comment"] or "print(" not in block["code"], "shows not what it prints"
    printed = [run(["bash", "-ec", block["code"]], folder) for block in shell]
    printed += run_python([block["code"] for block in python], folder) if python else []
    for block, text in zip(shell + python, printed):
        if REMAKE and block["shown"] and "...\n" not in block["shown"]:
            page.write_text(page.read_text().replace(f"```text\n{block['shown']}```", f"```text\n{text}```"))
        elif block["shown"]:
            assert re.fullmatch(looks_like(block["shown"]), text), text


def test_notebook():
    """It prints what is saved in it."""
    path = ROOT / "docs" / "quickstart.ipynb"
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    printed = run_python(["".join(cell["source"]) for cell in cells], path.parent)
    if REMAKE:
        for cell, text in zip(cells, printed):
            cell["outputs"][0]["text"] = text.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1) + "\n")
    assert printed == ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]


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


def anchors(page: Path) -> set[str]:
    """Of its headings: in lower case, without punctuation, with hyphens for spaces."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)


def test_troubleshooting_has_the_words_of_errors():
    """Each that is shown in bold, or in the first column of a table, is in the package, or is of others."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    shown = re.findall(r"\*\*`([^`]+)`\*\*", page)
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        shown += re.findall(r"`([^`]+)`", row)
    assert len(shown) > 20
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    others = {"CUDA out of memory", "Your setup doesn't support bf16/gpu"}
    assert [words for words in shown if words not in others and words not in code] == []
