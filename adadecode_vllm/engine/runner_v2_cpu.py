# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on CPUs that have Triton's CPU backend."""

from __future__ import annotations

from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from adadecode_vllm.engine.runner_v2 import AdaDecodeModelRunner


class AdaDecodeCPUModelRunnerV2(AdaDecodeModelRunner, CPUModelRunner):
    """vLLM's V2 runner for CPUs, with ours in between."""
