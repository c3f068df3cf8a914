# SPDX-License-Identifier: Apache-2.0
"""From a video file to segments of patches."""
