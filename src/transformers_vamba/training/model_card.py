# SPDX-License-Identifier: Apache-2.0
"""The model card that a training run leaves beside a checkpoint or an adapter: its base, and how to ask it."""

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


CARD = """---
{card_data}
---

# {name}

{what} [Vamba](https://arxiv.org/abs/2503.11579) model, {trained}. Vamba is a video language model for hour-long video.

## Ask it about a video

```python
{load}messages = [
    {{
        "role": "user",
        "content": [{{"type": "video", "path": "movie.mp4"}}, {{"type": "text", "text": "What happens?"}}],
    }}
]
inputs = processor.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```
"""

LOAD_MODEL = """from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_vamba  # registers the Auto classes

model = AutoModelForImageTextToText.from_pretrained("{path}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{path}")
"""

LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_vamba  # registers the Auto classes

model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{path}")
processor = AutoProcessor.from_pretrained("{base}")
"""


def write_model_card(
    folder: str | os.PathLike,
    base: str | None,
    is_adapter: bool,
    tags: Iterable[str] = (),
    path: str | None = None,
) -> None:
    """
    Writes `README.md` into a folder.

    Args:
        folder (`str` or `os.PathLike`): Of the checkpoint or adapter.
        base (`str`, *optional*): Name or folder of the checkpoint that the training began with, if there was one.
        is_adapter (`bool`): Whether the folder holds an adapter alone, to be loaded onto its base.
        tags (`Iterable[str]`, *optional*): For the Hub.
        path (`str`, *optional*): What the example loads; the folder by default.
    """
    path = path or os.fspath(folder)
    data = ModelCardData(
        # The Hub takes names alone, and would refuse a folder.
        base_model=base if base and not os.path.isdir(base) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=sorted({"vamba", *tags}),
    )
    card = CARD.format(
        card_data=data.to_yaml(),
        name=Path(path).name,
        what="An adapter of a" if is_adapter else "A",
        trained=f"trained from `{base}`" if base else "trained from a model that was not loaded from a checkpoint",
        load=(LOAD_ADAPTER if is_adapter else LOAD_MODEL).format(base=base or "BASE", path=path),
    )
    ModelCard(card).save(Path(folder) / "README.md")
