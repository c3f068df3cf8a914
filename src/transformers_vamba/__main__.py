# SPDX-License-Identifier: Apache-2.0
"""
Transformers' own command line, for Vamba: `python -m transformers_vamba serve PATH` is `transformers serve PATH`,
which encodes each video once and has options of its own (see `serving`).

`transformers` itself does not import this package. Importing it registers the Auto classes; the server looks for the
class among those of Transformers' own models as well, and there for whether it takes images and videos. For a
checkpoint in the published layout, whose files name Qwen2-VL's processor, it is given Vamba's. For an adapter it is
given the configuration of the adapter's base, and its processor if the adapter was saved without one.
"""

import sys

import transformers
from transformers import AutoConfig, AutoProcessor
from transformers.cli.transformers import app, main
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from .configuration_vamba import VambaConfig
from .modeling_vamba import VambaForConditionalGeneration
from .processing_vamba import VambaProcessor
from .serving.adapters import find_base, has_processor


class ServedConfig(AutoConfig):
    """As [`AutoConfig`], but for an adapter it is that of its base."""

    @classmethod
    def from_pretrained(cls, path, revision=None, **kwargs):
        base = find_base(path, revision)
        path, revision = (path, revision) if base is None else (base, None)
        return AutoConfig.from_pretrained(path, revision=revision, **kwargs)


class ServedProcessor(AutoProcessor):
    """As [`AutoProcessor`], but a [`VambaProcessor`] for every Vamba, whatever its files name."""

    @classmethod
    def from_pretrained(cls, path, trust_remote_code=None, revision=None):
        options = {"trust_remote_code": trust_remote_code, "revision": revision}
        is_vamba = isinstance(ServedConfig.from_pretrained(path, **options), VambaConfig)
        base = find_base(path, revision)
        if base is not None and not has_processor(path, revision):
            path, options["revision"] = base, None
        return (VambaProcessor if is_vamba else AutoProcessor).from_pretrained(path, **options)


def register() -> None:
    """Puts Vamba's classes where the server looks for those of a checkpoint."""
    transformers.VambaForConditionalGeneration = VambaForConditionalGeneration
    transformers.AutoConfig = ServedConfig
    transformers.AutoProcessor = ServedProcessor
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VambaConfig.model_type] = VambaForConditionalGeneration.__name__


if __name__ == "__main__":
    register()
    if is_serve_available():
        from .serving.command import serve

        app.command(name="serve")(serve)
    elif "serve" in sys.argv[1:2]:
        raise SystemExit("The server needs further packages: pip install 'transformers-vamba[serve]'")
    main()
