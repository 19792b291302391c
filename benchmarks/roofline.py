# SPDX-License-Identifier: Apache-2.0
"""What the speed formula of docs/design.md predicts for decoding that was counted.

At batch 1 a step costs what reading its weights costs. The counters say how often each
segment and each exit head was read, so the prediction needs no assumption about how
drafts are distributed; measured speed over predicted speed is the *efficiency*.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.counters import Counters


@cache
def cost_model(
    model: str, *, identity: bool, draft_vocabulary: int | None, memory: bool = False
) -> CostModel:
    """Shares of a model's step, counted without loading its weights.

    Args:
        model: Directory or name.
        identity: Whether T = I at every exit.
        draft_vocabulary: Tokens that the gates look at; None for all.
        memory: Whether the exits have U.

    Returns:
        The shares.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return CostModel.of_model(
        empty, identity=identity, memory=memory, draft_vocabulary=draft_vocabulary
    )


def predicted_speedup(stats: dict[str, Any], cost: CostModel) -> float:
    """Speedup at batch 1 without any overhead, at the measured acceptance.

    Args:
        stats: AdaDecode's counters of a run with one request at a time.
        cost: Shares of a plain step.
    """
    counters = Counters(tuple(stats["exit_layers"]), stats["num_layers"])
    # Forwards without a pending token ran every layer, in vLLM's own graph.
    baseline = stats["request_steps"] - stats["resumed_forwards"]
    counters.segments_run = [runs + baseline for runs in stats["segments_run"]]
    counters.gates = list(stats["gates"])
    counters.forwards = stats["request_steps"]
    counters.generated_tokens = stats["generated_tokens"]
    return cost.speedup(counters)
