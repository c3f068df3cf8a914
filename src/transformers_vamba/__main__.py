# Copyright 2026 The transformers-vamba team
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
