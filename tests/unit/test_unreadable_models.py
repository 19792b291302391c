# SPDX-License-Identifier: Apache-2.0
"""A model that cannot be read is one sentence, whatever its readers raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.init import init_heads
from adadecode_vllm.toolkit.data.prompts import load_model
from adadecode_vllm.toolkit.states.teacher import Teacher
from tests.fake_hub import use_cache
from tests.tiny import save_tiny_llama

READERS: dict[str, Callable[[str, Path], Any]] = {
    "data": lambda model, _: load_model(model),
    "train": lambda model, _: Teacher.load(model),
    "init": lambda model, directory: init_heads(model, directory / "heads", [1]),
}


@pytest.fixture(params=READERS)
def refusal(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[str | Path], str]:
    """Read a model that cannot be read; what a user is told."""

    def refused(model: str | Path) -> str:
        with pytest.raises(AdaDecodeError) as caught:
            READERS[request.param](str(model), tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert f" {model}: " in message
        assert "; " in message  # the remedy
        return message

    return refused


def test_a_configuration_that_its_own_checks_refuse(
    refusal: Callable[[str | Path], str], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_tiny_llama(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "hidden_size" in refusal(model)


def test_no_connection(
    refusal: Callable[[str | Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cache(monkeypatch, tmp_path / "cache")
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
    refusal("ann/no-such-model")
