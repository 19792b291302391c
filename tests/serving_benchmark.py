# SPDX-License-Identifier: Apache-2.0
"""What the serving benchmark is asked to measure, where no server is started."""

from __future__ import annotations

from benchmarks.variants import EngineSettings
from benchmarks.workloads import Workload
from tests.harness import HEADS, MODEL

SETTINGS = EngineSettings(
    model=MODEL,
    heads=HEADS,
    dtype="float32",
    threshold=0.5,
    max_early_predictions=4,
    arguments={"enforce_eager": True, "max_model_len": 256},
    kv_cache_gib=0.0625,
)
WORKLOAD = Workload(
    name="text",
    prompts=[[1, 2], [3], [4, 5]],
    texts=["Tom has 3 apples.", "Ann\n", "Übung"],
    chat=False,
    output_tokens=8,
    description="three texts",
    sha256="0",
)
