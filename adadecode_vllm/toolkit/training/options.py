# SPDX-License-Identifier: Apache-2.0
"""What a training run is given beside its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adadecode_vllm.config import DEFAULT_CAP
from adadecode_vllm.heads.config import HeadsDtype
from adadecode_vllm.toolkit.training.exit_sets import Choice


@dataclass(frozen=True)
class RunOptions:
    """Where a run reads and writes, and how it works; no influence on the weights.

    Attributes:
        output: The heads directory; run files go to its ``run/``.
        cache: Whether to keep states on disk.
        cache_directory: Where; None for ``run/cache``, which is deleted at the end.
        overwrite: Replace heads, or an unfinished run of another kind, once the new
            heads are trained.
        threshold: The gate that ``auto`` exits are chosen for.
        max_early_predictions: The cap that they are chosen for.
        heads_dtype: Of the weights that are written; they are trained in float32.
    """

    output: Path
    cache: bool = True
    cache_directory: Path | None = None
    overwrite: bool = False
    threshold: float = 0.75
    max_early_predictions: int = DEFAULT_CAP
    heads_dtype: HeadsDtype = "float32"


@dataclass
class Reporter:
    """What a run tells while it works; the defaults say nothing.

    Attributes:
        say: Called with sentences.
        choices: Called with the table behind automatic exit layers.
        begin: Called with the directory that the run works in.
        start: Called when something begins that takes long, with what it is, what is
            counted, and how many there are.
        advance: Called with how many further ones are done.
        step: Called with each step's record.
        epoch: Called with each epoch's held-out record.
    """

    say: Callable[[str], None] = lambda sentence: None
    choices: Callable[[list[Choice]], None] = lambda choices: None
    begin: Callable[[Path], None] = lambda directory: None
    start: Callable[[str, str, int], None] = lambda what, unit, total: None
    advance: Callable[[int], None] = lambda count: None
    step: Callable[[dict[str, Any]], None] = lambda record: None
    epoch: Callable[[dict[str, Any]], None] = lambda record: None
