# SPDX-License-Identifier: Apache-2.0
"""On top of the model: collator, distillation, parts by name, adapters."""
