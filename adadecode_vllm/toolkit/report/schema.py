# SPDX-License-Identifier: Apache-2.0
"""What `evaluation.json` and `history.json` hold.

Unknown keys are ignored: a report of an older version still shows what it knows of a
newer file. Shares and probabilities are in [0, 1], divergences in nats, speedups are
ratios to plain decoding.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adadecode_vllm.errors import AdaDecodeError, problems

Grid = list[list[float | None]]


class _Record(BaseModel):
    """A part of one of the files."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ThresholdRow(_Record):
    """What a gate does at one threshold.

    Attributes:
        threshold: The gate opens above this probability.
        coverage: Share of the tokens at which it opens.
        precision: Share of those at which the exit's token is the final layer's; None
            where the gate never opens.
    """

    threshold: float
    coverage: float
    precision: float | None = None


class ReliabilityBin(_Record):
    """Tokens of similar confidence.

    Attributes:
        confidence: Mean of what the gate said; None in an empty bin.
        accuracy: Share at which the exit was right; None in an empty bin.
        count: Tokens.
    """

    confidence: float | None
    accuracy: float | None
    count: int


class Reliability(_Record):
    """How well a gate's number predicts that the exit is right.

    Attributes:
        ece: Expected calibration error: mean of |confidence - accuracy| over tokens.
        bins: By confidence.
    """

    ece: float
    bins: list[ReliabilityBin]


class GateReliability(_Record):
    """Reliability of both gates.

    Attributes:
        probability: Of the head's top probability.
        acceptance: Of the fitted probability of acceptance; None without a fit.
    """

    probability: Reliability
    acceptance: Reliability | None = None


class EqualAcceptance(_Record):
    """Coverage of both gates where they are right equally often, all exits together.

    Attributes:
        precision: Share of open gates with the right token, for both.
        coverage_probability: Coverage of the head's probability; None if that precision
            is out of its reach.
        coverage_acceptance: The same of the fitted probability of acceptance.
    """

    precision: float
    coverage_probability: float | None = None
    coverage_acceptance: float | None = None


class ExitFigures(_Record):
    """One exit on held-out text.

    Attributes:
        layer: Layer count of the exit.
        agreement: Share of tokens whose top token is the final layer's.
        agreement_by_draft: The same for each draft of a cycle, for heads with memory.
        kl: Mean KL(final || exit), nats per token.
        thresholds: The probability gate by threshold.
        reliability: Of the gates, if it was measured.
    """

    layer: int
    agreement: float
    agreement_by_draft: list[float] = []
    kl: float
    thresholds: list[ThresholdRow] = []
    reliability: GateReliability | None = None


RowCosts = Annotated[dict[str, float], Field(min_length=1)]


class Simulation(_Record):
    """The decoding policy simulated over a grid.

    Attributes:
        gate: `probability` or `acceptance`.
        requests: Requests at a time.
        row_costs: Cost of a pass over the weights by its rows, in those of one row;
            by default what earlier versions, which do not say so, took it for.
        thresholds: One per row of the grids.
        caps: Most early predictions, one per column.
        speedup: Ratio to plain decoding.
        tokens_per_forward: Tokens per full forward.
        acceptance: Share of the early predictions that are accepted.
        coverage: Share of the tokens that are predicted early.
    """

    gate: str = "probability"
    requests: int = 1
    row_costs: RowCosts = {"1": 1.0}
    thresholds: Annotated[list[float], Field(min_length=1)]
    caps: Annotated[list[int], Field(min_length=1)]
    speedup: Grid
    tokens_per_forward: Grid | None = None
    acceptance: Grid | None = None
    coverage: Grid | None = None

    @model_validator(mode="after")
    def _check_grids(self) -> "Simulation":
        """Every grid has a row per threshold and a column per cap."""
        for name in ("speedup", "tokens_per_forward", "acceptance", "coverage"):
            grid: Grid | None = getattr(self, name)
            if grid is not None and [len(row) for row in grid] != (
                [len(self.caps)] * len(self.thresholds)
            ):
                raise ValueError(
                    f"{name} is not a grid of {len(self.thresholds)} thresholds x "
                    f"{len(self.caps)} caps"
                )
        return self


class Cost(_Record):
    """What the speedups assume, as fractions of one plain step.

    Attributes:
        head_share: h, the LM head's.
        transform_share: tau, that of an exit's matrix T.
        overhead: o, the bookkeeping of a draft.
    """

    head_share: float
    transform_share: float
    overhead: float


class Best(_Record):
    """The fastest cell of the grid."""

    threshold: float
    cap: int
    speedup: float


class DraftSource(_Record):
    """What exits or n-gram lookup contribute.

    Attributes:
        drafts: Tokens that they drafted.
        acceptance: Share of those that were verified which are right; None without any.
        coverage: Share of all tokens that are such drafts.
    """

    drafts: int
    acceptance: float | None = None
    coverage: float


class Defaults(_Record):
    """An engine that is given no option but the heads, simulated.

    Attributes:
        exit_layers: Layer counts of the exits that it uses.
        max_early_predictions: The cap.
        policy: `cost` or `threshold`.
        ngram: How it drafts by n-gram lookup.
        requests: Requests at a time.
        answers: Answers that were decoded.
        row_costs: Cost of a pass over the weights by its rows, in those of one row.
        speedup: Ratio to plain decoding.
        tokens_per_forward: Tokens per full forward.
        exits: What the exits contribute.
        lookup: What n-gram lookup contributes.
    """

    exit_layers: list[int]
    max_early_predictions: int
    policy: str
    ngram: str
    requests: int
    answers: int
    row_costs: RowCosts
    speedup: float
    tokens_per_forward: float
    exits: DraftSource
    lookup: DraftSource


class Evaluation(_Record):
    """All of `evaluation.json`.

    Attributes:
        model: Name or path of the base model.
        heads: Name or path of the heads.
        weights: SHA-256 of their weights' file; None where it is not known.
        data: Name or path of the held-out text.
        tokens: Tokens of it.
        num_layers: Decoder layers of the model.
        exits: By layer.
        equal_acceptance: Both gates compared, if the heads are calibrated.
        simulation: The policy, simulated.
        cost: What its speedups assume.
        best: Its fastest cell.
        defaults: The engine's defaults, simulated.
    """

    model: str
    heads: str
    weights: str | None = None
    data: str
    tokens: int
    num_layers: int
    exits: Annotated[list[ExitFigures], Field(min_length=1)]
    equal_acceptance: list[EqualAcceptance] | None = None
    simulation: Simulation | None = None
    cost: Cost | None = None
    best: Best | None = None
    defaults: Defaults | None = None

    @property
    def defaults_are_best(self) -> bool:
        """Whether no setting of the grid is predicted to be faster.

        Both are rated by the same costs and requests, except in files of earlier
        versions, whose grid is one where rows cost nothing and is flattered by that.
        """
        best, defaults = self.best, self.defaults
        return defaults is not None and (
            best is None or defaults.speedup >= best.speedup
        )


class TrainingStep(_Record):
    """One optimizer step; `loss` is in nats per token, by exit layer."""

    step: int
    epoch: int
    learning_rate: float
    loss: dict[int, float]


class HeldOut(_Record):
    """Held-out text after an epoch.

    Attributes:
        epoch: The epoch, from 1.
        loss: In nats, by exit layer.
        agreement: Share of tokens whose top token is the final layer's, by exit layer.
        draft_vocabulary: Tokens that both were compared among; None for all.
    """

    epoch: int
    loss: dict[int, float]
    agreement: dict[int, float] = {}
    draft_vocabulary: int | None = None


class History(_Record):
    """All of `history.json`."""

    steps: list[TrainingStep]
    held_out: list[HeldOut] = []

    @property
    def best(self) -> HeldOut | None:
        """The epoch whose heads were kept: that of the lowest loss of all exits."""
        return min(
            self.held_out,
            key=lambda point: sum(point.loss.values()) / max(1, len(point.loss)),
            default=None,
        )


_Parsed = TypeVar("_Parsed", bound=_Record)


def parse_evaluation(values: Mapping[str, Any]) -> Evaluation:
    """Check what `adadecode eval` wrote.

    Args:
        values: `evaluation.json`, decoded.

    Returns:
        The figures, typed.

    Raises:
        AdaDecodeError: Something is missing or has the wrong form.
    """
    return _parse(Evaluation, values, "evaluation.json", "adadecode eval")


def parse_history(values: Mapping[str, Any]) -> History:
    """Check what `adadecode train` wrote.

    Args:
        values: `history.json`, decoded.

    Returns:
        The history, typed.

    Raises:
        AdaDecodeError: Something is missing or has the wrong form.
    """
    return _parse(History, values, "history.json", "adadecode train")


def _parse(
    schema: type[_Parsed], values: Mapping[str, Any], file: str, command: str
) -> _Parsed:
    """Validate, with one sentence instead of pydantic's report."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        first, *others = problems(error)
        more = f" (and {len(others)} more)" if others else ""
        raise AdaDecodeError(
            f"{file}: {first}{more}; run `{command}` again to write the file"
        ) from error
