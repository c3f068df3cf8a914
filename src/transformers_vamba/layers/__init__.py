# SPDX-License-Identifier: Apache-2.0
"""Modules: the decoder layer, the mixer, the vision tower, the loss."""
