# SPDX-License-Identifier: Apache-2.0
"""The changes to vLLM that Model Runner V2 needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu import model_runner, spec_decode

from adadecode_vllm.compat import facts
from adadecode_vllm.engine.arguments import SPECULATOR
from adadecode_vllm.patches import (
    finished_outcomes,
    init_speculator,
    v2_async_scheduling,
    v2_custom_class,
)

_UNSUPPORTED = "speculative method 'custom_class'"


def _unsupported(model: str) -> list[str]:
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="custom_class",
            model=model,
            parallel_drafting=True,
            use_heterogeneous_vocab=False,
        ),
        parallel_config=SimpleNamespace(
            distributed_executor_backend=None,
            pipeline_parallel_size=1,
            use_ubatching=False,
        ),
    )
    return VllmConfig._get_v2_model_runner_unsupported_features(config)


def test_only_our_speculator_is_accepted() -> None:
    v2_custom_class.install()
    v2_custom_class.install()
    assert _UNSUPPORTED in _unsupported("some.other.Proposer")
    ours = _unsupported(SPECULATOR)
    assert _UNSUPPORTED not in ours
    # Whatever else V2 cannot run is still reported.
    assert len(ours) == len(_unsupported("some.other.Proposer")) - 1 > 0


def test_engines_without_speculation_are_left_alone() -> None:
    v2_custom_class.install()
    config: Any = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(
            distributed_executor_backend=None,
            pipeline_parallel_size=1,
            use_ubatching=False,
        ),
    )
    assert VllmConfig._get_v2_model_runner_unsupported_features(config) == []


def test_another_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(VllmConfig, "_get_v2_model_runner_unsupported_features")
    v2_custom_class.install()
    assert not hasattr(VllmConfig, "_get_v2_model_runner_unsupported_features")


def test_the_list_of_unsupported_features_still_names_custom_class() -> None:
    """Fails once vLLM's V2 runs custom classes: then both patches can go."""
    listed = inspect.unwrap(VllmConfig._get_v2_model_runner_unsupported_features)
    assert '"custom_class"' in inspect.getsource(listed)
    assert "custom_class" not in inspect.getsource(spec_decode.init_speculator)


class _Speculator:
    """Remembers what it was built with."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _config(method: str) -> Any:
    speculative = SimpleNamespace(
        method=method,
        model=f"{__name__}._Speculator",
        use_gemma4_mtp=lambda: False,
        use_multi_module_mtp=lambda: False,
        use_eagle=lambda: False,
        uses_draft_model=lambda: False,
        use_ngram=lambda: False,
    )
    return SimpleNamespace(speculative_config=speculative)


def test_the_named_class_is_built_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        init_speculator, "resolve_obj_by_qualname", lambda name: _Speculator
    )
    with init_speculator.custom_class():
        config = _config("custom_class")
        built = model_runner.init_speculator(config, "device", "states")
        assert isinstance(built, _Speculator)
        assert built.arguments == (config, "device", "states")
        with pytest.raises(NotImplementedError, match="medusa"):
            model_runner.init_speculator(_config("medusa"), "device", "states")
    assert model_runner.init_speculator is spec_decode.init_speculator
    with pytest.raises(NotImplementedError, match="custom_class"):
        model_runner.init_speculator(_config("custom_class"), "device", "states")


def test_a_replaced_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "init_speculator", lambda *arguments: None)
    with (
        pytest.raises(RuntimeError, match="is not vLLM's own"),
        init_speculator.custom_class(),
    ):
        pass


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """What vLLM's validation saw of ``async_scheduling``, the patch installed."""
    seen: list[bool | None] = []

    def validate(self: Any) -> None:
        seen.append(self.scheduler_config.async_scheduling)
        self.scheduler_config.async_scheduling = False

    monkeypatch.setattr(VllmConfig, "__post_init__", validate)
    v2_async_scheduling.install()
    v2_async_scheduling.install()
    return seen


@pytest.mark.parametrize(
    ("model", "asked", "seen", "kept"),
    [
        (SPECULATOR, True, None, True),
        (SPECULATOR, False, False, False),
        (SPECULATOR, None, None, False),
        ("some.other.Proposer", True, True, False),
    ],
)
def test_only_our_speculator_keeps_asynchronous_scheduling(
    validations: list[bool | None],
    model: str,
    asked: bool | None,
    seen: bool | None,
    kept: bool,
) -> None:
    scheduler = SimpleNamespace(async_scheduling=asked)
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(model=model), scheduler_config=scheduler
    )
    VllmConfig.__post_init__(config)
    assert validations == [seen]
    assert scheduler.async_scheduling is kept


def test_engines_without_speculation_are_validated_as_they_are(
    validations: list[bool | None],
) -> None:
    config: Any = SimpleNamespace(
        speculative_config=None, scheduler_config=SimpleNamespace(async_scheduling=True)
    )
    VllmConfig.__post_init__(config)
    assert validations == [True]


def test_vllm_032_lists_the_methods_that_schedule_asynchronously() -> None:
    """Once 0.32 is no longer supported, the patch can go."""
    source = inspect.getsource(inspect.unwrap(VllmConfig.__post_init__))
    listed = "async scheduling is only supported" in source
    assert listed is facts().async_scheduling_by_method
    assert "custom_class" not in source


class _Queue:
    """What `step_with_batch_queue` reads of an engine: one entry and a scheduler."""

    def __init__(self, *, done: bool) -> None:
        self.batch_queue: list[Any] = []
        self.done = done
        self.idle = False
        self.scheduler = SimpleNamespace(nothing_more=self.nothing_more)

    @contextmanager
    def nothing_more(self) -> Iterator[None]:
        self.idle = True
        yield
        self.idle = False


def _step(engine: Any) -> tuple[Any, bool]:
    """Imitates vLLM's: schedules if it may, otherwise hands an outcome over."""
    if engine.idle:
        return engine.batch_queue.pop(), False
    engine.batch_queue.append((SimpleNamespace(done=lambda: engine.done), "outcome"))
    return None, True


def test_an_outcome_that_is_there_is_taken_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EngineCore, "step_with_batch_queue", _step)
    finished_outcomes.install()
    finished_outcomes.install()
    step: Any = EngineCore.step_with_batch_queue
    outcome, executed = step(_Queue(done=True))
    assert outcome[1] == "outcome"
    assert executed
    assert step(_Queue(done=False)) == (None, True)
    plain = _Queue(done=True)
    plain.scheduler = SimpleNamespace()
    assert step(plain) == (None, True)


def test_the_engine_still_schedules_before_it_takes_an_outcome() -> None:
    """Fails once vLLM looks at the queue first: then the patch can go."""
    source = inspect.getsource(inspect.unwrap(EngineCore.step_with_batch_queue))
    first = source.index("self.scheduler.schedule(")
    assert first < source.index("batch_queue.pop()")
    assert ".done()" not in source[:first]
