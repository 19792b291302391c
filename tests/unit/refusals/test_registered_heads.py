# SPDX-License-Identifier: Apache-2.0
"""A model without heads: those that are registered for it are used, or named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from adadecode_vllm.engine import registered_heads
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import hub
from adadecode_vllm.heads.registry import REGISTRY_VARIABLE

RECOMMENDED = {"exit_layers": [3], "policy": "cost", "ngram": "first"}


def arguments(model: Path | str, **options: Any) -> EngineArgs:
    return EngineArgs(model=str(model), additional_config={"adadecode": options})


def options_of(args: EngineArgs) -> Any:
    return args.create_engine_config().additional_config["adadecode"]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes a registry of the user's with these entries."""
    path = tmp_path / "registry.json"
    monkeypatch.setenv(REGISTRY_VARIABLE, str(path))

    def write(*entries: dict[str, Any]) -> None:
        path.write_text(json.dumps({"heads": list(entries)}))

    return write


def test_registered_heads_are_used(
    model: Path,
    edited_heads: Callable[..., Path],
    register: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = edited_heads(recommended=RECOMMENDED)
    register({"models": [str(model)], "directory": "edited"})  # beside the registry
    monkeypatch.setattr(registered_heads.logger, "propagate", True)
    args = arguments(model, ngram="tail")
    with caplog.at_level(logging.INFO, logger=registered_heads.logger.name):
        config = args.create_engine_config()
    # The model keeps its name: it is what the user asked for.
    assert config.model_config.served_model_name == str(model)
    options = config.additional_config["adadecode"]
    assert options["heads"] == str(heads)
    assert options["exit_layers"] == [3]
    assert (options["policy"], options["ngram"]) == ("cost", "tail")
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if record.name == registered_heads.logger.name
    ]
    assert "no heads given; using those that" in line
    assert str(heads) in line
    assert options_of(args) == options


def test_a_copy_of_the_model_has_its_heads(
    model: Path, heads: Path, register: Callable[..., None], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    register({"models": ["someone/the-model"], "directory": str(heads)})
    assert options_of(arguments(copy))["heads"] == str(heads)


def test_another_model_does_not(
    model: Path, heads: Path, register: Callable[..., None], tmp_path: Path
) -> None:
    """The same weights with fewer layers: the fingerprint alone would not tell."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    register({"models": ["someone/the-model"], "directory": str(heads)})
    with pytest.raises(AdaDecodeError, match="None are registered for"):
        arguments(copy).create_engine_config()


def test_damaged_heads_of_others_are_left_out(
    model: Path, heads: Path, register: Callable[..., None], tmp_path: Path
) -> None:
    register(
        {"models": ["someone/another-model"], "directory": "nowhere"},
        {"models": ["someone/the-model"], "directory": str(heads)},
    )
    assert options_of(arguments(model))["heads"] == str(heads)


def test_a_directory_without_heads_is_named_with_its_registry(
    model: Path, register: Callable[..., None], tmp_path: Path
) -> None:
    register({"models": [str(model)], "directory": "nowhere"})
    with pytest.raises(AdaDecodeError) as refused:
        arguments(model).create_engine_config()
    message = str(refused.value)
    registry, directory = tmp_path / "registry.json", tmp_path / "nowhere"
    assert message.startswith(f"{registry}: directory {directory}: the path does not ")
    assert "--adadecode-heads" not in message


def test_heads_of_the_hub_are_named_and_not_fetched(
    model: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: object, **options: object) -> Path:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(hub, "_download", fetch)
    register({"models": [str(model)], "repository": "someone/heads@v1"})
    with pytest.raises(AdaDecodeError) as caught:
        arguments(model).create_engine_config()
    assert str(caught.value) == (
        f"--adadecode-heads: no exit heads given. Those of {model} are on the Hub; add "
        "--adadecode-heads someone/heads@v1 to fetch and use them."
    )


def test_no_heads_at_all(model: Path) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        arguments(model).create_engine_config()
    assert str(caught.value) == (
        f"--adadecode-heads: no exit heads given. None are registered for {model}: "
        "name its heads, or make some with `adadecode data` and `adadecode train`."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"heads": [{"models": [], "directory": "a"}]}', "heads.0.models: List"),
        ('{"heads": [{"models": ["a/b"]}]}', "heads.0: give directory or repository"),
        (
            '{"heads": [{"models": ["a/b"], "directory": "a", "repository": "b/c"}]}',
            "heads.0: give directory or repository, one of them",
        ),
        ('{"heads": [{"model": "a/b", "directory": "a"}]}', "heads.0.models: Field"),
    ],
)
def test_registries_that_cannot_be_read(
    model: Path,
    register: Callable[..., None],
    tmp_path: Path,
    text: str | None,
    reason: str,
) -> None:
    path = tmp_path / "registry.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AdaDecodeError) as caught:
        arguments(model).create_engine_config()
    message = str(caught.value)
    assert message.startswith(f"{REGISTRY_VARIABLE} {path}: it is not a registry of")
    assert reason in message
    assert message.endswith("Correct the file or the path, or unset the variable.")
