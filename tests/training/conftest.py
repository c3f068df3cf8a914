# SPDX-License-Identifier: Apache-2.0
"""The small checkpoint that trainers train."""

import pytest
from tiny_vamba import TINY_CHECKPOINT
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.fixture
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture
def tiny_processor():
    return AutoProcessor.from_pretrained(TINY_CHECKPOINT)
