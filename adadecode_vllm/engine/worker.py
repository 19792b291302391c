# SPDX-License-Identifier: Apache-2.0
"""What every worker answers, whatever its device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from adadecode_vllm.engine.adadecode import AdaDecode
from adadecode_vllm.engine.device_timer import DeviceTimer


class AdaDecodeWorker:
    """Mixed into vLLM's workers: counters, settings, and weights that change."""

    model_runner: Any
    use_v2_model_runner: bool
    _asleep: dict[str, torch.Tensor] | None = None

    def compile_or_warm_up_model(self) -> Any:
        """Compile, warm kernels up on made-up requests, and capture graphs."""
        with (
            self.model_runner.proposer.warming_up()
            if self.use_v2_model_runner
            else nullcontext()
        ):
            return super().compile_or_warm_up_model()  # type: ignore[misc]

    def update_max_model_len(self, max_model_len: int) -> None:
        """Take over the length for which the KV cache has room."""
        super().update_max_model_len(max_model_len)  # type: ignore[misc]
        self.model_runner.proposer.cycle.max_model_len = max_model_len

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """Receive some of the new weights; what the old ones computed is dropped (I2).

        The LM head may be incomplete until :meth:`finish_weight_update`.
        """
        self._adadecode.ledger.clear("weights_updated")
        super().update_weights(*args, **kwargs)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """Put the new weights in place, which the exit scorer then follows."""
        with self._adadecode.new_weights("weights_updated"):
            super().finish_weight_update()  # type: ignore[misc]

    def reset_weights(self) -> None:
        """Set the model's weights to zero, which the exit scorer then follows."""
        with self._adadecode.new_weights("weights_updated"):
            super().reset_weights()  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        """Release memory; what is pending goes with its KV (I2).

        Level 2 discards all weights. vLLM keeps the model's buffers on the host, and
        whoever wakes the engine reloads the model; exit heads are ours to keep.

        Args:
            level: See vLLM.
        """
        self._adadecode.ledger.clear("slept")
        if level == 2:
            self._asleep = {
                name: weight.to("cpu", copy=True)
                for name, weight in self._adadecode.scorer.lasting().items()
            }
        super().sleep(level)  # type: ignore[misc]

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory back, and the exit heads with the weights.

        The exit scorer follows the LM head as it is now: whole, or discarded by level 2
        and soon to be reloaded, when it follows it again.

        Args:
            tags: See vLLM.
        """
        if tags is not None and "weights" not in tags:
            super().wake_up(tags)  # type: ignore[misc]
            return
        with self._adadecode.new_weights("slept"):
            super().wake_up(tags)  # type: ignore[misc]
            if self._asleep is not None:
                for name, weight in self._adadecode.scorer.lasting().items():
                    weight.copy_(self._asleep[name])
                self._asleep = None

    def adadecode_stats(self, reset: bool = False) -> dict[str, Any]:
        """Counters of this worker; reached through ``LLM.collective_rpc``.

        Args:
            reset: Start again from zero afterwards.

        Returns:
            :meth:`adadecode_vllm.method.stats.Stats.to_dict`, ``dropped``, requests
            whose pending tokens were discarded, by reason, and ``dropped_tokens``,
            those tokens; after :meth:`adadecode_profile` also ``device_seconds``, for
            each part of the cycle its seconds and how often it was measured.
        """
        adadecode = self._adadecode
        answer = {
            **adadecode.stats.to_dict(),
            "dropped": dict(adadecode.ledger.dropped),
            "dropped_tokens": dict(adadecode.ledger.dropped_tokens),
        }
        if adadecode.timer is not None:
            answer["device_seconds"] = adadecode.timer.read()
        if reset:
            adadecode.reset_counters()
        return answer

    def adadecode_drafts(self) -> dict[str, list[tuple[int, int]]]:
        """What the next step verifies; reached through ``LLM.collective_rpc``.

        Returns:
            By the engine's request id, in order, each draft's token and the layer
            count of its exit; -1 for n-gram lookup.
        """
        layers = self._adadecode.stats.exit_layers
        return {
            request_id: [
                (token, layers[index] if index >= 0 else -1) for token, index in drafts
            ]
            for request_id, drafts in self._adadecode.drafts().items()
        }

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
            **options: ``threshold``, ``gate``, ``last_guess`` and
                ``synthetic_acceptance_rate``, which also end deciding by costs,
                ``policy``, which goes back to it, ``ngram``, and
                ``max_early_predictions`` up to the engine's own; what is not named
                stays.

        Raises:
            AdaDecodeError: If an option cannot be changed or its value is wrong.
        """
        self._adadecode.configure(options)

    def adadecode_forget_answers(self) -> None:
        """Look up nothing in earlier answers; reached through ``LLM.collective_rpc``.

        With ``lookup: "suffix"`` the engine remembers answers. A measurement that asks
        for the same texts again must not find them there.
        """
        self._adadecode.forget_answers()

    @property
    def _adadecode(self) -> AdaDecode:
        return self.model_runner.adadecode
