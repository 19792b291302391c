# SPDX-License-Identifier: Apache-2.0
"""Choosing exit layers before any head is trained.

Every layer gets a stand-in for a trained head that costs one linear solve (`ridge`).
Sets of layers are then compared by the cost formula on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.measure import read_exit
from adadecode_vllm.toolkit.evaluation.simulate import Counters
from adadecode_vllm.toolkit.evaluation.unrolled import stretches
from adadecode_vllm.toolkit.states.cache import LiveStates
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import Text
from adadecode_vllm.toolkit.training.ridge import ridge_heads

_MOST_SETS = 3000


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
    """One layer on the held-out tokens, by draft of a cycle: (drafts, n) bool each.

    With memory, all drafts before in the cycle are those of the same exit.
    """

    confident: np.ndarray
    agreed: np.ndarray


def choose_exits(
    teacher: Teacher,
    training: Sequence[Text],
    held_out: Sequence[Text],
    *,
    threshold: float,
    max_early_predictions: int,
    drafts: int = 0,
    draft_token_ids: torch.Tensor | None = None,
    most_exits: int = 3,
    probe_tokens: int = 8192,
    pass_tokens: int = 1024,
    start: Callable[[int], None] = lambda total: None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Choice]:
    """Compare sets of exit layers.

    Args:
        teacher: The model.
        training: Texts that the stand-in heads are fitted to.
        held_out: Texts that the sets are compared on.
        threshold: The gate's threshold.
        max_early_predictions: The cap.
        drafts: Drafts of a cycle that heads with memory are trained on; 0 for heads
            without memory.
        draft_token_ids: (m,) int64, the tokens that gates will look at; None for all.
        most_exits: Largest size of a set.
        probe_tokens: Most tokens of either kind of text.
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
    count = sum(math.comb(len(layers), size) for size in range(1, most_exits + 1))
    grown_only = count > _MOST_SETS
    sizes = range(min(most_exits, len(layers)))
    start(sum(len(layers) - size for size in sizes) if grown_only else count)
    fit_on = _first_tokens(training, probe_tokens)
    compare_on = _first_tokens(held_out, probe_tokens)
    fitted = LiveStates(teacher, fit_on, [*layers, teacher.num_layers], pass_tokens)
    heads = ridge_heads(fitted, layers, memory=drafts > 0)
    probes = _probe(
        teacher, compare_on, heads, threshold, pass_tokens, drafts, draft_token_ids
    )
    cost = CostModel.of_model(
        teacher.model,
        identity=False,
        memory=drafts > 0,
        draft_vocabulary=None if draft_token_ids is None else len(draft_token_ids),
    )
    lengths = [text.used for text in compare_on]

    def rate(exits: tuple[int, ...]) -> Choice:
        counters = _walk(
            [probes[layer] for layer in exits],
            lengths,
            Counters(exits, teacher.num_layers),
            max_early_predictions,
        )
        advance(1)
        return Choice(
            exits,
            cost.speedup(counters),
            counters.tokens_per_forward,
            counters.acceptance,
            counters.coverage,
        )

    if not grown_only:
        rated = [
            rate(exits)
            for size in range(1, most_exits + 1)
            for exits in combinations(layers, size)
        ]
    else:
        rated, best = [], Choice((), 0.0, 0.0, 0.0, 0.0)
        for _ in range(most_exits):
            grown = [
                rate(tuple(sorted((*best.exit_layers, layer))))
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


@torch.inference_mode()
def _probe(
    teacher: Teacher,
    texts: Sequence[Text],
    heads: Mapping[int, tuple[torch.Tensor, torch.Tensor | None]],
    threshold: float,
    pass_tokens: int,
    drafts: int,
    draft_token_ids: torch.Tensor | None,
) -> dict[int, _Probe]:
    live = LiveStates(teacher, texts, [*heads, teacher.num_layers], pass_tokens)
    log_odds = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else -math.inf
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {k: [] for k in heads}
    states = live.states(range(len(texts)))
    lengths = live.lengths(range(len(texts)))
    few = teacher.lm_head
    if draft_token_ids is not None:
        draft_token_ids = draft_token_ids.to(teacher.device)
        few = few[draft_token_ids]
    steps = max(1, drafts)
    for stretch in stretches(states[-1], lengths, 512, steps):
        final, _ = read_exit(states[-1][stretch.chosen], None, teacher.lm_head)
        top = final.argmax(-1)
        for inputs, (layer, head) in zip(
            states[:, stretch.wide], heads.items(), strict=False
        ):
            weight, memory = head
            weight = weight.to(inputs.dtype)
            if memory is None:
                outputs = [inputs @ weight.T]
            else:
                memory = memory.to(inputs.dtype)
                outputs, _ = stretch.outputs(inputs, weight, memory, steps)
            sure, right = [], []
            for output in outputs:
                logits, odds = read_exit(output[stretch.lead :], None, few)
                token = logits.argmax(-1)
                if draft_token_ids is not None:
                    token = draft_token_ids[token]
                sure.append(odds > log_odds)
                right.append(token == top)
            found[layer].append((torch.stack(sure), torch.stack(right)))
    return {
        layer: _Probe(
            *(torch.cat(part, dim=1).cpu().numpy() for part in zip(*rows, strict=True))
        )
        for layer, rows in found.items()
    }


def _walk(
    probes: Sequence[_Probe],
    lengths: Sequence[int],
    counters: Counters,
    max_early_predictions: int,
) -> Counters:
    """Play the cycles on the text as it stands.

    Unlike :mod:`adadecode_vllm.toolkit.evaluation.simulate` it does not leave the text
    after a wrong prediction: the cycle ends there. Heads with memory remember what the
    same exit would have drafted before, and draft all later ones as the last one that
    they are trained on. Good enough to rank sets, and fast.
    """
    never = len(probes)
    confident = np.stack([probe.confident for probe in probes])
    # By draft of a cycle and token, the exit that is taken, and whether it is right.
    exits = np.where(confident.any(0), confident.argmax(0), never)
    agreed = np.stack([probe.agreed for probe in probes])
    right = np.take_along_axis(agreed, np.minimum(exits, never - 1)[None], axis=0)[0]
    last = len(exits) - 1
    start = 0
    for length in lengths:
        position, end = start, start + length
        while position < end:
            drafts, lowest, wrong = 0, 0, False
            while drafts < max_early_predictions and position + drafts < end - 1:
                front = position + drafts
                draft = min(drafts, last)
                taken = exits[draft, front]
                for segment in range(min(taken + 1, never)):
                    counters.segments_run[segment] += 1
                    counters.gates[segment] += 1
                if taken == never:
                    lowest = never
                    break
                drafts += 1
                counters.early_predictions[taken] += 1
                if not right[draft, front]:
                    counters.rejected[taken] += 1
                    wrong = True
                    break
                counters.accepted[taken] += 1
            for segment in range(lowest, len(counters.segments_run)):
                counters.segments_run[segment] += 1
            counters.forwards += 1
            kept = drafts + (0 if wrong else 1)
            counters.generated_tokens += kept
            position += kept
        start = end
    return counters
