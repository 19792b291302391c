# SPDX-License-Identifier: Apache-2.0
"""The worker on CUDA devices."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from adadecode_vllm.engine.runner_v2 import AdaDecodeModelRunner
from adadecode_vllm.engine.worker import AdaDecodeWorker


class AdaDecodeCUDAWorker(AdaDecodeWorker, Worker):
    """vLLM's worker with a Model Runner V2 that predicts early."""

    def _make_model_runner(self) -> Any:
        """Build the runner; vLLM's override point."""
        assert self.device is not None, "set by init_device"
        return AdaDecodeModelRunner(self.vllm_config, self.device)
