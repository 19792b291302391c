# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a heads directory on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adadecode_vllm.config import parse_config
from adadecode_vllm.engine.settings import threshold_policy
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.config import ExitHeadsConfig, load_heads_config
from adadecode_vllm.heads.files import weights_digest
from adadecode_vllm.heads.fingerprint import check_fingerprint
from adadecode_vllm.heads.io import HeadsTensors, is_identity, load_tensors
from adadecode_vllm.toolkit.evaluation.answers import KEPT_ANSWERS, known_answers
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.counters import Counters
from adadecode_vllm.toolkit.evaluation.defaults import (
    can_play_defaults,
    default_options,
    play_defaults,
)
from adadecode_vllm.toolkit.evaluation.known_exits import Answer
from adadecode_vllm.toolkit.evaluation.measure import (
    equal_acceptance,
    measure,
    summarize,
)
from adadecode_vllm.toolkit.evaluation.row_costs import RowCosts, measure_row_costs
from adadecode_vllm.toolkit.evaluation.simulate import Setting, total, without_drafts
from adadecode_vllm.toolkit.progress import Meter
from adadecode_vllm.toolkit.states.cache import LiveStates
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import load_texts, used_tokens

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)
CAPS = (1, 2, 3, 4, 5, 6, 8)

MEASURED_DRAFTS = 3
"""Drafts of a cycle that heads with memory are measured on, as they are trained."""


@dataclass(frozen=True)
class SimulationGrid:
    """What to simulate.

    Attributes:
        thresholds: Values of `threshold`.
        caps: Values of `max_early_predictions`.
        gate: `probability` or `acceptance`.
        most_answers: Answers to use at most.
        overhead: o of the cost formula.
        last_guess: Whether unsure guesses of the last exit are submitted where they
            pay, as the engine does by default.
        row_costs: What rows cost; None to measure that on this device.
        requests: Requests at a time.
    """

    thresholds: Sequence[float] = THRESHOLDS
    caps: Sequence[int] = CAPS
    gate: str = "probability"
    most_answers: int = 200
    overhead: float = 0.0
    last_guess: bool = True
    row_costs: RowCosts | None = None
    requests: int = 1


def load_heads_for(
    teacher: Teacher, directory: Path
) -> tuple[ExitHeadsConfig, HeadsTensors]:
    """Load heads and check that they are the model's.

    Args:
        teacher: The model.
        directory: The heads directory.

    Returns:
        The configuration, and the tensors, of which the matrices are on the model's
        device in its dtype.

    Raises:
        AdaDecodeError: If they cannot be read or belong to another model.
    """
    config = load_heads_config(directory)
    same_shape = (
        config.hidden_size == teacher.hidden_size
        and config.vocab_size == teacher.vocab_size
        and config.num_hidden_layers == teacher.num_layers
    )
    if not same_shape or not check_fingerprint(
        config.lm_head_fingerprint, teacher.lm_head, 0, config.vocab_size
    ):
        raise AdaDecodeError(
            f"HEADS {directory}: they were made for {config.base_model} and not for "
            f"{teacher.name}; give the heads of this model"
        )

    def placed(matrices: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        return {k: m.to(teacher.device, teacher.dtype) for k, m in matrices.items()}

    tensors = load_tensors(directory, config)
    return config, replace(
        tensors,
        weights=placed(tensors.weights),
        memory=tensors.memory and placed(tensors.memory),
    )


def evaluate_heads(
    teacher: Teacher,
    directory: Path,
    data: Sequence[Path],
    *,
    grid: SimulationGrid | None,
    max_length: int | None = None,
    pass_tokens: int = 1024,
    chunk_tokens: int = 512,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Measure every exit on text, and simulate decoding on a model's own answers.

    Args:
        teacher: The model.
        directory: The heads directory.
        data: Data directories. Texts with a prompt are answers of the model itself at
            temperature 0; decoding is simulated on those.
        grid: What to simulate; None for nothing.
        max_length: Tokens after which a text is cut.
        pass_tokens: Most tokens of one pass of the model.
        chunk_tokens: Tokens whose distributions are in memory at a time.
        meter: Shows how far it is; None for nobody.

    Returns:
        Contents of ``evaluation.json``.

    Raises:
        AdaDecodeError: If something of the user's cannot be used.
    """
    # Of what is loaded next; the caller can tell later whether it was replaced.
    digest = weights_digest(directory)
    config, tensors = load_heads_for(teacher, directory)
    weights, memory = tensors.weights, tensors.memory
    texts = load_texts(data, teacher, max_length)
    prompted = [text for text in texts if text.prompted]
    defaults = None
    if grid is not None and prompted and can_play_defaults():
        # Refused before the minutes that everything else takes.
        defaults = default_options(config, str(directory))
    live = LiveStates(
        teacher, texts, [*config.exit_layers, teacher.num_layers], pass_tokens
    )
    meter = meter or Meter(visible=False)
    meter.start("measuring", "texts", len(texts))
    few = config.default_draft_vocabulary > 0
    draft_token_ids = tensors.draft_token_ids if few else None
    measures = measure(
        weights,
        live,
        teacher.lm_head,
        memory=memory,
        drafts=MEASURED_DRAFTS,
        draft_token_ids=draft_token_ids,
        chunk_tokens=chunk_tokens,
        advance=meter.advance,
    )
    maps = {
        int(layer): (row.slope, row.intercept)
        for layer, row in (config.calibration or {}).items()
    }
    identity = all(is_identity(weight) for weight in weights.values())
    report: dict[str, Any] = {
        "model": teacher.name,
        "heads": str(directory),
        "weights": digest,
        "data": ", ".join(map(str, data)),
        "tokens": used_tokens(texts),
        "num_layers": teacher.num_layers,
        "exits": [
            {"layer": layer, **summarize(found, maps.get(layer))}
            for layer, found in measures.items()
        ],
        "equal_acceptance": equal_acceptance(measures, maps) if maps else None,
        "simulation": None,
        "best": None,
        "defaults": None,
    }
    overhead = grid.overhead if grid else 0.0
    cost = CostModel.of_model(
        teacher.model,
        identity=identity,
        memory=config.memory,
        overhead=overhead,
        draft_vocabulary=config.default_draft_vocabulary,
    )
    report["cost"] = {
        "head_share": cost.head_share,
        "transform_share": cost.transform_share,
        "overhead": cost.overhead,
    }
    if grid is not None and prompted:
        chosen = prompted[: grid.most_answers]
        meter.start("reading exits", "answers", len(chosen))
        answers = known_answers(
            teacher, config.exit_layers, weights, chosen, pass_tokens=pass_tokens,
            draft_token_ids=draft_token_ids, memory=memory,
            kept_answers=max(KEPT_ANSWERS, grid.requests), advance=meter.advance,
        )  # fmt: skip
        if answers:
            rows = grid.row_costs
            if rows is None:
                caps = [*grid.caps, defaults.max_early_predictions if defaults else 0]
                rows = measure_row_costs(teacher, grid.requests * (max(caps) + 1))
            cost = replace(cost, row_costs=rows)
            report["simulation"] = _simulate_grid(answers, config, cost, grid, meter)
            report["best"] = _best(report["simulation"])
            if defaults is not None:
                meter.start("playing the defaults", "answers", len(answers))
                report["defaults"] = play_defaults(
                    answers, config, defaults, cost, requests=grid.requests,
                    max_length=teacher.max_length, advance=meter.advance,
                )  # fmt: skip
    return report


def _simulate_grid(
    answers: Sequence[Answer],
    config: ExitHeadsConfig,
    cost: CostModel,
    grid: SimulationGrid,
    meter: Meter,
) -> dict[str, Any]:
    """Play every setting, with the costs and requests that the defaults have too."""
    # One request at a time: they do not depend on each other, and some at once are
    # faster to play. Those then meet every setting before the next ones come, so that
    # few have to keep what was computed off their answers.
    alone = grid.requests == 1
    size = KEPT_ANSWERS if alone else len(answers)

    def setting(threshold: float, cap: int) -> Setting:
        options = {
            "heads": "simulated",
            "exit_layers": config.exit_layers,
            "threshold": threshold,
            "max_early_predictions": cap,
            "gate": grid.gate,
            "last_guess": grid.last_guess,
        }
        return Setting(
            tuple(config.exit_layers),
            config.num_hidden_layers,
            threshold_policy(parse_config(options), config),
            requests=None if alone else grid.requests,
            timed_alone=alone,
        )

    settings = [
        [setting(threshold, cap) for cap in grid.caps] for threshold in grid.thresholds
    ]

    def none() -> Counters:
        return Counters(tuple(config.exit_layers), config.num_hidden_layers)

    rows = [[none() for _ in row] for row in settings]
    plain = none()
    meter.start("simulating", "answers", len(answers))
    for first in range(0, len(answers), size):
        some = answers[first : first + size]
        plain.add(total(some, without_drafts(settings[0][0]), cost))
        for found, row in zip(rows, settings, strict=True):
            for counters, playing in zip(found, row, strict=True):
                counters.add(total(some, playing, cost))
        meter.advance(len(some))

    def table(value: Any) -> list[list[float]]:
        return [[value(counters) for counters in row] for row in rows]

    return {
        "gate": grid.gate,
        "answers": len(answers),
        "requests": grid.requests,
        "row_costs": cost.row_costs.to_dict(),
        "thresholds": list(grid.thresholds),
        "caps": list(grid.caps),
        "speedup": table(
            lambda counters: plain.time / counters.time if counters.time else 1.0
        ),
        "tokens_per_forward": table(lambda counters: counters.tokens_per_forward),
        "acceptance": table(lambda counters: counters.acceptance),
        "coverage": table(lambda counters: counters.coverage),
    }


def _best(simulation: dict[str, Any]) -> dict[str, Any]:
    speedup, row, column = max(
        (value, row, column)
        for row, values in enumerate(simulation["speedup"])
        for column, value in enumerate(values)
    )
    return {
        "threshold": simulation["thresholds"][row],
        "cap": simulation["caps"][column],
        "speedup": speedup,
    }
