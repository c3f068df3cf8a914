# SPDX-License-Identifier: Apache-2.0
"""
What is taken over of a folder that may come from a stranger: the known fields of known files, parsed and written anew.

A file is read only if it lies in the folder. Everything else in a file or a folder is left out: code that an
`auto_map` names, local paths, tokens.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import (
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from transformers_vamba import VambaConfig, VambaTextConfig, VambaVideoProcessor
from transformers_vamba.configuration_vamba import _PUBLISHED_SWITCHES


def fields_of(config_class: type) -> dict[str, None]:
    of_a_classifier = {"id2label", "label2id", "problem_type"}
    return dict.fromkeys({field.name for field in dataclasses.fields(config_class)} - of_a_classifier)


def arguments_of(processor_class: Any) -> dict[str, None]:
    keywords = processor_class.valid_kwargs
    return dict.fromkeys(keywords.__required_keys__ | keywords.__optional_keys__)


# Of each file the fields that are known; where they are nested, those of the object within.
ROPE = dict.fromkeys(
    "rope_type type rope_theta mrope_section partial_rotary_factor factor original_max_position_embeddings "
    "attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor".split()
)
ANY_CONFIG = {"model_type": None, "torch_dtype": None}
VISION = ANY_CONFIG | fields_of(Qwen2VLVisionConfig) | {"rope_parameters": ROPE}
TEXT = ANY_CONFIG | fields_of(VambaTextConfig) | {"rope_parameters": ROPE, "rope_scaling": ROPE, "rope_theta": None}
TEXT |= {"tie_word_embeddings": None}
CONFIG = TEXT | fields_of(VambaConfig) | {"text_config": TEXT, "vision_config": VISION}
CONFIG |= dict.fromkeys(("vision_mamba_mixer_config", "distill_coeff", *_PUBLISHED_SWITCHES))
IMAGES = arguments_of(Qwen2VLImageProcessor) | {"image_processor_type": None, "processor_class": None}
VIDEOS = arguments_of(VambaVideoProcessor) | {"video_processor_type": None, "processor_class": None}
TOKENIZER = dict.fromkeys((*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, "additional_special_tokens"))
TOKENIZER |= dict.fromkeys(
    "tokenizer_class processor_class backend chat_template model_max_length model_input_names padding_side "
    "truncation_side clean_up_tokenization_spaces split_special_tokens add_prefix_space add_bos_token add_eos_token "
    "errors added_tokens_decoder extra_special_tokens model_specific_special_tokens".split()
)
GENERATION = dict.fromkeys(vars(GenerationConfig()))
KNOWN_FIELDS = {
    CONFIG_NAME: CONFIG,
    GENERATION_CONFIG_NAME: GENERATION,
    PROCESSOR_NAME: {"image_processor": IMAGES, "video_processor": VIDEOS, "processor_class": None},
    IMAGE_PROCESSOR_NAME: IMAGES | VIDEOS,
    VIDEO_PROCESSOR_NAME: VIDEOS,
    "tokenizer_config.json": TOKENIZER,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE: {"chat_template": None},
}
WRITTEN_ANEW = ("architectures", "transformers_version")
# The tokenizer reads these, and saving writes what it has understood of them.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json", "merges.txt")
TEXT_FILES = (*VOCABULARY_FILES, CHAT_TEMPLATE_FILE)


def find_file(folder: Path, name: str) -> Path | None:
    """
    A file of a folder, `None` if there is none.

    Raises:
        ValueError: for a link that leads out of the folder, unless into the Hub's cache that the folder is part of,
            and for what is no file.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    home, target = folder.resolve(), path.resolve()
    is_cached = home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs"
    if not is_cached and home not in target.parents:
        raise ValueError(
            f"{str(path)!r} is a link to {str(target)!r}, out of its folder: nothing outside a checkpoint is read. "
            "Copy the file to where the link is."
        )
    if not target.is_file():
        raise ValueError(f"{str(path)!r} is no file.")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file; else a `ValueError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a JSON {type(content).__name__}, expected an object.")
    return content


def keep_known(content: dict, known: dict, unknown: list[str], prefix: str = "") -> dict:
    """The known fields of an object read from JSON. The names of the others go to `unknown`."""
    kept = {}
    for name, value in content.items():
        if name in WRITTEN_ANEW:
            continue
        if name not in known:
            unknown.append(prefix + name)
        elif known[name] is not None and isinstance(value, dict):
            kept[name] = keep_known(value, known[name], unknown, f"{prefix}{name}.")
        else:
            kept[name] = value
    return kept


def read_known(folder: Path, name: str) -> dict | None:
    """The known fields of one of the files in `KNOWN_FIELDS`, `None` if it is not there."""
    path = find_file(folder, name)
    return None if path is None else keep_known(read_json(path), KNOWN_FIELDS[name], [])


@contextmanager
def checked_copy(folder: Path) -> Iterator[Path]:
    """
    A temporary folder that Transformers can load what it needs from, and nothing else: the known fields of a
    checkpoint's configurations, its vocabulary and its chat template.
    """
    with tempfile.TemporaryDirectory(prefix="checked-") as temporary:
        copy = Path(temporary)
        for name in KNOWN_FIELDS:
            if (content := read_known(folder, name)) is not None:
                (copy / name).write_text(json.dumps(content), encoding="utf-8")
        for name in TEXT_FILES:
            if (path := find_file(folder, name)) is not None:
                (copy / name).write_bytes(path.read_bytes())
        yield copy
