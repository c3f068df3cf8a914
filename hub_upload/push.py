# SPDX-License-Identifier: Apache-2.0
"""
Write the repository folder of a Vamba checkpoint, or of an adapter for one, and push it to the Hub.

python hub_upload/push.py Vamba-7B my-name/Vamba-7B --base-model Qwen/Qwen2-VL-7B-Instruct [--dry-run]

The folder holds weights, processor, a model card and this package's own files, so that it loads with
`trust_remote_code=True` where the package is not installed. The repository is private unless `--public` is given.
After an interruption the same command goes on: files that arrived are not sent again.
"""

import argparse
import filecmp
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from bundle import flat_files
from checkpoint_folders import (
    check_destination,
    check_parameters,
    find_checkpoint,
    find_shards,
    new_folder,
    read_config,
    read_header,
)
from convert import load_processor, save_generation_config
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: of httpx or httpx2, whichever it uses
from huggingface_hub.utils import validate_repo_id
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from transformers_vamba import (
    VambaConfig,
    VambaForConditionalGeneration,
    VambaModel,
    VambaProcessor,
    VambaVideoProcessor,
)


RESULTS_FILE = "evaluation.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
    return flat_files({Path(sys.modules[cls.__module__].__file__) for cls in AUTO_CLASSES.values()})


def link(source: Path, target: Path) -> None:
    """The same file under another name where the file system allows, so that weights take no space twice."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_results(file: Path) -> dict[str, dict[str, float]]:
    """Measured results, `{data: {metric: value}}`; else a `ValueError`."""
    results = json.loads(file.read_text())
    if not isinstance(results, dict) or not all(
        isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
        for metrics in results.values()
    ):
        raise ValueError(f"{str(file)!r} holds no results: expected JSON of the form {{data: {{metric: number}}}}.")
    return results


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
    model_name = repo_id.split("/")[-1]
    eval_results = [
        EvalResult(
            task_type="video-text-to-text",
            dataset_type=data.lower().replace(" ", "-"),
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
        results=results,
        metrics=dict.fromkeys(metric for metrics in results.values() for metric in metrics),
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
    check_parameters(checkpoint, config)
    processor = load_processor(checkpoint)
    for part in (config, processor, processor.video_processor):
        part.auto_map = AUTO_MAP
    config.architectures = [VambaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_generation_config(checkpoint, config, folder)
    for name, text in code_files().items():
        (folder / name).write_text(text)

    num_parameters = Counter()
    for shard in find_shards(checkpoint):
        link(shard, folder / shard.name)
        for dtype, shape in read_header(shard).values():
            num_parameters[dtype] += shape.numel()
    if (checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        shutil.copyfile(checkpoint / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
    write_card(folder, num_parameters=num_parameters, text=config.text_config, vision=config.vision_config, **card)


def write_adapter(adapter: Path, folder: Path, base_model: str | None, **card) -> None:
    """
    Writes the repository of an adapter that PEFT saved: its weights and configuration, and nothing of its base model.

    Raises:
        FileNotFoundError: where the adapter has no safetensors file.
        ValueError: where neither the arguments nor the adapter name a base model on the Hub.
    """
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    base_model = base_model or config["base_model_name_or_path"]
    if not base_model or base_model.count("/") != 1 or Path(base_model).exists():
        raise ValueError(
            f"{ADAPTER_CONFIG} names the base model {base_model!r}, which others do not have: pass --base-model with "
            "its name on the Hub."
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{str(adapter)!r} has no {ADAPTER_WEIGHTS}.")
    read_header(adapter / ADAPTER_WEIGHTS)
    link(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    config["base_model_name_or_path"] = base_model
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_card(folder, base_model=base_model, adapter=config, **card)


def write_repository(checkpoint: Path, folder: Path, overwrite: bool = False, **card) -> None:
    """
    Writes the repository of a checkpoint or of an adapter to `folder`, which may hold the very same already.

    Raises:
        FileExistsError: where the folder holds anything else and `overwrite` is not set, or is no model folder.
    """
    check_destination(folder, True, checkpoint)
    write = write_adapter if (checkpoint / ADAPTER_CONFIG).is_file() else write_model
    with new_folder(folder) as new:
        write(checkpoint, new, **card)
        if folder.exists() and not overwrite:
            names = {file.name for file in (*folder.iterdir(), *new.iterdir())}
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
        results = checkpoint / RESULTS_FILE
        write_repository(
            checkpoint,
            folder,
            args.overwrite,
            repo_id=args.repo_id,
            base_model=args.base_model,
            license=args.license,
            results=args.results or (results if results.is_file() else None),
        )
        visibility = "public" if args.public else "private"
        print(f"{folder} for the {visibility} repository {args.repo_id}:")
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size:15,}  {file.name}")
        if not args.dry_run:
            print(f"Pushed: {upload(folder, args.repo_id, args.public, args.create_pr)}")
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
