# SPDX-License-Identifier: Apache-2.0
"""How far a request may predict early, for all model runners."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    AdapterLogitsProcessor,
)

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_input_batch import InputBatch

_BUILT_IN = tuple(BUILTIN_LOGITS_PROCESSORS)


def draft_limits(
    *,
    cap: np.ndarray,
    positions: np.ndarray,
    owned_slots: np.ndarray,
    max_model_len: int,
    remaining: np.ndarray,
) -> np.ndarray:
    """Most early predictions per request.

    Bounded by the cap, by the KV slots that the request owns (I3), by the model's
    length (vLLM schedules no token that leaves no room for a sampled one) and by what
    the request may still generate.

    Args:
        cap: (R,) int64, most unverified tokens of each request.
        positions: (R,) int64, positions of the newest tokens.
        owned_slots: (R,) int64, positions below this may be written.
        max_model_len: The model's length.
        remaining: (R,) int64, tokens that the request may still generate.

    Returns:
        (R,) int64, 0 .. cap.
    """
    bounds = (
        cap,
        owned_slots - positions,
        max_model_len - 2 - positions,
        remaining - 1,
    )
    return np.maximum(np.min(bounds, axis=0), 0)


def stop_token_ids(params: SamplingParams | None) -> frozenset[int]:
    """Tokens that end the request, so that nothing after them is kept."""
    if params is None:
        return frozenset()
    stops = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stops.add(params.eos_token_id)
    return frozenset(stops)


def processed_rows(input_batch: InputBatch, rows: np.ndarray) -> np.ndarray:
    """Rows whose logits a custom logits processor may change.

    vLLM applies custom processors to one token a request, so drafts would be verified
    without them. Those that vLLM's adapter makes say whose request they concern;
    others may concern any.

    Args:
        input_batch: Model Runner V1's batch.
        rows: (R,) int64.

    Returns:
        (R,) bool.
    """
    processed = np.zeros(len(rows), bool)
    for processor in input_batch.logitsprocs.all:
        if isinstance(processor, AdapterLogitsProcessor):
            processed |= np.isin(rows, list(processor.req_info))
        elif not isinstance(processor, _BUILT_IN):
            processed[:] = True
    return processed
