# SPDX-License-Identifier: Apache-2.0
"""What trained heads say of themselves in ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adadecode_vllm.heads.config import ExitCalibration, ExitHeadsConfig, HeadsDtype
from adadecode_vllm.heads.fingerprint import lm_head_fingerprint
from adadecode_vllm.heads.io import HeadsTensors
from adadecode_vllm.toolkit.evaluation.calibration import fit_logistic
from adadecode_vllm.toolkit.evaluation.measure import measure
from adadecode_vllm.toolkit.states.cache import StateSource
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.training.recommend import Recommendation, recommend
from adadecode_vllm.toolkit.training.settings import TrainSettings


@dataclass(frozen=True)
class Findings:
    """What held-out text tells of heads.

    Attributes:
        calibration: Of `calibrate`; None where no text was held out.
        recommendation: What to serve them with; None for heads that are not served.
    """

    calibration: dict[str, dict[str, float]] | None = None
    recommendation: Recommendation | None = None

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The engine's options that suit the heads."""
        return None if self.recommendation is None else self.recommendation.options


def examine(
    teacher: Teacher,
    heads: HeadsTensors,
    source: StateSource,
    settings: TrainSettings,
    max_draft_tokens: int,
    advance: Callable[[int], None],
) -> Findings:
    """Calibrate heads, and find the options that suit them.

    Args:
        teacher: The model.
        heads: See `calibrate`.
        source: States of held-out text.
        settings: Of the training.
        max_draft_tokens: The cap to recommend.
        advance: Called with how many further texts have been read.

    Returns:
        Both.
    """
    calibration = calibrate(teacher, heads, source, settings, advance)
    if settings.head == "full":
        return Findings(calibration)
    recommendation = recommend(
        teacher,
        heads,
        source,
        calibration,
        drafts=settings.drafts,
        max_draft_tokens=max_draft_tokens,
    )
    return Findings(calibration, recommendation)


def calibrate(
    teacher: Teacher,
    heads: HeadsTensors,
    source: StateSource,
    settings: TrainSettings,
    advance: Callable[[int], None],
) -> dict[str, dict[str, float]]:
    """Fit every exit's map from confidence to the probability of acceptance.

    Args:
        teacher: The model.
        heads: The heads, of full size or not; their ranking holds the tokens that gates
            will look at. Heads with memory get one map for all drafts of a cycle.
        source: States of held-out text.
        settings: Of the training.
        advance: Called with how many further texts have been read.

    Returns:
        By exit, ``slope``, ``intercept`` and ``tokens``.
    """
    found = measure(
        heads.weights,
        source,
        teacher.lm_head,
        memory=heads.memory,
        drafts=settings.drafts,
        draft_token_ids=heads.draft_token_ids,
        chunk_tokens=settings.chunk_tokens,
        advance=advance,
    )
    table = {}
    for layer, exit_measure in found.items():
        slope, intercept = fit_logistic(exit_measure.log_odds, exit_measure.agreed)
        table[str(layer)] = {
            "slope": slope,
            "intercept": intercept,
            "tokens": len(exit_measure.agreed),
        }
    return table


def heads_config(
    teacher: Teacher, record: dict[str, Any], dtype: HeadsDtype
) -> ExitHeadsConfig:
    """The heads' ``config.json``.

    Args:
        teacher: The model.
        record: Of the run, with ``exit_layers``, ``calibration`` and ``recommended``.
        dtype: Of the stored weights.

    Returns:
        The configuration.
    """
    calibration = record["calibration"]
    return ExitHeadsConfig(
        exit_layers=record["exit_layers"],
        hidden_size=teacher.hidden_size,
        vocab_size=teacher.vocab_size,
        num_hidden_layers=teacher.num_layers,
        base_model=teacher.name,
        dtype=dtype,
        lm_head_fingerprint=lm_head_fingerprint(teacher.lm_head),
        calibration=calibration
        and {
            layer: ExitCalibration(
                slope=row["slope"], intercept=row["intercept"], tokens=row["tokens"]
            )
            for layer, row in calibration.items()
        },
        base_model_revision=getattr(teacher.model.config, "_commit_hash", None),
        recommended=record["recommended"],
    )
