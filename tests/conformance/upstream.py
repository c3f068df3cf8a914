"""Makes the common tests of the installed Transformers importable as the package `tests`.

They are part of its source distribution. Importing this module downloads that once, into `.cache/`. If it cannot be
had, the importing test module is skipped, and fails in CI. Modules that the common tests import and the distribution
lacks are replaced by those in `stand_ins/`.
"""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers
from filelock import FileLock
from transformers import testing_utils
from transformers.models.auto import modeling_auto


HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "conformance"
# Other versions rely on pip, which checks the sum that the index gives.
SHA256 = {
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
    "5.24.0": "906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3",
}


def download(version: str) -> Path:
    """The source distribution of Transformers `version`, downloaded unless it is in the cache."""
    archive = CACHE / f"transformers-{version}.tar.gz"
    if not archive.exists():
        source = ["--no-deps", "--no-binary=transformers", f"transformers=={version}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", f"--dest={CACHE}", *source]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = f"no source distribution of transformers {version}: {result.stderr.strip()[-300:]}"
            if os.environ.get("CI"):
                raise RuntimeError(reason)
            pytest.skip(reason, allow_module_level=True)
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    if checksum != SHA256.get(version, checksum):
        raise RuntimeError(f"{archive} has SHA-256 {checksum}, expected {SHA256[version]}; delete it and try again.")
    return archive


def unpack(archive: Path) -> Path:
    """A folder with the `tests` of `archive`, completed by the stand-ins."""
    root = CACHE / archive.name.removesuffix(".tar.gz")
    if not root.exists():
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(f"{root.name}/tests/")]
            tar.extractall(CACHE, members, filter="data")
    # Another process may be importing what is there: only what differs is touched.
    for source in (HERE / "stand_ins").rglob("*.*"):
        path = root / source.relative_to(HERE / "stand_ins")
        if not path.exists() or path.read_bytes() != source.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    sources, installed = root / "src" / "transformers", Path(transformers.__file__).parent
    if sources.resolve() != installed.resolve():
        sources.parent.mkdir(exist_ok=True)
        sources.unlink(missing_ok=True)
        sources.symlink_to(installed)

    # `test_pipeline_mixin.py` imports one test class per pipeline task; those that have no stand-in are empty.
    mixin = (root / "tests" / "test_pipeline_mixin.py").read_text()
    for module, name in re.findall(r"pipelines\.(test_pipelines_\w+)(?: import |\.)(\w+)", mixin):
        path = root / "tests" / "pipelines" / f"{module}.py"
        if not path.exists():
            path.write_text(f"class {name}:\n    pass\n")
    return root


def name_vamba() -> None:
    """Lists Vamba's classes where the mixins look up, by name, what a class is for."""
    modeling_auto.MODEL_MAPPING_NAMES["vamba"] = "VambaModel"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vamba"] = "VambaForConditionalGeneration"


CACHE.mkdir(parents=True, exist_ok=True)
with FileLock(CACHE / "lock"):
    sys.path.insert(0, str(unpack(download(transformers.__version__))))
name_vamba()
# These two load Transformers anew, by its link in `src`, and leave that one in place of the one all other tests use.
for module in ("test_configuration_common", "test_pipeline_mixin"):
    importlib.import_module(f"tests.{module}")
    sys.modules["transformers"] = transformers
# Vamba decodes videos with PyAV, so it can run what asks for torchcodec.
testing_utils.require_torchcodec = lambda test: test
