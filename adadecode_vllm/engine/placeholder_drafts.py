# SPDX-License-Identifier: Apache-2.0
"""From placeholder drafts, which is what is scheduled first, to what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adadecode_vllm.compat import facts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


def fill_placeholders(
    scheduler_output: SchedulerOutput, predicted: Mapping[str, Sequence[int]]
) -> tuple[SchedulerOutput, dict[str, int]]:
    """Remove the placeholders that stayed empty.

    Args:
        scheduler_output: What the scheduler asks for; is left as it is. It reads off
            its own what was rejected: empty placeholders, and wrong drafts.
        predicted: Request id to the early predictions that wait for verification.

    Returns:
        The same with no more drafts per request than there are and than the scheduler
        agrees to, and request id to drafts removed.
    """
    empty: dict[str, int] = {}
    drafts: dict[str, list[int]] = {}
    scheduled = scheduler_output.scheduled_spec_decode_tokens
    for request_id, placeholders in scheduled.items():
        filled = _agreeing(predicted.get(request_id, ()), placeholders)
        if filled:
            drafts[request_id] = placeholders[:filled]
        if filled < len(placeholders):
            empty[request_id] = len(placeholders) - filled
    if not empty:
        return scheduler_output, empty
    counts = dict(scheduler_output.num_scheduled_tokens)
    for request_id, removed in empty.items():
        counts[request_id] -= removed
    trimmed = replace(
        scheduler_output,
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens=drafts,
    )
    return trimmed, empty


def trim_grammar(
    grammar_output: GrammarOutput | None,
    drafts: Mapping[str, Sequence[int]],
    empty: Mapping[str, int],
) -> GrammarOutput | None:
    """Let the grammar concern the drafts that there are, not the placeholders.

    Args:
        grammar_output: The bitmask of the structured requests, as the scheduler made
            it. Where its rows follow the drafts, those of empty placeholders are
            removed.
        drafts: Request id to the step's drafts.
        empty: Request id to drafts removed.

    Returns:
        The same for the drafts that there are.
    """
    if grammar_output is None or grammar_output.grammar_bitmask is None:
        return grammar_output
    request_ids = grammar_output.structured_output_request_ids
    if not any(request_id in empty for request_id in request_ids):
        return grammar_output
    filled = [len(drafts.get(request_id, ())) for request_id in request_ids]
    bitmask = grammar_output.grammar_bitmask
    if facts().grammar_rows_follow_drafts:
        keep: list[int] = []
        first = 0
        for request_id, count in zip(request_ids, filled, strict=True):
            keep.extend(range(first, first + count + 1))
            first += count + 1 + empty.get(request_id, 0)
        bitmask = bitmask[keep]
    acceptable = grammar_output.num_acceptable_drafts
    if acceptable is not None:
        acceptable = [min(*pair) for pair in zip(acceptable, filled, strict=True)]
    return replace(
        grammar_output, grammar_bitmask=bitmask, num_acceptable_drafts=acceptable
    )


def _agreeing(predicted: Sequence[int], placeholders: Sequence[int]) -> int:
    """Drafts that fit the placeholders; -1 stands for whatever was predicted."""
    filled = 0
    for ours, theirs in zip(predicted, placeholders, strict=False):
        if theirs not in (-1, ours):
            break
        filled += 1
    return filled
