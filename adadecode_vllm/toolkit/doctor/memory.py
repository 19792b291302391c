# SPDX-License-Identifier: Apache-2.0
"""Memory that early predictions take beside the model; docs/design.md has the sums."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.machine import Device, gigabytes
from adadecode_vllm.toolkit.doctor.model import ModelFacts

VLLM_SHARE = 0.92
"""Share of the device's memory that vLLM reserves unless told otherwise."""

# vLLM's defaults of --max-num-seqs for a server, by device.
_CPU_REQUESTS = 128
_CUDA_REQUESTS = 256
_LARGE_CUDA_REQUESTS = 1024
_LARGE_CUDA_BYTES = 70 << 30


@dataclass(frozen=True)
class Memory:
    """What is taken, in bytes.

    Attributes:
        model: The model's weights; 0 if they are not known.
        heads: Every T that is not the identity, and every U.
        gates: The LM head's rows of the draft vocabulary.
        states: Hidden states and residuals of pending tokens; for heads with memory
            also what their tokens were taken from.
        requests: Requests that the states have room for.
        dtype: What the model and all of it is in: the checkpoint's.
    """

    model: int
    heads: int
    gates: int
    states: int
    requests: int
    dtype: str

    @property
    def beside_model(self) -> int:
        """What early predictions take."""
        return self.heads + self.gates + self.states

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.beside_model


def memory_needed(
    model: ModelFacts, heads: ExitHeadsConfig, identities: int, requests: int
) -> Memory:
    """Sum up what is taken with the plugin's defaults.

    Args:
        model: The model.
        heads: Its heads.
        identities: Exits whose T is the identity.
        requests: Most requests at a time, ``--max-num-seqs``.

    Returns:
        Bytes.
    """
    row = model.hidden_size * model.element_bytes
    exits = len(heads.exit_layers)
    matrices = exits - identities + (exits if heads.memory else 0)
    window = int(AdaDecodeConfig.model_fields["max_early_predictions"].default) + 1
    rows = (3 if heads.memory else 2) * window
    return Memory(
        model=model.weight_bytes,
        heads=matrices * model.hidden_size * row,
        gates=heads.default_draft_vocabulary * row,
        states=requests * rows * row,
        requests=requests,
        dtype=model.dtype,
    )


def default_requests(device: Device) -> int:
    """Requests at a time that a server of vLLM's takes by default."""
    if device.kind == "cpu":
        return _CPU_REQUESTS
    large = device.total >= _LARGE_CUDA_BYTES
    return _LARGE_CUDA_REQUESTS if large else _CUDA_REQUESTS


def check_memory(need: Memory, device: Device) -> Iterator[Finding]:
    """Compare with what there is.

    Args:
        need: What is taken.
        device: What serves.
    """
    figures = {
        "model_bytes": need.model,
        "heads_bytes": need.heads,
        "gates_bytes": need.gates,
        "states_bytes": need.states,
        "requests": need.requests,
        "dtype": need.dtype,
        "available_bytes": device.available,
        "total_bytes": device.total,
    }
    model = gigabytes(need.model) if need.model else "size unknown"
    parts = (
        f"In {need.dtype}, beside the model ({model}), heads take "
        f"{gigabytes(need.heads)}, gates {gigabytes(need.gates)} and the states of "
        f"{need.requests} requests {gigabytes(need.states)}"
    )
    if not device.total:
        yield Finding(
            "memory",
            "warning",
            f"{parts}; how much there is could not be found out.",
            "Compare with the device's memory yourself.",
            figures,
        )
        return
    there = f"{gigabytes(device.available)} of {gigabytes(device.total)} are free"
    if need.total > device.available:
        yield Finding(
            "memory",
            "problem",
            f"{parts}, and {there}.",
            "Free memory, quantize the model, or set a smaller --max-num-seqs.",
            figures,
        )
        return
    yield Finding(
        "memory",
        "ok",
        f"{parts}; {there}. Compiled segments and graphs come on top, which cannot be "
        "told beforehand: with a model of 0.57 B on CPUs they were 53 MB, and on CUDA "
        "vLLM measures them when it starts. The KV cache gets what is left.",
        figures=figures,
    )
    if (finding := _reservation(need, device)) is not None:
        yield finding


def _reservation(need: Memory, device: Device) -> Finding | None:
    """vLLM on CPUs starts only if the share that it reserves is free."""
    if device.kind != "cpu" or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    wanted = VLLM_SHARE * device.total
    if wanted <= device.available:
        return None
    share = math.floor(95 * device.available / device.total) / 100
    rest = max(device.available - need.total, 0)
    return Finding(
        "KV cache",
        "warning",
        f"Unless told otherwise vLLM reserves {VLLM_SHARE:.0%} of all memory "
        f"({gigabytes(wanted)}) and does not start where less is free.",
        f"Start the server with --gpu-memory-utilization {share:g}, or say how much "
        "the KV cache may have with --kv-cache-memory-bytes, at most "
        f"{gigabytes(rest)} here.",
        {"reserved_bytes": int(wanted)},
    )
