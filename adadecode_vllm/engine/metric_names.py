# SPDX-License-Identifier: Apache-2.0
"""Names of the metrics, with vLLM's prefix: ``LLM.get_metrics`` shows what has it."""

from __future__ import annotations

PREFIX = "vllm:adadecode_"

# Name and help of each counter of `Stats.reported`; Prometheus adds `_total`.
PER_EXIT = {
    "early_predictions": (
        "early_predictions",
        "Tokens predicted early at an exit.",
    ),
    "accepted": (
        "accepted_tokens",
        "Early predictions of an exit that the final layer confirmed.",
    ),
    "rejected": (
        "rejected_tokens",
        "Early predictions of an exit that the final layer contradicted.",
    ),
    "gates": ("gate_checks", "Tokens that an exit's head scored."),
}
TOTALS = {
    "request_steps": (
        "target_forwards",
        "Forwards of the whole model, counted per request that got tokens from it.",
    ),
    "generated_tokens": (
        "generated_tokens",
        "Tokens that those forwards yielded.",
    ),
    "ngram_drafts": (
        "ngram_draft_tokens",
        "Tokens drafted by n-gram lookup.",
    ),
    "ngram_accepted": (
        "ngram_accepted_tokens",
        "Tokens drafted by n-gram lookup that the final layer confirmed.",
    ),
    "ngram_rejected": (
        "ngram_rejected_tokens",
        "Tokens drafted by n-gram lookup that the final layer contradicted.",
    ),
    "resumed_tokens": (
        "resumed_tokens",
        "Tokens that entered a forward with layers already done.",
    ),
    "resumed_forwards": (
        "resumed_forwards",
        "Forwards with at least one such token.",
    ),
    "drafting_seconds": ("draft_seconds", "Wall time that the host spent drafting."),
    "verifying_seconds": (
        "verify_seconds",
        "Wall time that the host spent in forwards with resumed tokens.",
    ),
}
# Of the scheduler: with `policy: "cost"` it times steps with drafts and without.
COMPARED = {
    "compared_seconds": (
        "compared_seconds",
        "Time of steps for which the speed without drafts is known.",
    ),
    "plain_seconds": (
        "plain_seconds",
        "Estimated time of the same tokens without drafts.",
    ),
}
CONFIG_INFO = ("config_info", "The engine's options, as labels.")
DROPPED = (
    "dropped_tokens",
    "Pending tokens whose work was discarded and done again, by reason.",
)
