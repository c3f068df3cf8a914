# SPDX-License-Identifier: Apache-2.0
"""Functions and kernels on tensors, without parameters."""
