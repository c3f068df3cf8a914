# SPDX-License-Identifier: Apache-2.0
"""
Convert a Vamba checkpoint in the published layout into this package's, and check that both give the same logits.

python hub_upload/convert.py TIGER-Lab/Vamba-Qwen2-VL-7B Vamba-7B

The tensors are copied as they are, a shard at a time, in a few MB of memory. Stopped in the middle, the same command
goes on where it stopped. The check runs with the weights on disk: a layer at a time is in memory.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from checkpoint_folders import (
    check_destination,
    check_parameters,
    checked_checkpoint,
    find_checkpoint,
    find_shards,
    left_out,
    open_tensors,
    partial_folder,
    put_in_place,
    read_config,
    read_record,
    start,
    write_index,
)
from safetensors import SafetensorError
from source_files import KNOWN_FIELDS, TEXT_FILES, checked_copy, read_known
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from transformers_vamba import VambaConfig, VambaForConditionalGeneration, VambaProcessor


COMMAND = "convert.py"
SAMPLE_QUESTION = "What happens?"

# Accelerate does not offload a whole model: the last norm, which is small, stays.
WEIGHTS_ON_DISK = {
    "model.visual": "disk",
    "model.language_model.embed_tokens": "disk",
    "model.language_model.layers": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def convert(source: Path, destination: Path, overwrite: bool = False) -> None:
    """
    Writes the checkpoint in `source`, in either layout, to `destination` in this package's layout.

    Raises:
        FileExistsError: where the destination exists and `overwrite` is not set, or is no model folder, or something
            is beside it that this command did not leave there, the unfinished conversion of another source included.
        FileNotFoundError: where the source lacks a shard or its processor.
        ValueError: where the source is no Vamba, a file of it is damaged or a link out of it, its weights do not fit
            its configuration, or the result does not give its logits.
    """
    check_destination(destination, overwrite, COMMAND, source)
    config = read_config(source)
    processor = load_processor(source)
    names = check_parameters(source, config)
    partial = partial_folder(destination)
    start_or_resume(source, destination, overwrite)

    shards = find_shards(source)
    for shard in tqdm(shards, desc="Shards"):
        if not (partial / shard.name).is_file():
            rename_parameters(shard, partial / shard.name, names)
    write_index(shards, partial, names)
    config.architectures = [VambaForConditionalGeneration.__name__]
    config.save_pretrained(partial)
    processor.save_pretrained(partial)
    save_generation_config(source, config, partial)

    print("Comparing the logits of a sample")
    with checked_checkpoint(source) as checked:
        check_same_logits(checked, partial)
    put_in_place(destination)
    for line in left_out(source, KNOWN_FIELDS, shards, (*TEXT_FILES, SAFE_WEIGHTS_INDEX_NAME)):
        print(f"Left out: {line}")


def load_processor(checkpoint: Path) -> VambaProcessor:
    """The processor of a checkpoint, tokenizer and chat template included; else a `FileNotFoundError`."""
    with checked_copy(checkpoint) as checked:
        try:
            processor = VambaProcessor.from_pretrained(checked)
        except Exception as error:  # of whatever kind: the files are not trusted
            reason = str(error).replace(str(checked), str(checkpoint))
            raise FileNotFoundError(
                f"{str(checkpoint)!r} lacks a processor or a tokenizer ({reason}). Those of the Qwen2-VL checkpoint "
                "that it was made from fit: copy preprocessor_config.json and the tokenizer's files beside its "
                "config.json."
            ) from error
    tokens = processor.tokenizer(SAMPLE_QUESTION)["input_ids"]
    if processor.tokenizer.decode(tokens) != SAMPLE_QUESTION:  # Transformers makes up a tokenizer without a vocabulary
        raise FileNotFoundError(
            f"The tokenizer of {str(checkpoint)!r} does not know English: its vocabulary is missing. Copy "
            "tokenizer.json of the Qwen2-VL checkpoint that it was made from."
        )
    return processor


def start_or_resume(source: Path, destination: Path, overwrite: bool) -> None:
    """Makes the folder of an unfinished conversion, or finds that there is one of the same source, to go on with."""
    partial = partial_folder(destination)
    shards = {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in find_shards(source)}
    details = {"source": str(source.resolve()), "shards": shards}
    if record := read_record(partial):
        if record == {"command": COMMAND, **details}:
            print(f"Going on with {partial}")
            return
        if not overwrite:
            raise FileExistsError(
                f"{str(partial)!r} is the unfinished conversion of another checkpoint, or of one that has changed "
                "since. Remove it, or pass --overwrite to begin anew."
            )
        shutil.rmtree(partial)
    start(destination, COMMAND, **details)


def rename_parameters(source: Path, target: Path, names: dict[str, str]) -> None:
    """
    Copies a safetensors file with other names for its tensors. Names stand in the header alone; the tensors after it
    are copied byte by byte, never held in memory.
    """
    unfinished = target.with_name(target.name + ".unfinished")
    with open(source, "rb") as reader, open(unfinished, "wb") as writer:
        header = open_tensors(reader)
        header.pop("__metadata__", None)
        header = {"__metadata__": {"format": "pt"}, **{names[name]: entry for name, entry in header.items()}}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the tensors begin at a multiple of 8 bytes
        writer.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(reader, writer, 2**24)
    os.replace(unfinished, target)


def save_generation_config(source: Path, config: VambaConfig, folder: Path) -> None:
    generation_config = read_known(source, GENERATION_CONFIG_NAME)
    if generation_config is not None:
        content = json.dumps(generation_config, indent=2, sort_keys=True)
        (folder / GENERATION_CONFIG_NAME).write_text(content + "\n")
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def check_same_logits(source: Path, result: Path) -> None:
    """Raises a `ValueError` unless both checkpoints give a sample, through their own processors, equal logits."""
    expected = sample_logits(source)
    gc.collect()  # Accelerate's hooks and their modules hold one another, and with them the files of the source
    logits = sample_logits(result)
    if not torch.allclose(logits, expected, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"{str(result)!r} and {str(source)!r} give logits that differ by up to "
            f"{(logits - expected).abs().max().item():.2e}."
        )


@torch.no_grad()
def sample_logits(checkpoint: Path) -> torch.Tensor:
    """Logits of a question about a few frames of noise, with the weights on disk until each is needed."""
    processor = load_processor(checkpoint)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": SAMPLE_QUESTION}]}]
    frames = torch.randint(256, (4, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True),
        videos=[frames],
        do_sample_frames=False,
        return_tensors="pt",
    )
    with tempfile.TemporaryDirectory() as offload_folder:
        model = VambaForConditionalGeneration.from_pretrained(
            checkpoint, device_map=WEIGHTS_ON_DISK, offload_folder=offload_folder
        )
        return model(**inputs).logits.float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub name of a checkpoint in the published layout")
    parser.add_argument("destination", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the destination if it exists")
    args = parser.parse_args()
    try:
        convert(find_checkpoint(args.source), args.destination, args.overwrite)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"Error: {error}")
    print(f"Wrote {args.destination}")


if __name__ == "__main__":
    main()
