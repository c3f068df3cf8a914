# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the published layout, folders as they are on the Hub, and an environment to load them in."""

import os
import subprocess
import venv
from pathlib import Path

import push
import pytest
import torch
import transformers
from layouts import write_published
from tiny_vamba import TINY_CHECKPOINT


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A checkpoint in the published layout, in four shards."""
    return write_published(tmp_path_factory.mktemp("published"), max_shard_size="2MB")


@pytest.fixture(scope="session")
def pushed_folder(tmp_path_factory):
    """The repository folder of the tiny model."""
    folder = tmp_path_factory.mktemp("pushed") / "vamba-tiny"
    push.write_repository(
        TINY_CHECKPOINT,
        folder,
        repo_id="me/vamba-tiny",
        base_model=None,
        license="apache-2.0",
        results=TINY_CHECKPOINT / "evaluation.json",
    )
    return folder


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory):
    """Runs Python code offline in a virtual environment with every package of this one but `transformers_vamba`."""
    home = tmp_path_factory.mktemp("clean")
    environment = home / "environment"
    venv.create(environment)
    site_packages = next(environment.glob("lib/*/site-packages"))
    linked = set()  # of a package in two versions the first counts, as does what describes it
    for module in (transformers, torch):  # an older Transformers stands in a folder of its own, in front
        for package in Path(module.__file__).parents[1].iterdir():
            # What makes this package importable is itself or, where it is installed to be edited, a .pth file.
            if package.name.startswith("transformers_vamba") or package.suffix == ".pth":
                continue
            name = package.name.split("-")[0] + package.suffix  # without the version
            if name not in linked:
                (site_packages / package.name).symlink_to(package)
                linked.add(name)

    def run(code: str, **variables) -> str:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        offline = {"HF_HOME": str(home / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        completed = subprocess.run(
            [environment / "bin" / "python", "-c", code],
            env=inherited | offline | variables,
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    return run
