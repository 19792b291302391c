# SPDX-License-Identifier: Apache-2.0
"""The heads directory: round trips, and what saving leaves."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads
from adadecode_vllm.heads.output import check_output, holds_heads
from tests.published_heads import D, make_config, make_weights
from tests.tiny import save_tiny_llama

DTYPES = ["float32", "bfloat16", "float16"]


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), hidden_size=st.integers(1, 9))
def test_round_trip(data: st.DataObject, dtype: Any, hidden_size: int) -> None:
    num_layers = data.draw(st.integers(2, 12))
    layers = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
    config = make_config(
        exit_layers=layers,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        dtype=dtype,
    )
    weights = {layer: torch.randn(hidden_size, hidden_size) for layer in layers}
    with tempfile.TemporaryDirectory() as directory:
        save_heads(directory, weights, config)
        loaded_config = load_heads_config(directory)
        loaded = load_tensors(directory, loaded_config).weights
    assert loaded_config == config
    assert list(loaded) == layers
    for layer in layers:
        expected = weights[layer].to(getattr(torch, dtype))
        assert loaded[layer].dtype == expected.dtype
        assert torch.equal(loaded[layer], expected)


def test_round_trip_with_memory(tmp_path: Path) -> None:
    weights = make_weights()
    memory = {layer: -weight for layer, weight in weights.items()}
    save_heads(tmp_path, weights, make_config(), memory=memory)
    config = load_heads_config(tmp_path)
    assert config == make_config(memory=True)
    loaded = load_tensors(tmp_path, config).memory
    assert loaded is not None
    assert list(loaded) == [1, 3]
    for layer in (1, 3):
        assert torch.equal(loaded[layer], memory[layer])
        assert torch.equal(
            load_tensors(tmp_path, config).weights[layer], weights[layer]
        )
    names = sorted(load_file(tmp_path / "model.safetensors"))
    assert names == [
        f"exit_heads.{k}.{n}" for k in (1, 3) for n in ("memory", "weight")
    ]
    assert holds_heads(tmp_path)
    (tmp_path / "config.json").unlink()
    assert holds_heads(tmp_path)


def test_heads_without_memory_say_nothing_of_it(heads: Path) -> None:
    """So that earlier versions, which refuse unknown keys, read them."""
    assert "memory" not in json.loads((heads / "config.json").read_text())
    assert load_tensors(heads, load_heads_config(heads)).memory is None


def test_save_refuses_unfit_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory for layers \[1\].*are \[1, 3\]"):
        save_heads(tmp_path, make_weights(), make_config(), memory={1: torch.eye(D)})
    with pytest.raises(ValueError, match="memory is true, but there is none"):
        save_heads(tmp_path, make_weights(), make_config(memory=True))
    assert not os.listdir(tmp_path)


def test_config_carries_the_version(heads: Path) -> None:
    assert load_heads_config(heads).library_version == __version__


def test_saving_replaces_heads_and_leaves_no_other_file(heads: Path) -> None:
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert load_heads_config(heads).exit_layers == [2]
    assert sorted(os.listdir(heads)) == ["config.json", "model.safetensors"]


def test_failed_save_keeps_the_old_heads(
    heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tensors(heads, load_heads_config(heads)).weights

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    after = load_tensors(heads, load_heads_config(heads)).weights
    assert before.keys() == after.keys()
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    assert sorted(os.listdir(heads)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("at", range(4))
def test_interrupted_save_keeps_the_old_heads(
    heads: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = {name: (heads / name).read_bytes() for name in os.listdir(heads)}
    rename, calls = os.rename, iter(range(100))

    def interrupted(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert {name: (heads / name).read_bytes() for name in os.listdir(heads)} == before


def test_a_killed_save_is_refused_not_mixed(heads: Path) -> None:
    """What SIGKILL between the renames leaves, and how it is mended."""
    for name in ("config.json", "model.safetensors"):
        (heads / name).rename(heads / f"{name}.old-1-0123456789abcdef")
    with pytest.raises(AdaDecodeError, match=r"writing heads was interrupted; .*old-1"):
        load_heads_config(heads)
    check_output(heads, "OUT", overwrite=False)
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert load_heads_config(heads).exit_layers == [2]


def test_temporary_files_of_heads_follow_no_link(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where somebody guesses the process id."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("config.json", "model.safetensors"):
        (heads / f"{name}.tmp-{os.getpid()}").symlink_to(precious)
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert precious.read_text() == "mine"
    assert load_heads_config(heads).exit_layers == [2]


def model_directory(directory: Path) -> None:
    save_tiny_llama(directory)


def only_weights(directory: Path) -> None:
    save_tiny_llama(directory)
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize("make", [model_directory, only_weights, broken_config])
def test_what_is_not_heads_is_never_replaced(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "d"
    make(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(
        AdaDecodeError, match=r"directory .*: it holds .*; give another"
    ):
        save_heads(directory, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    with pytest.raises(AdaDecodeError, match=r"OUT .*: it holds .*; give another"):
        check_output(directory, "OUT", overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({1: torch.eye(D)}, r"weight for layers \[1\].*exit_layers are \[1, 3\]"),
        ({1: torch.eye(D), 3: torch.eye(D + 1)}, r"exit 3 has shape \(9, 9\)"),
        ({1: torch.eye(D), 3: torch.full((D, D), torch.nan)}, "exit 3 holds NaN"),
    ],
)
def test_save_refuses_unfit_weights(
    tmp_path: Path, weights: dict[int, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_heads(tmp_path / "heads", weights, make_config())
    assert not (tmp_path / "heads").exists()


def test_save_refuses_overflow_of_the_stored_dtype(tmp_path: Path) -> None:
    weights = {1: torch.eye(D), 3: torch.eye(D) * 1e6}
    with pytest.raises(ValueError, match="exit 3 holds NaN or infinity"):
        save_heads(tmp_path, weights, make_config(dtype="float16"))


def test_schema_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config().hidden_size = 3  # type: ignore[misc]
