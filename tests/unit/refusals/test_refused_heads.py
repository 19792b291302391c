# SPDX-License-Identifier: Apache-2.0
"""Heads that start-up refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.start_up import refusal
from tests.tiny import save_tiny_llama


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"vocab_size": 97}, "their vocabulary size is 97 and that of"),
        ({"num_hidden_layers": 5}, "their number of layers is 5 and that of"),
        (
            {"lm_head_fingerprint": "sim64x16:" + "-".join(["0123456789abcdef"] * 16)},
            "they were made for an LM head with other weights than that of",
        ),
    ],
)
def test_heads_of_another_model(
    model: Path, edited_heads: Callable[..., Path], values: dict[str, Any], reason: str
) -> None:
    directory = edited_heads(base_model="other/model", **values)
    message = refusal(model, directory)
    assert message.startswith(
        f"--adadecode-heads {directory}: these heads do not fit: {reason}"
    )
    assert str(model) in message
    assert "(they name other/model as their model). Give the heads of" in message


def test_heads_of_another_width(tmp_path: Path, heads: Path) -> None:
    save_tiny_llama(tmp_path, hidden_size=32)
    message = refusal(tmp_path, heads)
    assert f"their hidden size is 16 and that of {tmp_path} is 32" in message


def test_heads_of_the_same_model_trained_otherwise(tmp_path: Path, heads: Path) -> None:
    """All shapes agree; only the LM head's rows tell."""
    save_tiny_llama(tmp_path, seed=1)
    assert "an LM head with other weights" in refusal(tmp_path, heads)


def test_acceptance_gate_without_calibration(model: Path, heads: Path) -> None:
    message = refusal(model, heads, {"gate": "acceptance"})
    assert message.startswith("--adadecode-config: gate = 'acceptance' is refused")
    assert "Train them with `adadecode train`" in message


def test_exits_without_a_head(model: Path, heads: Path) -> None:
    assert refusal(model, heads, {"exit_layers": [1, 2]}) == (
        f"--adadecode-config: exit_layers = [1, 2] is refused: {heads} has no head "
        "after layer 2. Choose among [1, 3], or train heads for that exit."
    )


def test_missing_heads(model: Path, tmp_path: Path) -> None:
    message = refusal(model, tmp_path / "nowhere")
    assert message.startswith(
        f"--adadecode-heads {tmp_path / 'nowhere'}: the path does not exist; "
    )


def test_truncated_heads(model: Path, edited_heads: Callable[..., Path]) -> None:
    directory = edited_heads()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refusal(model, directory)
    assert "model.safetensors is truncated or damaged" in message


def test_pickled_heads(model: Path, edited_heads: Callable[..., Path]) -> None:
    directory = edited_heads()
    (directory / "model.safetensors").rename(directory / "model.bin")
    message = refusal(model, directory)
    assert "it holds model.bin but no model.safetensors; only safetensors" in message
