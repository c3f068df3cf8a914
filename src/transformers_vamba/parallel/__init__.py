# SPDX-License-Identifier: Apache-2.0
"""What the forward pass itself needs in training: gradient checkpointing, ranks, sequence parallelism."""
