# SPDX-License-Identifier: Apache-2.0
"""AdaDecode's counters, put together from Prometheus's samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from adadecode_vllm.engine.metric_names import (
    COMPARED,
    CONFIG_INFO,
    DROPPED,
    PER_EXIT,
    PREFIX,
    TOTALS,
)

Sample = tuple[str, Mapping[str, str], float]
"""A sample's full name, its labels and its value."""

_PER_EXIT_KEYS = {name: key for key, (name, _) in PER_EXIT.items()}
_TOTAL_KEYS = {name: key for key, (name, _) in {**TOTALS, **COMPARED}.items()}


@dataclass(frozen=True)
class Counted:
    """Counters of a server, summed over its engines.

    Attributes:
        per_exit: By exit layer, each counter of
            :data:`adadecode_vllm.engine.metric_names.PER_EXIT` by its key.
        totals: Each counter of :data:`adadecode_vllm.engine.metric_names.TOTALS` and
            of :data:`adadecode_vllm.engine.metric_names.COMPARED`.
        dropped: Dropped tokens, by reason.
        options: The engine's options.
    """

    per_exit: dict[int, dict[str, float]]
    totals: dict[str, float]
    dropped: dict[str, float]
    options: dict[str, str] = field(default_factory=dict)

    def since(self, earlier: Counted) -> Counted:
        """What was counted between two moments."""
        return Counted(
            per_exit={
                layer: _less(counted, earlier.per_exit.get(layer, {}))
                for layer, counted in self.per_exit.items()
            },
            totals=_less(self.totals, earlier.totals),
            dropped=_less(self.dropped, earlier.dropped),
            options=self.options,
        )

    @property
    def restarted(self) -> bool:
        """Whether a difference shows that the server counted from zero again."""
        return any(value < 0 for value in self.totals.values())


def sum_samples(samples: Iterable[Sample]) -> Counted | None:
    """Sum up AdaDecode's samples; others are left out.

    Args:
        samples: A server's.

    Returns:
        The counters; None where there are none of AdaDecode.
    """
    ours = [
        (name.removeprefix(PREFIX), labels, value)
        for name, labels, value in samples
        if name.startswith(PREFIX)
    ]
    layers = {
        int(labels["exit_layer"]) for _, labels, _ in ours if "exit_layer" in labels
    }
    if not layers:
        return None
    per_exit = {layer: dict.fromkeys(PER_EXIT, 0.0) for layer in sorted(layers)}
    totals = dict.fromkeys([*TOTALS, *COMPARED], 0.0)
    dropped: defaultdict[str, float] = defaultdict(float)
    options: dict[str, str] = {}
    for full_name, labels, value in ours:
        name = full_name.removesuffix("_total")
        if name in _PER_EXIT_KEYS:
            per_exit[int(labels["exit_layer"])][_PER_EXIT_KEYS[name]] += value
        elif name in _TOTAL_KEYS:
            totals[_TOTAL_KEYS[name]] += value
        elif name == DROPPED[0]:
            dropped[labels["reason"]] += value
        elif name == CONFIG_INFO[0]:
            options = dict(labels)
    return Counted(per_exit, totals, dict(dropped), options)


def counted_here() -> Counted | None:
    """The counters as this server's `/metrics` shows them; see `sum_samples`."""
    # Imported here: `adadecode stats` reads another machine's samples without vLLM.
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return sum_samples(
        (sample.name, sample.labels, sample.value)
        for family in get_prometheus_registry().collect()
        for sample in family.samples
    )


def _less(counted: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: value - earlier.get(name, 0.0) for name, value in counted.items()}
