# SPDX-License-Identifier: Apache-2.0
import pytest
from tiny_vamba import tiny_model

from transformers_vamba.cache.storage import HostStorage


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that a tiny video fills several times, and never whole."""
    monkeypatch.setattr(HostStorage, "tokens_per_block", 16)
