# SPDX-License-Identifier: Apache-2.0
"""Thin adapters between vLLM's model runners and :mod:`adadecode_vllm.core`."""
