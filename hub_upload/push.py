# SPDX-License-Identifier: Apache-2.0
"""
Write the repository folder of a Vamba checkpoint, or of an adapter for one, and push it to the Hub.

python hub_upload/push.py Vamba-7B my-name/Vamba-7B --base-model Qwen/Qwen2-VL-7B-Instruct [--dry-run]

The folder holds weights, processor, a model card and this package's own files, so that it loads with
`trust_remote_code=True` where the package is not installed. The repository is private unless `--public` is given.
After an interruption the same command goes on: files that arrived are not sent again.
"""

import argparse
import dataclasses
import filecmp
import inspect
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from bundle import flat_files
from checkpoint_folders import (
    RECORD_NAME,
    check_destination,
    check_numbers,
    check_parameters,
    find_checkpoint,
    find_shards,
    left_out,
    new_folder,
    notes_in,
    read_config,
    read_header,
    write_index,
)
from convert import load_processor, rename_parameters, save_generation_config
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: of httpx or httpx2, whichever it uses
from huggingface_hub.utils import validate_repo_id
from source_files import KNOWN_FIELDS, TEXT_FILES, find_file, keep_known, read_json
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME

from transformers_vamba import (
    VambaConfig,
    VambaForConditionalGeneration,
    VambaModel,
    VambaProcessor,
    VambaVideoProcessor,
)


COMMAND = "push.py"
RESULTS_FILE = "evaluation.json"
MARKUP = re.compile(r"([\\`*\[\]<>|!~$])")  # what Markdown and HTML read in a table's cell
AUTO_CLASSES = {
    "AutoConfig": VambaConfig,
    "AutoModel": VambaModel,
    "AutoModelForImageTextToText": VambaForConditionalGeneration,
    "AutoModelForMultimodalLM": VambaForConditionalGeneration,
    "AutoProcessor": VambaProcessor,
    "AutoVideoProcessor": VambaVideoProcessor,
}
# Which class of which file each is, as Transformers reads it in the configurations.
AUTO_MAP = {name: f"{cls.__module__.rsplit('.', 1)[1]}.{cls.__name__}" for name, cls in AUTO_CLASSES.items()}


def code_files() -> dict[str, str]:
    """Name and text of the files that the Auto classes need, as the Hub's remote code."""
    return flat_files({Path(inspect.getfile(cls)) for cls in AUTO_CLASSES.values()})


def copy_weights(source: Path, target: Path) -> None:
    """
    A copy of a file, which can be edited without touching the source. Where the file system can, the two share their
    blocks until then, and weights take no space twice.
    """
    with open(source, "rb") as reader, open(target, "xb") as writer:
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 2**30):
                pass
        except (AttributeError, OSError):  # not on this system, or not between these two places
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 2**24)


def take_weights(source: Path, folder: Path) -> None:
    """The same tensors in a file of the same name, without what else stands in the header."""
    if notes_in(source):
        rename_parameters(source, folder / source.name, {name: name for name in read_header(source)})
    else:
        copy_weights(source, folder / source.name)


def is_finite_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_results(file: Path) -> dict[str, dict[str, float]]:
    """Measured results, `{data: {metric: value}}`, of finite numbers; else a `ValueError`."""
    results = read_json(file)
    for data, metrics in results.items():
        if not isinstance(metrics, dict) or not data.strip():
            raise ValueError(
                f"{str(file)!r} holds no results: expected JSON of the form {{data: {{metric: number}}}}."
            )
        for metric, value in metrics.items():
            if not is_finite_number(value) or not metric.strip():
                raise ValueError(f"{str(file)!r} holds no number as {metric!r} of {data!r}, but {value!r}.")
    return results


def cell(text: str) -> str:
    """A text as it is in the cell of a table in Markdown, whatever it holds."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def check_base_model(name: object) -> None:
    """Raises a `ValueError` unless others can find the base model by its name on the Hub."""
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
        raise ValueError(
            f"The base model {name!r} is none that others have: pass --base-model with its name on the Hub, such as "
            "Qwen/Qwen2-VL-7B-Instruct."
        )
    validate_repo_id(name)


def write_card(folder: Path, repo_id: str, base_model: str | None, license: str, results: Path | None, **details):
    """
    Writes README.md, the model card.

    Args:
        base_model (`str`, *optional*): Hub name of the model that this one was made from.
        license (`str`): Identifier of the Hub's, such as `"apache-2.0"`.
        results (`Path`, *optional*): See [`read_results`].
        details: What the template shows of the model: its configuration and sizes.
    """
    results = read_results(results) if results else {}
    validate_repo_id(repo_id)
    if base_model is not None:
        check_base_model(base_model)
    model_name = repo_id.split("/")[-1]
    eval_results = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=re.sub(r"[^\w./-]+", "-", data.lower()).strip("-") or "data",
            dataset_name=data,
            metric_type=metric,
            metric_value=value,
        )
        for data, metrics in results.items()
        for metric, value in metrics.items()
    ]
    card_data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if "adapter" in details else None,
        eval_results=eval_results or None,
        library_name="peft" if "adapter" in details else "transformers",
        license=license,
        model_name=model_name,
        pipeline_tag="video-text-to-text",
        tags=["vamba", "arxiv:2503.11579"],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / "model_card.md"),
        base_model=base_model,
        model_name=model_name,
        repo_id=repo_id,
        results={cell(data): {cell(metric): each[metric] for metric in each} for data, each in results.items()},
        metrics=dict.fromkeys(cell(metric) for metrics in results.values() for metric in metrics),
        **details,
    )
    (folder / "README.md").write_text(str(card).rstrip() + "\n")


def write_model(checkpoint: Path, folder: Path, **card) -> None:
    """
    Writes the repository of a Vamba checkpoint, in either layout. `card` are arguments of [`write_card`].

    Raises:
        FileNotFoundError: where the checkpoint lacks a shard or its processor.
        ValueError: where it is no Vamba, or its weights do not fit its configuration.
    """
    config = read_config(checkpoint)
    processor = load_processor(checkpoint)
    check_parameters(checkpoint, config)
    for part in (config, processor, processor.video_processor):
        part.auto_map = AUTO_MAP
    config.architectures = [VambaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_generation_config(checkpoint, config, folder)
    for name, text in code_files().items():
        (folder / name).write_text(text)

    num_parameters: Counter[str] = Counter()
    shards = find_shards(checkpoint)
    for shard in shards:
        take_weights(shard, folder)
        for dtype, shape in read_header(shard).values():
            num_parameters[dtype] += shape.numel()
    write_index(shards, folder)
    write_card(folder, num_parameters=num_parameters, text=config.text_config, vision=config.vision_config, **card)


def adapter_fields(config: dict, file: Path) -> dict[str, None]:
    """The fields that PEFT knows of an adapter's configuration; a `ValueError` for one of no kind that it knows."""
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ValueError("To push an adapter, install PEFT, which knows its fields: `pip install peft`.") from error
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{str(file)!r} says peft_type {peft_type!r}, which PEFT does not know.")
    # By `auto_mapping`, PEFT would import a module of this name.
    names = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])} - {"auto_mapping"}
    return dict.fromkeys((*names, "peft_version"))


def write_adapter(adapter: Path, folder: Path, base_model: str | None, **card) -> None:
    """
    Writes the repository of an adapter that PEFT saved: its weights and configuration, and nothing of its base model.

    Raises:
        FileNotFoundError: where the adapter has no safetensors file.
        ValueError: where neither the arguments nor the adapter name a base model on the Hub, or a file is damaged.
    """
    file = find_file(adapter, ADAPTER_CONFIG_NAME)
    if file is None:
        raise FileNotFoundError(f"{str(adapter)!r} has no {ADAPTER_CONFIG_NAME}.")
    config = read_json(file)
    config = keep_known(config, adapter_fields(config, file), [])
    base_model = base_model or config.get("base_model_name_or_path")
    check_base_model(base_model)
    if find_file(adapter, ADAPTER_SAFE_WEIGHTS_NAME) is None:
        raise FileNotFoundError(f"{str(adapter)!r} has no {ADAPTER_SAFE_WEIGHTS_NAME}.")
    read_header(adapter / ADAPTER_SAFE_WEIGHTS_NAME)
    check_numbers(adapter / ADAPTER_SAFE_WEIGHTS_NAME)
    take_weights(adapter / ADAPTER_SAFE_WEIGHTS_NAME, folder)
    config["base_model_name_or_path"] = base_model
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    rank = config.get("r")
    adapter_details = {"peft_type": config["peft_type"], "r": rank if type(rank) is int else None}
    write_card(folder, base_model=base_model, adapter=adapter_details, **card)


def is_adapter(checkpoint: Path) -> bool:
    return find_file(checkpoint, ADAPTER_CONFIG_NAME) is not None


def not_taken(checkpoint: Path) -> list[str]:
    """What of a checkpoint or an adapter is not in its repository."""
    if is_adapter(checkpoint):
        file, shards = checkpoint / ADAPTER_CONFIG_NAME, [checkpoint / ADAPTER_SAFE_WEIGHTS_NAME]
        known_fields = {ADAPTER_CONFIG_NAME: adapter_fields(read_json(file), file)}
        other_files = (RESULTS_FILE,)
    else:
        shards, known_fields = find_shards(checkpoint), KNOWN_FIELDS
        other_files = (*TEXT_FILES, SAFE_WEIGHTS_INDEX_NAME, RESULTS_FILE)
    return left_out(checkpoint, known_fields, shards, other_files)


def write_repository(checkpoint: Path, folder: Path, overwrite: bool = False, **card) -> None:
    """
    Writes the repository of a checkpoint or of an adapter to `folder`, which may hold the very same already.

    Raises:
        FileExistsError: where the folder holds anything else and `overwrite` is not set, or is no model folder, or
            something is beside it that this command did not leave there.
    """
    check_destination(folder, True, COMMAND, checkpoint)
    write = write_adapter if is_adapter(checkpoint) else write_model
    with new_folder(folder, COMMAND) as new:
        write(checkpoint, new, **card)
        if folder.exists() and not overwrite:
            names = {file.name for file in (*folder.iterdir(), *new.iterdir())} - {RECORD_NAME}
            _, different, absent = filecmp.cmpfiles(folder, new, names)
            if different or absent:
                raise FileExistsError(
                    f"{str(folder)!r} exists and is not what would be written there (see "
                    f"{', '.join(sorted(different + absent))}). Pass --overwrite to replace it, or push it as it is "
                    "with `hf upload`."
                )


def upload(folder: Path, repo_id: str, public: bool = False, create_pr: bool = False) -> str:
    """
    Uploads a folder to a repository on the Hub, which is made if there is none, and returns the address of the commit
    or of the pull request.

    Raises:
        PermissionError: where no token is found.
        ValueError: where the repository exists and is public, and `public` is not set.
        ConnectionError: where the Hub refused or was not reached for long; what arrived is not sent again.
    """
    check_token()
    api = HfApi()
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo_id).private:
            raise ValueError(f"The repository {repo_id!r} exists and is public. Pass --public to push to it.")
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, create_pr=create_pr, commit_message=f"Upload {repo_id.split('/')[1]}"
        )
    # The client reports a file that failed as a RuntimeError.
    except (HfHubHTTPError, HTTPError, RuntimeError) as error:
        reasons = " ".join(str(reason) for reason in (error, error.__cause__) if reason is not None)
        raise ConnectionError(
            f"{repo_id!r} was not updated: {reasons} Run the same command to go on: files that arrived are not sent "
            "again."
        ) from error
    return commit.pr_url or commit.commit_url


def check_token() -> None:
    if get_token() is None:
        raise PermissionError("There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub name of a Vamba checkpoint, or folder of an adapter")
    parser.add_argument("repo_id", help="name of the repository, with its owner: my-name/my-vamba")
    parser.add_argument("--folder", type=Path, help="where to write the repository folder (default: ./my-vamba-hub)")
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if it holds something else")
    parser.add_argument("--base-model", help="Hub name of the model that this one was made from")
    parser.add_argument("--license", default="apache-2.0", help="the Hub's identifier of it (default: apache-2.0)")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"JSON of measured results, {{data: {{metric: number}}}} (default: {RESULTS_FILE})",
    )
    parser.add_argument("--public", action="store_true", help="make the repository public, or push to one that is")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing to main")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and list what would go")
    args = parser.parse_args()
    try:
        validate_repo_id(args.repo_id)
        if "/" not in args.repo_id:
            raise ValueError(f"The repository {args.repo_id!r} needs its owner in front: my-name/{args.repo_id}.")
        if not args.dry_run:
            check_token()
        checkpoint = find_checkpoint(args.checkpoint)
        folder = args.folder or Path(args.repo_id.split("/")[1] + "-hub")
        write_repository(
            checkpoint,
            folder,
            args.overwrite,
            repo_id=args.repo_id,
            base_model=args.base_model,
            license=args.license,
            results=args.results or find_file(checkpoint, RESULTS_FILE),
        )
        visibility = "public" if args.public else "private"
        print(f"{folder} for the {visibility} repository {args.repo_id}:")
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size:15,}  {file.name}")
        for line in not_taken(checkpoint):
            print(f"Left out: {line}")
        if not args.dry_run:
            print(f"Pushed: {upload(folder, args.repo_id, args.public, args.create_pr)}")
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
