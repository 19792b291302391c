# SPDX-License-Identifier: Apache-2.0
"""The registry of heads that is shipped, and what it ships."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from adadecode_vllm.config import parse_config
from adadecode_vllm.heads import load_heads_config, load_tensors
from adadecode_vllm.heads.registry import (
    REGISTRY_VARIABLE,
    SHIPPED,
    find_registered_heads,
)
from tests.harness import MODEL, ROOT

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE = ROOT / "examples" / "smollm2" / "memory-heads"
ENTRIES = json.loads(SHIPPED.read_text(encoding="utf-8"))["heads"]
MOST_BYTES = 2_000_000
"""Of one entry: the package must stay a small download."""


@pytest.mark.parametrize("name", [SMOLLM2, SMOLLM2.lower()])
def test_a_model_of_the_hub_is_found_by_its_name(name: str) -> None:
    found = find_registered_heads(name)
    assert found is not None
    assert found.registry == SHIPPED
    assert found.directory is not None
    assert load_heads_config(found.directory).base_model == SMOLLM2


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-360M-Instruct", MODEL])
def test_others_have_none(model: str) -> None:
    assert find_registered_heads(model) is None


def test_a_users_registry_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    entry = {"models": [SMOLLM2], "repository": "me/better-heads"}
    path.write_text(json.dumps({"heads": [entry]}))
    monkeypatch.setenv(REGISTRY_VARIABLE, str(path))
    found = find_registered_heads(SMOLLM2)
    assert found is not None
    assert (found.directory, found.repository) == (None, "me/better-heads")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["models"][0])
def test_what_is_shipped(entry: dict[str, str]) -> None:
    """It can be served as it is, is small, and names no place of one machine."""
    directory = SHIPPED.parent / entry["directory"]
    config = load_heads_config(directory)
    load_tensors(directory, config)
    parse_config({**(config.recommended or {}), "heads": str(directory)})
    assert {path.name for path in directory.iterdir()} == {
        *("README.md", "config.json", "model.safetensors")
    }
    assert sum(path.stat().st_size for path in directory.iterdir()) < MOST_BYTES
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert f"vllm serve {config.base_model} --plugin adadecode\n```" in card


def test_shipped_heads_are_those_of_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After new ones were trained: python scripts/ship_heads.py (see CONTRIBUTING)."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    registry = tmp_path / "registry.json"
    name = "smollm2-135m-instruct"
    importlib.import_module("ship_heads").ship(SOURCE, SMOLLM2, registry, name)
    assert registry.read_bytes() == SHIPPED.read_bytes()
    for path in (SHIPPED.parent / name).iterdir():
        assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path


@pytest.mark.parametrize("model", ["me/", ".."])
def test_heads_are_shipped_beside_the_registry_only(
    monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    ship_heads = importlib.import_module("ship_heads")
    monkeypatch.setattr(sys, "argv", ["ship_heads", str(SOURCE), model])
    before = sorted(SHIPPED.parent.rglob("*"))
    with pytest.raises(SystemExit):
        ship_heads.main()
    assert sorted(SHIPPED.parent.rglob("*")) == before
