# SPDX-License-Identifier: Apache-2.0
"""Training within the tests' process, with steps that are counted and may be the last.

The model and the texts are fixtures of tests/unit/conftest.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.training.options import Reporter, RunOptions
from adadecode_vllm.toolkit.training.run import train_heads
from adadecode_vllm.toolkit.training.settings import TrainSettings

SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "held_out": 0.2,
    "chunk_tokens": 50,
    "pass_tokens": 120,
}


class Killed(BaseException):
    """Stands for a kill: what handles errors does not see it."""


class Trained(NamedTuple):
    """What a run returned.

    Attributes:
        record: Contents of `run.yaml`.
        steps: The steps that it made.
    """

    record: dict[str, Any]
    steps: list[int]


def train(
    teacher: Teacher,
    data: Path,
    output: Path,
    *,
    exit_layers: Sequence[int] = (1, 2),
    kill_at: int | None = None,
    **values: Any,
) -> Trained:
    """Train heads.

    Args:
        teacher: The model.
        data: A data directory.
        output: The heads directory.
        exit_layers: Layer counts of the exits.
        kill_at: The step that the run is killed at.
        **values: Of `TrainSettings`, in place of those of `SETTINGS`, and of
            `RunOptions`.
    """
    settings = {
        name: values.pop(name) for name in values.keys() & TrainSettings.model_fields
    }
    steps: list[int] = []

    def step(record: dict[str, Any]) -> None:
        if record["step"] == kill_at:
            raise Killed
        steps.append(record["step"])

    record = train_heads(
        teacher,
        [data],
        exit_layers,
        TrainSettings(**SETTINGS | settings),
        RunOptions(output, **values),
        Accelerator(cpu=True),
        Reporter(step=step),
    )
    return Trained(record, steps)


def weights_of(heads: Path) -> dict[int, torch.Tensor]:
    """The matrices of heads by exit."""
    return load_tensors(heads, load_heads_config(heads)).weights
