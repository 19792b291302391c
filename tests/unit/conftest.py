# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several files here; a file may have another one of the same name.

What they need is imported when one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from adadecode_vllm.engine.metric_loggers import AdaDecodeProm
    from adadecode_vllm.toolkit.data.options import DataOptions
    from adadecode_vllm.toolkit.states.teacher import Teacher
    from tests.fake_hub import FakeApi

# Training


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, which nobody changes."""
    from tests.tiny import save_tiny_llama

    directory = tmp_path_factory.mktemp("model")
    save_tiny_llama(directory, max_position_embeddings=64)
    return directory


@pytest.fixture(scope="session")
def teacher(model: Path) -> Teacher:
    """The same model as heads learn from it."""
    from adadecode_vllm.toolkit.states.teacher import Teacher

    return Teacher.load(str(model))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of random tokens to train on."""
    from tests.data_directory import write_random_texts

    return write_random_texts(tmp_path_factory.mktemp("data") / "d")


# Publishing


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """Trained heads with their card."""
    from tests.published_heads import save_trained

    return save_trained(tmp_path / "heads")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    """What uploads end at."""
    from tests.fake_hub import use_fake_api

    return use_fake_api(monkeypatch)


# `adadecode data`


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from no engine."""
    from tests.fake_answers import without_engine

    without_engine(monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> DataOptions:
    """Ask for the answers to twenty questions."""
    from tests.fake_answers import make_options

    return make_options(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that an engine was asked for."""
    from tests.fake_answers import record_asked

    return record_asked(monkeypatch)


# Metrics


@pytest.fixture
def prom() -> Iterator[Callable[..., AdaDecodeProm]]:
    """Makes readers of an engine's counters; vLLM unregisters what they registered."""
    from tests.exported_counters import make_readers

    with make_readers() as make:
        yield make
