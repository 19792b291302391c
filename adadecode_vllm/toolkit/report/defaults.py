# SPDX-License-Identifier: Apache-2.0
"""What the engine's defaults are predicted to do, in words."""

from adadecode_vllm.toolkit.report.schema import Defaults
from adadecode_vllm.toolkit.report.text import conditions, percent, ratio


def defaults_in_words(defaults: Defaults | None) -> list[str]:
    """Say what the defaults are predicted to do, and by which drafts.

    Args:
        defaults: The figures; None where the defaults were not played.

    Returns:
        Sentences; none without figures.
    """
    if defaults is None:
        return []
    return [expected_by_default(defaults), _drafts_by_source(defaults)]


def expected_by_default(defaults: Defaults) -> str:
    """Say what speed the defaults are predicted to reach.

    Args:
        defaults: The figures.

    Returns:
        A sentence.
    """
    return (
        f"With the engine's defaults {ratio(defaults.speedup)} over plain decoding "
        f"is predicted, {defaults.tokens_per_forward:.2f} tokens per forward, "
        f"{conditions(defaults.requests, defaults.row_costs)}."
    )


def _drafts_by_source(defaults: Defaults) -> str:
    """Say what exits and n-gram lookup contribute."""
    exits, lookup = defaults.exits, defaults.lookup
    return (
        f"Of the verified drafts, {percent(exits.acceptance)} of the exits' and "
        f"{percent(lookup.acceptance)} of n-gram lookup's are right; they make "
        f"{percent(exits.coverage)} and {percent(lookup.coverage)} of the tokens."
    )
