# SPDX-License-Identifier: Apache-2.0
"""What travels from worker to scheduler with a step's outcome."""

UNUSED_DRAFTS = "adadecode_unused_drafts"
"""Attribute of a model runner's output: request id to draft slots that stayed empty."""

COUNTERS = "adadecode_counters"
"""Attribute of a model runner's output: the worker's counters after the step."""
