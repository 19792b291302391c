# SPDX-License-Identifier: Apache-2.0
"""What the engine's options and those of single requests amount to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from adadecode_vllm.config import (
    OF_THRESHOLDS,
    AdaDecodeConfig,
    Ngram,
    parse_config,
)
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.request_options import (
    ENGINES,
    RequestOptions,
    needs_plain_steps,
    options_of,
)

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

# What the policy alone depends on; everything else is built at start-up.
_CHANGEABLE = {
    "threshold",
    "max_early_predictions",
    "gate",
    "last_guess",
    "ngram",
    "policy",
    "synthetic_acceptance_rate",
}


class Settings:
    """Caps and thresholds of a running engine, and of the requests in it.

    What they take of the heads was read at start-up: requests and
    :meth:`configure` come in the middle of serving, when the heads' directory may have
    changed or gone.

    Attributes:
        policy: When to predict early, where a request leaves that to the engine.
    """

    policy: ThresholdPolicy

    def __init__(self, config: AdaDecodeConfig, heads: ExitHeadsConfig) -> None:
        """Start with the options that the engine was started with.

        Args:
            config: Resolved options: ``exit_layers`` is set.
            heads: The heads' description.
        """
        self._heads = heads
        self._times_steps = config.policy == "cost"
        self._max_draft_tokens = config.max_early_predictions
        self._options: dict[str, RequestOptions] = {}
        self._plain: set[str] = set()
        self._all_plain = False
        self._apply(config)

    def _apply(self, config: AdaDecodeConfig) -> None:
        self.policy = threshold_policy(config, self._heads)
        self._config = config
        # Of this engine's heads: another one in the same process has its own.
        self._own_thresholds = lru_cache(maxsize=1024)(
            partial(self._heads.thresholds, config.gate, exit_layers=config.exit_layers)
        )

    def configure(self, options: Mapping[str, Any]) -> None:
        """Change when to predict early, for studies on a running engine.

        As at start-up, a threshold decides in place of costs, unless ``policy`` is
        given too.

        Args:
            options: Those of :data:`_CHANGEABLE`; what is not named stays.

        Raises:
            AdaDecodeError: If an option cannot be changed or its value is wrong;
                nothing has changed then.
        """
        if fixed := sorted(options.keys() - _CHANGEABLE):
            raise AdaDecodeError(
                f"adadecode_configure: {fixed[0]} cannot be changed on a running "
                "engine. Set it in --adadecode-config."
            )
        changed = {**self._config.model_dump(), **options}
        if "policy" not in options and not OF_THRESHOLDS.isdisjoint(options):
            changed["policy"] = "threshold"
        config = parse_config(changed)
        if config.policy == "cost" and not self._times_steps:
            raise AdaDecodeError(
                'adadecode_configure: policy = "cost" is refused: this engine was '
                "started with thresholds and times no steps. Start it with "
                '"policy": "cost" in --adadecode-config.'
            )
        if config.max_early_predictions > self._max_draft_tokens:
            raise AdaDecodeError(
                f"adadecode_configure: max_early_predictions = "
                f"{config.max_early_predictions} is refused: this engine reserved room "
                f"for {self._max_draft_tokens}. Start it with more in "
                "--adadecode-config."
            )
        self._apply(config)

    @property
    def by_costs(self) -> bool:
        """Whether costs decide, where a request does not give a threshold."""
        return self._config.policy == "cost"

    def admit(self, request_id: str, params: SamplingParams | None) -> None:
        """Learn what a new request, or the next turn of a session, asks for.

        Args:
            request_id: The request.
            params: Its parameters.
        """
        if needs_plain_steps(params):
            self._plain.add(request_id)
        else:
            # A streaming session's next turn has parameters of its own.
            self._plain.discard(request_id)
        own = options_of(params, self._config)
        if own == ENGINES:
            self._options.pop(request_id, None)
        else:
            self._options[request_id] = own

    def forbid_drafts(self, request_ids: Collection[str]) -> bool:
        """Whether a step with these requests has to do without any draft."""
        return self._all_plain or (
            bool(self._plain) and not self._plain.isdisjoint(request_ids)
        )

    def forbid_all_drafts(self) -> None:
        """Let every step do without drafts, whatever its requests ask for."""
        self._all_plain = True

    def options(self, request_ids: Sequence[str]) -> list[RequestOptions] | None:
        """What requests ask for.

        Args:
            request_ids: R requests that were admitted.

        Returns:
            R requests' options; None if all leave everything to the engine, which is
            what a step should find out quickly.
        """
        if not self._options:
            return None
        return [self._options.get(request_id, ENGINES) for request_id in request_ids]

    def caps(
        self, options: Sequence[RequestOptions] | None, requests: int, most: int
    ) -> np.ndarray | None:
        """Most early predictions that requests ask for and the engine allows.

        Args:
            options: R requests' options, or None for the engine's.
            requests: R.
            most: The scheduler's bound for this step.

        Returns:
            (R,) int64, or None if nothing may be predicted early.
        """
        cap = min(self.policy.max_draft_tokens, most)
        if options is None:
            drafts = self.policy.can_predict or self._ngram
            caps = np.full(requests, cap if drafts else 0, np.int64)
        else:
            caps = np.array([self._cap(own, cap) for own in options], np.int64)
        return caps if caps.any() else None

    def _cap(self, own: RequestOptions, cap: int) -> int:
        if not own.may_draft(early=self.policy.can_predict, ngram=self._ngram):
            return 0
        own_cap = own.max_early_predictions
        return cap if own_cap is None else min(cap, own_cap)

    def lookups(
        self, options: Sequence[RequestOptions] | None, requests: int
    ) -> list[Ngram] | None:
        """How requests draft by n-gram lookup.

        Args:
            options: R requests' options, or None for the engine's.
            requests: R.

        Returns:
            R ways, or None if none does.
        """
        engines = self._config.ngram
        if options is None:
            return [engines] * requests if self._ngram else None
        lookups = [engines if own.ngram is None else own.ngram for own in options]
        return lookups if any(way != "off" for way in lookups) else None

    @property
    def _ngram(self) -> bool:
        return self._config.ngram != "off"

    def thresholds(self, options: Sequence[RequestOptions] | None) -> np.ndarray | None:
        """Requests' own thresholds on the exits' probabilities.

        Args:
            options: R requests' options, or None for the engine's.

        Returns:
            (R, K), or None if all leave it to the policy.
        """
        if options is None or all(own.threshold is None for own in options):
            return None
        return np.array(
            [
                self.policy.thresholds
                if own.threshold is None
                else self._own_thresholds(own.threshold)
                for own in options
            ]
        )

    def forget(self, request_ids: Collection[str]) -> None:
        """Release what is remembered of finished requests."""
        self._plain.difference_update(request_ids)
        for request_id in request_ids:
            self._options.pop(request_id, None)


def threshold_policy(
    config: AdaDecodeConfig, heads: ExitHeadsConfig
) -> ThresholdPolicy:
    """When an engine with some options predicts early.

    Args:
        config: Resolved options: ``exit_layers`` is set.
        heads: The heads' description.
    """
    assert config.exit_layers is not None, "resolved at start-up"
    last_exit, rate = config.exit_layers[-1], config.synthetic_acceptance_rate
    return ThresholdPolicy(
        heads.thresholds(config.gate, config.threshold, config.exit_layers),
        config.max_early_predictions,
        heads.guess_threshold(last_exit) if config.last_guess else 1.0,
        0.0 if rate is None else 1.0 - rate,
        heads.calibrations(config.exit_layers),
    )
