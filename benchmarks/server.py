# SPDX-License-Identifier: Apache-2.0
"""One way of decoding, served by `vllm serve`."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any

from adadecode_vllm.config import CONFIG_KEY
from adadecode_vllm.engine.arguments import PLUGIN_NAME
from adadecode_vllm.errors import AdaDecodeError
from benchmarks.process import VariantError, log_reason
from benchmarks.variants import BASELINE, EngineSettings, Variant, llm_arguments

HOST = "127.0.0.1"
_START_UP_SECONDS = 1800  # a large model loads and compiles for minutes
_END_SECONDS = 60


class Server:
    """A running server; a context manager that ends it.

    Attributes:
        variant: The variant.
        url: Where it answers.
        flags: Its flags, without host and port.
        start_up_seconds: How long it took to start.
    """

    def __init__(self, variant: Variant, settings: EngineSettings) -> None:
        """Start the server and wait until it answers.

        Args:
            variant: A variant with ``uses_vllm``.
            settings: What all variants of the comparison have in common.

        Raises:
            VariantError: If it does not start; with the end of its log.
            AdaDecodeError: If an engine argument cannot be given as a flag.
        """
        arguments = llm_arguments(variant, settings)
        self.variant = variant
        self.flags = engine_flags(arguments)
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        if variant.kind == BASELINE:
            environment["VLLM_PLUGINS"] = ""
        remembers = _remembers_answers(arguments)
        if remembers:
            environment["VLLM_SERVER_DEV_MODE"] = "1"  # has the route for the worker
        self._port = _free_port()
        self.url = f"http://{HOST}:{self._port}"
        self._log = tempfile.TemporaryFile(  # noqa: SIM115 (closed in _end)
            "w+", encoding="utf-8", errors="replace"
        )
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"),
                *(arguments["model"], *self.flags),
                *(f"--host={HOST}", f"--port={self._port}"),
                "--disable-uvicorn-access-log",
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            # A group of its own: no Ctrl-C from the terminal before the measurement
            # has ended in order, and no engine process outlives its server.
            start_new_session=True,
        )
        try:
            self._wait()
            if remembers:
                self._forget_answers()
        except BaseException:
            self._end()
            raise
        self.start_up_seconds = time.perf_counter() - started

    def check(self) -> None:
        """Make sure that the server still runs.

        Raises:
            VariantError: If it has ended; with the end of its log.
        """
        if self._process.poll() is not None:
            self._log.seek(0)
            raise VariantError(f"the server ended: {log_reason(self._log.read())}")

    def __enter__(self) -> Server:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the server."""
        self._end()

    def _wait(self) -> None:
        end = time.monotonic() + _START_UP_SECONDS
        while time.monotonic() < end:
            self.check()
            if self._answers():
                return
            time.sleep(0.5)
        raise VariantError(
            f"the server did not answer within {_START_UP_SECONDS} seconds"
        )

    def _answers(self) -> bool:
        return self._ask("GET", "/health") == http.HTTPStatus.OK

    def _forget_answers(self) -> None:
        """As vLLM's suffix decoding here: every repeat asks for the same texts."""
        method = json.dumps({"method": "adadecode_forget_answers"})
        status = self._ask("POST", "/collective_rpc", method)
        if status != http.HTTPStatus.OK:
            raise VariantError(
                f"the server does not forget answers: it says {status or 'nothing'}"
            )

    def _ask(self, method: str, path: str, body: str | None = None) -> int | None:
        """The status of the server's answer; None without one."""
        # Not urllib, which would ask a proxy of the environment.
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            connection.request(method, path, body)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also what a crashed server left behind.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()


def engine_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Write arguments of ``vllm.LLM`` as flags of ``vllm serve``.

    Args:
        arguments: From :func:`benchmarks.variants.llm_arguments`. The model is left
            out: it is no flag.

    Returns:
        The flags; AdaDecode's options are given through its own.

    Raises:
        AdaDecodeError: If there is no flag for an argument.
    """
    actions = _engine_actions()
    flags: list[str] = []
    for name, value in arguments.items():
        if name == "model":
            continue
        if name not in actions:
            raise AdaDecodeError(
                f"{name}: vllm serve has no such flag, so it cannot be the same for "
                "all servers. Leave it at its default."
            )
        if name == "additional_config":
            value = dict(value)
            flags += _adadecode_flags(value.pop(CONFIG_KEY, None))
            if not value:
                continue
        flags += _flag(actions[name], value)
    return flags


@cache
def _engine_actions() -> dict[str, argparse.Action]:
    """By engine argument, the option of vLLM's parser."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return {action.dest: action for action in parser._actions if action.option_strings}


def _flag(action: argparse.Action, value: Any) -> list[str]:
    name = next(name for name in action.option_strings if name.startswith("--"))
    if isinstance(action, argparse.BooleanOptionalAction):
        return [name if value else f"--no-{name.removeprefix('--')}"]
    if action.nargs == 0:
        return [name] if value else []
    if action.nargs == "+" and isinstance(value, list | tuple):
        return [name, *map(_text, value)]
    # With an equals sign a value may begin with a dash.
    return [f"{name}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def _remembers_answers(arguments: Mapping[str, Any]) -> bool:
    """Whether AdaDecode would look up in earlier answers."""
    options = (arguments.get("additional_config") or {}).get(CONFIG_KEY, {})
    return options.get("lookup") == "suffix"


def _adadecode_flags(options: Mapping[str, Any] | None) -> list[str]:
    if options is None:
        return []
    others = {name: value for name, value in options.items() if name != "heads"}
    flags = [f"--plugin={PLUGIN_NAME}"]
    if "heads" in options:
        flags.append(f"--adadecode-heads={options['heads']}")
    if others:
        flags.append(f"--adadecode-config={json.dumps(others)}")
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
