# SPDX-License-Identifier: Apache-2.0
"""Compiled code of an earlier start is loaded again on CPUs."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.compilation import decorators

from adadecode_vllm.patches import aot_artifacts


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch, for one test."""
    found = decorators._try_load_aot_compiled_fn
    monkeypatch.setattr(decorators, "_try_load_aot_compiled_fn", inspect.unwrap(found))
    aot_artifacts.install()
    aot_artifacts.install()


def load(
    compiled: Any, path: Path, monkeypatch: pytest.MonkeyPatch, **model_config: Any
) -> Any:
    """What vLLM makes of a file from which torch reads a compiled function."""
    read = SimpleNamespace(
        _artifacts=SimpleNamespace(compiled_fn=compiled),
        source_info=lambda: SimpleNamespace(inlined_sources=[]),
        disable_guard_check=lambda: None,
    )
    path.write_bytes(b"code")
    monkeypatch.setattr(torch.compiler, "load_compiled_function", lambda *_, **__: read)
    before = torch.compiler.load_compiled_function
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            **{"quantization": None, "is_moe": False, **model_config}
        ),
        compilation_config=SimpleNamespace(
            dynamic_shapes_config=SimpleNamespace(evaluate_guards=False),
            traced_files=set(),
        ),
    )
    model = SimpleNamespace(
        vllm_config=config,
        compilation_config=config.compilation_config,
        forward=load,
        _is_encoder=False,
    )
    for name in (
        "monitor_torch_compile",
        "set_current_vllm_config",
        "maybe_use_cudagraph_partition_wrapper",
    ):
        monkeypatch.setattr(decorators, name, lambda *_, **__: nullcontext())
    loaded = decorators._try_load_aot_compiled_fn(model, str(path))
    assert torch.compiler.load_compiled_function is before
    return loaded


def test_what_is_complete_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(lambda: None, tmp_path / "model", monkeypatch)
    assert loaded is not None


def test_what_has_something_left_to_do_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[Any] = []
    compiled = SimpleNamespace(finalize_loading=finished.append)
    assert load(compiled, tmp_path / "model", monkeypatch) is not None
    assert len(finished) == 1


@pytest.mark.parametrize("kind", [{"quantization": "awq"}, {"is_moe": True}])
def test_other_kernels_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    loaded = load(lambda: None, tmp_path / "model", monkeypatch, **kind)
    assert loaded is None


def test_vllm_still_finishes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it does not, `patches/aot_artifacts.py` can go."""
    found = inspect.unwrap(decorators._try_load_aot_compiled_fn)
    monkeypatch.setattr(decorators, "_try_load_aot_compiled_fn", found)
    assert load(lambda: None, tmp_path / "model", monkeypatch) is None
