# SPDX-License-Identifier: Apache-2.0
"""``EngineArgs`` learns the plugin's flags and ``additional_config["adadecode"]``.

Symptom without it: vLLM has no way for a plugin to add command-line flags or to turn an
entry of ``additional_config`` into a worker, a scheduler and a speculative method; a
user would have to write all three class paths by hand.

Upstream: ``EngineArgs.add_cli_args``, ``from_cli_args`` and ``create_engine_config`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/engine/arg_utils.py

Can go when vLLM offers plugins a hook to extend the parser and the engine arguments.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adadecode_vllm.compat import SUPPORTED_NAMES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap three methods of ``EngineArgs``; a second call does nothing.

    An ``EngineArgs`` that does not look as expected is left alone with a warning:
    this runs in every vLLM process, also in those that never ask for the plugin.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logger import init_logger

    logger = init_logger("vllm.adadecode")

    if hasattr(EngineArgs.create_engine_config, _MARK):
        return
    for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
        if name not in vars(EngineArgs):
            logger.warning(
                "adadecode: vLLM's EngineArgs has no %s. The plugin was written for "
                "vLLM %s and stays off; install one of them to use it.",
                name,
                SUPPORTED_NAMES,
            )
            return
    EngineArgs.add_cli_args = staticmethod(_wrap_add(EngineArgs.add_cli_args))
    EngineArgs.from_cli_args = classmethod(  # type: ignore[assignment]
        _wrap_from(vars(EngineArgs)["from_cli_args"].__func__)
    )
    EngineArgs.create_engine_config = _wrap_create(EngineArgs.create_engine_config)
    logger.debug("EngineArgs extended by the adadecode plugin")


def _wrap_add(original: Any) -> Any:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        from adadecode_vllm.engine.arguments import add_cli_flags

        parser = original(parser)
        add_cli_flags(parser)
        return parser

    return add_cli_args


def _wrap_from(original: Any) -> Any:
    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        from adadecode_vllm.engine.arguments import (
            merge_into_additional_config,
            options_from_flags,
        )
        from adadecode_vllm.errors import AdaDecodeError

        engine_args = original(cls, args)
        try:
            options = options_from_flags(args)
            if options is not None:
                engine_args.additional_config = merge_into_additional_config(
                    engine_args.additional_config, options
                )
                # Several API servers are started with the same `args`. They load their
                # plugins while they make an `EngineArgs`, too late for this method.
                args.additional_config = engine_args.additional_config
        except AdaDecodeError as error:
            _exit(error)
        return engine_args

    return from_cli_args


def _wrap_create(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        from adadecode_vllm.engine import arguments
        from adadecode_vllm.errors import AdaDecodeError

        heads = None
        try:
            if arguments.lacks_heads(self):
                from adadecode_vllm.engine.heads_as_model import find_model_of_heads

                heads = find_model_of_heads(self)
            if arguments.lacks_heads(self):
                from adadecode_vllm.engine.registered_heads import find_heads_of_model

                heads = find_heads_of_model(self)
            config = arguments.requested_config(self)
            if config is None:
                return original(self, *args, **kwargs)
            # Heavy imports only for engines that use the plugin.
            from adadecode_vllm import compat
            from adadecode_vllm.engine import refusals
            from adadecode_vllm.patches import request_options, stat_loggers

            # This process, one of several API servers perhaps, takes requests in and
            # shows metrics.
            usage = kwargs.get("usage_context", args[0] if args else None)
            request_options.install(streams=usage != "LLM_CLASS")
            stat_loggers.install()
            compat.check_vllm_version()
            refusals.check_arguments(self)
            with arguments.prepared(self, config):
                vllm_config = original(self, *args, **kwargs)
            refusals.check_engine(vllm_config, config, heads)
            arguments.enable_async_scheduling(vllm_config, self.async_scheduling)
        except AdaDecodeError as error:
            # In the `vllm` command a user's mistake ends with a sentence.
            if Path(sys.argv[0]).name == "vllm":
                _exit(error)
            raise
        return vllm_config

    setattr(create_engine_config, _MARK, original)
    return create_engine_config


def _exit(error: Exception) -> NoReturn:
    """End a command the way its own parser ends on a wrong flag."""
    sys.stderr.write(f"vllm: error: {error}\n")
    raise SystemExit(2) from None
