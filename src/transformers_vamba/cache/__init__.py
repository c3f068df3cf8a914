# SPDX-License-Identifier: Apache-2.0
"""What is kept of the text and of each video."""
