# SPDX-License-Identifier: Apache-2.0
"""The arguments of `forward`: checked, and brought into order."""
