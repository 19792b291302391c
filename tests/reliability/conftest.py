# SPDX-License-Identifier: Apache-2.0
"""Ordinary texts, and a server that must give them whatever else happens to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import baseline_texts, demo_corpus
from tests.server_process import PLUGIN, Server, serve


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return demo_corpus().heldout_problems(8)


@pytest.fixture(scope="session")
def expected(prompts: list[str]) -> list[str]:
    """Plain vLLM's greedy texts."""
    return baseline_texts(prompts, max_tokens=64)


@pytest.fixture(scope="session")
def arguments() -> list[str]:
    """Of a server: early predictions are both accepted and rejected."""
    return [*PLUGIN, '--adadecode-config={"threshold": 0.5}']


# Of a module: one that no test needs any longer would only take memory.
@pytest.fixture(scope="module")
def server(
    expected: list[str],
    arguments: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server") / "log", *arguments) as server:
        yield server
