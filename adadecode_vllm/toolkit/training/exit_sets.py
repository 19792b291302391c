# SPDX-License-Identifier: Apache-2.0
"""What a set of exits would bring, by the cost formula on known text.

Sets are played on what every exit says of every token, which is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.counters import Counters
from adadecode_vllm.toolkit.evaluation.measure import read_exit
from adadecode_vllm.toolkit.evaluation.unrolled import stretches
from adadecode_vllm.toolkit.states.cache import StateSource
from adadecode_vllm.toolkit.states.teacher import Teacher

PROBE_TOKENS = 8192
"""Tokens that sets are compared on."""

MOST_EXITS = 3
"""Size of the largest set."""

Heads = Mapping[int, tuple[torch.Tensor, torch.Tensor | None]]
"""By exit, T and U, (d, d); None for U without memory."""


@dataclass(frozen=True)
class Choice:
    """A set of exits and what the formula says of it.

    Attributes:
        exit_layers: Layer counts.
        speedup: Predicted.
        tokens_per_forward: Tokens per full forward.
        acceptance: Share of early predictions that were right.
        coverage: Share of tokens predicted early and right.
    """

    exit_layers: tuple[int, ...]
    speedup: float
    tokens_per_forward: float
    acceptance: float
    coverage: float


@dataclass(frozen=True)
class _Probe:
    """One exit on n tokens, by draft of a cycle.

    With memory, all drafts before in the cycle are those of the same exit.

    Attributes:
        log_odds: (drafts, n) float32, log(p / (1 - p)) of its top token's probability.
        agreed: (drafts, n) bool, whether that is the final layer's top token.
    """

    log_odds: np.ndarray
    agreed: np.ndarray


class ExitSets:
    """Sets of exits, compared on what every exit says of some texts."""

    def __init__(
        self,
        teacher: Teacher,
        source: StateSource,
        indices: Sequence[int],
        heads: Heads,
        *,
        drafts: int,
        draft_token_ids: torch.Tensor | None,
        max_draft_tokens: int,
    ) -> None:
        """Read the exits.

        Args:
            teacher: The model.
            source: States of the texts, at least those of the exits.
            indices: The texts.
            heads: The exits' heads.
            drafts: Drafts of a cycle that heads with memory are asked for.
            draft_token_ids: (m,) int64, the tokens that gates will look at; None for
                all.
            max_draft_tokens: The cap.
        """
        self._probes = _read_probes(
            source,
            indices,
            heads,
            teacher.lm_head,
            drafts=drafts,
            draft_token_ids=draft_token_ids,
        )
        self._lengths = source.lengths(indices)
        self._cost = CostModel.of_model(
            teacher.model,
            identity=False,
            memory=any(memory is not None for _, memory in heads.values()),
            draft_vocabulary=None if draft_token_ids is None else len(draft_token_ids),
        )
        self._num_layers = teacher.num_layers
        self._max_draft_tokens = max_draft_tokens

    def rate(self, exits: Sequence[int], least: Mapping[int, float]) -> Choice:
        """Predict what a set of exits brings.

        Args:
            exits: Layer counts, increasing.
            least: By exit, the log-odds that its gate asks for.

        Returns:
            The set and its figures.
        """
        counters = _walk(
            [self._probes[layer].log_odds > least[layer] for layer in exits],
            [self._probes[layer].agreed for layer in exits],
            self._lengths,
            Counters(tuple(exits), self._num_layers),
            self._max_draft_tokens,
        )
        return Choice(
            tuple(exits),
            self._cost.speedup(counters),
            counters.tokens_per_forward,
            counters.acceptance,
            counters.coverage,
        )


@torch.inference_mode()
def _read_probes(
    source: StateSource,
    indices: Sequence[int],
    heads: Heads,
    lm_head: torch.Tensor,
    *,
    drafts: int,
    draft_token_ids: torch.Tensor | None,
) -> dict[int, _Probe]:
    """Read exits on the texts of a source; see :class:`ExitSets`.

    Returns:
        By exit, what it says.
    """
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {k: [] for k in heads}
    states = source.states(indices)
    by_layer = dict(zip(source.layers, states, strict=True))
    few = lm_head
    if draft_token_ids is not None:
        draft_token_ids = draft_token_ids.to(lm_head.device)
        few = few[draft_token_ids]
    for stretch in stretches(states[-1], source.lengths(indices), 512, drafts):
        final, _ = read_exit(states[-1][stretch.chosen], None, lm_head)
        top = final.argmax(-1)
        for layer, (weight, memory) in heads.items():
            inputs = by_layer[layer][stretch.wide]
            weight = weight.to(inputs.dtype)
            if memory is None:
                outputs = [inputs @ weight.T]
            else:
                memory = memory.to(inputs.dtype)
                outputs, _ = stretch.outputs(inputs, weight, memory, drafts)
            odds, right = [], []
            for output in outputs:
                logits, log_odds = read_exit(output[stretch.lead :], None, few)
                token = logits.argmax(-1)
                if draft_token_ids is not None:
                    token = draft_token_ids[token]
                odds.append(log_odds)
                right.append(token == top)
            found[layer].append((torch.stack(odds), torch.stack(right)))
    return {
        layer: _Probe(
            *(torch.cat(part, dim=1).cpu().numpy() for part in zip(*rows, strict=True))
        )
        for layer, rows in found.items()
    }


def _walk(
    confident: Sequence[np.ndarray],
    agreed: Sequence[np.ndarray],
    lengths: Sequence[int],
    counters: Counters,
    max_draft_tokens: int,
) -> Counters:
    """Play the cycles on the text as it stands, from (drafts, n) bool by exit.

    Unlike :mod:`adadecode_vllm.toolkit.evaluation.simulate` it does not leave the text
    after a wrong prediction: the cycle ends there. Heads with memory remember what the
    same exit would have drafted before, and draft all later ones as the last one that
    they are trained on. Good enough to rank sets, and fast.
    """
    never = len(confident)
    sure = np.stack(confident)
    # By draft of a cycle and token, the exit that is taken, and whether it is right.
    exits = np.where(sure.any(0), sure.argmax(0), never)
    taken = np.minimum(exits, never - 1)[None]
    right = np.take_along_axis(np.stack(agreed), taken, axis=0)[0]
    last = len(exits) - 1
    start = 0
    for length in lengths:
        position, end = start, start + length
        while position < end:
            drafts, lowest, wrong = 0, 0, False
            while drafts < max_draft_tokens and position + drafts < end - 1:
                front = position + drafts
                draft = min(drafts, last)
                exit_index = exits[draft, front]
                for segment in range(min(exit_index + 1, never)):
                    counters.segments_run[segment] += 1
                    counters.gates[segment] += 1
                if exit_index == never:
                    lowest = never
                    break
                drafts += 1
                counters.early_predictions[exit_index] += 1
                if not right[draft, front]:
                    counters.rejected[exit_index] += 1
                    wrong = True
                    break
                counters.accepted[exit_index] += 1
            for segment in range(lowest, len(counters.segments_run)):
                counters.segments_run[segment] += 1
            counters.forwards += 1
            kept = drafts + (0 if wrong else 1)
            counters.generated_tokens += kept
            position += kept
        start = end
    return counters
