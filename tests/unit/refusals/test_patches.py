# SPDX-License-Identifier: Apache-2.0
"""The patches that every engine needs, and whether they still are needed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adadecode_vllm import plugin
from adadecode_vllm.patches import cpu_model_runner
from adadecode_vllm.patches import engine_args as engine_args_patch


def test_installing_twice_wraps_once() -> None:
    names = ("add_cli_args", "from_cli_args", "create_engine_config")
    before = [inspect.getattr_static(EngineArgs, name) for name in names]
    plugin.register()
    engine_args_patch.install()
    after = [inspect.getattr_static(EngineArgs, name) for name in names]
    for old, new in zip(before, after, strict=True):
        assert old is new
    original = getattr(EngineArgs.create_engine_config, engine_args_patch._MARK)
    assert not hasattr(original, engine_args_patch._MARK)


def test_an_unfamiliar_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine import arg_utils

    class Unfamiliar:
        @staticmethod
        def add_cli_args(parser: Any) -> Any:
            return parser

        def create_engine_config(self) -> None:
            pass

    methods = dict(vars(Unfamiliar))
    monkeypatch.setattr(arg_utils, "EngineArgs", Unfamiliar)
    engine_args_patch.install()
    assert dict(vars(Unfamiliar)) == methods


def test_the_engine_arguments_patch_is_still_needed() -> None:
    """Fails once vLLM has flags or a hook for plugins: then the patch can go."""
    from vllm.engine import arg_utils

    for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
        method = inspect.getattr_static(EngineArgs, name)
        function = getattr(method, "__func__", method)
        original = inspect.unwrap(function)
        assert inspect.getsourcefile(original) == arg_utils.__file__
        source = inspect.getsource(original)
        for hook in ('"--plugin', "entry_point", "plugin_hook", "general_plugins"):
            assert hook not in source, name


class _Runner(CPUModelRunner):
    """Any subclass."""


def test_the_runner_is_replaced_for_a_while() -> None:
    with cpu_model_runner.use(_Runner):
        assert cpu_worker.CPUModelRunner is _Runner
    assert cpu_worker.CPUModelRunner is CPUModelRunner


def _fail_during_set_up() -> None:
    with cpu_model_runner.use(_Runner):
        raise KeyError("set-up failed")


def test_the_runner_is_restored_after_a_failure() -> None:
    with pytest.raises(KeyError, match="set-up failed"):
        _fail_during_set_up()
    assert cpu_worker.CPUModelRunner is CPUModelRunner


def _replace_the_replaced() -> None:
    with cpu_model_runner.use(_Runner), cpu_model_runner.use(_Runner):
        pass


def test_a_replaced_runner_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="is not vLLM's own"):
        _replace_the_replaced()
    assert cpu_worker.CPUModelRunner is CPUModelRunner
    monkeypatch.delattr(cpu_worker, "CPUModelRunner")
    with (
        pytest.raises(RuntimeError, match="is not vLLM's own"),
        cpu_model_runner.use(_Runner),
    ):
        pass


def test_the_second_runner_is_replaced_in_its_own_module() -> None:
    from vllm.v1.worker.cpu import model_runner

    class RunnerV2(model_runner.CPUModelRunner):
        """Any subclass of V2's."""

    with cpu_model_runner.use(RunnerV2):
        assert model_runner.CPUModelRunner is RunnerV2
        assert cpu_worker.CPUModelRunner is CPUModelRunner
    assert model_runner.CPUModelRunner is not RunnerV2


def test_the_runner_patch_is_still_needed() -> None:
    """Fails once `CPUWorker` asks a method for its runner: then the patch can go."""
    source = inspect.getsource(cpu_worker.CPUWorker.init_device)
    assert " CPUModelRunner(" in source
    assert "_make_model_runner" not in source
