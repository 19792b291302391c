# SPDX-License-Identifier: Apache-2.0
"""What `adadecode eval` and training write down, made up."""

import math
from collections.abc import Callable
from typing import Any


def make_evaluation(**values: Any) -> dict[str, Any]:
    """Figures of three exits of 16 layers, as `adadecode eval` writes them."""
    thresholds = [0.2, 0.4, 0.6, 0.75, 0.9]

    def exit_figures(layer: int, agreement: float, kl: float) -> dict[str, Any]:
        def reliability(ece: float, shift: float) -> dict[str, Any]:
            bins = [
                {
                    "confidence": confidence,
                    "accuracy": min(1.0, max(0.0, confidence + shift)),
                    "count": count,
                }
                for confidence, count in (
                    (0.15, 40),
                    (0.5, 90),
                    (0.8, 300),
                    (0.97, 900),
                )
            ]
            empty = {"confidence": None, "accuracy": None, "count": 0}
            return {"ece": ece, "bins": [empty, *bins]}

        return {
            "layer": layer,
            "agreement": agreement,
            "kl": kl,
            "thresholds": [
                {
                    "threshold": t,
                    "coverage": agreement * (1 - 0.5 * t),
                    "precision": 1 - (1 - t) * 0.2,
                }
                for t in thresholds
            ]
            + [{"threshold": 0.999, "coverage": 0.0, "precision": None}],
            "reliability": {
                "probability": reliability(0.0713, 0.12),
                "acceptance": reliability(0.0127, 0.01),
            },
        }

    def grid(function: Callable[[float, int], float]) -> list[list[float]]:
        return [[function(t, cap) for cap in (1, 2, 3, 5, 8)] for t in thresholds]

    evaluation: dict[str, Any] = {
        "model": "examples/demo/model",
        "heads": "examples/demo/heads",
        "data": "held-out",
        "tokens": 13047,
        "num_layers": 16,
        "exits": [
            exit_figures(2, 0.8123, 0.308),
            exit_figures(4, 0.9034, 0.1227),
            exit_figures(8, 0.9645, 0.0599),
        ],
        "equal_acceptance": [
            {
                "precision": 0.95,
                "coverage_probability": 0.4321,
                "coverage_acceptance": 0.5678,
            },
            {
                "precision": 0.99,
                "coverage_probability": None,
                "coverage_acceptance": 0.1,
            },
        ],
        "simulation": {
            "gate": "probability",
            "thresholds": thresholds,
            "caps": [1, 2, 3, 5, 8],
            "speedup": grid(lambda t, cap: 0.9 + 0.3 * math.log(cap) - abs(t - 0.6)),
            "tokens_per_forward": grid(lambda t, cap: 1 + cap * (1 - t / 2)),
            "acceptance": grid(lambda t, cap: 1 - (1 - t) * 0.2),
            "coverage": grid(lambda t, cap: 1 - t / 2),
        },
        "cost": {"head_share": 0.071, "transform_share": 0.0021, "overhead": 0.034},
        "best": {"threshold": 0.6, "cap": 8, "speedup": 1.5238},
        "defaults": {
            "exit_layers": [2],
            "max_early_predictions": 5,
            "policy": "cost",
            "ngram": "first",
            "requests": 1,
            "answers": 40,
            "row_costs": {"1": 1.0, "2": 1.02, "10": 1.4213},
            "speedup": 1.4123,
            "tokens_per_forward": 2.3456,
            "exits": {"drafts": 700, "acceptance": 0.5432, "coverage": 0.2111},
            "lookup": {"drafts": 600, "acceptance": None, "coverage": 0.0},
        },
    }
    return evaluation | values


def make_history() -> dict[str, Any]:
    steps = [
        {
            "step": step,
            "epoch": step // 20,
            "learning_rate": 0.005,
            "loss": {
                str(layer): 0.1 + 1.5 * math.exp(-step / 15) / rank
                for rank, layer in enumerate((2, 4, 8), 1)
            },
        }
        for step in range(60)
    ]
    held_out = [
        {
            "epoch": epoch,
            "loss": {"2": 0.9 / (epoch + 1), "4": 0.5 / (epoch + 1), "8": 0.0456},
            "agreement": {"2": 0.6 + 0.07 * epoch, "4": 0.8, "8": 0.9271},
        }
        for epoch in range(3)
    ]
    return {"steps": steps, "held_out": held_out}
