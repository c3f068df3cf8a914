# SPDX-License-Identifier: Apache-2.0
"""What an index and an installation see of the package."""

import re
import subprocess
import sys

import pytest
from tiny_vamba import ROOT

import transformers_vamba


if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINK = re.compile(r"\]\(([^)]*)\)")


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", transformers_vamba.__version__)
    # The wheel has the same: it is read from there.
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "src/transformers_vamba/__init__.py"
    assert "version" in PYPROJECT["project"]["dynamic"] and "version" not in PYPROJECT["project"]


def test_readme_of_an_index_page():
    """Without links and pictures that lead nowhere there, and otherwise the same text."""
    readme = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert "readme" in PYPROJECT["project"]["dynamic"] and readme["fragments"] == [{"path": "README.md"}]
    text = original = (ROOT / "README.md").read_text()
    for substitution in readme["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    relative = [link for link in LINK.findall(original) if not link.startswith(("http", "#"))]
    assert len(relative) > 5 and all((ROOT / link.split("#")[0]).is_file() for link in relative)
    assert [link for link in LINK.findall(text) if not link.startswith(("http", "#"))] == []
    assert [link for link in LINK.findall(text)] == [link for link in LINK.findall(original) if link not in relative]
    assert "![" not in text.replace("![](http", "") and "[table]" not in text and "table" in text


@pytest.mark.parametrize("fault", ("missing", "of another PyTorch"))
def test_error_without_torchvision(fault, tmp_path):
    if fault == "missing":
        code = "import sys; sys.modules['torchvision'] = None; import transformers_vamba"
    else:
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import transformers_vamba"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode != 0
    error = completed.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: transformers_vamba needs torchvision for images and videos")
    assert "pip install torch torchvision" in error


def test_how_to_install_the_kernels_is_said():
    assert "pip install --no-build-isolation '.[cuda]'" in (ROOT / "docs" / "troubleshooting.md").read_text()


@pytest.mark.parametrize("command", ("make demo", "make test"))
def test_what_sets_everything_up_is_said(command):
    assert command in (ROOT / "README.md").read_text()
