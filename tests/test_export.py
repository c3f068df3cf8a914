# SPDX-License-Identifier: Apache-2.0
"""The decoder, exported with a cache that holds a video."""

import pytest
import torch
from tiny_vamba import make_media, make_text, tiny_model

from transformers_vamba.compat import CACHE_NAME


@pytest.mark.parametrize("way", ("torch.export", "Transformers' exporter"))
def test_decoder_with_a_video_in_the_cache(way):
    model = tiny_model()
    cache = model.encode_video(**make_media("video", (5, 4, 6)))

    def inputs():
        mask = torch.ones(1, 12, dtype=torch.long)
        return {"input_ids": make_text(), "attention_mask": mask, CACHE_NAME: cache.fork()}

    exporter = pytest.importorskip("transformers.exporters.exporter_dynamo")
    with torch.no_grad():
        if way == "torch.export":
            exporter.register_cache_pytrees_for_model(model)
            exported = torch.export.export(model, (), inputs(), strict=False)
        else:
            exported = exporter.DynamoExporter().export(model, inputs(), exporter.DynamoConfig())
            exported = getattr(exported, "program", exported)
        logits = exported.module()(**inputs()).logits
        torch.testing.assert_close(logits, model(**inputs()).logits)
        assert not torch.allclose(logits, model(input_ids=make_text()).logits, atol=1e-3)
