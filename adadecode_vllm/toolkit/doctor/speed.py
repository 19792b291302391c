# SPDX-License-Identifier: Apache-2.0
"""What speedup to expect: what the heads' own evaluation says, and what it does not."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import Heads
from adadecode_vllm.heads.files import CARD_FILE, weights_digest
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.evaluation.output import EVALUATION_FILE
from adadecode_vllm.toolkit.publishing.card_reading import predicted_best
from adadecode_vllm.toolkit.report import parse_evaluation, parse_history
from adadecode_vllm.toolkit.report.defaults import expected_by_default
from adadecode_vllm.toolkit.report.schema import (
    Best,
    Defaults,
    Evaluation,
    HeldOut,
    Simulation,
)
from adadecode_vllm.toolkit.report.text import among, conditions, percent, ratio, short
from adadecode_vllm.toolkit.training.output import HISTORY_FILE, RUN_DIRECTORY

_EVALUATION = Path("evaluation", EVALUATION_FILE)
_HOST = "The host's work is left out of it, so small models gain less."
_LARGER_BATCHES = (
    " That is for one request at a time. For more it is unknown, and less: on other "
    "models the gain was gone at 16 requests (H200, and 2 CPU cores)."
)
_COST = 'For larger batches set "policy": "cost", which drafts only where it pays.'


class _Predicted(NamedTuple):
    """The best setting that was simulated.

    Attributes:
        best: The setting.
        gate: Its gate; None where that is not known.
        simulation: What it was found in; None where that is not known.
        source: Where all of it is written.
    """

    best: Best
    gate: str | None
    simulation: Simulation | None
    source: str


def expected_speed(heads: Heads, identities: list[int]) -> Finding:
    """Say what speedup the heads' evaluation predicts.

    Args:
        heads: The heads.
        identities: Layer counts of the exits whose T is the identity.

    Returns:
        A warning where nothing is known, or where nothing is to be gained.
    """
    evaluation = _evaluation(heads)
    if evaluation and evaluation.defaults and evaluation.defaults_are_best:
        return _by_default(heads, evaluation.defaults)
    found = _evaluated(heads, evaluation)
    if found is None:
        return _unknown(heads, identities)
    best, gate, simulation, source = found
    requests = 1 if simulation is None else simulation.requests
    figures = {
        "speedup": best.speedup,
        "threshold": best.threshold,
        "max_early_predictions": best.cap,
        "batch_sizes": [requests],
        "source": source,
    }
    setting = f"threshold {short(best.threshold)} and cap {best.cap}"
    if best.speedup <= 1:
        return Finding(
            "speed",
            "warning",
            f"No setting is predicted to be faster than plain decoding: the best, "
            f"{setting}, reaches {ratio(best.speedup)} ({source}).",
            "Train better heads, or leave the plugin off for this text.",
            figures,
        )
    options: dict[str, Any] = {
        "threshold": best.threshold,
        "max_early_predictions": best.cap,
    }
    if gate is not None and gate != "probability":
        options["gate"] = gate
    # By their own name, what the heads recommend would choose other exits.
    how = ""
    if heads.config.recommended:
        how = f"--adadecode-heads {shlex.quote(heads.name)} and "
    serve = (
        f"Serve the model with {how}--adadecode-config '{json.dumps(options)}'."
        if gate is not None
        else "Serve with the command on the model card."
    )
    where = ""
    if simulation is not None:
        where = f" {conditions(requests, simulation.row_costs)},"
    return Finding(
        "speed",
        "ok",
        f"{ratio(best.speedup)} with {setting}, predicted, not measured ({source}),"
        f"{where} on text like the held-out one. {_HOST}"
        f"{_LARGER_BATCHES if requests == 1 else ''}",
        f"{serve} {_COST}",
        figures,
    )


def _by_default(heads: Heads, defaults: Defaults) -> Finding:
    """The engine's defaults are predicted to be fastest."""
    figures = {
        "speedup": defaults.speedup,
        "max_early_predictions": defaults.max_early_predictions,
        "batch_sizes": [defaults.requests],
        "source": str(_EVALUATION),
    }
    if defaults.speedup <= 1:
        return Finding(
            "speed",
            "warning",
            "Nothing is predicted to be faster than plain decoding: the engine's "
            f"defaults reach {ratio(defaults.speedup)} ({_EVALUATION}).",
            "Train better heads, or leave the plugin off for this text.",
            figures,
        )
    how = ""
    if heads.config.recommended:
        name = shlex.quote(heads.name)
        how = f": vllm serve {name} --plugin adadecode, which uses what they recommend"
    return Finding(
        "speed",
        "ok",
        f"{expected_by_default(defaults)} That is predicted, not measured "
        f"({_EVALUATION}), for text like the held-out one. {_HOST}",
        f"Serve the heads without further options{how}.",
        figures,
    )


def _evaluation(heads: Heads) -> Evaluation | None:
    """What was written of these heads, not of those that they replaced."""
    path = heads.directory / _EVALUATION
    with suppress(OSError, ValueError, RecursionError, AdaDecodeError):
        evaluation = parse_evaluation(json.loads(path.read_text(encoding="utf-8")))
        same = evaluation.weights == weights_digest(heads.directory)
        return evaluation if same else None
    return None


def _evaluated(heads: Heads, evaluation: Evaluation | None) -> _Predicted | None:
    """The best setting, by an evaluation or the model card."""
    if evaluation is not None and evaluation.best is not None:
        simulation = evaluation.simulation
        gate = "probability" if simulation is None else simulation.gate
        return _Predicted(evaluation.best, gate, simulation, str(_EVALUATION))
    with suppress(OSError, UnicodeDecodeError):
        card = (heads.directory / CARD_FILE).read_text(encoding="utf-8")
        if (best := predicted_best(card)) is not None:
            return _Predicted(best, None, None, f"the model card, {CARD_FILE}")
    return None


def _unknown(heads: Heads, identities: list[int]) -> Finding:
    """Nothing was evaluated; perhaps the training measured agreement."""
    text = "Unknown: these heads were not evaluated."
    remedy = "Run `adadecode eval MODEL HEADS --data HELDOUT` on text like yours."
    if identities == heads.config.exit_layers and not heads.config.memory:
        text = "Unknown, and probably little: no exit is trained (T = I)."
        remedy = "Train them with `adadecode train`, then run `adadecode eval`."
    elif (held_out := _held_out(heads)) and held_out.agreement:
        exits = ", ".join(
            f"{percent(share)} after layer {layer}"
            for layer, share in held_out.agreement.items()
        )
        text += (
            " Of the tokens held out of the training they agreed with "
            f"{exits}{among(held_out.draft_vocabulary)}."
        )
    return Finding(
        "speed", "warning", text, remedy, {"speedup": None, "batch_sizes": []}
    )


def _held_out(heads: Heads) -> HeldOut | None:
    """Held-out text after the epoch that the heads are of; None if it is not known."""
    path = heads.directory / RUN_DIRECTORY / HISTORY_FILE
    with suppress(OSError, ValueError, RecursionError, AdaDecodeError):
        return parse_history(json.loads(path.read_text(encoding="utf-8"))).best
    return None
