# SPDX-License-Identifier: Apache-2.0
"""Choosing exit layers before any head is trained.

Every layer gets a stand-in for a trained head that costs one linear solve (`ridge`).
Sets of layers are then compared by the cost formula on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.states.cache import LiveStates
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import Text
from adadecode_vllm.toolkit.training.exit_sets import (
    MOST_EXITS,
    PROBE_TOKENS,
    Choice,
    ExitSets,
)
from adadecode_vllm.toolkit.training.ridge import ridge_heads

_MOST_SETS = 3000


def choose_exits(
    teacher: Teacher,
    training: Sequence[Text],
    held_out: Sequence[Text],
    *,
    threshold: float,
    max_draft_tokens: int,
    drafts: int = 0,
    draft_token_ids: torch.Tensor | None = None,
    pass_tokens: int = 1024,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Choice]:
    """Compare sets of exit layers.

    Args:
        teacher: The model.
        training: Texts that the stand-in heads are fitted to.
        held_out: Texts that the sets are compared on.
        threshold: The gate's threshold, in [0, 1]; at 1 it never opens.
        max_draft_tokens: The cap.
        drafts: Drafts of a cycle that heads with memory are trained on; 0 for heads
            without memory.
        draft_token_ids: (m,) int64, the tokens that gates will look at; None for all.
        pass_tokens: Most tokens of one pass of the model.
        start: Called at the beginning with the number of sets to compare.
        advance: Called with how many further ones were compared.

    Returns:
        The sets that were compared, the fastest first.

    Raises:
        AdaDecodeError: If no text is held out.
    """
    if not held_out:
        raise AdaDecodeError(
            "--exit-layers auto: the choice needs held-out text; give --held-out a "
            "share above 0, or name the layers"
        )
    layers = list(range(teacher.num_layers))
    count = sum(math.comb(len(layers), size) for size in range(1, MOST_EXITS + 1))
    grown_only = count > _MOST_SETS
    sizes = range(min(MOST_EXITS, len(layers)))
    start(sum(len(layers) - size for size in sizes) if grown_only else count)
    fit_on = _first_tokens(training, PROBE_TOKENS)
    compare_on = _first_tokens(held_out, PROBE_TOKENS)
    read = [*layers, teacher.num_layers]
    heads = ridge_heads(
        LiveStates(teacher, fit_on, read, pass_tokens), layers, memory=drafts > 0
    )
    source = LiveStates(teacher, compare_on, read, pass_tokens)
    sets = ExitSets(
        teacher,
        source,
        range(len(source)),
        heads,
        drafts=max(1, drafts),
        draft_token_ids=draft_token_ids,
        max_draft_tokens=max_draft_tokens,
    )
    if 0 < threshold < 1:
        log_odds = math.log(threshold / (1 - threshold))
    else:
        log_odds = math.inf if threshold >= 1 else -math.inf
    least = dict.fromkeys(layers, log_odds)

    def rated_set(exits: tuple[int, ...]) -> Choice:
        advance(1)
        return sets.rate(exits, least)

    if not grown_only:
        rated = [
            rated_set(exits)
            for size in range(1, MOST_EXITS + 1)
            for exits in combinations(layers, size)
        ]
    else:
        rated, best = [], Choice((), 0.0, 0.0, 0.0, 0.0)
        for _ in range(MOST_EXITS):
            grown = [
                rated_set(tuple(sorted((*best.exit_layers, layer))))
                for layer in layers
                if layer not in best.exit_layers
            ]
            rated += grown
            best = max(grown, key=lambda choice: choice.speedup)
    return sorted(rated, key=lambda choice: -choice.speedup)


def _first_tokens(texts: Sequence[Text], most: int) -> list[Text]:
    """The first texts, the last of them cut: one alone may be as long as a book."""
    chosen: list[Text] = []
    left = most
    for text in texts:
        if left <= 0:
            break
        chosen.append(replace(text, token_ids=text.token_ids[: text.first + 1 + left]))
        left -= text.used
    return chosen
