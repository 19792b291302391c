# SPDX-License-Identifier: Apache-2.0
"""A logits processor of the user's, as engines may be started with."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class Shift(LogitsProcessor):
    """Favours every seventh token in requests that ask for it in `extra_args`."""

    def __init__(self, vllm_config: Any, device: torch.device, _: bool) -> None:
        self._device = device
        self._shifts: dict[int, float] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(
            self._shifts,
            batch_update,
            lambda params, *_: (params.extra_args or {}).get("shift"),
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, shift in self._shifts.items():
            logits[row, ::7] += shift
        return logits
