# SPDX-License-Identifier: Apache-2.0
"""`adadecode data` without an engine: answers that follow from the prompt alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.toolkit.data import generate as generate_module
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Shards
from adadecode_vllm.toolkit.data.options import DataOptions
from tests.harness import MODEL


def fake_answers(
    spec: EngineSpec, shards: Shards, on_tokens: Callable[[int], None]
) -> Iterator[Answer]:
    """Answer as an engine would, short prompts first."""
    for index, prompts in shards.items():
        began = time.time()
        for row, ids in sorted(prompts.items(), key=lambda item: len(item[1])):
            yield Answer(index, row, [sum(ids) % 1000, len(ids), 1], began)


def fail_after(shards_done: int, rows_done: int = 0) -> Callable[..., Iterator[Answer]]:
    """Return a generator whose engine breaks; shards have three rows."""

    def answers(*args: Any) -> Iterator[Answer]:
        for number, answer in enumerate(fake_answers(*args)):
            if number == 3 * shards_done + rows_done:
                raise RuntimeError("out of power")
            yield answer

    return answers


def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `adadecode data` start no engine in a test."""
    monkeypatch.setattr(generate_module, "check_options", lambda options: None)
    monkeypatch.setattr(generate_module, "model_length", lambda spec: 256)
    monkeypatch.setattr(generate_module, "generate", fake_answers)


def record_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the rows that an engine will have been asked for."""
    rows: list[int] = []

    def recording(spec: EngineSpec, wanted: Shards, on_tokens: Any) -> Any:
        for prompts in wanted.values():
            rows.extend(prompts)
        return fake_answers(spec, wanted, on_tokens)

    monkeypatch.setattr(generate_module, "generate", recording)
    return rows


def make_options(directory: Path) -> DataOptions:
    """Write twenty questions to a directory and ask for their answers in `out`."""
    path = directory / "input" / "questions.jsonl"
    path.parent.mkdir()
    path.write_text(
        "".join(
            json.dumps({"text": f"Ann has {i} apples. {'How many? ' * (i % 5)}"}) + "\n"
            for i in range(20)
        )
    )
    return DataOptions(
        out=directory / "out",
        model=MODEL,
        inputs=(path,),
        chat=False,
        max_new_tokens=100,
        rows_per_shard=3,
        argv=("data", "out"),
    )
