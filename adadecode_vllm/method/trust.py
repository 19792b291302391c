# SPDX-License-Identifier: Apache-2.0
"""How far to trust what drafts promise, by what became of a request's others."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np

_PRIOR = 2.0
"""What is known of all requests weighs as much as drafts of one of them whose outcomes
vary by so much: eight that are right half of the time."""

_MEMORY = 16.0
"""The most that all drafts of a request weigh: text changes."""

_BOUNDS = (-6.0, 2.0)
"""Of the shift of log-odds."""

_SUREST = 0.99
"""The most that a promise is taken for: no shift would change certainty."""


@dataclass
class Trust:
    """A shift of log-odds, learnt from drafts that were compared.

    Promises shift together: where drafts are right less often than they say, those that
    were nearly certain lose little, and those in the middle much. One step of Newton's
    method for each draft maximizes the likelihood of what came.

    Attributes:
        shift: Added to the log-odds of what is promised.
        weight: How much is known, the prior included: the variance of the outcomes.
    """

    shift: float = 0.0
    weight: float = _PRIOR

    @property
    def factor(self) -> float:
        """On the odds of what is promised."""
        return exp(self.shift)

    def learn(self, said: float, right: bool) -> None:
        """Note a draft that was compared.

        Args:
            said: How probably it was said to be right, without this trust.
            right: Whether it was.
        """
        within = min(max(said, 1.0 - _SUREST), _SUREST)
        said = 1.0 / (1.0 + exp(-self.shift - log(within / (1.0 - within))))
        self.weight = min(self.weight + said * (1.0 - said), _MEMORY)
        shift = self.shift + (right - said) / self.weight
        self.shift = min(max(shift, _BOUNDS[0]), _BOUNDS[1])


def trusted(promise: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Probabilities whose odds are multiplied.

    Args:
        promise: Probabilities in [0, 1].
        factor: Of :attr:`Trust.factor`; broadcasts against them.
    """
    promise = np.minimum(promise, _SUREST)
    raised = promise * factor
    return raised / (raised + (1.0 - promise))
