# SPDX-License-Identifier: Apache-2.0
"""Worker classes: they choose the model runner and answer for its counters."""

from __future__ import annotations

from typing import Any, cast

from vllm.v1.worker.cpu_worker import CPUWorker

from adadecode_vllm.patches import cpu_model_runner
from adadecode_vllm.runner.v1 import AdaDecodeCPUModelRunner


class AdaDecodeCPUWorker(CPUWorker):
    """vLLM's CPU worker with a runner that predicts early."""

    def init_device(self) -> None:
        """Set the worker up, with our runner in place of vLLM's."""
        with cpu_model_runner.use(AdaDecodeCPUModelRunner):
            super().init_device()

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Receive new weights; what the old ones computed is dropped (I2)."""
        self._runner.proposer.adadecode.ledger.clear("weights_updated")
        super().update_weights(*args, **kwargs)

    def adadecode_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters of this worker; reached through ``LLM.collective_rpc``.

        Args:
            reset: Start again from zero afterwards.

        Returns:
            :meth:`adadecode_vllm.core.stats.Stats.to_dict` and ``dropped``, requests
            whose pending tokens were discarded, by reason.
        """
        adadecode = self._runner.proposer.adadecode
        answer = {
            **adadecode.stats.to_dict(),
            "dropped": dict(adadecode.ledger.dropped),
        }
        if reset:
            adadecode.stats.reset()
            adadecode.ledger.dropped.clear()
        return answer

    def adadecode_configure(self, **options: Any) -> None:
        """Change when to predict early; reached through ``LLM.collective_rpc``.

        Args:
            **options: ``threshold``, ``max_early_predictions`` (up to the engine's
                own), ``gate``, ``last_guess`` and ``synthetic_acceptance_rate``; what
                is not named stays.

        Raises:
            AdaDecodeError: If an option cannot be changed or its value is wrong.
        """
        self._runner.proposer.adadecode.configure(options)

    @property
    def _runner(self) -> AdaDecodeCPUModelRunner:
        return cast(AdaDecodeCPUModelRunner, self.model_runner)
