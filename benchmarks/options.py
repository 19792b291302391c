# SPDX-License-Identifier: Apache-2.0
"""Command-line options that the benchmarks share.

Engine arguments are vLLM's own, with the plugin's flags among them; the others are
named as in `vllm bench throughput` where they mean the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.variants import VARIANTS, EngineSettings
from benchmarks.workloads import WORKLOADS, Workload, load_workload

# Set for each variant, or by an option of the benchmarks.
_OURS = {"model", "dtype", "additional_config", "kv_cache_memory_bytes"}
# What would come of less than one.
_LEAST_ONE = {
    "repeats": "nothing would be measured",
    "rounds": "no prompt would be sent",
    "start_together": "no engine would start",
    "side_by_side": "no engine would be loaded",
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the shared options and all engine arguments of vLLM.

    Args:
        description: First lines of ``--help``.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    group = parser.add_argument_group("Benchmark")
    group.add_argument(
        "--dataset-name",
        default="problems",
        choices=sorted(WORKLOADS),
        help="; ".join(f"{name}: {text}" for name, text in WORKLOADS.items()),
    )
    group.add_argument("--dataset-path", type=Path, help="Published files, or your own")
    group.add_argument("--num-prompts", type=int, help="Default: the data set's own")
    group.add_argument("--output-len", type=int, help="Most new tokens of a request")
    group.add_argument("--repeats", type=int, default=3, help="Repeats of all variants")
    group.add_argument(
        "--batch-sizes", default="1", help="Requests at a time, comma-separated"
    )
    group.add_argument(
        "--rounds",
        type=int,
        help="Prompts of a run, as a multiple of the requests at a time; default: all "
        "prompts at every batch size",
    )
    group.add_argument(
        "--start-together",
        type=int,
        default=1,
        help="Engines to start at a time; more where there are cores and memory for it",
    )
    group.add_argument("--draft-model", help="Directory, for the variant draft-model")
    group.add_argument(
        "--kv-cache-gib", type=float, default=1.0, help="KV cache of each engine"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="Generate all tokens of each request"
    )
    group.add_argument(
        "--side-by-side",
        type=int,
        help="Most variants to load at a time beside plain vLLM; default: all",
    )
    group.add_argument(
        "--output-json", type=Path, help="Result file; written after every repeat"
    )
    EngineArgs.add_cli_args(parser)
    # Each benchmark says itself which variants use the plugin.
    parser.set_defaults(plugin="adadecode")
    return parser


def add_variants_option(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--variants``."""
    parser.add_argument(
        "--variants",
        default=default,
        help="Comma-separated; "
        + "; ".join(f"{name}: {text}" for name, text in VARIANTS.items()),
    )


def settings_from(args: argparse.Namespace) -> EngineSettings:
    """What all variants have in common.

    Args:
        args: Parsed arguments.

    Raises:
        AdaDecodeError: If an option is wrong.
    """
    from vllm.engine.arg_utils import EngineArgs

    from adadecode_vllm.config import parse_config
    from adadecode_vllm.engine.arguments import options_from_flags

    for name, reason in _LEAST_ONE.items():
        number = getattr(args, name)
        if number is not None and number < 1:
            flag = name.replace("_", "-")
            raise AdaDecodeError(f"--{flag} {number}: {reason}. Give at least 1.")
    options = options_from_flags(args) or {}
    if args.additional_config:
        raise AdaDecodeError(
            "--additional-config: it is written for each variant by the benchmark. "
            "Give --adadecode-heads and --adadecode-config."
        )
    config = parse_config(options)
    given = EngineArgs.from_cli_args(args)
    # The parser's defaults differ from the dataclass's here and there. With the model
    # that is asked for: offline vLLM looks for its default model, in vain.
    plain = make_parser("").parse_args(["--model", args.model])
    defaults = EngineArgs.from_cli_args(plain)
    arguments = {
        name: _plain(name, getattr(given, name))
        for name in (field.name for field in dataclasses.fields(EngineArgs))
        if name not in _OURS and getattr(given, name) != getattr(defaults, name)
    }
    own = {"heads", "threshold", "max_early_predictions"}
    return EngineSettings(
        model=args.model,
        heads=config.heads,
        dtype=args.dtype,
        draft_model=args.draft_model,
        threshold=options.get("threshold"),
        max_early_predictions=config.max_early_predictions,
        adadecode={name: options[name] for name in options if name not in own},
        arguments=arguments,
        kv_cache_gib=args.kv_cache_gib,
    )


def batch_sizes_from(args: argparse.Namespace) -> list[int]:
    """Read ``--batch-sizes``.

    Raises:
        AdaDecodeError: If one is no positive number.
    """
    return numbers("--batch-sizes", args.batch_sizes, int, lambda size: size > 0)


def numbers(
    flag: str, text: str, kind: Callable[[str], Any], valid: Callable[[Any], bool]
) -> list[Any]:
    """Read a comma-separated list of numbers.

    Raises:
        AdaDecodeError: If one is none, or not valid.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(valid, values)):
        raise AdaDecodeError(
            f"{flag}: {text!r} is not a list of valid numbers. Write for example 1,2,4."
        )
    return values


def workload_from(
    args: argparse.Namespace, settings: EngineSettings, least: int = 1
) -> Workload:
    """Load the prompts.

    Args:
        args: Parsed arguments.
        settings: The comparison's settings.
        least: Largest batch size; fewer prompts could not fill it.

    Raises:
        AdaDecodeError: If they cannot be loaded.
    """
    workload = load_workload(
        args.dataset_name,
        settings.model,
        path=args.dataset_path,
        count=args.num_prompts,
        seed=args.seed or 0,
        output_tokens=args.output_len,
        max_model_len=settings.arguments.get("max_model_len"),
    )
    if len(workload.prompts) < least:
        raise AdaDecodeError(
            f"--num-prompts: {len(workload.prompts)} prompts do not fill a batch of "
            f"{least}. Ask for at least {least}, or for a smaller --batch-sizes."
        )
    return workload


def run_command(command: Callable[[], object]) -> None:
    """Run a command; a user's mistake ends with a sentence and exit code 2.

    Args:
        command: What to run.

    Raises:
        SystemExit: After a mistake, or where plain vLLM failed.
    """
    from benchmarks.process import VariantError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        command()
    except AdaDecodeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except VariantError as error:
        sys.stderr.write(f"error: plain vLLM failed: {error}\n")
        raise SystemExit(1) from None


def print_results(results: Mapping[str, Any], table: str) -> None:
    """Print what was measured; a comparison that lacks a variant is no success.

    Args:
        results: Content of the result file.
        table: What to print.

    Raises:
        SystemExit: 1, where a variant failed. One that is skipped says why it cannot
            run, which is no failure.
    """
    sys.stdout.write(table + "\n")
    sys.stdout.flush()
    failed = [
        variant
        for variant, entry in results["variants"].items()
        if entry["status"] == "failed"
    ]
    if failed:
        sys.stderr.write(
            f"error: --variants: {', '.join(failed)} failed, for the reason below the "
            "table.\n"
        )
        raise SystemExit(1)


def say(line: str) -> None:
    """Print a line about the progress, beside the table on standard output."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def _plain(name: str, value: Any) -> Any:
    """A value that can cross to the variant's process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    try:
        json.dumps(value)
    except TypeError:
        raise AdaDecodeError(
            f"--{name.replace('_', '-')}: {value!r} cannot be handed to the engines of "
            "a comparison. Leave it at its default."
        ) from None
    return value
