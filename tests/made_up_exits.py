# SPDX-License-Identifier: Apache-2.0
"""A drafter whose exits say what a test wants, where costs decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from adadecode_vllm.method.admission import Admission
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.stats import Stats


def make_drafter(
    exit_layers: Sequence[int],
    cap: int,
    confidence: Callable[[np.ndarray], Sequence[float]],
) -> Drafter:
    """Every exit drafts token 7.

    Args:
        exit_layers: Layer counts of the exits.
        cap: Most drafts.
        confidence: Of some requests' rows, what an exit says of their next tokens.
    """

    def score(segment: int, subset: Any, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        said = np.array(confidence(subset.rows), np.float32)
        return np.full(len(said), 7), said

    at_embedding = int(exit_layers[0] == 0)
    return Drafter(
        executor=SimpleNamespace(  # type: ignore[arg-type]
            num_segments=len(exit_layers) + 1 - at_embedding,
            exits_at_embedding=at_embedding,
            steps=SimpleNamespace(draft=score),
        ),
        states=SimpleNamespace(window=cap + 1, memory=None),  # type: ignore[arg-type]
        policy=ThresholdPolicy([0.5] * len(exit_layers), cap),
        stats=Stats(exit_layers, 4),
    )


def make_requests(size: int, cap: int, least: float) -> DraftRequests:
    """So many requests, whose drafts must promise `least`."""
    zeros = np.zeros(size, np.int64)
    return DraftRequests(
        rows=np.arange(size),
        token_ids=zeros,
        positions=zeros,
        limits=zeros + cap,
        stop_token_ids=[()] * size,
        admission=Admission(
            least=np.full(size, least),
            trust=np.ones(size),
            lookup=np.ones((size, 8)),
            use_exits=np.ones(size, bool),
            exits_due=np.zeros(size, bool),
            due=np.zeros(size, bool),
        ),
    )
