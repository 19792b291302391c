# SPDX-License-Identifier: Apache-2.0
"""The plugin's flags on vLLM's own command line."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor

from adadecode_vllm import plugin
from adadecode_vllm.config import parse_config
from adadecode_vllm.engine.arguments import (
    ASYNC_SCHEDULER,
    CPU_WORKER,
    CUDA_WORKER,
    PROPOSER,
    SCHEDULER,
    SPECULATOR,
    enable_async_scheduling,
    prepared,
    requested_config,
)
from adadecode_vllm.errors import AdaDecodeError

# vLLM's own command line


@pytest.fixture(scope="module")
def cli() -> argparse.ArgumentParser:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def from_cli(cli: argparse.ArgumentParser, *argv: str) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(cli.parse_args(["--model", "m", *argv]))


def test_the_parser_has_the_flags(cli: argparse.ArgumentParser) -> None:
    text = cli.format_help()
    assert "--plugin {adadecode}" in text
    assert "--adadecode-heads DIR" in text
    assert "--adadecode-config JSON" in text
    options = [option for action in cli._actions for option in action.option_strings]
    for flag in ("--plugin", "--adadecode-heads", "--adadecode-config"):
        assert options.count(flag) == 1


def test_flags_become_additional_config(cli: argparse.ArgumentParser) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = from_cli(
        cli,
        *("--plugin", "adadecode", "--adadecode-heads", "H"),
        *("--adadecode-config", '{"threshold": 0.5}'),
        *("--additional-config", '{"other": 1}'),
    )
    assert type(args) is AsyncEngineArgs
    assert args.additional_config == {
        "other": 1,
        "adadecode": {"heads": "H", "threshold": 0.5},
    }
    config = requested_config(args)
    assert config == parse_config({"heads": "H", "threshold": 0.5})
    assert args.speculative_config is None


def test_flags_reach_processes_without_the_plugin(
    cli: argparse.ArgumentParser,
) -> None:
    """Several API servers read the same arguments, with vLLM's own method."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    argv = ["--plugin", "adadecode", "--adadecode-heads", "H"]
    parsed = cli.parse_args(argv)
    ours = AsyncEngineArgs.from_cli_args(parsed)
    again = AsyncEngineArgs.from_cli_args(parsed)
    original = AsyncEngineArgs.__mro__[1].from_cli_args.__func__.__wrapped__
    theirs = original(AsyncEngineArgs, parsed)
    for args in (ours, again, theirs):
        assert args.additional_config == {"adadecode": {"heads": "H"}}


def test_class_names_stand_in_the_arguments_only_for_a_while(
    cli: argparse.ArgumentParser,
) -> None:
    args = from_cli(cli, "--plugin", "adadecode", "--adadecode-heads", "H")
    before = dict(vars(args))

    def fail_within() -> None:
        options = {"heads": "H", "max_early_predictions": 3}
        with prepared(args, parse_config(options)):
            assert args.speculative_config == {
                "method": "custom_class",
                "model": PROPOSER,
                "num_speculative_tokens": 3,
            }
            assert args.scheduler_cls == SCHEDULER
            assert args.worker_cls == CPU_WORKER
            raise KeyError("vLLM failed")

    with pytest.raises(KeyError, match="vLLM failed"):
        fail_within()
    assert vars(args) == before


def test_dotted_flags_are_json_too(cli: argparse.ArgumentParser) -> None:
    args = from_cli(
        cli,
        *("--plugin", "adadecode", "--adadecode-heads", "H"),
        *("--adadecode-config.threshold", "0.5"),
    )
    assert args.additional_config["adadecode"] == {"heads": "H", "threshold": 0.5}


def test_without_flags_nothing_is_asked_for(cli: argparse.ArgumentParser) -> None:
    args = from_cli(cli, "--additional-config", '{"other": 1}')
    assert args.additional_config == {"other": 1}
    assert requested_config(args) is None


def test_off(cli: argparse.ArgumentParser) -> None:
    args = from_cli(
        cli,
        *("--plugin", "adadecode", "--adadecode-heads", "H"),
        *("--adadecode-config", '{"enabled": false}'),
    )
    assert requested_config(args) is None


def test_off_without_heads(cli: argparse.ArgumentParser) -> None:
    """As if the plugin were not installed: which heads is of no interest."""
    switched_off = ("--adadecode-config", '{"enabled": false}')
    assert requested_config(from_cli(cli, "--plugin", "adadecode", *switched_off)) is (
        None
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adadecode-heads", "H"], "--adadecode-heads: it has no effect without"),
        (
            ["--plugin", "adadecode", "--adadecode-heads", ""],
            "--adadecode-heads: '' names no heads. Give their directory",
        ),
        (
            ["--plugin", "adadecode", "--adadecode-config", "{"],
            "--adadecode-config: '{' is not JSON",
        ),
        (
            [
                *("--plugin", "adadecode", "--adadecode-heads", "A"),
                *("--additional-config", '{"adadecode": {"heads": "B"}}'),
            ],
            "--adadecode-config: heads = 'A' contradicts 'B' in --additional-config",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(
    cli: argparse.ArgumentParser,
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        from_cli(cli, *argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"vllm: error: {message}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{}", "--adadecode-heads: no exit heads given"),
        ('{"heads": "H", "threshold": 3}', "--adadecode-config: threshold = 3 is"),
    ],
)
def test_wrong_options_end_with_a_sentence(
    cli: argparse.ArgumentParser,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = from_cli(cli, "--plugin", "adadecode", "--adadecode-config", options)
    with pytest.raises(AdaDecodeError, match=re.escape(message)):
        args.create_engine_config()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vllm", "serve"])
    with pytest.raises(SystemExit) as caught:
        args.create_engine_config()
    assert caught.value.code == 2
    assert f"vllm: error: {message}" in capsys.readouterr().err


def test_an_unknown_plugin(
    cli: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        from_cli(cli, "--plugin", "medusa")
    assert caught.value.code == 2
    assert "argument --plugin: invalid choice: 'medusa'" in capsys.readouterr().err


def test_class_paths_import() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert resolve_obj_by_qualname(PROPOSER).__name__ == "AdaDecodeProposer"
    assert resolve_obj_by_qualname(SCHEDULER).__name__ == "AdaDecodeScheduler"
    assert (
        resolve_obj_by_qualname(ASYNC_SCHEDULER).__name__ == "AdaDecodeAsyncScheduler"
    )
    assert resolve_obj_by_qualname(SPECULATOR).__name__ == "AdaDecodeSpeculator"
    # The CUDA worker's module must not be imported beside vLLM's CPU worker.
    module, name = CUDA_WORKER.rsplit(".", 1)
    source = Path(str(find_spec(module).origin)).read_text()
    assert f"class {name}(" in source


def test_cuda_engines_get_model_runner_v2(
    cli: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    args = from_cli(cli, "--plugin", "adadecode", "--adadecode-heads", "H")
    # vLLM would refuse True; `enable_async_scheduling` switches it on afterwards.
    for asked, prepares in ((True, None), (None, None), (False, False)):
        args.async_scheduling = asked
        with prepared(args, parse_config({"heads": "H"})):
            assert args.speculative_config["model"] == SPECULATOR
            assert args.worker_cls == CUDA_WORKER
            assert args.async_scheduling is prepares
        assert args.async_scheduling is asked


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize(
    ("backend", "able"), [("uni", True), ("mp", True), ("ray", True), (Executor, False)]
)
def test_model_runner_v2_schedules_asynchronously(
    asked: bool | None, backend: Any, able: bool
) -> None:
    """Where the executor can, unless the user switched it off."""
    config: Any = SimpleNamespace(
        use_v2_model_runner=True,
        parallel_config=SimpleNamespace(
            distributed_executor_backend=backend, world_size=1
        ),
        scheduler_config=SimpleNamespace(async_scheduling=False, scheduler_cls="S"),
    )
    enable_async_scheduling(config, asked)
    enabled = able and asked is not False
    assert config.scheduler_config.async_scheduling is enabled
    assert config.scheduler_config.scheduler_cls == (
        ASYNC_SCHEDULER if enabled else "S"
    )


def test_model_runner_v1_does_not_schedule_asynchronously() -> None:
    scheduler = SimpleNamespace(async_scheduling=False)
    config: Any = SimpleNamespace(use_v2_model_runner=False, scheduler_config=scheduler)
    enable_async_scheduling(config, None)
    assert scheduler.async_scheduling is False
