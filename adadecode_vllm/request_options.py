# SPDX-License-Identifier: Apache-2.0
"""What a single request may ask: ``extra_args``, or ``vllm_xargs`` over HTTP."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from adadecode_vllm.config import (
    AdaDecodeConfig,
    Ngram,
    format_text,
    format_value,
    validated,
)
from adadecode_vllm.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger("vllm.adadecode")

PREFIX = "adadecode_"

# vLLM's own: a smaller min_p is none.
_LEAST_MIN_P = 1e-5


class RequestOptions(BaseModel):
    """Options of one request; what is not given is the engine's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(
        default=True, description="False decodes this request as plain vLLM does."
    )
    threshold: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Predict early above this; at 1 nothing is predicted early.",
    )
    max_early_predictions: int | None = Field(
        default=None, ge=0, description="Most unverified tokens, up to the engine's."
    )

    ngram: Ngram | None = Field(
        default=None,
        description="chain, first or tail to draft by n-gram lookup too, or off.",
    )

    def may_draft(self, *, early: bool, ngram: bool) -> bool:
        """Whether the request drafts.

        Args:
            early: Whether it predicts early where that is up to the engine.
            ngram: Whether it drafts by n-gram lookup where that is.
        """
        if not self.enabled or self.max_early_predictions == 0:
            return False
        return (early if self.predicts is None else self.predicts) or (
            ngram if self.ngram is None else self.ngram != "off"
        )

    @property
    def predicts(self) -> bool | None:
        """Whether the request predicts early; None if that is up to the engine."""
        if not self.enabled or self.max_early_predictions == 0:
            return False
        return None if self.threshold is None else self.threshold < 1.0


ENGINES = RequestOptions()
"""A request that asks for nothing."""

NOTHING = RequestOptions(enabled=False)
"""A request without early predictions."""


def parse_request_options(
    extra_args: Mapping[str, Any] | None, config: AdaDecodeConfig
) -> RequestOptions:
    """Read a request's options.

    Args:
        extra_args: ``SamplingParams.extra_args``; names without the prefix are others'.
        config: The engine's options.

    Returns:
        The options.

    Raises:
        AdaDecodeError: With one sentence for every option that is wrong; vLLM's server
            answers HTTP 400.
    """
    options = {
        name.removeprefix(PREFIX): value
        for name, value in (extra_args or {}).items()
        if isinstance(name, str) and name.startswith(PREFIX)
    }
    if not options:
        return ENGINES
    found = validated(RequestOptions, options, _sentence, _unknown)
    cap = found.max_early_predictions
    if cap is not None and cap > config.max_early_predictions:
        raise AdaDecodeError(
            f"{PREFIX}max_early_predictions = {format_value(cap)} is refused: this "
            f"engine reserves room for {config.max_early_predictions}. Ask for at most "
            "that, or start it with more in --adadecode-config."
        )
    return found


def verifiable(params: SamplingParams | None) -> bool:
    """Whether vLLM can verify drafts of a request.

    What it cannot verify is decoded without early predictions, beside requests that
    have them: vLLM applies these parameters to one token a request. With a seed, what
    is sampled would follow the number of drafts, and with it the engine's clock;
    without drafts it is plain vLLM's text.

    Args:
        params: The request's parameters.
    """
    return not (
        params is None
        or params.min_p > _LEAST_MIN_P
        or params.logit_bias
        or (params.seed is not None and params.temperature > 0)
        or needs_plain_steps(params)
    )


def needs_plain_steps(params: SamplingParams | None) -> bool:
    """Whether a request can be served in steps without any draft only.

    vLLM counts rows for these parameters as if no request of the batch had drafts
    (thinking budgets, replayed traces), or forgets them where one has (the logprobs of
    chosen tokens). So the drafts of other requests are dropped in such steps.

    Args:
        params: The request's parameters.
    """
    return params is not None and bool(
        params.logprob_token_ids
        or params.thinking_token_budget is not None
        or params.trace_decode_token_ids
    )


def options_of(
    params: SamplingParams | None, config: AdaDecodeConfig
) -> RequestOptions:
    """What a request amounts to that the front door let in.

    Args:
        params: The request's parameters.
        config: The engine's options.

    Returns:
        Its options. A request that cannot be verified with drafts gets none, and one
        whose options are wrong the engine's: only a front door without this plugin lets
        such a request in.
    """
    if params is None or not verifiable(params):
        return NOTHING
    try:
        return parse_request_options(params.extra_args, config)
    except AdaDecodeError as error:
        logger.warning("adadecode: %s", error)
        return ENGINES


def max_draft_tokens(params: SamplingParams | None, config: AdaDecodeConfig) -> int:
    """Most drafts that a request may ever get.

    Args:
        params: The request's parameters.
        config: The engine's options.

    Returns:
        0 .. ``max_early_predictions``. The engine's threshold is not looked at, since
        it can be changed on a running engine.
    """
    own = options_of(params, config)
    if not own.may_draft(early=True, ngram=config.ngram != "off"):
        return 0
    own_cap = own.max_early_predictions
    return config.max_early_predictions if own_cap is None else own_cap


def _unknown(name: str) -> str:
    known = ", ".join(PREFIX + field for field in RequestOptions.model_fields)
    return (
        f"{format_text(PREFIX + name)}: unknown option. A request may give {known}; "
        "remove or correct it."
    )


def _sentence(detail: Any) -> str:
    name = str(detail["loc"][0])
    meaning = (RequestOptions.model_fields[name].description or "").rstrip(".")
    return (
        f"{PREFIX}{name} = {format_value(detail.get('input'))} is refused: "
        f"{detail['msg']}. Give a valid value ({meaning}), or leave it out."
    )
