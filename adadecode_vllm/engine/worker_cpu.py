# SPDX-License-Identifier: Apache-2.0
"""The worker on CPUs."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from adadecode_vllm.engine.worker import AdaDecodeWorker
from adadecode_vllm.patches import aot_artifacts, cpu_expand_kernel, cpu_model_runner


class AdaDecodeCPUWorker(AdaDecodeWorker, CPUWorker):
    """vLLM's CPU worker with a runner that predicts early.

    Model Runner V1 is vLLM's choice on CPUs. V2 needs Triton's CPU backend and
    ``VLLM_USE_V2_MODEL_RUNNER=1``.
    """

    def init_device(self) -> None:
        """Set the worker up, with our runner in place of vLLM's."""
        aot_artifacts.install()
        cpu_expand_kernel.install()
        with cpu_model_runner.use(self._runner_class()):
            super().init_device()

    def _runner_class(self) -> type:
        if self.use_v2_model_runner:
            from adadecode_vllm.engine.runner_v2_cpu import AdaDecodeCPUModelRunnerV2

            return AdaDecodeCPUModelRunnerV2
        from adadecode_vllm.engine.runner_v1 import AdaDecodeCPUModelRunner

        return AdaDecodeCPUModelRunner
