# SPDX-License-Identifier: Apache-2.0
"""Heads named by their Hub name: what start-up hands to workers elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import Hub, publish, serve_hub, use_cache
from tests.start_up import create, load_in_worker

NAME = "ann/heads"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, heads: Path) -> Iterator[Hub]:
    with serve_hub(monkeypatch) as hub:
        publish(hub, heads)
        yield hub


def test_a_worker_with_a_cache_of_its_own(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes the front end's commit, though the branch has moved on meanwhile."""
    use_cache(monkeypatch, tmp_path / "front end")
    config = create(model, Path(NAME))
    hub.revisions |= {"before": "1" * 40, "main": "3" * 40}
    hub.requests.clear()
    use_cache(monkeypatch, tmp_path / "worker")
    (tmp_path / "front end").rename(tmp_path / "not on this machine")
    heads = load_in_worker(config, model)
    assert heads.exits.exit_layers == (1, 3)
    weights = [path for path in hub.requests if path.endswith("model.safetensors")]
    assert weights
    assert all("1" * 40 in path for path in weights)
    # On the front end's own machine nothing is fetched again.
    hub.requests.clear()
    use_cache(monkeypatch, tmp_path / "not on this machine")
    load_in_worker(config, model)
    assert hub.requests == []


def test_the_compile_cache_knows_the_same_heads_again(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another name of the same commit, and where another machine keeps them."""
    use_cache(monkeypatch, tmp_path / "one")
    first = create(model, Path(NAME))
    use_cache(monkeypatch, tmp_path / "two")
    second = create(model, Path(f"{NAME}@main"))
    assert first.additional_config == second.additional_config
    assert first.compute_hash() == second.compute_hash()
    # Other heads at the same exits leave the compiled graphs as they are.
    other = create(model, Path(f"{NAME}@v1"))
    assert other.additional_config != first.additional_config
    assert other.compute_hash() == first.compute_hash()
