# SPDX-License-Identifier: Apache-2.0
"""Heads to publish: their model card, and `save_pretrained` and `push_to_hub`.

Names and arguments are huggingface_hub's, as functions on heads directories.
"""
