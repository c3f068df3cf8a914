# SPDX-License-Identifier: Apache-2.0
"""
Transformers' own command line, for Vamba: `python -m transformers_vamba serve PATH` is `transformers serve PATH`.

`transformers` itself does not import this package. Importing it registers the Auto classes; the server looks for the
class among those of Transformers' own models as well, and there for whether it takes images and videos.
"""

import transformers
from transformers.cli.transformers import main
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .configuration_vamba import VambaConfig
from .modeling_vamba import VambaForConditionalGeneration


if __name__ == "__main__":
    transformers.VambaForConditionalGeneration = VambaForConditionalGeneration
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VambaConfig.model_type] = VambaForConditionalGeneration.__name__
    main()
