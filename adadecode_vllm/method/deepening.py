# SPDX-License-Identifier: Apache-2.0
"""Whether an unsure token shall run on to the next exit, where costs decide.

A deeper exit is right more often, but its layers take time. Both are weighed in tokens,
as :class:`~adadecode_vllm.method.admission.Admission` does: what a time costs is what
the engine would yield in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adadecode_vllm.method.admission import TRY_COST, TRY_EVERY

BUCKETS = 8
"""Ranges of what an exit promised that are told apart."""

MIDDLES = (np.arange(BUCKETS) + 0.5) / BUCKETS
"""(BUCKETS,) what is promised in the middle of each."""

_PRIOR = 2.0
"""Tokens that what is taken for usual weighs as much as."""

_MEMORY = 128.0
"""Tokens that are remembered of a range."""

_USUAL_DRAFTS = 16.0
_USUAL_PROMISE = 0.6
"""What drafts are taken to promise until so many have been made."""

_GATE_LAYERS = 0.5
"""Layers whose time an exit's head and the host's part of a draft step are taken to
take until steps have told."""


class Deepening:
    """What running on to the next exit has brought so far, over all requests."""

    def __init__(self, exit_layers: Sequence[int]) -> None:
        """Begin with the guess that it halves what is missing.

        Args:
            exit_layers: Layer counts of the K exits, strictly increasing.
        """
        layers = np.array(exit_layers, np.float64)
        # In drafts by the first exit.
        self._usual_costs = (np.diff(layers) + _GATE_LAYERS) / (
            layers[0] + _GATE_LAYERS
        )
        self._usual = (1.0 + MIDDLES) / 2.0 - MIDDLES
        shape = (max(len(layers) - 1, 0), BUCKETS)
        self._tokens = np.zeros(shape)
        self._gained = np.zeros(shape)
        self._passed = np.zeros(shape)
        self._drafts = _USUAL_DRAFTS
        self._promised = _USUAL_DRAFTS * _USUAL_PROMISE

    def pays(
        self,
        exit_index: int,
        own_promise: np.ndarray,
        promise: np.ndarray,
        survival: np.ndarray,
        least: np.ndarray,
        room: np.ndarray,
        deeper_cost: float = math.nan,
        asking: float = 0.0,
    ) -> np.ndarray:
        """Whether running on beats what can be had now, a draft or none, or is due.

        Args:
            exit_index: The exit that has scored; not the last.
            own_promise: (n,) how probably its tokens are accepted where those before
                are.
            promise: (n,) the same of what would be drafted now: its tokens, or those
                of a lookup, which promise more.
            survival: (n,) how probably those before are.
            least: (n,) what a draft has to promise; NaN where thresholds decide.
            room: (n,) int64, drafts that may still be made, this one included.
            deeper_cost: What asking the next exit takes, in tokens; NaN where it is not
                known, and what is usual is taken.
            asking: What asking the first exit for each draft behind it takes, in
                tokens.

        Returns:
            (n,) bool; False where thresholds decide.
        """
        bucket = bucket_of(own_promise)
        gain = self._gained[exit_index] + _PRIOR * self._usual
        gain /= self._tokens[exit_index] + _PRIOR
        deeper = np.maximum(np.minimum(own_promise + gain[bucket], 1.0), promise)
        now = self._worth(survival * promise, least, room, asking)
        then = self._worth(survival * deeper, least, room, asking)
        cost = self._usual_costs[exit_index] * least
        if not math.isnan(deeper_cost):
            cost = np.where(np.isnan(least), np.nan, deeper_cost)
        due = self._passed[exit_index][bucket] >= np.maximum(TRY_EVERY, cost / TRY_COST)
        # One of a range is enough, among those that costs decide for.
        first = np.zeros(len(bucket), bool)
        ranges = np.where(np.isnan(least), -1, bucket)
        first[np.unique(ranges, return_index=True)[1]] = True
        return (then - cost > np.maximum(now, 0.0)) | (due & first)

    def _worth(
        self,
        survival: np.ndarray,
        least: np.ndarray,
        room: np.ndarray,
        asking: float,
    ) -> np.ndarray:
        """Tokens of a draft and of those that may follow it, less those of their time.

        Args:
            survival: (n,) how probably the draft and those before it are right.
            least: (n,) what each has to promise.
            room: (n,) int64, how many there may be.
            asking: What asking an exit for each of those that follow takes.
        """
        following = np.arange(1, max(int(room.max(initial=0)), 1))
        usual = self._promised / self._drafts
        chain = survival[:, None] * usual**following - (least[:, None] + asking)
        chain[following >= room[:, None]] = 0.0
        return survival - least + chain.clip(0.0).sum(axis=1)

    def ran_on(self, exit_index: int, promise: np.ndarray, deeper: np.ndarray) -> None:
        """Note what the next exit said of some tokens.

        Args:
            exit_index: The exit before.
            promise: (n,) what that had promised.
            deeper: (n,) what the next one promises.
        """
        bucket = bucket_of(promise)
        noted = np.bincount(bucket, minlength=BUCKETS)
        keep = (1.0 - noted / _MEMORY).clip(0.0)
        self._tokens[exit_index] = keep * self._tokens[exit_index] + noted
        self._gained[exit_index] = keep * self._gained[exit_index] + np.bincount(
            bucket, deeper - promise, BUCKETS
        )
        self._passed[exit_index, bucket] = 0.0

    def stayed(self, exit_index: int, promise: np.ndarray) -> None:
        """Note tokens that did not run on; (n,) what their exit promised."""
        self._passed[exit_index] += np.bincount(bucket_of(promise), minlength=BUCKETS)

    def drafted(self, promise: np.ndarray) -> None:
        """Note drafts that exits made; (n,) what these promised."""
        keep = max(1.0 - len(promise) / _MEMORY, 0.0)
        self._drafts = keep * self._drafts + len(promise)
        self._promised = keep * self._promised + float(promise.sum())


def bucket_of(promise: np.ndarray) -> np.ndarray:
    """The ranges, (n,) int64, of what exits promised, (n,)."""
    return (promise * BUCKETS).astype(np.int64).clip(0, BUCKETS - 1)
