# SPDX-License-Identifier: Apache-2.0
"""How sure a request's drafts must be for another one to be worth asking an exit for.

An exit takes its time whatever it says. The less probable it is that the drafts so far
are right, the more it would have to promise for a further one to pay, and the less
often it does.
"""

from __future__ import annotations

import numpy as np

from adadecode_vllm.method.admission import SCORING_COST
from adadecode_vllm.method.deepening import BUCKETS, MIDDLES, bucket_of

_PRIOR = 16.0
"""Tokens that all ranges alike weigh as much as."""

_MEMORY = 256.0
"""Tokens that are remembered."""

_AT_ONCE = 16
"""Tokens after which the ratio is worked out again."""

_RATIOS = 1.0 + 0.25 * np.arange(29)
"""What is tried for `Scoring.least_ratio`."""

_BRINGS = (_RATIOS[:, None] * MIDDLES - 1.0).clip(0.0)
"""By ratio and range, what a draft brings beyond what it must."""


class Scoring:
    """What exits said of tokens behind other drafts, over all requests.

    Attributes:
        least_ratio: Of the probability that all drafts are right to what a draft must
            promise. Up to here, what an exit says of a further draft brings less, on
            average, than the time that it takes.
    """

    least_ratio: float

    def __init__(self) -> None:
        """Begin with every promise alike."""
        self._said = np.full(BUCKETS, _PRIOR / BUCKETS)
        self._lately: list[float] = []
        self._work_out(SCORING_COST)

    def said(self, promise: np.ndarray, cost: float = SCORING_COST) -> None:
        """Note what exits promised of some tokens.

        Args:
            promise: (n,) what they promised.
            cost: What asking them takes, as a share of what a draft must promise.
        """
        self._lately += promise.tolist()
        if len(self._lately) < _AT_ONCE:
            return
        self._said *= max(1.0 - len(self._lately) / _MEMORY, 0.0)
        self._said += np.bincount(bucket_of(np.array(self._lately)), minlength=BUCKETS)
        self._lately.clear()
        self._work_out(cost)

    def _work_out(self, cost: float) -> None:
        brings = _BRINGS @ self._said / self._said.sum()
        self.least_ratio = float(_RATIOS[brings < cost].max(initial=1.0))
