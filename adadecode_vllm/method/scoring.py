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

_USUAL_LEAST = 0.05
"""What a draft is taken to have to promise at first."""

_AT_ONCE = 16
"""Tokens after which the ratio is worked out again."""

_RATIOS = 1.1 ** np.arange(45)
"""What is tried for `Scoring.least_ratio`."""

_BRINGS = (_RATIOS[:, None] * MIDDLES - 1.0).clip(0.0)
"""By ratio and range, what a draft brings beyond what it must."""

_LOOKED_UP = np.linspace(0.0, 1.0, 41)
"""What is tried for `Scoring.sure`."""

_BETTER = (MIDDLES - _LOOKED_UP[:, None]).clip(0.0)
"""By promise of a lookup and range, how much more an exit promises."""

_FOLLOWING = np.arange(1, 8)
"""Drafts that are taken to follow one at most."""


class Scoring:
    """What exits said of tokens behind other drafts, over all requests.

    Attributes:
        least_ratio: Of the probability that all drafts are right to what a draft must
            promise. Up to here, what an exit says of a further draft brings less, on
            average, than the time that it takes.
        sure: What a lookup has to promise for an exit not to be asked beside it: above,
            what it may know better is worth less, on average, than its time.
    """

    least_ratio: float
    sure: float

    def __init__(self) -> None:
        """Begin with every promise alike."""
        self._said = np.full(BUCKETS, _PRIOR / BUCKETS)
        self._lately: list[float] = []
        self._work_out(_USUAL_LEAST, SCORING_COST * _USUAL_LEAST)

    def said(self, promise: np.ndarray, least: float, asking: float) -> None:
        """Note what exits promised of some tokens.

        Args:
            promise: (n,) what they promised.
            least: What a draft must promise.
            asking: What asking an exit takes, in tokens.
        """
        self._lately += promise.tolist()
        if len(self._lately) < _AT_ONCE:
            return
        self._said *= max(1.0 - len(self._lately) / _MEMORY, 0.0)
        self._said += np.bincount(bucket_of(np.array(self._lately)), minlength=BUCKETS)
        self._lately.clear()
        self._work_out(least, asking)

    def _work_out(self, least: float, asking: float) -> None:
        share = self._said / self._said.sum()
        self.least_ratio = float(
            _RATIOS[least * (_BRINGS @ share) < asking].max(initial=1.0)
        )
        # A draft that is right lets others follow.
        following = float(share @ MIDDLES) ** _FOLLOWING - (least + asking)
        worth = 1.0 + following.clip(0.0).sum()
        better = worth * (_BETTER @ share)
        self.sure = float(_LOOKED_UP[better > asking].max(initial=0.0))
