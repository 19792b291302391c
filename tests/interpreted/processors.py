# SPDX-License-Identifier: Apache-2.0
"""A custom logits processor for Model Runner V2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


class Alternating(LogitsProcessor):
    """After an even token an odd one, in the row of a request's number.

    Right where every request has one row, and only there: drafts move the rows, and
    what follows a draft follows no verified token.
    """

    def __init__(
        self, vllm_config: VllmConfig, req_states: LogitsProcRequestState
    ) -> None:
        self._states = req_states

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Look at the first rows only, one for each request."""
        slots = ctx.idx_mapping.long()
        newest = self._states.total_len.gpu[slots].long() - 1
        tokens = self._states.all_token_ids.gpu[slots, newest].long()
        for row, token in enumerate(tokens.tolist()):
            logits[row, token % 2 :: 2] = float("-inf")
        return logits
