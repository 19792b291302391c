# SPDX-License-Identifier: Apache-2.0
"""Settings of the throughput benchmark and what an engine counts, without one."""

from typing import Any

from benchmarks.variants import EngineSettings
from tests.harness import HEADS, MODEL

SETTINGS = EngineSettings(MODEL, HEADS, dtype="float32")


def stats(**changes: Any) -> dict[str, Any]:
    """Counters of one request: 12 tokens in 4 forwards, 9 predicted, 8 right."""
    return {
        "exit_layers": [2, 4],
        "num_layers": 8,
        "early_predictions": [7, 2],
        "accepted": [7, 1],
        "rejected": [0, 1],
        "contradicted_requests": 1,
        "draft_steps": [10, 3],
        "gates": [10, 3],
        "segments_run": [13, 6, 3],
        "request_steps": 4,
        "generated_tokens": 12,
        "resumed_forwards": 3,
        "drafting_seconds": 0.5,
        "draft_segment_seconds": [0.2, 0.1, 0.0],
        "gate_seconds": [0.05, 0.05],
        "verifying_seconds": 0.3,
        **changes,
    }
