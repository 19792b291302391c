# SPDX-License-Identifier: Apache-2.0
"""What a written model card tells, where nothing else does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adadecode_vllm.toolkit.publishing.signed import read_as_written
from adadecode_vllm.toolkit.report.schema import Best

_PREDICTION = re.compile(
    r"^Predicted, not measured: ([\d.]+)x over plain decoding\s+with threshold "
    r"([\d.]+) and at most (\d+) early predictions",
    re.MULTILINE,
)
_TRAINING = re.compile(r"^## Training\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Told(NamedTuple):
    """What a card says of a training whose record is not there.

    Attributes:
        section: The text below its heading.
        metadata: The licence and the datasets.
    """

    section: str
    metadata: Mapping[str, Any]


def told_training(path: Path) -> Told | None:
    """What a card says of the training.

    Args:
        path: The card.

    Returns:
        What stands there; None without a card as it was written here.
    """
    from huggingface_hub import ModelCard

    text = read_as_written(path)
    if text is None:
        return None
    card = ModelCard(text)
    if (match := _TRAINING.search(card.text)) is None:
        return None
    data = card.data.to_dict()
    return Told(
        match[1].strip(), {name: data.get(name) for name in ("license", "datasets")}
    )


def predicted_best(card: str) -> Best | None:
    """Read the predicted speedup off a card, all that published heads tell of it.

    Args:
        card: The card's text.

    Returns:
        The fastest setting and its speedup; None where the card predicts nothing.
    """
    if (match := _PREDICTION.search(card)) is None:
        return None
    return Best(speedup=float(match[1]), threshold=float(match[2]), cap=int(match[3]))
