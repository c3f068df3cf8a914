# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT saved, served with the model that they were trained on."""

from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file, find_adapter_config_file
from transformers.utils.import_utils import is_peft_available


def find_adapter(path: str, revision: str | None = None) -> Path | None:
    """
    The folder of an adapter, which is in the Hub's cache if `path` names a repository. `None` for a whole checkpoint,
    and for one with an adapter beside its weights, which needs no other base.

    Raises:
        `ImportError`: if it is an adapter and PEFT is missing.
    """
    file = find_adapter_config_file(path, revision=revision)
    if file is None or (folder := Path(file).parent).joinpath(CONFIG_NAME).is_file():
        return None
    if not is_peft_available():
        raise ImportError(f"{path!r} is an adapter, and adapters need PEFT: pip install peft")
    return folder


def find_base(path: str, revision: str | None = None) -> str | None:
    """The path or name of the model that an adapter was trained on. `None` for a whole checkpoint."""
    folder = find_adapter(path, revision)
    if folder is None:
        return None
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {path!r} does not say what it was trained on: set `base_model_name_or_path`.")
    return base


def has_processor(path: str, revision: str | None = None) -> bool:
    """Whether a folder or repository has the files of a processor, as TRL and `Trainer` save them with an adapter."""
    try:
        cached_file(path, PROCESSOR_NAME, revision=revision)
    except OSError:
        return False
    return True
