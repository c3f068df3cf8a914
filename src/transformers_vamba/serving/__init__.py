# SPDX-License-Identifier: Apache-2.0
"""`python -m transformers_vamba serve`: Transformers' server, which encodes each video once and asks it many times."""
