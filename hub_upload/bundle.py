# SPDX-License-Identifier: Apache-2.0
"""
The package as the Hub's remote code: one flat folder, since Transformers follows `from .name import` alone.

Each file gets a name made from its path (`cache/layers.py` becomes `cache_layers.py`). Only import lines change.
"""

import re
from pathlib import Path

import transformers_vamba


PACKAGE = Path(transformers_vamba.__file__).parent
RELATIVE_IMPORT = re.compile(r"^( *from )(\.+)([\w.]+)( import )", re.MULTILINE)


def flat_name(file: Path) -> str:
    """The name of a module of the package in the flat folder, without `.py`."""
    return "_".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imported_file(file: Path, dots: str, module: str) -> Path:
    """The file that `from <dots><module> import` in `file` names."""
    return file.parents[len(dots) - 1].joinpath(*module.split(".")).with_suffix(".py")


def flatten(file: Path) -> str:
    """The text of a module, with the import lines of the flat folder."""
    return RELATIVE_IMPORT.sub(
        lambda line: f"{line[1]}.{flat_name(imported_file(file, line[2], line[3]))}{line[4]}", file.read_text()
    )


def flat_files(entries: set[Path]) -> dict[str, str]:
    """Name and text of each module that the entries need, the entries included, sorted by name."""
    found, waiting = set(), set(entries)
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= {
            imported_file(file, line[2], line[3]) for line in RELATIVE_IMPORT.finditer(file.read_text())
        } - found
    return {f"{flat_name(file)}.py": flatten(file) for file in sorted(found, key=flat_name)}
