# SPDX-License-Identifier: Apache-2.0
"""What `generate` does differently, and how much memory it takes."""
