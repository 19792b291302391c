# SPDX-License-Identifier: Apache-2.0
"""What a pass over the weights costs by the rows that share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.states.teacher import Teacher

_SECONDS = 1.0
_ROUNDS = 3
"""Each number of rows is timed for so long, and at least so often."""

_BYTES = 1 << 30
"""Weights that are timed, or all if there are fewer: more than any cache holds."""


@dataclass(frozen=True)
class RowCosts:
    """Costs by rows, in those of one row; straight lines between and behind.

    Attributes:
        rows: (n,) increasing, from 1 on.
        costs: (n,) not decreasing, from 1 on.
    """

    rows: tuple[int, ...] = (1,)
    costs: tuple[float, ...] = (1.0,)

    def __call__(self, rows: int) -> float:
        """What so many rows cost."""
        if rows <= self.rows[-1] or len(self.rows) == 1:
            return float(np.interp(rows, self.rows, self.costs))
        slope = (self.costs[-1] - self.costs[-2]) / (self.rows[-1] - self.rows[-2])
        return self.costs[-1] + slope * (rows - self.rows[-1])

    @classmethod
    def parse(cls, text: str) -> RowCosts:
        """Read what `--row-costs` gives.

        Args:
            text: ``free``, or rows and costs such as ``1:1,6:1.6``.

        Returns:
            The costs.

        Raises:
            AdaDecodeError: If it is something else.
        """
        if text == "free":
            return cls()
        try:
            pairs = [pair.split(":") for pair in text.split(",")]
            rows = tuple(int(count) for count, _ in pairs)
            costs = tuple(float(cost) for _, cost in pairs)
        except ValueError:
            rows, costs = (), ()
        grows = all(a < b for a, b in pairwise(rows)) and all(
            a <= b < float("inf") for a, b in pairwise(costs)
        )
        if not rows or rows[0] != 1 or costs[0] != 1 or not grows:
            raise AdaDecodeError(
                f"--row-costs {text}: expected measured, free, or rows with their "
                "costs, from 1:1 on and not decreasing; write for example 1:1,6:1.6"
            )
        return cls(rows, costs)

    def to_dict(self) -> dict[str, float]:
        """Costs by rows, for JSON."""
        return {str(rows): c for rows, c in zip(self.rows, self.costs, strict=True)}


FREE = RowCosts()
"""Where reading weights is all that a pass costs."""


@torch.inference_mode()
def measure_row_costs(teacher: Teacher, most: int) -> RowCosts:
    """Time a model's linear layers, the LM head among them, on this device.

    They run one after the other, as in a forward, so that their weights come from
    memory as they do there; a gigabyte of them is enough. Attention is left out. On
    CPUs vLLM's kernels run where it is installed, since torch's differ in what rows
    cost.

    Args:
        teacher: The model.
        most: Most rows.

    Returns:
        The costs for 1, 2, 4, ... rows up to `most`, the fastest of several rounds.
    """
    layers = [
        (layer.in_features, _served(layer, teacher.device))
        for layer in _first_layers(teacher)
    ]
    counts = sorted({most, *(1 << power for power in range(most.bit_length()))})
    inputs = {
        (rows, size): torch.randn(
            rows, size, dtype=teacher.dtype, device=teacher.device
        )
        for rows in counts
        for size in {size for size, _ in layers}
    }

    def seconds(rows: int) -> float:
        _wait(teacher.device)
        began = time.perf_counter()
        for size, layer in layers:
            layer(inputs[rows, size])
        _wait(teacher.device)
        return time.perf_counter() - began

    for rows in counts:
        seconds(rows)  # kernels are chosen
    fastest = dict.fromkeys(counts, float("inf"))
    ended = time.perf_counter() + _SECONDS * len(counts)
    rounds = 0
    # In turn, so that what else the machine does meets all of them.
    while rounds < _ROUNDS or time.perf_counter() < ended:
        for rows in counts:
            fastest[rows] = min(fastest[rows], seconds(rows))
        rounds += 1
    times = np.array([fastest[rows] for rows in counts])
    costs = np.maximum.accumulate(times / times[0])
    return RowCosts(tuple(counts), _rounded(costs.tolist()))


def _first_layers(teacher: Teacher) -> Iterator[nn.Linear]:
    """A model's linear layers, as many as shall be timed."""
    left = _BYTES
    for module in (*teacher.model.model.layers.modules(), teacher.model.lm_head):
        if isinstance(module, nn.Linear) and left > 0:
            left -= module.weight.nbytes
            yield module


def _served(
    layer: nn.Linear, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer without bias, by the kernel that serves it."""
    if device.type == "cpu" and find_spec("vllm") is not None:
        from adadecode_vllm.engine.packed_linear import PackedLinear

        return PackedLinear(layer.weight.detach())
    return partial(nn.functional.linear, weight=layer.weight)


def _rounded(costs: Sequence[float]) -> tuple[float, ...]:
    """As they are shown, so that what is shown gives the same prediction."""
    return tuple(round(cost, 3) for cost in costs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
