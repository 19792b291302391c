# SPDX-License-Identifier: Apache-2.0
"""What every worker answers, whatever its device."""

from __future__ import annotations

from typing import Any

from adadecode_vllm.core.adadecode import AdaDecode
from adadecode_vllm.core.device_timer import DeviceTimer


class AdaDecodeWorker:
    """Mixed into vLLM's workers: counters, settings, and weights that change."""

    model_runner: Any

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Receive new weights; what the old ones computed is dropped (I2)."""
        self._adadecode.ledger.clear("weights_updated")
        super().update_weights(*args, **kwargs)  # type: ignore[misc]

    def adadecode_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters of this worker; reached through ``LLM.collective_rpc``.

        Args:
            reset: Start again from zero afterwards.

        Returns:
            :meth:`adadecode_vllm.core.stats.Stats.to_dict` and ``dropped``, requests
            whose pending tokens were discarded, by reason; after
            :meth:`adadecode_profile` also ``device_seconds``, for each part of the
            cycle its seconds and how often it was measured.
        """
        adadecode = self._adadecode
        answer = {
            **adadecode.stats.to_dict(),
            "dropped": dict(adadecode.ledger.dropped),
        }
        if adadecode.timer is not None:
            answer["device_seconds"] = adadecode.timer.read()
        if reset:
            adadecode.stats.reset()
            adadecode.ledger.dropped.clear()
            if adadecode.timer is not None:
                adadecode.timer.reset()
        return answer

    def adadecode_profile(self) -> bool:
        """From now on measure the device's time; reached through ``collective_rpc``.

        Returns:
            Whether the device can be measured apart from the host: not on CPUs.
        """
        adadecode = self._adadecode
        if adadecode.states.hidden.device.type != "cuda":
            return False
        adadecode.timer = DeviceTimer()
        return True

    def adadecode_configure(self, **options: Any) -> None:
        """Change when to predict early; reached through ``LLM.collective_rpc``.

        Args:
            **options: ``threshold``, ``max_early_predictions`` (up to the engine's
                own), ``gate``, ``last_guess`` and ``synthetic_acceptance_rate``; what
                is not named stays.

        Raises:
            AdaDecodeError: If an option cannot be changed or its value is wrong.
        """
        self._adadecode.configure(options)

    @property
    def _adadecode(self) -> AdaDecode:
        return self.model_runner.adadecode
