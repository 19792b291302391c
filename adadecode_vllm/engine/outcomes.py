# SPDX-License-Identifier: Apache-2.0
"""What travels between scheduler and worker with a step."""

UNUSED_DRAFTS = "adadecode_unused_drafts"
"""Attribute of a model runner's output: request id to draft slots that stayed empty."""

COUNTERS = "adadecode_counters"
"""Attribute of a model runner's output: the worker's counters after the step."""

BY_COSTS = "adadecode_by_costs"
"""Attribute of a model runner's output: whether costs decide about drafts, as a running
engine may be told otherwise."""

ADMISSION = "adadecode_admission"
"""Attribute of a scheduler's output: the probability, in [0, 1], that a draft and all
before it are right above which one more draft pays; None where thresholds decide."""

EXIT_COSTS = "adadecode_exit_costs"
"""Attribute of a scheduler's output: what asking each exit for a token takes, in tokens
that the engine yields in that time; NaN where it is not known. Empty before it is known
how many exits there are."""

EXIT_SECONDS = "adadecode_exit_seconds"
"""Attribute of some of a model runner's outputs: by exit, the worker's seconds of draft
steps and the tokens that were scored in them, since the start or the last reset."""

EXIT_SECONDS_EVERY = 8
"""Steps from one such output to the next."""
