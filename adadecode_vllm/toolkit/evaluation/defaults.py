# SPDX-License-Identifier: Apache-2.0
"""What users get who serve heads by their name: the engine's defaults, played."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from adadecode_vllm.config import AdaDecodeConfig, parse_config
from adadecode_vllm.engine.heads_fit import resolve_exit_layers
from adadecode_vllm.engine.settings import threshold_policy
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.counters import Counters
from adadecode_vllm.toolkit.evaluation.known_exits import Answer, Scored
from adadecode_vllm.toolkit.evaluation.simulate import Setting, total, without_drafts


@dataclass(frozen=True)
class _Some:
    """Some of an answer's exits, under indices of their own."""

    scores: Callable[[tuple[int, ...], tuple[int, ...], int], Scored]
    indices: Sequence[int]

    def __call__(
        self, prefix: tuple[int, ...], drafted_by: tuple[int, ...], exit_index: int
    ) -> Scored:
        drafted_by = tuple(self.indices[index] for index in drafted_by)
        return self.scores(prefix, drafted_by, self.indices[exit_index])


def some_exits(answer: Answer, indices: Sequence[int]) -> Answer:
    """An answer for an engine with some of the exits.

    Args:
        answer: With all of them.
        indices: Of those, increasing.
    """
    return replace(answer, scores=_Some(answer.scores, indices))


def can_play_defaults() -> bool:
    """Whether vLLM is installed, which the options of its engine come with."""
    return find_spec("vllm") is not None


def default_options(heads: ExitHeadsConfig, name: str) -> AdaDecodeConfig:
    """Options of an engine that serves the heads by their own name, and no others.

    What the heads recommend counts as a default there.

    Args:
        heads: The heads' description.
        name: Of the heads.

    Returns:
        The options; `exit_layers` is set.

    Raises:
        AdaDecodeError: If the heads recommend something that is not valid, or an exit
            that they do not have.
    """
    # Loads vLLM.
    from adadecode_vllm.engine.heads_as_model import with_recommended

    config = parse_config(with_recommended(heads, name, {}))
    layers = resolve_exit_layers(config, heads)
    return config.model_copy(update={"exit_layers": layers})


def engine_with(
    answers: Sequence[Answer],
    heads: ExitHeadsConfig,
    config: AdaDecodeConfig,
    requests: int | None,
    max_length: int,
) -> tuple[list[Answer], Setting]:
    """An engine to simulate, and the answers as its exits see them.

    Args:
        answers: With all of the heads' exits.
        heads: The heads' description.
        config: The engine's options; `exit_layers` is set.
        requests: Requests at a time; None for all at once.
        max_length: The engine's `max_model_len`.
    """
    from adadecode_vllm.engine.ngram import NgramLookup  # loads vLLM
    from adadecode_vllm.engine.suffix import SuffixLookup

    layers = config.exit_layers
    assert layers is not None, "set by the caller"
    in_trees = config.lookup == "suffix"
    indices = [heads.exit_layers.index(layer) for layer in layers]
    setting = Setting(
        tuple(layers),
        heads.num_hidden_layers,
        threshold_policy(config, heads),
        ngram=config.ngram,
        lookup=SuffixLookup(heads.vocab_size)
        if in_trees
        else NgramLookup(max_length, heads.vocab_size),
        by_costs=config.policy == "cost",
        requests=requests,
    )
    return [some_exits(answer, indices) for answer in answers], setting


def play_defaults(
    answers: Sequence[Answer],
    heads: ExitHeadsConfig,
    config: AdaDecodeConfig,
    cost: CostModel,
    *,
    requests: int,
    max_length: int,
    advance: Callable[[int], None] = lambda answers: None,
) -> dict[str, Any]:
    """Decode answers as an engine with these options does.

    Args:
        answers: The answers, with all exits of the heads.
        heads: The heads' description.
        config: The options; `exit_layers` is set.
        cost: What steps take.
        requests: Requests at a time.
        max_length: The engine's `max_model_len`.
        advance: Called with how many further answers were decoded.

    Returns:
        ``defaults`` of ``evaluation.json``.
    """
    layers = config.exit_layers
    assert layers is not None, "set by the caller"
    chosen, setting = engine_with(answers, heads, config, requests, max_length)
    counters = total(chosen, setting, cost, advance)
    plain = total(chosen, without_drafts(setting), cost)
    return {
        "exit_layers": list(layers),
        "max_early_predictions": config.max_early_predictions,
        "policy": config.policy,
        "ngram": config.ngram,
        "requests": requests,
        "answers": len(chosen),
        "row_costs": cost.row_costs.to_dict(),
        "speedup": plain.time / counters.time if counters.time else 1.0,
        "tokens_per_forward": counters.tokens_per_forward,
        "exits": _source(
            sum(counters.early_predictions),
            sum(counters.accepted),
            sum(counters.rejected),
            counters,
        ),
        "lookup": _source(
            counters.ngram_drafts,
            counters.ngram_accepted,
            counters.ngram_rejected,
            counters,
        ),
    }


def _source(
    drafts: int, right: int, wrong: int, counters: Counters
) -> dict[str, float | int | None]:
    """What one source of drafts brought."""
    return {
        "drafts": drafts,
        "acceptance": right / (right + wrong) if right + wrong else None,
        "coverage": right / max(1, counters.generated_tokens),
    }
