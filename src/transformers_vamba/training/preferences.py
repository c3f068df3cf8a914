# SPDX-License-Identifier: Apache-2.0
"""Batches of preferences about images and videos, for TRL's `DPOTrainer`."""

from dataclasses import dataclass
from typing import Any

import torch

from .collator import VambaDataCollator


@dataclass
class VambaPreferenceCollator(VambaDataCollator):
    """
    Makes the batches of TRL's `DPOTrainer`, whose own collator takes images only:

        args = DPOConfig(remove_unused_columns=False)
        DPOTrainer(model, args=args, data_collator=VambaPreferenceCollator(processor), ...)

    A row has `prompt`, `chosen` and `rejected`, each a list of messages as [`VambaDataCollator`] takes them, with the
    images and videos in the messages or in the columns `images` and `videos`. The data set needs a column `images`,
    of empty lists if there are none: by it TRL leaves the rows to the collator.

    A batch has the entries of [`VambaDataCollator`] for the rows with the chosen answers and, after them, for those
    with the rejected ones, and instead of `labels`:

    - **completion_mask** -- int64 of shape (2 * rows, tokens): 1 at the tokens of the answers.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.packing or self.on_error != "raise":
            raise ValueError(
                "Preferences are compared row by row, and take `packing=False` and `on_error='raise'`, got "
                f"packing={self.packing} and on_error={self.on_error!r}."
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            if missing := {"prompt", "chosen", "rejected"} - row.keys():
                raise ValueError(f"A row of preferences lacks {sorted(missing)}, got {sorted(row)}.")
        batch = super().__call__(
            [
                {**row, "messages": [*row["prompt"], *row[answer]], "learn_from": len(row["prompt"])}
                for answer in ("chosen", "rejected")
                for row in rows
            ]
        )
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return batch
