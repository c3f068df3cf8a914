# SPDX-License-Identifier: Apache-2.0
"""
Make a new Vamba from a Qwen2-VL checkpoint of any size, ready for the first stage of training.

python hub_upload/init_from_qwen2_vl.py Qwen/Qwen2-VL-2B-Instruct Vamba-2B-init

Cross-attention starts as a copy of self-attention, α at 0.5 and the mixers from their own initialisation. The model is
in memory once, in the precision of its checkpoint.
"""

import argparse
import sys
from pathlib import Path

from checkpoint_folders import (
    check_destination,
    check_parameters,
    checked_checkpoint,
    find_checkpoint,
    make_config,
    new_folder,
    read_config_fields,
)
from convert import load_processor, save_generation_config
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, set_seed

from transformers_vamba import VambaForConditionalGeneration


COMMAND = "init_from_qwen2_vl.py"


def init_from_qwen2_vl(source: Path, destination: Path, overwrite: bool = False) -> None:
    """
    Writes a new Vamba, its processor and its generation config to `destination`.

    Raises:
        FileExistsError: where the destination exists and `overwrite` is not set, or is no model folder, or something
            is beside it that this command did not leave there.
        FileNotFoundError: where the source lacks a shard or its processor.
        ValueError: where the source is no Qwen2-VL, a file of it is damaged or a link out of it, or its weights do not
            fit its configuration.
    """
    check_destination(destination, overwrite, COMMAND, source)
    fields = read_config_fields(source)
    model_type = fields.get("model_type")
    if model_type != Qwen2VLConfig.model_type or "vision_mamba_mixer_config" in fields:
        raise ValueError(
            f"{str(source)!r} is no Qwen2-VL checkpoint: its config.json says model_type {model_type!r}, "
            "expected 'qwen2_vl' without a Vamba mixer."
        )
    config = make_config(source, Qwen2VLConfig, fields)
    processor = load_processor(source)
    check_parameters(source, config, Qwen2VLForConditionalGeneration)
    set_seed(0)  # of the mixers
    with checked_checkpoint(source) as checked:
        model = VambaForConditionalGeneration.from_qwen2_vl(checked)
    with new_folder(destination, COMMAND) as folder:
        model.save_pretrained(folder, save_original_format=False, max_shard_size="5GB")
        processor.save_pretrained(folder)
        save_generation_config(source, model.config, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub name of a Qwen2-VL checkpoint")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination if it exists")
    args = parser.parse_args()
    try:
        init_from_qwen2_vl(find_checkpoint(args.source), args.destination, args.overwrite)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    print(f"Wrote {args.destination}")


if __name__ == "__main__":
    main()
