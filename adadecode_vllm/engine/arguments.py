# SPDX-License-Identifier: Apache-2.0
"""From command-line flags and ``additional_config`` to vLLM's engine arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adadecode_vllm.config import (
    CONFIG_KEY,
    AdaDecodeConfig,
    enabled_config,
    format_text,
    format_value,
)
from adadecode_vllm.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

PLUGIN_NAME = "adadecode"
# Named, not imported: vLLM imports them in the processes that need them.
PROPOSER = "adadecode_vllm.engine.proposer.AdaDecodeProposer"
SPECULATOR = "adadecode_vllm.engine.speculator.AdaDecodeSpeculator"
SCHEDULER = "adadecode_vllm.engine.scheduler.AdaDecodeScheduler"
ASYNC_SCHEDULER = "adadecode_vllm.engine.scheduler.AdaDecodeAsyncScheduler"
CPU_WORKER = "adadecode_vllm.engine.worker_cpu.AdaDecodeCPUWorker"
CUDA_WORKER = "adadecode_vllm.engine.worker_cuda.AdaDecodeCUDAWorker"


def add_cli_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's flags to a parser that takes engine arguments.

    Args:
        parser: The parser.
    """
    group = parser.add_argument_group(
        title="AdaDecode", description="Early predictions by exit heads."
    )
    group.add_argument(
        "--plugin",
        choices=[PLUGIN_NAME],
        default=None,
        help="Switch an installed plugin on for this engine.",
    )
    group.add_argument(
        "--adadecode-heads",
        default=None,
        metavar="DIR",
        help=str(AdaDecodeConfig.model_fields["heads"].description),
    )
    group.add_argument(
        "--adadecode-config",
        default=None,
        metavar="JSON",
        help="Further options as a JSON object: "
        + ", ".join(name for name in AdaDecodeConfig.model_fields if name != "heads")
        + ".",
    )


def options_from_flags(args: argparse.Namespace) -> dict[str, Any] | None:
    """Read the plugin's flags.

    Args:
        args: Parsed arguments; the flags may be absent.

    Returns:
        Options for ``additional_config["adadecode"]``, not validated yet, or None
        where the plugin was not asked for.

    Raises:
        AdaDecodeError: If the flags contradict each other, or name nothing.
    """
    heads = getattr(args, "adadecode_heads", None)
    text = getattr(args, "adadecode_config", None)
    if getattr(args, "plugin", None) is None:
        for flag, value in (("--adadecode-heads", heads), ("--adadecode-config", text)):
            if value is not None:
                raise AdaDecodeError(
                    f"{flag}: it has no effect without the plugin. Add "
                    f"--plugin {PLUGIN_NAME}, or remove {flag}."
                )
        return None
    options = _parse_json(text) if text is not None else {}
    if heads is not None:
        if not heads:
            raise AdaDecodeError(
                "--adadecode-heads: '' names no heads. Give their directory or their "
                "name on the Hub."
            )
        if options.get("heads", heads) != heads:
            raise AdaDecodeError(
                f"--adadecode-heads: {format_value(heads)} contradicts heads = "
                f"{format_value(options['heads'])} in --adadecode-config. Give it once."
            )
        options["heads"] = heads
    return options


def merge_into_additional_config(
    additional_config: dict[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Put options from flags beside the user's own ``--additional-config``.

    Args:
        additional_config: The user's dictionary.
        options: From :func:`options_from_flags`.

    Returns:
        A new dictionary.

    Raises:
        AdaDecodeError: If both give different values for an option.
    """
    merged = dict(additional_config or {})
    present = merged.get(CONFIG_KEY, {})
    if not isinstance(present, dict):
        raise AdaDecodeError(
            f"--additional-config: {CONFIG_KEY} = {format_value(present)} is not an "
            "object with options. Give one, or remove it."
        )
    for name in present.keys() & options.keys():
        if present[name] != options[name]:
            given, other = format_value(options[name]), format_value(present[name])
            raise AdaDecodeError(
                f"--adadecode-config: {format_text(name)} = {given} contradicts "
                f"{other} in --additional-config. Give it once."
            )
    merged[CONFIG_KEY] = {**present, **options}
    return merged


def lacks_heads(args: EngineArgs) -> bool:
    """Whether AdaDecode is asked for and no heads are named."""
    options = _given_options(args)
    return isinstance(options, dict) and "heads" not in options


def requested_config(args: EngineArgs) -> AdaDecodeConfig | None:
    """The configuration that engine arguments ask for.

    Args:
        args: vLLM's engine arguments.

    Returns:
        The validated configuration, or None if AdaDecode is not asked for or off.

    Raises:
        AdaDecodeError: If an option is wrong.
    """
    return enabled_config(_given_options(args))


def _given_options(args: EngineArgs) -> Any:
    additional = args.additional_config
    # vLLM also takes an object of a platform's own there.
    return additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None


@contextmanager
def prepared(args: EngineArgs, config: AdaDecodeConfig) -> Iterator[None]:
    """Name AdaDecode's worker, scheduler and proposer in engine arguments for a while.

    The user's own arguments come back afterwards, so that the same object can be used,
    changed and used again.

    Args:
        args: vLLM's engine arguments. Conflicting ones were refused before
            (:func:`adadecode_vllm.engine.refusals.check_arguments`).
        config: The configuration.
    """
    from vllm.platforms import current_platform

    v2 = expects_v2()
    ours: dict[str, Any] = {
        "speculative_config": {
            "method": "custom_class",
            "model": SPECULATOR if v2 else PROPOSER,
            "num_speculative_tokens": config.max_early_predictions,
        },
        "scheduler_cls": SCHEDULER,
        "worker_cls": CPU_WORKER if current_platform.is_cpu() else CUDA_WORKER,
    }
    if v2 and args.async_scheduling is not False:
        # vLLM lets no custom_class method ask for it; see `enable_async_scheduling`.
        ours["async_scheduling"] = None
    theirs = {name: getattr(args, name) for name in ours}
    for name, value in ours.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(args, name, value)


def expects_v2() -> bool:
    """Whether an engine of this process would run Model Runner V2.

    vLLM chooses it on CUDA, where nothing else is supported here, and elsewhere where
    the environment asks for it.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    return current_platform.is_cuda() or bool(envs.VLLM_USE_V2_MODEL_RUNNER)


def enable_async_scheduling(vllm_config: VllmConfig, requested: bool | None) -> None:
    """Let Model Runner V2 schedule a step while the last one still runs.

    That is vLLM's default. Version 0.32 switches it off for any method that it does not
    know, since drafts must then be counted in the worker; ours are. In every version
    the scheduler has to be the one for it.

    Args:
        vllm_config: The engine's configuration, changed in place.
        requested: The user's ``async_scheduling``; False leaves it off.
    """
    from vllm.v1.executor.abstract import Executor

    if requested is False or not vllm_config.use_v2_model_runner:
        return
    if Executor.get_class(vllm_config).supports_async_scheduling():
        vllm_config.scheduler_config.async_scheduling = True
        vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER


def _parse_json(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Not only of syntax: integers of thousands of digits, very deep nesting.
        raise AdaDecodeError(
            f"--adadecode-config: {format_value(text)} is not JSON ({error}). Write "
            'for example \'{"threshold": 0.8, "max_early_predictions": 4}\'.'
        ) from None
    if not isinstance(options, dict):
        raise AdaDecodeError(
            f"--adadecode-config: expected a JSON object, got {format_text(text)}. "
            "Write for example '{\"threshold\": 0.8}'."
        )
    return options
