# SPDX-License-Identifier: Apache-2.0
"""When to predict early and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np


@dataclass(frozen=True)
class ThresholdPolicy:
    """The paper's gate: predict early when the head's top probability exceeds gamma.

    The gate looks at the head's distribution and at nothing that was sampled from
    it, so verification stays lossless at any temperature (I5).

    Attributes:
        thresholds: gamma of each exit, in [0, 1]; the paper's is the same for all. At 1
            no probability exceeds it: if all are 1 nothing is ever predicted early and
            drafting is not even started.
        max_draft_tokens: Largest number of unverified tokens of a request.
        guess_threshold: Below its own threshold the last exit's token is predicted
            above this one, after which the request stops; 1 for never.
        corrupted_share: Share of early predictions to replace by another token, so that
            speed can be measured as a function of acceptance.
        calibration: Slope and intercept of each exit's acceptance over its log-odds;
            None where heads are not calibrated, whose probabilities are taken as they
            are.
    """

    thresholds: Sequence[float]
    max_draft_tokens: int
    guess_threshold: float = 1.0
    corrupted_share: float = 0.0
    calibration: Sequence[tuple[float, float]] | None = None

    @property
    def can_predict(self) -> bool:
        """Whether any early prediction can happen at all."""
        return min(self.thresholds) < 1.0

    def may_predict(self, own: np.ndarray | None) -> np.ndarray | bool:
        """Which requests may predict early at some exit.

        Args:
            own: (R, K) the requests' own thresholds; None for the policy's.

        Returns:
            (R,) bool, or one bool for all.
        """
        return self.can_predict if own is None else own.min(axis=1) < 1.0

    def confident(
        self,
        exit_index: int,
        confidence: np.ndarray,
        own: np.ndarray | None = None,
    ) -> np.ndarray:
        """Decide for each request at an exit.

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            confidence: (n,) float32, top probability under the exit head.
            own: (n,) the requests' own thresholds at this exit; None for the policy's.

        Returns:
            (n,) bool.
        """
        return confidence > (self.thresholds[exit_index] if own is None else own)

    def acceptance(self, exit_index: int, confidence: np.ndarray) -> np.ndarray:
        """How probably an exit's top tokens are accepted.

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            confidence: (n,) float32, top probability under the exit head.

        Returns:
            (n,) float64.
        """
        probability = confidence.astype(np.float64)
        if self.calibration is None:
            return probability
        slope, intercept = self.calibration[exit_index]
        within = probability.clip(1e-9, 1 - 1e-9)
        # The logistic function of slope * log(odds) + intercept, for few operations.
        return 1.0 / (1.0 + exp(-intercept) * (1.0 / within - 1.0) ** slope)

    def corrupt(self, token_ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Replace a share of early predictions by a neighbouring token id.

        Args:
            token_ids: (n,) int64.
            random: The same on every tensor-parallel rank (I7).

        Returns:
            (n,) int64.
        """
        if not self.corrupted_share:
            return token_ids
        wrong = random.random(len(token_ids)) < self.corrupted_share
        return np.where(wrong, np.where(token_ids > 0, token_ids - 1, 1), token_ids)

    def worth_a_guess(self, confidence: np.ndarray) -> np.ndarray:
        """Decide for each request that the last exit left unsure.

        Args:
            confidence: (n,) float32, top probability under the last exit's head.

        Returns:
            (n,) bool.
        """
        return confidence > self.guess_threshold
