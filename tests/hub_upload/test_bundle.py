# SPDX-License-Identifier: Apache-2.0
"""The flat folder of remote code beside the package that it is made from."""

import re

import bundle
import push
import pytest
from transformers.dynamic_module_utils import get_relative_import_files


IMPORT = re.compile(r"^ *from \.+\S+ import ", re.MULTILINE)


def test_names_come_from_paths():
    package = bundle.PACKAGE
    assert bundle.flat_name(package / "cache" / "layers.py") == "cache_layers"
    assert bundle.imported_file(package / "cache" / "layers.py", "..", "ops.state") == package / "ops" / "state.py"
    names = [bundle.flat_name(file) for file in package.rglob("*.py")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", push.code_files())
def test_only_import_lines_differ(name):
    text = push.code_files()[name]
    original = next(file for file in bundle.PACKAGE.rglob("*.py") if bundle.flat_name(file) + ".py" == name)
    assert IMPORT.sub("", text) == IMPORT.sub("", original.read_text())
    assert len(IMPORT.findall(text)) == len(IMPORT.findall(original.read_text()))
    assert all(line.lstrip().startswith("from .") and ".." not in line for line in IMPORT.findall(text))


def test_transformers_finds_all_files_and_no_more(tmp_path):
    for name, text in push.code_files().items():
        (tmp_path / name).write_text(text)
    entries = {tmp_path / f"{cls.__module__.rsplit('.', 1)[1]}.py" for cls in push.AUTO_CLASSES.values()}
    found = {str(entry) for entry in entries} | {
        file for entry in entries for file in get_relative_import_files(entry)
    }
    assert found == {str(file) for file in tmp_path.iterdir()}
