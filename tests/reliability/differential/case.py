# SPDX-License-Identifier: Apache-2.0
"""What is drawn: an engine and requests, as plain values that can be written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

MEMORY_HEADS = "heads with memory"
"""As the option `heads`: those of :func:`tests.harness.make_memory_heads`."""


@dataclass(frozen=True)
class Engine:
    """Two engines that differ in AdaDecode alone.

    Attributes:
        runner: "v1", or "v2" for Model Runner V2 in Triton's interpreter.
        arguments: Arguments of `vllm.LLM` for both.
        adadecode: Options of AdaDecode.
        own: Arguments of `vllm.LLM` for the engine with AdaDecode only.
    """

    runner: str = "v1"
    arguments: dict[str, Any] = field(default_factory=dict)
    adadecode: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request of a stream.

    Attributes:
        prompt: Token ids.
        params: Of `SamplingParams`; structured outputs as a dictionary.
        arrives: Engine step before which it arrives.
        priority: Smaller is more urgent.
        abort_after: Steps between its arrival and its end by an abort.
        chunks: Later inputs of a streaming session: steps after the arrival, token ids.
    """

    prompt: list[int]
    params: dict[str, Any]
    arrives: int = 0
    priority: int = 0
    abort_after: int | None = None
    chunks: list[tuple[int, list[int]]] = field(default_factory=list)


def literal(value: Engine | Request) -> str:
    """The value as Python, without what is the default."""
    parts = []
    for entry in fields(value):
        found = getattr(value, entry.name)
        if found or entry.name in ("prompt", "params"):
            parts.append(f"{entry.name}={found!r}")
    return f"{type(value).__name__}({', '.join(parts)})"


def plain(engine: Engine) -> dict[str, Any]:
    """For a result file."""
    return asdict(engine)
